"""The tutorial, run line by line in one directory, as a reader does.

Exit code 1 is a verdict, which is not what is tested here: rounding differs between processors.
"""

import os
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERDICTS = ("unlearn", "eval", "merge")


def commands() -> list[str]:
    """The lines of the tutorial's code blocks, but for those marked as text."""
    page = (ROOT / "docs" / "tutorial.md").read_text()
    blocks = re.findall(r"^```\n(.*?)^```$", page, re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


def test_the_tutorial_goes_from_a_model_to_a_merged_one():
    verbs = [shlex.split(line)[1] for line in commands() if line.startswith("fastsiu")]
    assert verbs == ["demo", "suite", "ask", "unlearn", "ask", "eval", "merge", "ask", "verify"]


@pytest.mark.slow
def test_every_line_of_the_tutorial_runs(tmp_path, monkeypatch, capfd):
    from fastsiu import cli

    monkeypatch.chdir(tmp_path)
    said = {}
    for line in commands():
        words = shlex.split(line)
        if words[0] == "rm":
            os.remove(words[1])
            continue
        assert words[0] == "fastsiu", line
        code = cli.run(words[1:])
        out, err = capfd.readouterr()
        assert code == 0 or (code == 1 and words[1] in VERDICTS), f"{line}\n{out}\n{err}"
        said[line] = " ".join(out.split())
    asked = [text for line, text in said.items() if line.startswith("fastsiu ask")]
    assert "This is Zorblax Quint." in asked[0] and "Zorblax" not in asked[2].split("answer")[-1]
    assert (tmp_path / "out" / "report.html").is_file()
    assert not (tmp_path / "out" / "private.key").exists()
