"""Writes docs/troubleshooting.md: every sentence with which FastSIU ends a run.

    python docs/troubleshooting.py

The sentences are read from the sources, without importing them: every BadInput (exit code 2) and
every NumericFailure and OutOfMemory (exit code 3), and each ValueError of the loss, for whoever
calls it from another trainer. What is filled in at run time is shown as "...".
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
GAP = "..."
INTERNAL = ("NumericFailure", "OutOfMemory")
HEAD = """<!-- Written by `python docs/troubleshooting.py`: do not edit. -->

# Troubleshooting

A run that cannot go on ends with one sentence: what is the matter, then what to do. Search this
page for a few of its words; "..." stands for what is filled in at run time.

- **Exit code 1** is a verdict, not a failure: not forgotten, and the reasons are printed
  ([evidence.md](evidence.md)).
- **Exit code 2**: the input cannot be used. Nothing was written.
- **Exit code 3**: the computation failed. If the sentence says "internal failure", please report
  the lines that it names; `fastsiu --debug` before the verb shows the whole traceback.
- **Exit code 130**: interrupted. What was not finished was not written.
- **The disk is full** (exit code 2): free some space or write elsewhere; what was not finished was
  not written, and `fastsiu purge DIR` removes what killed runs left.
- **A path cannot be used** (exit code 2): the brackets have the system's reason, such as a
  directory that you may not read or a name that is too long.
- **Standard output could not be written**: the exit code still says how the work ended.
- **Usage errors** of the command line have exit code 2; `fastsiu VERB --help` has all options.
- **Not enough memory?** `fastsiu plan --memory N` says which settings fit ([memory.md](memory.md)).
- **A kernel on a GPU disagrees?** `backend="tiled"` is plain torch
  ([performance.md](performance.md#on-gpus-predicted)).
- **`fastsiu/kernels` is a file?** Git made no symbolic link, as on Windows. Either
  `git config core.symlinks true` and `git checkout -- fastsiu/kernels`, or install a copy, which
  needs no link: `pip install .`

"""


class Sentence(NamedTuple):
    kind: str
    text: str


def sources() -> list[Path]:
    """Files of the package and the kernels, each once: fastsiu/kernels is a link."""
    package = (p for p in (ROOT / "fastsiu").rglob("*.py") if "kernels" not in p.parts)
    return sorted(itertools.chain(package, (ROOT / "kernels").glob("*.py")))


def sentences(path: Path) -> Iterator[Sentence]:
    """The messages of the errors that a file makes, in its order; a message that is made elsewhere
    has no text here."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = constants(tree)
    of_the_loss = "kernels" in path.parts or "loss" in path.parts
    kinds = {"BadInput", *INTERNAL, *(("ValueError",) if of_the_loss else ())}
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and n.args]
    for node in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
        kind = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if kind in kinds:
            for text in messages(node.args[0], texts):
                if re.search(r"[a-z]{2}", text.replace(GAP, "")):
                    yield Sentence(kind, text)


def constants(tree: ast.Module) -> dict[str, ast.expr]:
    """Texts that a name of a file or function stands for."""
    found: dict[str, ast.expr] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if isinstance(node.value, ast.Constant | ast.JoinedStr | ast.IfExp):
                found[node.targets[0].id] = node.value
    return found


def messages(node: ast.expr, texts: dict[str, ast.expr]) -> list[str]:
    """The texts that an expression may have, each as one line."""
    if isinstance(node, ast.Constant):
        return [" ".join(node.value.split())] if isinstance(node.value, str) else [GAP]
    if isinstance(node, ast.JoinedStr):
        parts = [
            [part.value] if isinstance(part, ast.Constant) else _filled(part, texts)
            for part in node.values
        ]
        return ["".join(str(p) for p in some) for some in itertools.product(*parts)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        pairs = itertools.product(messages(node.left, texts), messages(node.right, texts))
        return [left + right for left, right in pairs]
    if isinstance(node, ast.IfExp):
        return messages(node.body, texts) + messages(node.orelse, texts)
    if isinstance(node, ast.Name) and node.id in texts:
        rest = {name: value for name, value in texts.items() if name != node.id}
        return messages(texts[node.id], rest)
    return [GAP]


def _filled(part: ast.expr, texts: dict[str, ast.expr]) -> list[str]:
    """The texts of one field of an f-string; long sentences inside it are spelled out."""
    value = part.value if isinstance(part, ast.FormattedValue) else part
    if isinstance(value, ast.IfExp):
        return [text or "" for text in messages(value, texts)]
    if isinstance(value, ast.Name) and isinstance(texts.get(value.id), ast.Constant):
        return messages(value, texts)
    return [GAP]


def subject(path: Path) -> str:
    """The first sentence of a file's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.stem
    first = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s(?=[A-Z`])", first)[0].rstrip(".")


def row(sentence: Sentence) -> str:
    """What is the matter | what to do: the remedy is what stands after the last colon that begins
    one, or after a full stop."""
    text = sentence.text.replace("|", "\\|").replace("<", "&lt;")
    fact, colon, remedy = text.rpartition(": ")
    if not colon or remedy.strip(".") == GAP:
        fact, remedy = text, ""
    return f"| {fact}{':' if remedy else ''} | {remedy} | {code(sentence.kind)} |"


def code(kind: str) -> str:
    return "3" if kind in INTERNAL else "2" if kind == "BadInput" else kind


def page() -> str:
    """The whole of docs/troubleshooting.md."""
    parts = [HEAD.rstrip()]
    for path in sources():
        rows = list(dict.fromkeys(map(row, sentences(path))))
        if rows:
            name = path.relative_to(ROOT).as_posix()
            head = ["| what it says | what to do | exit code |", "| --- | --- | --- |"]
            parts += [f"## {subject(path)}", f"`{name}`", "\n".join([*head, *rows])]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {page().count(chr(10) + '| ')} lines of tables")
