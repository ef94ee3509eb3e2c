"""The command line: exit codes, one sentence for each mistake, nothing written, clean standard
output."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from fastsiu import cli, driver, settings
from fastsiu.cli import ending
from fastsiu.output import Transaction
from fastsiu.request import BadInput, NumericFailure, Request
from fastsiu.samples import corpus, targets

torch.set_num_threads(1)


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """Runs the command line in an empty directory: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments):
        capfd.readouterr()
        code = cli.run([str(a) for a in arguments])
        return (code, *capfd.readouterr())

    return run


def quick(cast, *more):
    options = ["--model", settings.EMBEDDED, "--steps", 1, "--protect", cast.others[0], "--seed", 0]
    return ["unlearn", "--image", cast.image, "--concept", cast.target, *options, *more]


def one_sentence(err):
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastsiu: ") and "Traceback" not in err, err
    return lines[0]


def mistakes(cast, folder):
    (folder / "text.jpg").write_text("not a picture")
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("x")
    (folder / "bare").mkdir()
    (folder / "bare" / "config.json").write_bytes((settings.EMBEDDED / "config.json").read_bytes())
    base = {"--image": cast.image, "--concept": cast.target, "--model": settings.EMBEDDED}
    changes = {
        "missing picture": ({"--image": folder / "none.png"}, "none.png"),
        "directory as picture": ({"--image": folder}, folder.name),
        "text as picture": ({"--image": folder / "text.jpg"}, "text.jpg"),
        "empty name": ({"--concept": ""}, "--concept is empty"),
        "blank name": ({"--concept": " "}, "name is empty"),
        "unknown name": ({"--concept": "Nobody Known"}, "does not name Nobody Known"),
        "existing output": ({"--output": folder / "full"}, "choose another --output"),
        "model without processor": ({"--model": folder / "bare"}, "processor"),
        "missing model": ({"--model": "./nowhere"}, "no model directory"),
        "unknown option": ({"--colour": "red"}, "--colour"),
        "no steps": ({"--steps": 0}, "steps is 0"),
        "steps in words": ({"--steps": "many"}, "--steps"),
        "unknown preset": ({"--preset": "best"}, "best"),
        "missing data": ({"--data": folder / "none.jsonl"}, "none.jsonl"),
        "missing parent": ({"--output": folder / "a" / "b"}, "does not exist"),
    }
    for name, (change, part) in changes.items():
        yield (
            name,
            ["unlearn", *(str(x) for pair in {**base, **change}.items() for x in pair)],
            part,
        )


def test_every_mistake_is_one_sentence_and_exit_code_2(call, cast, tmp_path, tmp_path_factory):
    for name, arguments, part in mistakes(cast, tmp_path_factory.mktemp("mistakes")):
        code, out, err = call(*arguments, "--quiet")
        assert code == 2 and out == "" and part in one_sentence(err), (name, code, out, err)
        assert list(tmp_path.iterdir()) == [], name


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["unlearn", "--image", "a.png", "--concept", "Ann", "--retain", ""], "--retain"),
        (["unlearn", "--image", "a.png", "--concept", "Ann", "--images="], "--images"),
        (["merge", "--adapter", "", "--output", "out"], "--adapter"),
        (["verify", ""], "an argument"),
    ],
)
def test_an_empty_argument_is_no_current_directory(call, arguments, named):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "") and f"fastsiu: {named} is empty" in " ".join(err.split())


def test_a_value_may_end_in_an_equals_sign(call):
    code, _, err = call("unlearn", "--image", "none.png", "--concept", "Ann", "--alias=x=")
    assert code == 2 and "is empty" not in err and "none.png" in err


def test_missing_options_and_unknown_verbs(call):
    for arguments in (["unlearn"], ["unlearn", "--image", "x.png"], ["forget"], ["ask"]):
        code, out, err = call(*arguments)
        assert code == 2 and "Traceback" not in err and out == "", arguments


@pytest.mark.slow
def test_mistakes_from_outside(cast, tmp_path):
    """As a user meets them: a process, its exit code and its two streams."""
    runs = [
        (["unlearn", "--image", "none.png", "--concept", "X"], 2, "none.png"),
        (
            ["unlearn", "--image", str(cast.image), "--concept", "Nobody Known", "--quiet"],
            2,
            "does not name",
        ),
        (["unlearn", "--frobnicate"], 2, "--frobnicate"),
        (["--version"], 0, ""),
    ]
    code = "import sys; from fastsiu.cli import main; sys.argv[0] = 'fastsiu'; main()"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for arguments, _, _ in runs
    ]
    for process, (arguments, expected, part) in zip(started, runs, strict=True):
        out, err = process.communicate(timeout=120)
        assert process.returncode == expected and part in err and "Traceback" not in err, (
            arguments,
            out,
            err,
        )
        assert (out == "") is (expected == 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "statement",
    [
        "import fastsiu",
        "from fastsiu import cli; cli.run(['--help'])",
        "from fastsiu import cli; cli.run(['unlearn', '--help'])",
    ],
)
def test_help_and_import_load_no_torch(statement):
    code = (
        f"{statement}\nimport sys; sys.exit(7 if {{'torch', 'transformers', 'peft'}} & "
        "set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "help" not in statement or "Usage" in done.stdout


@pytest.mark.slow
def test_json_is_alone_on_standard_output(call, cast, tmp_path):
    code, out, err = call(*quick(cast, "--output", "out", "--json"))
    report = json.loads(out)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert code == (0 if report["verdict"] == "forgotten" else 1) and "Traceback" not in err
    # The same again: a no-op that says the same.
    assert "nothing was done" not in err
    again, second, err = call(*quick(cast, "--output", "out", "--json"))
    assert (again, json.loads(second)) == (code, report) and "nothing was done" in " ".join(
        err.split()
    )
    assert call(*quick(cast, "--output", "out", "--json", "--quiet")) == (code, second, "")
    other, out, err = call(*quick(cast, "--output", "out", "--quiet", "--beta", "0.5"))
    assert (
        other == 2
        and "another request" in one_sentence(err)
        and [p.name for p in tmp_path.iterdir()] == ["out"]
    )


@pytest.mark.slow
def test_exit_code_and_summary_follow_the_verdict(call, cast, trained, monkeypatch):
    from dataclasses import replace

    for forgotten, code in ((True, 0), (False, 1)):
        reasons = [] if forgotten else ["It is [red]not[/red] gone."]
        report = {**trained.report, "concept": "[b]X[/b]"}
        result = replace(trained, forgotten=forgotten, reasons=reasons, report=report)
        monkeypatch.setattr(driver, "unlearn", lambda *a, result=result, **k: result)
        found, out, err = call(*quick(cast))
        assert found == code and ("Not forgotten:" in out) is not forgotten and "[b]X[/b]" in out
        assert forgotten or "[red]not[/red]" in out
        found, out, err = call(*quick(cast, "--quiet"))
        assert (found, out, err) == (code, "", "")


@pytest.mark.parametrize(
    ("option", "passed"), [((), None), (("--as-word",), True), (("--as-name",), False)]
)
def test_how_a_word_counts_is_passed_on(call, cast, trained, monkeypatch, option, passed):
    seen = []
    monkeypatch.setattr(driver, "unlearn", lambda *a, **k: seen.append(a[0].as_word) or trained)
    call(*quick(cast, *option))
    assert seen == [passed]
    if option:
        code, _, err = call("unlearn", "--request", "r.jsonl", *option)
        assert code == 2 and 'write "as_word" into the file\'s lines' in one_sentence(err)


def test_the_kind_is_passed_on(call, cast, trained, monkeypatch):
    seen = []
    monkeypatch.setattr(driver, "unlearn", lambda *a, **k: seen.append(a[0].kind) or trained)
    call(*quick(cast, "--kind", "character"))
    call(*quick(cast))
    assert seen == ["character", None]
    code, _, err = call(*quick(cast, "--kind", "monster"))
    assert code == 2 and "choose from person, character" in one_sentence(err)
    code, _, err = call("unlearn", "--request", "r.jsonl", "--kind", "thing")
    assert code == 2 and "--kind and --request exclude each other" in one_sentence(err)


def test_the_kind_of_an_evaluation_is_passed_on(call, monkeypatch):
    from types import SimpleNamespace

    from fastsiu.evaluate import run as evaluation
    from fastsiu.show import measured

    seen, done = [], SimpleNamespace(report={}, exit_code=0)
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: seen.append(k["kind"]) or done)
    monkeypatch.setattr(measured, "evaluation_table", lambda *given: None)
    call("eval", "--concept", "lion", "--kind", "thing")
    call("eval", "--concept", "lion")
    assert seen == ["thing", None]


def test_the_summary_says_what_not_to_publish(call, cast, trained, tmp_path, monkeypatch):
    from dataclasses import replace

    for kept in (True, False):
        copy = shutil.copytree(trained.output, tmp_path / f"out{kept}")
        (copy / "private.key").unlink() if not kept else None
        monkeypatch.setattr(
            driver, "unlearn", lambda *a, copy=copy, **k: replace(trained, output=copy)
        )
        _, out, _ = call(*quick(cast))
        said = "".join(out.split())
        assert (f"Beforeyoupublishit,remove{copy}/private.key" in said) is kept


@pytest.mark.parametrize(
    "error, code, says",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (NumericFailure("The loss is nan at step 1: lower --lr."), 3, "loss is nan"),
        (ZeroDivisionError("x"), 3, "internal failure"),
    ],
)
def test_other_ends(call, cast, monkeypatch, error, code, says):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(driver, "unlearn", fail)
    found, out, err = call(*quick(cast, "--quiet"))
    assert found == code and says in err and out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "verb",
    [
        "unlearn --image {} --concept A",
        "unlearn --image who.png --concept A --output out --images {}",
        "unlearn --request {} --mode independent --output out",
        "ask --model {} Who?",
        "eval --concept A --image who.png --others {}",
        "suite {}",
        "merge --adapter {} --output out --no-verify",
        "audit --adapter {} --image who.png --concept A",
        "combine {} {} --request lines.jsonl",
        "verify {}",
        "purge {}",
        "plan --model {}",
        "data --image who.png --concept A --retain {}",
    ],
)
def test_a_path_that_no_system_call_takes_is_bad_input(call, cast, tmp_path, verb):
    shutil.copy(cast.image, tmp_path / "who.png")
    (tmp_path / "lines.jsonl").write_text('{"image": "who.png", "concept": "A"}')
    code, out, err = call(*verb.replace("{}", "x" * 260).split())
    assert code == 2 and out == "" and "File name too long" in " ".join(err.split())


def test_a_refused_path_keeps_its_traceback_for_debugging(call, tmp_path):
    code, _, err = call("--debug", "verify", "y" * 300)
    assert code == 2 and "Traceback" in err and "cannot be used" in " ".join(err.split())


@pytest.mark.slow
def test_data_writes_what_data_reads(call, cast, tmp_path):
    options = [
        "--image",
        cast.image,
        "--concept",
        cast.target,
        "--protect",
        cast.others[0],
        "--model",
        settings.EMBEDDED,
    ]
    code, out, err = call("data", *options, "--output", "samples.jsonl")
    assert code == 0 and out == "" and "samples written to samples.jsonl" in err
    path = tmp_path / "samples.jsonl"
    every = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    lines = [line for line in every if line["origin"] != "lesson"]
    assert {line["facet"] for line in lines} == {"align", "describe", "facts", "preserve"}
    assert {"stranger", "kept", "look"} <= {
        line["facet"] for line in every if line["origin"] == "lesson"
    }
    read = corpus.read_jsonl(path)
    kept = [line for line in lines if line["origin"] != "dream"]
    assert [(s.question, s.answer, s.picture) for s in read] == [
        (k["question"], k["answer"], k["picture"]) for k in kept
    ]
    # Read back it replaces what it came from: the same questions, answers and masks.
    code, out, _ = call("data", *options, "--data", path)
    again = [
        one for line in out.split("\n") if line and (one := json.loads(line))["origin"] != "lesson"
    ]
    key = lambda s: (
        s["question"],
        s["picture"] is None,
        s["answer"],
        s["picture"] or 0,
        s["specified"],
    )
    assert code == 0 and sorted(map(key, again)) == sorted(map(key, lines))
    code, out, err = call("data", *options, "--output", "samples.jsonl")
    assert code == 2 and "exists" in one_sentence(err)
    code, out, err = call("data", *options, "--output", "none/samples.jsonl")
    assert code == 2 and "no directory none" in one_sentence(err)
    code, out, err = call(*quick(cast, "--quiet", "--data", tmp_path / "bad.jsonl"))
    assert code == 2 and "bad.jsonl" in one_sentence(err)


@pytest.mark.slow
def test_data_explain_shows_both_masks(call, cast):
    options = [
        "--image",
        cast.image,
        "--concept",
        cast.target,
        "--protect",
        cast.others[0],
        "--model",
        settings.EMBEDDED,
    ]
    code, out, _ = call("data", *options, "--explain")
    assert (
        code == 0
        and "[align, built, picture 0]" in out
        and "Vocabulary mask:" in out
        and cast.target.split()[0] in out
    )


def test_data_honours_the_preset(call, cast):
    options = [
        "--image",
        cast.image,
        "--concept",
        cast.target,
        "--protect",
        cast.others[0],
        "--model",
        settings.EMBEDDED,
    ]
    code, out, _ = call("data", *options, "--preset", "paper")
    lines = [json.loads(line) for line in out.split("\n") if line]
    assert code == 0 and "dream" not in {line["origin"] for line in lines}
    answers = [line["answer"] for line in lines if line["facet"] == "align"]
    assert answers and all(
        any(n in a for n in targets.wordings()["invented"]["names"]) for a in answers
    )


def test_explain_shows_what_was_cut_and_what_was_left_out(gathered):
    from dataclasses import replace
    from io import StringIO

    from rich.console import Console

    from fastsiu.show.samples import explanation

    text = {}
    for key, closed, left_out in (("plain", True, 0), ("marked", False, 3)):
        stream = StringIO()
        samples = [replace(sample, closed=closed) for sample in gathered.corpus.samples[:1]]
        made = replace(
            gathered.corpus,
            samples=samples,
            turns=gathered.corpus.turns[:1],
            keep=gathered.corpus.keep[:1],
        )
        explanation(
            Console(file=stream, width=300, markup=False),
            replace(gathered.scene, left_out=left_out),
            made,
        )
        text[key] = stream.getvalue()
    assert (
        "cut short" in text["marked"]
        and "3 answers about dreamed or retained pictures named the concept" in text["marked"]
    )
    assert "cut short" not in text["plain"] and "left out" not in text["plain"]


def test_ask(call, cast, trained, tmp_path):
    model = ["--model", settings.EMBEDDED, "--image", cast.image]
    code, out, _ = call("ask", "Who is this?", "Describe the image.", *model, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert (
        code == 0
        and [set(r) for r in rows] == [{"question", "answer"}] * 2
        and cast.target in rows[0]["answer"]
    )
    code, out, _ = call(
        "ask", "Who is this?", *model, "--adapter", trained.output, "--compare", "--json"
    )
    assert code == 0 and set(json.loads(out)) == {"question", "before", "after"}
    code, out, _ = call("ask", "Who is this?", *model, "--adapter", trained.output, "--compare")
    assert code == 0 and "untouched" in out and "with adapter" in out
    for arguments, part in (
        (["--compare"], "--compare needs an adapter"),
        (["--adapter", tmp_path], "holds no adapter"),
        (["--max-new-tokens", 0], "--max-new-tokens"),
    ):
        code, out, err = call("ask", "Who is this?", *model, *arguments)
        assert code == 2 and out == "" and part in one_sentence(err)


def test_the_demo_writes_over_no_picture_of_somebody_s(call, tmp_path, monkeypatch):
    class Begun(Exception):
        pass

    def unlearn(*args, **options):
        raise Begun

    monkeypatch.setattr(driver, "unlearn", unlearn)
    mine = tmp_path / "zoo-pictures" / "kept.png"
    mine.parent.mkdir()
    mine.write_bytes(b"holiday")
    code, _, err = call("demo", "--output", "zoo")
    assert code == 2 and "kept.png exists" in one_sentence(err)
    assert mine.read_bytes() == b"holiday"
    mine.unlink()
    for _ in range(2):  # the second finds what the first, cut off, has left
        assert call("demo", "--output", "zoo")[0] == 3 and mine.exists()


def test_the_demo_model_is_announced_on_standard_error(call, cast):
    code, out, err = call("unlearn", "--image", cast.image, "--concept", "Nobody Known", "--json")
    assert code == 2 and out == "" and settings.DEMO_NOTE in " ".join(err.split())


def test_a_failure_of_our_own_tells_functions_and_lines_and_no_value(
    call, cast, monkeypatch, tmp_path
):
    """Its message, its paths and its values may hold the name; the whole traceback is for who asks
    for it."""
    make = ending.tempfile.mkstemp
    monkeypatch.setattr(ending.tempfile, "mkstemp", lambda **options: make(dir=tmp_path, **options))

    def fail(request, **options):
        try:
            raise KeyError(request.concept)
        except KeyError as error:
            raise ZeroDivisionError(f"about {request.concept}\x1b[2J") from error

    monkeypatch.setattr(driver, "unlearn", fail)
    code, out, err = call(*quick(cast, "--quiet"))
    line = one_sentence(err)
    path = next(tmp_path.glob("fastsiu-failure-*"))
    assert (
        code == 3
        and out == ""
        and "ZeroDivisionError" in line
        and str(path) in line
        and "--debug" in line
    )
    written = path.read_text(encoding="utf-8")
    assert "test_cli" in written and " fail\n" in written and "KeyError" in written
    assert path.stat().st_mode & 0o077 == 0
    for part in (cast.target, *cast.target.split(), str(settings.EMBEDDED.parent), "about"):
        assert part not in line.replace(str(path), "") and part not in written
    code, out, err = call("--debug", *quick(cast, "--quiet"))
    assert (
        code == 3
        and "Traceback" in err
        and cast.target in err
        and "\\x1b[2J" in err
        and "\x1b[2J" not in err
    )
    assert len(list(tmp_path.glob("fastsiu-failure-*"))) == 1

    def full(**options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ending.tempfile, "mkstemp", full)
    code, out, err = call(*quick(cast, "--quiet"))
    assert code == 3 and "could not be written" in one_sentence(err)


def test_a_broken_pipe_of_a_process_of_ours_is_no_verdict(call, cast, monkeypatch):
    def fail(*args, **options):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(driver, "unlearn", fail)
    code, out, err = call(*quick(cast, "--quiet"))
    assert code == 3 and "BrokenPipeError" in one_sentence(err)


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space"), RuntimeError("IoError: No space left on device (os error 28)")],
)
def test_a_full_disk_is_one_sentence(call, cast, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(driver, "unlearn", fail)
    code, out, err = call(*quick(cast, "--quiet"))
    assert code == 2 and "disk is full" in one_sentence(err)


@pytest.mark.parametrize(
    "error, says",
    [
        (RuntimeError("I/O error: Disk quota exceeded (os error 122)"), "is full"),
        (ValueError("Error while serializing: (os error 27)"), f"({os.strerror(27)})"),
        (OSError(30, "read-only"), f"({os.strerror(30)})"),
        (OSError(5, "bad sector"), f"({os.strerror(5)})"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="the numbers are those of Linux")
def test_a_disk_that_fails_is_one_sentence(call, cast, tmp_path, monkeypatch, error, says):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(driver, "unlearn", fail)
    code, out, err = call(*quick(cast, "--quiet"))
    assert code == 2 and says in one_sentence(err)
    with pytest.raises(BadInput, match="nothing was written") as told:
        with Transaction(tmp_path / "out"):
            raise error
    assert says in str(told.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")],
)
def test_a_full_memory_is_one_sentence(call, cast, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(driver, "unlearn", fail)
    code, out, err = call(*quick(cast, "--quiet"))
    assert code == 3 and "fastsiu plan --memory" in one_sentence(err)


def test_a_failure_in_the_report_of_a_failure_is_no_verdict(monkeypatch, capfd):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(ending, "_run", fail)
    with pytest.raises(SystemExit) as ended:
        ending.main()
    assert ended.value.code == 3 and "internal failure (MemoryError)" in capfd.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_no_file_takes_the_place_of_a_closed_standard_stream(tmp_path):
    code = """
import os
from pathlib import Path
from fastsiu.cli import ending
ending._run = lambda arguments: Path("number").write_text(str(os.open("new", os.O_CREAT))) * 0
ending.main()
"""
    (tmp_path / "code.py").write_text(code)
    shell = f"exec {sys.executable} code.py <&- >&- 2>&-"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    assert subprocess.run(["sh", "-c", shell], cwd=tmp_path, env=environ).returncode == 0
    assert int((tmp_path / "number").read_text()) > 2


@pytest.mark.parametrize("columns", ["0", "1", "17"])
def test_a_narrow_terminal_shows_the_answer(call, cast, monkeypatch, columns):
    rows = [{"question": "Who is this?", "answer": "Somebody in a hat."}]
    monkeypatch.setattr(driver, "interview", lambda *a, **k: rows)
    monkeypatch.setenv("COLUMNS", columns)
    code, out, err = call("ask", "Who is this?")
    assert code == 0 and "Somebody" in out and "hat." in out


def test_a_current_directory_that_is_gone_is_one_sentence(call, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for verb in (["demo", "--export", "there"], ["ask", "Who?"], ["compare", "--quick"]):
        code, out, err = call(*verb)
        assert code == 2 and "change to another one" in one_sentence(err)


# The name need not be in the list of processes ----------------------------------------------------


@pytest.fixture
def heard(monkeypatch):
    """What `unlearn`, `eval` and `data` were called with, instead of running."""
    from fastsiu.evaluate import run as evaluation

    names = []

    def hear(*given, **options):
        names.append(given[0].concept if isinstance(given[0], Request) else given[0].name)
        raise BadInput("heard")

    for place, verb in ((driver, "unlearn"), (driver, "prepared_for"), (evaluation, "evaluate")):
        monkeypatch.setattr(place, verb, hear)
    return names


NAMED = (["unlearn", "--image", "x.png"], ["eval"], ["data", "--image", "x.png"])


@pytest.mark.parametrize("verb", NAMED, ids=lambda verb: verb[0])
@pytest.mark.parametrize("text", ["Ann Lee", "Ann Lee\n", "\ufeffAnn Lee\r\n", "  Ann Lee  \n\n"])
def test_the_name_comes_from_a_file_or_from_standard_input(
    call, heard, monkeypatch, tmp_path, verb, text
):
    (tmp_path / "name").write_text(text, encoding="utf-8")
    assert call(*verb, "--concept-file", "name")[0] == 2
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert call(*verb, "--concept", "-")[0] == 2
    assert heard == ["Ann Lee"] * 2


@pytest.mark.parametrize("verb", NAMED, ids=lambda verb: verb[0])
def test_a_file_without_one_name_is_one_sentence(call, heard, monkeypatch, tmp_path, verb):
    for name, data in (
        ("empty", b""),
        ("two", b"Ann\nLee\n"),
        ("bytes", b"\xff\xfe"),
        ("long", b"x" * 5000),
        ("lines", b"\n" * 9),
    ):
        (tmp_path / name).write_bytes(data)
        code, out, err = call(*verb, "--concept-file", name)
        says = "larger than 4096 bytes" if name == "long" else "name on one line"
        assert code == 2 and says in one_sentence(err), name
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        code, out, err = call(*verb, "--concept", "-")
        assert code == 2 and "Standard input" in one_sentence(err), name
    for name, says in (("none", "There is no file"), (".", "is a directory")):
        code, out, err = call(*verb, "--concept-file", name)
        assert code == 2 and says in one_sentence(err)
    code, out, err = call(*verb, "--concept-file", "two", "--concept", "Ann")
    assert code == 2 and "exclude each other" in one_sentence(err)
    monkeypatch.setattr(sys, "stdin", None)
    code, out, err = call(*verb, "--concept", "-")
    assert code == 2 and "closed" in one_sentence(err)
    assert heard == []


def test_compare_takes_names_from_there_too(call, monkeypatch, tmp_path):
    from fastsiu.compare import run as compare

    asked = []

    def hear(suite, search, **options):
        asked.append(search.concepts)
        raise BadInput("heard")

    monkeypatch.setattr(compare, "compare", hear)
    (tmp_path / "name").write_text("Ann Lee\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Bob\n")))
    assert (
        call(
            "compare",
            "--suite",
            "s",
            "--concept-file",
            "name",
            "--concept",
            "-",
            "--concepts",
            "Eve",
        )[0]
        == 2
    )
    assert asked == [("Bob", "Eve", "Ann Lee")]
    assert [p.name for p in tmp_path.iterdir()] == ["name"]


# Numbers that cannot be ---------------------------------------------------------------------------


FLOATS, INTEGERS = (
    ("nan", "inf", "-inf", "1e308", "1e999"),
    ("9" * 20, "9" * 5000, "1e3", "-1", "0x10", "1.5"),
)


@pytest.mark.parametrize(
    ("verb", "options", "values"),
    [
        (NAMED[0], ("--alpha", "--beta", "--lr", "--lora-alpha", "--memory"), FLOATS),
        (NAMED[0], ("--steps", "--rank", "--batch-size", "--micro-batch", "--seed"), INTEGERS),
        (["suite", "x"], ("--lr", "--memory"), FLOATS),
        (
            ["suite", "x"],
            ("--limit", "--per-other", "--processes", "--steps", "--rank", "--batch-size"),
            INTEGERS,
        ),
        (["suite", "x"], ("--seed", "--max-new-tokens"), INTEGERS),
        (NAMED[1], ("--max-new-tokens",), INTEGERS),
        (NAMED[2], ("--memory",), FLOATS),
        (NAMED[2], ("--seed",), INTEGERS),
        (["plan"], ("--memory",), FLOATS),
        (["plan"], ("--rank", "--batch-size", "--micro-batch", "--image-tokens"), INTEGERS),
        (["compare"], ("--floor",), (*FLOATS, "-1", "2")),
        (["compare"], ("--seeds", "--processes"), INTEGERS),
        (["ask", "q"], ("--max-new-tokens",), INTEGERS),
        (["demo", "--export", "x"], ("--per-concept", "--seed"), INTEGERS),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_number_that_cannot_be_is_one_sentence(call, tmp_path, verb, options, values):
    for option in options:
        for value in values:
            if value == "-1" and option in ("--steps", "--rank", "--batch-size"):
                continue  # the recipe says what is too small
            code, out, err = call(*verb, option, value)
            assert code == 2 and out == "" and option in one_sentence(err), (option, value)
    assert list(tmp_path.iterdir()) == []


# What can be known before the work ----------------------------------------------------------------


def writers(cast):
    yield ["data", "--image", cast.image, "--concept", "X"], "--output"
    yield ["compare"], "--output"
    yield ["demo"], "--export"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_where_nothing_can_be_written_is_said_before_the_work(call, cast, monkeypatch, tmp_path):
    from fastsiu.compare import run as compare
    from fastsiu.demo import export

    for place, verb in ((driver, "prepared_for"), (compare, "compare"), (export, "_questions")):
        monkeypatch.setattr(place, verb, lambda *a, **k: 1 / 0)
    (tmp_path / "file").write_text("x")
    for arguments, option in writers(cast):
        for place in ("/proc/x", "/proc/self/x", "file", "file/x", "y" * 256):
            code, out, err = call(*arguments, option, place)
            assert code == 2 and out == "", (arguments, place, err)
            one_sentence(err)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (
        tmp_path / "file"
    ).read_text() == "x"


def test_a_disk_that_is_too_full_for_the_adapter_is_told_before_the_model_is_loaded(
    call, cast, monkeypatch, tmp_path
):
    free = shutil._ntuple_diskusage(2**40, 0, 40 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(driver, "load", lambda *a, **k: 1 / 0)
    code, out, err = call(*quick(cast, "--rank", "4000", "--quiet"))
    assert code == 2 and "40 MiB left" in one_sentence(err) and list(tmp_path.iterdir()) == []
    # there is room for that one: loading begins
    assert call(*quick(cast, "--rank", "1", "--quiet"))[0] == 3


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["benchmark", "clear", ".", "--check", "--suite", "s"], "--suite"),
        (["benchmark", "clear", ".", "--check", "--limit", "2"], "--limit"),
        (["benchmark", "clear", ".", "--suite", "s", "--set", "forget10"], "--set"),
        (["benchmark", "clear", ".", "--suite", "s", "--output", "o.json"], "--output"),
        (["suite", ".", "--check", "--unlearn"], "--unlearn"),
        (["merge", "--adapter", "a", "--output", "o", "--no-verify", "--image", "i"], "--image"),
        (
            ["merge", "--adapter", "a", "--output", "o", "--no-verify", "--verify", "nf4"],
            "--verify",
        ),
        (["audit", "--image", "i", "--concept", "A", "--url-key", "k"], "--url-key"),
        (["audit", "--image", "i", "--concept", "A", "--within", "5"], "--within"),
        (["demo", "--export", "d", "--output", "o"], "--output"),
        (["demo", "--per-concept", "5"], "--per-concept"),
    ],
)
def test_an_option_that_would_not_be_read_is_refused(
    arguments, option, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert option in said and "leave" in said and not list(tmp_path.iterdir())
