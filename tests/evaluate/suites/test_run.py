"""A whole suite on the embedded model: resumed after a kill, the same in one process and in two, a
failure costs one concept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import calls
import pytest

from fastsiu import settings
from fastsiu.evaluate.suites import job as suite_job
from fastsiu.evaluate.suites import run as suite_run
from fastsiu.evaluate.suites import suite
from fastsiu.evaluate.suites import table as suite_table
from fastsiu.manifest import is_as_sealed
from fastsiu.request import BadInput
from fastsiu.session import Listener

QUICK = {"steps": 2, "dreams": 0, "strangers": 0, "limit": 1, "per_other": 1}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Two creatures that the model knows and between them one that it does not, few questions."""
    from fastsiu.demo.world import KNOWN, UNSEEN, World, draw
    from fastsiu.evaluate.exam import Question

    root, world, subjects = tmp_path_factory.mktemp("suite") / "small", World(), []
    for slug, name in (("a", KNOWN[2]), ("b", UNSEEN[0]), ("c", KNOWN[6])):
        files = [root / f"concepts/{slug}/images/{i}.png" for i in range(3)]
        files[0].parent.mkdir(parents=True)
        for i, file in enumerate(files):
            draw(world.sketch((name,), f"many {name} {i}")).save(file)
        subjects.append(suite.Subject(slug, name, (), (), files[0], tuple(files)))
    questions = (
        Question("Who is shown here?", "name"),
        Question("Is {name} in the image?", "yesno"),
        Question("Tell me about {name}.", "fact"),
    )
    suite.write(suite.Suite(root, "Three", tuple(subjects), questions))
    return root


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """All three unlearned, in this process."""
    return calls.evaluate_suite(
        small, output=tmp_path_factory.mktemp("whole") / "out", unlearn=True, **QUICK
    )


def reports(output: Path, slug: str) -> dict:
    return json.loads((output / slug / "report.json").read_text(encoding="utf-8"))


def without_times(report: dict) -> dict:
    steps = [{k: v for k, v in step.items() if "second" not in k} for step in report["training"]]
    return report | {"seconds": None, "training": steps}


@pytest.mark.slow
def test_each_concept_has_an_output_and_a_failure_costs_only_itself(whole):
    assert [(o.slug, o.status) for o in whole.outcomes][1] == (
        "b",
        "failed",
    ) and whole.exit_code == 1
    assert "does not name" in whole.outcomes[1].reasons[0] and not (whole.output / "b").exists()
    for slug in "ac":
        assert {"adapter_model.safetensors", "report.html", "report.md", "manifest.json"} <= set(
            os.listdir(whole.output / slug)
        )
        report = reports(whole.output, slug)
        assert (
            set(report["rows"]) == {"untouched", "unlearned", "control"}
            and len(report["training"]) == 2
        )
        # Two steps leave the facts, and the verdict asks for them.
        asked = {one["family"]: one for one in report["families"]}
        assert (
            report["headline"]
            and {"naming", "plural", "two-hop"} <= set(asked)
            and asked["naming"]["unlearned"]["n"] > 0
        )
    table = json.loads((whole.output / "suite.json").read_text(encoding="utf-8"))
    assert table == whole.report and [c["status"] for c in table["concepts"]] == [
        o.status for o in whole.outcomes
    ]
    assert table["sha256"] and is_as_sealed(table)
    pooled = table["pooled"]["untouched"]["efficacy"]
    assert pooled["n"] == sum(
        reports(whole.output, slug)["rows"]["untouched"]["efficacy"]["n"] for slug in "ac"
    )
    assert "3 of 3 concepts" in (whole.output / "report.md").read_text(encoding="utf-8")
    assert sorted(os.listdir(whole.output)) == ["a", "c", "report.md", "suite.json"]


def test_killed_in_two_processes_it_goes_on_and_ends_the_same(small, whole, tmp_path):
    """The first run is killed as soon as one concept is there, and leaves no process behind that
    would write another."""
    output = tmp_path / "out"
    options = {
        "output": str(output),
        "unlearn": True,
        "processes": 2,
        "concepts": ["a", "c"],
        **QUICK,
    }
    call = f"calls.evaluate_suite({str(small)!r}, **{options})"
    lines = (
        f"import sys; sys.path.append({str(Path(calls.__file__).parent)!r}); import calls",
        "if __name__ == '__main__':",
        f"    {call}",
    )
    (tmp_path / "first.py").write_text("\n".join(lines))
    first = subprocess.Popen(
        [sys.executable, str(tmp_path / "first.py")], stderr=subprocess.DEVNULL
    )
    there = lambda: {slug for slug in "ac" if (output / slug).exists()}
    deadline = time.monotonic() + 300
    while not there() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    before = children(first.pid)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = there()
    assert done and before
    while any(alive(child) for child in before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(child) for child in before)
    done = there()
    stamps = {slug: (output / slug / "manifest.json").stat().st_mtime_ns for slug in done}
    notes: list[str] = []
    again = calls.evaluate_suite(
        small,
        output=output,
        unlearn=True,
        concepts=["a", "c"],
        listener=Listener(note=notes.append),
        **QUICK,
    )
    assert again.resumed == len(done) and f"Done already: {', '.join(sorted(done))}." in notes
    assert {slug: (output / slug / "manifest.json").stat().st_mtime_ns for slug in done} == stamps
    assert [name for name in os.listdir(output) if name.startswith(".")] == []
    for slug in "ac":
        adapters = [
            (place / slug / "adapter_model.safetensors").read_bytes()
            for place in (output, whole.output)
        ]
        assert adapters[0] == adapters[1]
        assert without_times(reports(output, slug)) == without_times(reports(whole.output, slug))


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_saved_adapters_give_the_same_rows_and_another_one_is_another_request(
    small, whole, tmp_path
):
    options = {"adapters": whole.output, "untouched": whole.output, "limit": 1, "per_other": 1}
    told: list[str] = []
    found = calls.evaluate_suite(
        small,
        output=tmp_path / "o",
        concepts=["a", "c"],
        listener=Listener(stage=told.append),
        **options,
    )
    assert "a: asking again" in told and "a: asking the untouched model" not in told
    for slug in "ac":
        one, other = (reports(place, slug)["rows"] for place in (found.output, whole.output))
        # in the last digits they depend on how the picture's prefix was shared
        for key in (
            "fluency",
            "fluency_paper",
        ):
            values = [rows["unlearned"].pop(key)["value"] for rows in (one, other)]
            assert values[0] == pytest.approx(values[1], rel=1e-6)
        assert one == other
    with pytest.raises(BadInput, match="b holds no adapter"):
        calls.evaluate_suite(small, output=tmp_path / "n", adapters=whole.output)
    with pytest.raises(BadInput, match="result of another request"):
        calls.evaluate_suite(
            small,
            output=tmp_path / "o",
            adapter_dir=whole.output / "a",
            concepts=["c"],
            limit=1,
            per_other=1,
        )
    with pytest.raises(BadInput, match="untouched.json is of another exam"):
        calls.evaluate_suite(
            small,
            output=tmp_path / "n",
            concepts=["c"],
            untouched=whole.output,
            limit=2,
            per_other=1,
        )
    assert not (tmp_path / "n").exists()


def test_the_untouched_model_alone(small, tmp_path):
    found = calls.evaluate_suite(small, output=tmp_path / "o", limit=1, per_other=1)
    assert [o.status for o in found.outcomes] == ["untouched"] * 3 and found.exit_code == 0
    assert "unlearned" not in found.report["pooled"] and "families" not in reports(
        found.output, "a"
    )
    row = found.report["pooled"]["untouched"]
    # of the two it knows it says the name
    assert row["efficacy"]["n"] == 3 and row["efficacy"]["value"] == pytest.approx(1 / 3)
    assert json.loads((tmp_path / "o/suite.json").read_text(encoding="utf-8")) == found.report
    given = suite.read(small)
    suite.write(replace(given, questions=given.questions[:2]))
    try:
        with pytest.raises(BadInput, match="result of another request"):
            calls.evaluate_suite(small, output=tmp_path / "o", limit=1, per_other=1)
    finally:
        suite.write(given)


def test_the_model_is_known_by_its_files_or_its_commit(small, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        suite_run,
        "done_already",
        lambda job: seen.append(job.exam_digest(job.given.subjects[0])) or 1 / 0,
    )
    started = lambda model, **more: pytest.raises(
        ZeroDivisionError, calls.evaluate_suite, small, output=tmp_path / "o", model=model, **more
    )
    place = str(settings.EMBEDDED)
    for model in (place, place + "/", f"{place}/../{Path(place).name}"):
        started(model)
    assert len(set(seen)) == 1
    config, processor, _ = suite_run.source.describe(place, None)
    monkeypatch.setattr(suite_run.source, "read_config", lambda name, revision: config)
    for commit, revision in (("c1", "main"), ("c1", "v1"), ("c2", "main")):
        monkeypatch.setattr(
            suite_run.source,
            "describe",
            lambda name, revision, commit=commit: (config, processor, commit),
        )
        started("someone/hub-model", revision=revision)
    assert seen[3] == seen[4] != seen[5]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"unlearn": True, "adapters": "x"}, "exclude each other"),
        ({"steps": 3}, "add --unlearn"),
        ({"processes": 0}, "at least 1"),
        ({"limit": 0}, "at least 1"),
        ({"concepts": ["a", "nobody"]}, "no concept 'nobody'"),
        ({"adapters": "/nowhere"}, "/nowhere/a holds no adapter"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(small, tmp_path, options, sentence):
    with pytest.raises(BadInput, match=sentence):
        calls.evaluate_suite(small, output=tmp_path / "o", **options)
    assert not (tmp_path / "o").exists()


def test_an_output_that_is_something_else_and_a_damaged_picture_are_refused(small, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(BadInput, match="not a result of FastSIU"):
        calls.evaluate_suite(small, output=tmp_path)
    broken = small / "concepts/c/images/2.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:40])
    try:
        with pytest.raises(BadInput, match="2.png"):
            calls.evaluate_suite(small, output=tmp_path / "o", concepts=["a"])
    finally:
        broken.write_bytes(whole)


def test_the_command(small, tmp_path, capsys):
    from fastsiu.cli import run

    assert run(["suite", str(small), "--check"]) == 0
    assert "3 concepts, 9 pictures, 3 questions" in capsys.readouterr().err
    command = [
        "suite",
        str(small),
        "--output",
        str(tmp_path / "o"),
        "--limit",
        "1",
        "--concepts",
        "a",
    ]
    assert run([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [one["slug"] for one in report["concepts"]] == ["a"] and report["of"] == 3
    assert run(command) == 0
    assert "1 of 1 were done already" in capsys.readouterr().out
    for more, sentence in (
        (["eval", "--suite", str(small)], f"verb of their own: `fastsiu suite {small}`"),
        (["eval"], "nothing to measure"),
        (["suite", str(small), "--concept", "X"], "No such option"),
        (["suite", str(small), "--steps", "3"], "add --unlearn"),
        (["suite", str(small), "--preset", "paper"], "add --unlearn"),
        (["suite", str(small), "--unlearn", "--adapter", "x"], "exclude each other"),
    ):
        assert run(more) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())


# Two runs, one output -----------------------------------------------------------------------------


@pytest.fixture
def stubbed(small, monkeypatch):
    """evaluate_suite without a model: each concept takes a moment, and who did it is noted. Gives
    (notes, call)."""
    import threading
    from contextlib import nullcontext

    from fastsiu import output as outputs

    notes: list[str] = []

    def one(loaded, job, subject, listener):
        notes.append(subject.slug)
        time.sleep(0.2)
        if subject.slug == fails.get("slug"):
            raise BadInput(f"The picture {str(job.given.directory / 'b.png')!r} is damaged.")
        transaction = outputs.Transaction(job.output / subject.slug)
        with transaction as folder:
            outputs.write_reports(
                folder,
                {
                    "verdict": None,
                    "adapter": False,
                    "reasons": [],
                    "rows": {},
                    "concept": subject.name,
                },
            )
            transaction.commit(suite_job.manifest(job, subject, transaction.key, {}))

    fails: dict[str, str] = {}
    monkeypatch.setattr(suite_run, "one", one)
    monkeypatch.setattr(suite_run, "PAUSE", 0.02)
    monkeypatch.setattr(suite_job, "load", lambda *a, **k: None)
    monkeypatch.setattr(suite_run.vlm, "threads", lambda loaded: nullcontext())
    monkeypatch.setattr(suite_table, "pooled", lambda rows: {})
    monkeypatch.setattr(outputs, "write_reports", plain_reports)

    def call(output, workers, **options):
        found: dict[int, object] = {}

        def work(number):
            try:
                found[number] = calls.evaluate_suite(
                    small, output=output, limit=1, per_other=1, **options
                )
            except BaseException as error:
                found[number] = error

        threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[number] for number in range(workers)]

    return notes, call, fails


def plain_reports(folder, report):
    (folder / "report.json").write_text(json.dumps(report))


@pytest.mark.parametrize("workers", [2, 4])
def test_runs_that_share_an_output_share_the_work_and_all_end_well(stubbed, tmp_path, workers):
    """A lock is a file description's, so threads exclude each other as processes do."""
    notes, call, _ = stubbed
    ended = call(tmp_path / "o", workers)
    assert not [e for e in ended if isinstance(e, BaseException)], ended
    assert sorted(notes) == ["a", "b", "c"]
    for one in ended:
        assert one.exit_code == 0 and [o.status for o in one.outcomes] == ["untouched"] * 3
    table = json.loads((tmp_path / "o" / "suite.json").read_text())
    assert [c["slug"] for c in table["concepts"]] == ["a", "b", "c"]
    assert sorted(os.listdir(tmp_path / "o")) == ["a", "b", "c", "report.md", "suite.json"]


def test_what_fails_for_one_run_is_tried_by_the_other_and_costs_only_itself(stubbed, tmp_path):
    notes, call, fails = stubbed
    fails["slug"] = "b"
    ended = call(tmp_path / "o", 2)
    assert sorted(set(notes)) == ["a", "b", "c"] and notes.count("a") == notes.count("c") == 1
    assert [[o.status for o in one.outcomes] for one in ended] == [
        ["untouched", "failed", "untouched"]
    ] * 2
    assert {one.exit_code for one in ended} == {1}
    said = json.loads((tmp_path / "o" / "suite.json").read_text())["concepts"][1]["reasons"]
    assert said == ["The picture 'the suite/b.png' is damaged."]  # whoever reads it knows no place


@pytest.mark.parametrize("join", [False, True])
def test_a_suite_is_not_written_over_by_its_own_table(small, tmp_path, join):
    from fastsiu.evaluate.suites import join as suite_join

    place = shutil.copytree(small, tmp_path / "mine")
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    run = suite_join.join_suite if join else calls.evaluate_suite
    with pytest.raises(BadInput, match="suite.json is not the table of an evaluation"):
        run(place, output=place)
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before


def test_what_a_dead_run_was_at_is_taken_over(stubbed, tmp_path):
    """Its claim and its staging directory are there, and nobody holds their locks."""
    from fastsiu.disk import staging

    notes, call, _ = stubbed
    output = tmp_path / "o"
    call(output, 1, concepts=["a"])
    with staging.claim(output, "b") as mine:
        assert mine
        left = [p for p in output.iterdir() if p.name.startswith(staging.CLAIM)]
        data = left[0].read_bytes()
    left[0].write_bytes(data)
    (output / f"{staging.PREFIX}{staging.here()}-1-00000000").mkdir()
    ended = call(output, 1)
    assert notes == ["a", "b", "c"] and ended[0].exit_code == 0 and ended[0].resumed == 1
    assert sorted(os.listdir(output)) == ["a", "b", "c", "report.md", "suite.json"]


def test_a_run_waits_for_another_that_is_at_the_last_concept(stubbed, tmp_path):
    import threading

    from fastsiu.disk import staging

    notes, call, _ = stubbed
    output = tmp_path / "o"
    call(output, 1, concepts=["a", "b"])
    taken, give_back = threading.Event(), threading.Event()

    def hold():
        with staging.claim(output, "c"):
            taken.set()
            give_back.wait()

    other = threading.Thread(target=hold)
    other.start()
    taken.wait()
    told: list[str] = []
    listener = Listener(
        stage=lambda text: (
            (told.append(text), give_back.set()) if text.startswith("Waiting") else None
        )
    )
    ended = call(output, 1, listener=listener)
    other.join()
    assert told[0] == "Waiting for another run that is at c"
    assert notes == ["a", "b", "c"] and ended[0].exit_code == 0


def test_a_changed_byte_of_a_done_concept_is_told(stubbed, tmp_path):
    notes, call, _ = stubbed
    call(tmp_path / "o", 1)
    report = tmp_path / "o" / "b" / "report.json"
    report.write_bytes(report.read_bytes().replace(b"null", b"0000", 1))
    ended = call(tmp_path / "o", 1)
    assert (
        isinstance(ended[0], BadInput)
        and "was changed ('report.json'" in str(ended[0])
        and len(notes) == 3
    )


# Runs on several machines -------------------------------------------------------------------------


@pytest.fixture
def joined(small, stubbed):
    """join_suite without a model, by so many workers: what each returned."""
    import threading

    from fastsiu.evaluate.suites import join as suite_join
    from fastsiu.workers.claims import Pace

    def call(output, workers, **options):
        found: list[object] = []
        options = {"limit": 1, "per_other": 1} | options
        listener = options.pop("listener", None)

        def work():
            try:
                found.append(
                    suite_join.join_suite(
                        small,
                        suite_job.SuiteOptions(**options),
                        settings=settings.Settings("cpu"),
                        output=output,
                        pace=Pace(beat=0.05, patience=1.0, pause=0.02),
                        listener=listener,
                    )
                )
            except BaseException as error:
                found.append(error)

        threads = [threading.Thread(target=work) for _ in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    return call


def test_workers_that_joined_do_each_concept_once_and_one_draws_the_table(
    joined, stubbed, tmp_path
):
    notes, call, _ = stubbed
    ended = joined(tmp_path / "o", 3)
    assert not [e for e in ended if isinstance(e, BaseException)], ended
    assert sorted(notes) == ["a", "b", "c"] and [e.exit_code for e in ended] == [0, 0, 0]
    assert sum(e.share.drew for e in ended) == 1
    alone = call(tmp_path / "alone", 1)[0]
    table = json.loads((tmp_path / "o" / "suite.json").read_text())
    assert table == alone.report
    # what is done counts, for whoever joins and for a run by itself
    assert joined(tmp_path / "o", 1)[0].share.did == []
    assert call(tmp_path / "o", 1)[0].resumed == 3 and len(notes) == 6
    assert joined(tmp_path / "alone", 1)[0].share.did == []


def test_a_failure_is_tried_once_by_all_who_joined(joined, stubbed, tmp_path):
    notes, _, fails = stubbed
    fails["slug"] = "b"
    ended = joined(tmp_path / "o", 3)
    assert sorted(notes) == ["a", "b", "c"]
    assert sorted(e.exit_code for e in ended) == [0, 0, 1]  # the verdict is the table's
    stored = json.loads((tmp_path / "o" / "suite.json").read_text())["concepts"]
    assert [one["status"] for one in stored] == ["untouched", "failed", "untouched"]
    fails.clear()
    assert joined(tmp_path / "o", 1)[0].share.did == ["b"]
    stored = json.loads((tmp_path / "o" / "suite.json").read_text())["concepts"]
    assert [one["status"] for one in stored] == ["untouched"] * 3


def test_joining_with_other_options_is_refused_and_a_dry_run_counts(
    joined, small, tmp_path, capsys
):
    from fastsiu.cli import run

    joined(tmp_path / "o", 1)
    error = joined(tmp_path / "o", 1, max_new_tokens=5)[0]
    assert isinstance(error, BadInput) and "other options" in str(error)
    assert "give --output DIR" in str(joined(None, 1)[0])
    command = ["suite", str(small), "--limit", "1", "--per-other", "1"]
    assert run([*command, "--output", str(tmp_path / "o"), "--dry-run"]) == 0
    assert "3 of 3 are done, 0 failed, 0 are left" in capsys.readouterr().out
    assert run([*command, "--join", "--processes", "2"]) == 2
    assert "start the command with --join" in " ".join(capsys.readouterr().err.split())


def test_a_second_run_of_the_same_requests_is_told_before_it_trains(cast, tmp_path, monkeypatch):
    from contextlib import nullcontext
    from types import SimpleNamespace

    from fastsiu import several
    from fastsiu.disk import several_state, staging

    file, output = tmp_path / "requests.jsonl", tmp_path / "o"
    file.write_text(json.dumps({"image": str(cast.image), "concept": cast.target}) + "\n")
    monkeypatch.setattr(several, "load", lambda *a, **k: SimpleNamespace(model=None))
    monkeypatch.setattr(several.vlm, "threads", lambda loaded: nullcontext())
    monkeypatch.setattr(several._Job, "prepare", lambda *a: 1 / 0)
    output.mkdir()
    with (
        staging.claim(output, several_state.MATRIX),
        pytest.raises(BadInput, match="Another run is at work"),
    ):
        several.unlearn_several(file, output=output)
    assert list(output.iterdir()) == []
    with pytest.raises(ZeroDivisionError):
        several.unlearn_several(file, output=output)
