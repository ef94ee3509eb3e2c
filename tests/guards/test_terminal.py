"""Control characters never reach the terminal, JSON stays JSON, and a broken stream changes no exit
code."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from fastsiu.guards import terminal
from fastsiu.guards.terminal import Stream, Terminal, as_json, json_safe, visible
from fastsiu.show.progress import Progress
from fastsiu.show.samples import explanation, pieces

ROOT = Path(__file__).resolve().parents[2]
CONTROLS = [chr(c) for c in (*range(9), *range(11, 32), *range(127, 160))]
BIDI = [chr(c) for c in (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))]
OTHERS = ["\u2028", "\u2029", "\ufeff", "\ufff9", "\ud83d", "\udc80", "\U000e0041"]
HARMLESS = "Zoë\t김철수\n👩\u200d👩 café \u0301 ل"


@pytest.mark.parametrize("char", [*CONTROLS, *BIDI, *OTHERS])
def test_every_control_character_is_shown_as_its_escape(char):
    shown = visible(f"a{char}b")
    assert shown.startswith("a\\") and shown.endswith("b") and char not in shown
    assert visible(shown) == shown
    value = {char: [f"a{char}"]}
    text = as_json(value)
    assert char not in text and json.loads(text) == value


def test_what_is_harmless_stays():
    assert visible(HARMLESS) == HARMLESS
    assert json.loads(as_json(HARMLESS)) == HARMLESS and "김철수" in as_json(HARMLESS)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_json_is_the_same_value_in_any_encoding(encoding):
    value = {"é": [HARMLESS, "\x1b]0;x\x07", "\U0001f600", 1.5, None]}
    written = as_json(value, encoding).encode(encoding).decode(encoding)
    assert json.loads(written) == value
    lines = json_safe('{"a": "é\u202e"}\n{"b": "😀"}\n', encoding).encode(encoding).decode(encoding)
    assert [json.loads(line) for line in lines.splitlines()] == [{"a": "é\u202e"}, {"b": "😀"}]


@pytest.mark.parametrize(
    "bad", ["\x1b[31mred", "\x9b31m", "\u202edlrow", "x\rover", "\x07", "\x1b]8;;http://x\x07a"]
)
@pytest.mark.parametrize("live", [False, True])
def test_a_console_obeys_nothing_that_it_shows(bad, live):
    screen = io.StringIO()
    console = Terminal(file=screen, width=200, force_terminal=live, color_system=None)
    console.print(f"note {bad}", soft_wrap=True)
    console.print(Text(f"text {bad}"))
    table = Table("head", title=f"title {bad}")
    table.add_row(f"cell {bad}")
    table.add_row(Text(f"cell {bad}"))
    console.print(table)
    said = screen.getvalue()
    assert not any(char in said for char in (*CONTROLS, *BIDI))
    assert said.count(visible(bad)) >= 3  # rich takes some out of a Text by itself


def test_a_live_bar_shows_no_control_of_its_text_and_keeps_its_own():
    screen = io.StringIO()
    console = Terminal(file=screen, width=200, force_terminal=True)
    with Progress(console, hidden=False) as bar:
        bar.listener.stage("about \x1b[2J\u202e\r")
        bar.listener.note("note \x1b[2J\u202e\r")
    said = screen.getvalue()
    assert "about \\x1b[2J\\u202e\\x0d" in said and "note \\x1b[2J\\u202e\\x0d" in said
    assert "\x1b[2J" not in said and "\u202e" not in said and "\x1b[" in said


class Broken(io.StringIO):
    """Takes `room` characters, then fails."""

    def __init__(self, room: int, error: Exception) -> None:
        super().__init__()
        self.room, self.error = room, error

    def write(self, text: str) -> int:
        self.room -= len(text)
        if self.room < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space"), ValueError("I/O on closed file")],
)
def test_a_failing_stream_is_noted_once_and_never_raises(error):
    beneath = Broken(3, error)
    stream = Stream(beneath)
    for _ in range(3):
        assert stream.write("ab") == 2
    stream.flush()
    assert stream.problem and beneath.getvalue() == "ab" and not stream.isatty()


def test_what_libraries_write_past_the_console_is_escaped_but_for_bars_and_colours():
    beneath = io.StringIO()
    stream = Stream(beneath)
    bar = "\r\x1b[2K\x1b[1A\x1b[32m 50%\x1b[0m\x1b[?25l\x1b[?25h\n\t"
    stream.write(bar)
    assert beneath.getvalue() == bar
    for bad in (
        "\x1b]0;title\x07",
        "\x1b[2J",
        "\x1b[6n",
        "\x9b2J",
        "\u202e",
        "\x1bc",
        "\x1b[?1049h",
        "\x08",
    ):
        beneath.seek(0)
        beneath.truncate()
        stream.write(f"a warning: {bad}")
        assert bad not in beneath.getvalue() and "a warning: \\" in beneath.getvalue()
        assert "\x1b" not in beneath.getvalue()


def test_a_closed_stream_is_a_problem_only_where_something_is_to_be_said():
    stream = Stream(None)
    stream.flush()
    assert stream.problem is None and not stream.isatty()
    stream.write("x")
    assert stream.problem == "it is closed"


PROBE = """
import sys, typer
from fastsiu import cli
from fastsiu.cli.app import print_json
@cli.app.command()
def probe(code: int, size: int = 3) -> None:
    cli.say.print("working")
    cli.out.print("caf\\u00e9 \\x1b[1m" * size)
    print_json({"caf\\u00e9": "\\U0001f600\\x9b" * size})
    cli.say.print("done")
    raise typer.Exit(code)
sys.argv[0] = "fastsiu"
cli.main()
"""


def probe(*arguments: str, shell: str = "", **env: str) -> subprocess.CompletedProcess:
    command = f'"{sys.executable}" -c "$PROBE" {" ".join(arguments)} {shell}'
    known = {**os.environ, "PROBE": PROBE, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(["bash", "-c", command], capture_output=True, env=known, timeout=120)


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
@pytest.mark.parametrize("code", ["0", "1"])
@pytest.mark.parametrize(
    ("shell", "env", "told"),
    [
        ("| head -c 1; exit ${PIPESTATUS[0]}", {}, "could not be written"),
        ("| true; exit ${PIPESTATUS[0]}", {}, "could not be written"),
        (">&-", {}, "could not be written"),
        ("> /dev/full", {}, "could not be written"),
        ("", {"PYTHONIOENCODING": "ascii"}, ""),
        ("", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, ""),
        ("2>&-", {}, ""),
        ("2> /dev/full", {}, ""),
        ("> /dev/full 2>&1", {}, ""),
        (">&- 2>&-", {}, ""),
        ("2>&1 | true; exit ${PIPESTATUS[0]}", {}, ""),
    ],
)
def test_the_work_s_exit_code_holds_whatever_becomes_of_the_streams(code, shell, env, told):
    done = probe("probe", code, "--size", "30000", shell=shell, **env)
    assert done.returncode == int(code), (done.stdout[-500:], done.stderr[-500:])
    said = done.stderr.decode("utf-8", "replace")
    assert "Traceback" not in said and "Exception ignored" not in said and told in said
    assert said.count("could not be written") == bool(told)


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_in_a_locale_without_letters_json_is_json():
    done = probe("probe", "0", PYTHONIOENCODING="ascii")
    first, rest = done.stdout.decode("ascii").split("\n", 1)
    assert first == "caf\\xe9 \\x1b[1m" * 3 and json.loads(rest) == {"café": "\U0001f600\x9b" * 3}


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
@pytest.mark.parametrize("verb", ["--help", "--version", "unlearn --help"])
@pytest.mark.parametrize("shell", ["> /dev/full", ">&-"])
def test_help_ends_well_too(verb, shell):
    done = probe(*verb.split(), shell=shell)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr


def test_the_streams_are_put_back():
    before = sys.stdout, sys.stderr
    with terminal.streams() as (out, err):
        assert sys.stdout is out and sys.stderr is err
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ([(0, 3), (3, 4), (3, 4)], ["caf", "é"]),
        ([(0, 1), (0, 1), (0, 1), (0, 1), (1, 2)], ["c", "a"]),
        ([(0, 4), (3, 5)], ["café"]),  # a token that ends in the middle of a character
        ([(0, 4), (4, 4)], ["café", ""]),  # the end of the turn
        ([(0, 0), (0, 2)], ["", "ca"]),
    ],
)
def test_each_character_is_in_one_piece(offsets, expected):
    found = pieces(offsets, [True] * len(offsets), [False] * len(offsets))
    assert ["café"[start:stop] for start, stop, *_ in found] == expected
    states = pieces(
        offsets, [True, *[False] * (len(offsets) - 1)], [*[False] * (len(offsets) - 1), True]
    )
    if len(found) < len(offsets) and len(found) == 1:
        assert states == [(0, 5, False, True)]


def test_explain_repeats_no_character():
    """As a byte-level tokenizer has it: four tokens with the place of one character."""
    from types import SimpleNamespace

    import torch

    answer = "café 😀\x1b!"
    offsets = [(0, 3), (3, 4), (3, 4), (4, 5), *[(5, 6)] * 4, (6, 7), (7, 8)]
    turn = SimpleNamespace(offsets=offsets, labels=torch.arange(len(offsets)))
    sample = SimpleNamespace(
        picture=None, closed=True, facet="facts", origin="built", question="q\x1b?", answer=answer
    )
    made = SimpleNamespace(
        samples=[sample],
        turns=[turn],
        keep=[torch.ones(len(offsets), dtype=torch.bool)],
        mask=SimpleNamespace(masked={5: "x"}, spared={}, warning=""),
    )
    screen = io.StringIO()
    explanation(Terminal(file=screen, width=200), SimpleNamespace(named=[], left_out=0), made)
    assert "    café <😀>\\x1b!" in screen.getvalue() and "\x1b" not in screen.getvalue()
    assert "q\\x1b?" in screen.getvalue()
