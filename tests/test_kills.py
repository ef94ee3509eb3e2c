"""kill -9 at a random moment of every verb that writes: the output is absent or complete, nothing
is left after the next start, and the concept's name is in no file name and nowhere but where it
belongs.

The test kills few. For many, of all verbs with their real work (about ten seconds a kill):

    PYTHONPATH=. python -P tests/test_kills.py --kills 100 [--verbs unlearn,merge] [--seed 0]

One process loads the embedded model, and forks once a kill: so that what is killed starts at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

# Run as a script as well, where pytest has not put it there. Whatever imports torch is imported
# inside functions: `main` says before how many threads there may be.
sys.path.append(str(Path(__file__).parent / "helpers"))

VERBS = ("unlearn", "request", "eval", "suite", "compare", "merge", "data", "demo")
QUICK = ("unlearn", "suite", "merge", "data")  # whose work a few seconds or a stub can stand for
ALLOWED = (
    "run.toml",
    "report.json",
    "report.md",
    "README.md",
    "report.html",
    "untouched.json",
    "suite.json",
    "matrix.json",
    "requests.json",
    "samples.jsonl",
    "compare.json",
    "compare.md",
    "compare.svg",
    "tokenizer.json",
    "questions.jsonl",
    "concept.json",
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_few_kills_of_some_verbs(tmp_path):
    command = [
        sys.executable,
        "-P",
        __file__,
        "--kills",
        "16",
        "--stubs",
        "--verbs",
        ",".join(QUICK),
        "--place",
        str(tmp_path),
    ]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kills"] >= 4 and told["verbs"] == list(QUICK)


# What is killed


class Stage:
    """The world that every run starts in: the embedded model, loaded, two creatures and their
    pictures, one finished run."""

    def __init__(self, place: Path, stubs: bool) -> None:
        import calls

        from fastsiu import driver, settings, several
        from fastsiu.demo.world import KNOWN, World, draw
        from fastsiu.evaluate.exam import Question
        from fastsiu.evaluate.suites import job as suite_job
        from fastsiu.evaluate.suites import suite
        from fastsiu.model import vlm

        self.place, self.canary, self.stubs = place, KNOWN[2], stubs
        given = place / "given"
        given.mkdir()
        world, subjects = World(), []
        for slug, name in (("a", KNOWN[2]), ("b", KNOWN[6])):
            folder = given / "suite" / "concepts" / slug / "images"
            folder.mkdir(parents=True)
            files = [folder / f"{i}.png" for i in range(3)]
            for i, file in enumerate(files):
                draw(world.sketch((name,), f"kill {slug} {i}")).save(file)
            subjects.append(suite.Subject(slug, name, (), (), files[0], tuple(files)))
        questions = (
            Question("Who is shown here?", "name"),
            Question("Tell me about {name}.", "fact"),
        )
        suite.write(suite.Suite(given / "suite", "Two", tuple(subjects), questions))
        self.suite, self.image = given / "suite", given / "suite/concepts/a/images/0.png"
        (given / "name").write_text(f"{self.canary}\n")
        line = {"image": str(self.image), "concept": self.canary}
        (given / "requests.jsonl").write_text(json.dumps(line) + "\n")
        loaded = vlm.load(str(settings.EMBEDDED), device="cpu")
        for place in (driver, several, suite_job):
            place.load = lambda *given, **options: loaded
        self.given = given
        self.adapter = given / "adapter"
        quiet(
            lambda: calls.unlearn(
                self.image,
                self.canary,
                output=self.adapter,
                steps=1,
                dreams=0,
                strangers=0,
                batch_size=8,
            )
        )
        if stubs:
            self._stub(loaded)

    def _stub(self, loaded: object) -> None:
        """What is computed is taken from the finished run: what is killed is the writing, and the
        waiting for it."""
        import calls

        from fastsiu import driver
        from fastsiu.evaluate.suites import run as suite_run
        from fastsiu.evaluate.suites import table as suite_table
        from fastsiu.model import adapter, vlm

        report = json.loads((self.adapter / "report.json").read_text())

        def forget(loaded, request, recipe, picture, **options):
            time.sleep(0.05)
            adapter.attach(loaded, recipe)
            return SimpleNamespace(scene=None)

        made, prepared = (
            {**report, "masks": {"tokens": 1}},
            calls.prepared_for(self.image, self.canary, preset="paper"),
        )
        driver.forget = forget
        driver.decide = lambda *given: (SimpleNamespace(forgotten=False), [])
        driver.report_of = lambda *given: made
        driver.prepared_for = lambda *given, **options: time.sleep(0.05) or prepared
        vlm.load = lambda *given, **options: loaded
        suite_run.one = self._one
        suite_table.pooled = lambda rows: {}

    def _one(self, loaded, job, subject, listener) -> None:
        from fastsiu import output as outputs
        from fastsiu.evaluate.suites import job as suite_job

        time.sleep(0.05)
        transaction = outputs.Transaction(job.output / subject.slug)
        with transaction as folder:
            told = {
                "verdict": None,
                "adapter": False,
                "reasons": [],
                "rows": {},
                "concept": subject.name,
            }
            (folder / "report.json").write_text(json.dumps(told))
            transaction.commit(suite_job.manifest(job, subject, transaction.key, {}))

    def arguments(self, verb: str, where: Path) -> list[str]:
        """The command line. The output is `where`/out."""
        one = ["--image", self.image, "--concept-file", self.given / "name"]
        out = ["--output", where / ("samples.jsonl" if verb == "data" else "out")]
        preset = ["--preset", "paper", "--steps", "1"]
        own = {
            "unlearn": ["unlearn", *one, *preset, "--quiet"],
            "request": ["unlearn", "--request", self.given / "requests.jsonl", *preset, "--quiet"],
            "eval": ["eval", *one, "--adapter", self.adapter],
            "suite": ["suite", self.suite, "--limit", "1", "--per-other", "1"],
            "compare": ["compare", "--suite", self.suite, "--quick", "--concept", self.canary],
            "merge": ["merge", "--adapter", self.adapter, "--no-verify"],
            "data": ["data", *one, "--preset", "paper"],
            "demo": ["demo", "--per-concept", "1"],
        }
        return [
            str(a) for a in (*own[verb], *(out if verb != "demo" else ["--export", where / "out"]))
        ]


def quiet(work: Callable[[], object]) -> object:
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        return work()


def start(stage: Stage, verb: str, where: Path) -> int:
    """A process of its own that does it: its id. Standard output and error are the file
    `where`/log."""
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        from fastsiu import cli

        log = os.open(stage.given / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.chdir(where)
        code = cli.run(stage.arguments(verb, where))
    finally:
        os._exit(code)


# What must hold afterwards


def check(stage: Stage, verb: str, where: Path, whole: dict[str, bytes], scratch: Path) -> bool:
    """Whether there is an output, which is complete. Raises AssertionError for half of one, and for
    a name where it has no business."""
    from fastsiu.disk import upkeep

    shown = [p for p in where.iterdir() if not p.name.startswith(".fastsiu.")]
    assert {p.name for p in shown} <= {"out", "samples.jsonl"}, shown
    there = [p for p in shown if p.is_file() or any(p.iterdir())]
    words = [
        stage.canary,
        *stage.canary.split(),
        stage.canary.replace(" ", "-"),
        stage.canary.replace(" ", "_"),
    ]
    for folder in (where, scratch):
        for path in folder.rglob("*"):
            told = str(path.relative_to(folder)).lower()
            named = [word for word in words if word.lower() in told]
            assert verb == "demo" or not named, f"{path} is named after the concept"
            if (
                path.is_file()
                and path.name not in ALLOWED
                and path.suffix not in (".png", ".safetensors", ".pickle")
            ):
                data = path.read_bytes()
                assert stage.canary.encode() not in data or path.name.startswith(".fastsiu."), (
                    f"{path} holds the name"
                )
    assert [p.name for p in scratch.iterdir() if "fastsiu" in p.name] == []
    for path in there:
        assert path.stat().st_mode & 0o077 == 0 or verb == "demo", f"{path} is open to others"
    if not there:
        return False
    out = there[0]
    if verb == "data":
        assert out.read_bytes() == whole["samples.jsonl"]
    elif verb in ("demo", "compare"):
        assert {p.relative_to(where).as_posix() for p in out.rglob("*") if p.is_file()} == set(
            whole
        )
    elif any(
        (out / "manifest.json").is_file() or (inner / "manifest.json").is_file()
        for inner in out.iterdir()
    ):
        assert upkeep.verify(out).wrong == []
    for path in out.rglob("*.json") if out.is_dir() else ():
        if ".fastsiu." not in str(path):
            json.loads(path.read_text(encoding="utf-8"))
    return True


def next_start(stage: Stage, where: Path) -> None:
    """Of another verb, which ends before it has done anything: what was left in the place is
    gone."""
    from fastsiu import cli

    command = [
        "compare",
        "--suite",
        str(stage.suite),
        "--methods",
        "none",
        "--output",
        str(where / "next"),
    ]
    code = quiet(lambda: cli.run(command))
    assert code == 2
    left = [p for p in where.rglob("*") if p.name.startswith(".fastsiu.")]
    assert left == [], left


def kill_many(
    place: Path, verbs: list[str], kills: int, seed: int, stubs: bool
) -> dict[str, object]:
    """Kills `kills` runs, the verbs in turn. Raises AssertionError where something does not
    hold."""
    scratch = place / "tmp"
    scratch.mkdir()
    tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)
    stage, rng = Stage(place, stubs), random.Random(seed)
    seconds: dict[str, float] = {}
    files: dict[str, dict[str, bytes]] = {}
    for verb in verbs:
        where = place / f"whole-{verb}"
        where.mkdir()
        began = time.monotonic()
        code = os.waitstatus_to_exitcode(os.waitpid(start(stage, verb, where), 0)[1])
        assert code in (0, 1), (stage.given / "log").read_text()
        seconds[verb] = time.monotonic() - began
        files[verb] = {
            p.relative_to(where).as_posix(): p.read_bytes() for p in where.rglob("*") if p.is_file()
        }
        assert check(stage, verb, where, files[verb], scratch)
    killed, complete = 0, 0
    for number in range(kills):
        verb = verbs[number % len(verbs)]
        where = place / f"{number}-{verb}"
        where.mkdir()
        child, began = start(stage, verb, where), time.monotonic()
        moment = began + rng.uniform(0, seconds[verb])
        ended = 0
        while not ended and time.monotonic() < moment:
            time.sleep(0.001)
            ended = os.waitpid(child, os.WNOHANG)[0]
        if ended:  # it was quicker than the one that was measured
            seconds[verb] = min(seconds[verb], time.monotonic() - began)
        else:
            os.kill(child, signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        complete += check(stage, verb, where, files[verb], scratch)
        next_start(stage, where)
        check(stage, verb, where, files[verb], scratch)
    return {"kills": killed, "of": kills, "complete": complete, "verbs": verbs, "seconds": seconds}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--verbs", default=",".join(VERBS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stubs", action="store_true", help="what takes long is taken from a finished run"
    )
    parser.add_argument(
        "--place", type=Path, help="an empty directory; a temporary one when left out"
    )
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # A thread does not survive a fork: a child that waits for one of OpenMP's or of the tokenizers'
    # waits for ever.
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with contextlib.ExitStack() as stack:
        base = given.place or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        print(
            json.dumps(
                kill_many(base, given.verbs.split(","), given.kills, given.seed, given.stubs)
            )
        )
