"""Puts the newest figures into the documents' tables.

    python docs/tables.py            rewrites every table whose results are in benches/results
    python docs/tables.py --check    says which are out of date (exit code 1)

A table stands between `<!-- table: COMMAND -->` and `<!-- end of table -->`. Commands that print
results which are there already are run anew; a command that measures is left to whoever has the
time. An excerpt stands between `<!-- excerpt: NAME -->` and the same end: some rows and columns of
a table on another page (EXCERPTS), so that README says what that page says.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
END = "<!-- end of table -->"
BLOCK = re.compile(r"<!-- (table|excerpt): (.+?) -->\n(.*?)" + re.escape(END), re.S)


class Excerpt(NamedTuple):
    """page: where the table stands; command: which of its tables; rows: by their first cells;
    columns: a column's head there -> its head in the excerpt"""

    page: str
    command: str
    rows: tuple[str, ...]
    columns: dict[str, str]


EXCERPTS = {
    "comparison": Excerpt(
        "docs/comparison.md",
        "python benches/compare.py --table",
        ("siu", "ce", "vgid-context", "npo", "po"),
        {
            "method": "method",
            "name still given": "name still given",
            "others' names kept": "others' names kept",
            "look-alikes": "look-alikes kept",
            "facts": "facts kept",
            "front": "on the front",
        },
    ),
    "results": Excerpt(
        "docs/results.md",
        "python benches/attacks.py --table",
        ("siu", "four targets", "ce", "ga"),
        {
            "row": "method",
            "naming families": "gives the name, %",
            "two-hop": "tells its facts, %",
            "group": "names it in a group, %",
            "begun fact": "ends a begun fact, %",
            "others' names": "others' names lost, points",
            "look-alikes": "look-alikes lost, points",
        },
    ),
    "loss": Excerpt(
        "docs/performance.md",
        "python benches/loss.py --table",
        (
            "**fastsiu tiled**",
            "torch.compile, fp32 logits",
            "KL cache trick (torch's CE)",
            "Liger chunked JSD 0.8.5 (forms dW too)",
        ),
        {"": "CE + KL", "time": "time", "memory": "memory", "0.001": "error of the gradient"},
    ),
}


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


def repeatable(command: str) -> bool:
    """Whether it prints results that are there, within seconds."""
    return "--table" in command or "roofline.py" in command


def printed(command: str) -> str:
    """What a command prints. Raises CalledProcessError where it fails."""
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip("\n")


def tables_of(text: str) -> list[list[list[str]]]:
    """All tables of a text: tables, lines, cells; the lines of dashes are left out."""
    groups = re.findall(r"(?:^\|.*\|\n)+", text, re.M)
    tables = [
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in group.splitlines()]
        for group in groups
    ]
    return [[line for line in table if {*"".join(line)} != {"-"}] for table in tables]


def excerpt(name: str) -> str:
    """Some rows of a command's tables; where two tables have the same rows, side by side. Raises
    KeyError for a row or a column that is not there."""
    wanted = EXCERPTS[name]
    page = (ROOT / wanted.page).read_text(encoding="utf-8")
    block = {what: text for _, what, text in BLOCK.findall(page)}[wanted.command]
    cells: dict[str, dict[str, str]] = {}
    for head, *lines in tables_of(block):
        for line in lines:
            cells.setdefault(line[0], {}).update(zip(head, line, strict=True))
    lines = [[cells[row][column] for column in wanted.columns] for row in wanted.rows]
    heads = [*wanted.columns.values()]
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *lines])


def renewed(text: str, kind: str) -> str:
    """The page with its tables (or excerpts) printed anew."""

    def new(block: re.Match[str]) -> str:
        found, what, old = block.groups()
        if found != kind or (kind == "table" and not repeatable(what)):
            return block[0]
        lines = excerpt(what) if kind == "excerpt" else printed(what)
        return f"<!-- {kind}: {what} -->\n{lines}\n{END}"

    return BLOCK.sub(new, text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if old")
    check = parser.parse_args().check
    old = []
    for kind in ("table", "excerpt"):
        for page in documents():
            before = page.read_text(encoding="utf-8")
            after = renewed(before, kind)
            if after != before:
                old.append(f"{page.relative_to(ROOT)}: {kind}s")
                if not check:
                    page.write_text(after, encoding="utf-8")
    for line in old:
        print(line, "are out of date" if check else "renewed")
    return int(check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
