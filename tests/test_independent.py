"""Requests each by itself, in one process and in several that share the output."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import calls
import pytest

from fastsiu import driver, independent, manifest
from fastsiu import output as outputs
from fastsiu.cli import run
from fastsiu.disk import staging, upkeep
from fastsiu.disk.request_file import first_sentence_of
from fastsiu.independent import Sharing
from fastsiu.report.words import CONCEPT
from fastsiu.request import BadInput, NumericFailure
from fastsiu.settings import RecipeChoice, ReportOptions, Settings
from fastsiu.workers.claims import Pace

FAST = Pace(beat=0.05, patience=0.5, pause=0.02)
NAMES = ("Ann Lee", "Bob Mar", "Cid Nor")


@pytest.fixture
def file(tmp_path, cast):
    """Three requests for one picture."""
    path = tmp_path / "requests.jsonl"
    lines = [{"image": str(cast.image), "concept": name} for name in NAMES]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def stubbed(monkeypatch):
    """unlearn_on without a model; which requests were done, and which shall fail."""
    state = SimpleNamespace(done=[], fails={}, device=[])

    def unlearn_on(loaded, request, pictures, name, sealed, destination, *, listener, seconds):
        listener.stage("Training")
        if request.concept in state.fails:
            raise state.fails[request.concept]
        state.done.append(request.concept)
        told = {"verdict": "forgotten", "reasons": [], "concept": request.concept}
        transaction = outputs.Transaction(destination)
        with transaction as folder:
            (folder / "report.json").write_text(json.dumps(told))
            transaction.commit(
                outputs.manifest(
                    recipe=sealed.recipe,
                    model_id="m",
                    revision=None,
                    weights={},
                    digest=sealed.digest,
                    key=transaction.key,
                    pictures={},
                    masks={},
                )
            )
        return driver.Result(True, [], told, destination)

    monkeypatch.setattr(driver, "unlearn_on", unlearn_on)
    monkeypatch.setattr(independent, "load", lambda *a: SimpleNamespace(shares=()))
    return state


def each(file, output, **options):
    options = {"settings": Settings("cpu"), "sharing": Sharing(True, FAST)} | options
    return independent.unlearn_each(file, output=output, **options)


def table(output):
    table = json.loads((output / "requests.json").read_text())
    assert manifest.is_as_sealed(table) and len(table[manifest.SEAL]) == 64
    return table


def test_each_has_an_output_and_the_table_has_all(file, stubbed, tmp_path):
    made = each(file, tmp_path / "o", sharing=Sharing())
    assert made.exit_code == 0 and [o.output for o in made.outcomes] == ["001", "002", "003"]
    assert stubbed.done == list(NAMES) and table(tmp_path / "o")["forgotten"] == 3
    assert sorted(os.listdir(tmp_path / "o")) == [
        staging.JOIN,
        "001",
        "002",
        "003",
        "requests.json",
    ]
    again = each(file, tmp_path / "o", sharing=Sharing())
    assert again.resumed == 3 and len(stubbed.done) == 3 and again.exit_code == 0
    for number in ("001", "003"):  # what `unlearn` calls the same request
        sealed = manifest.read(tmp_path / "o" / number)
        assert sealed["files"].keys() == {"report.json"}


def test_workers_share_and_one_of_them_draws_the_table(file, stubbed, tmp_path):
    found = []
    work = lambda: found.append(each(file, tmp_path / "o"))
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(stubbed.done) == sorted(NAMES) and [e.exit_code for e in found] == [0, 0, 0]
    assert sorted(key for e in found for key in e.share.did) == ["001", "002", "003"]
    assert [e.share.drew for e in found].count(True) == 1
    each(file, tmp_path / "alone", sharing=Sharing())
    assert table(tmp_path / "o") == table(tmp_path / "alone")


@pytest.mark.parametrize("join", [True, False])
def test_a_run_that_is_refused_leaves_run_toml_as_it_is(file, stubbed, tmp_path, join):
    shown = lambda text: ReportOptions(run=text)
    each(file, tmp_path / "o", report=shown("first"))
    other = RecipeChoice(changes={"steps": 7})
    with pytest.raises(BadInput):
        each(
            file,
            tmp_path / "o",
            recipe=other,
            report=shown("second"),
            sharing=Sharing(join, FAST),
        )
    assert (tmp_path / "o/run.toml").read_text() == "first"


def test_a_failure_s_sentence_holds_no_path(file, stubbed, tmp_path, cast):
    """requests.json may be read by others: neither a directory's place nor the model's is told."""
    (tmp_path / "it's of Bob").mkdir()
    lines = file.read_text().splitlines()
    record = {
        "image": str(cast.image),
        "concept": NAMES[1],
        "retain": str(tmp_path / "it's of Bob"),
    }
    file.write_text("\n".join([lines[0], json.dumps(record)]))
    made = each(file, tmp_path / "o")
    assert [o.status for o in made.outcomes] == ["forgotten", "failed"]
    assert made.outcomes[1].reasons[0].startswith('There is no picture in "its retain"')
    for path in (tmp_path / "o").rglob("*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes(), path


def test_a_short_path_is_no_part_of_a_word():
    error = BadInput("The picture 'p' is damaged; p/x.png too.")
    said = first_sentence_of(error, {"its picture": Path("p")})
    assert said == "The picture 'its picture' is damaged; its picture/x.png too."


def test_a_failure_counts_for_what_was_asked_then(file, stubbed, tmp_path, cast):
    """The line was mended, and another was added."""
    stubbed.fails[NAMES[1]] = BadInput("no")
    assert each(file, tmp_path / "o").exit_code == 1
    lines = file.read_text().splitlines()
    lines[1] = json.dumps({"image": str(cast.image), "concept": "Eve Sun"})
    lines.append(json.dumps({"image": str(cast.image), "concept": "Fay Orr"}))
    file.write_text("\n".join(lines))
    later = each(file, tmp_path / "o")
    assert [o.status for o in later.outcomes] == ["forgotten"] * 4 and later.exit_code == 0
    assert "Eve Sun" in stubbed.done


def test_a_failure_of_an_unreadable_picture_ends_with_the_picture(file, stubbed, tmp_path, cast):
    broken = tmp_path / "p.png"
    broken.write_bytes(b"")
    lines = file.read_text().splitlines()
    lines[1] = json.dumps({"image": str(broken), "concept": NAMES[1]})
    file.write_text("\n".join(lines[:2]))
    assert [o.status for o in each(file, tmp_path / "o").outcomes] == ["forgotten", "failed"]
    broken.write_bytes(cast.image.read_bytes())
    file.write_text("\n".join(lines))
    later = each(file, tmp_path / "o")
    assert [o.status for o in later.outcomes] == ["forgotten"] * 3


def test_workers_of_two_files_do_not_take_each_other_s_failures(file, stubbed, tmp_path, cast):
    stubbed.fails[NAMES[0]] = BadInput("no")
    assert each(file, tmp_path / "o").exit_code == 1
    other = tmp_path / "other.jsonl"
    asked = [{"image": str(cast.image), "concept": name} for name in ("Eve Sun", *NAMES[1:])]
    asked.append({"image": str(cast.image), "concept": "Fay Orr"})
    other.write_text("".join(json.dumps(line) + "\n" for line in asked))
    assert each(other, tmp_path / "o").outcomes[0].status == "forgotten"


def test_a_failure_is_one_request_s_and_names_no_file(file, stubbed, tmp_path, cast):
    stubbed.fails[NAMES[1]] = BadInput(f"The model does not name X in {cast.image}.")
    made = each(file, tmp_path / "o")
    assert made.exit_code == 1 and [o.status for o in made.outcomes] == [
        "forgotten",
        "failed",
        "forgotten",
    ]
    assert "its picture" in made.outcomes[1].reasons[0]
    late = each(file, tmp_path / "o")  # nothing else was left: it tries once more
    assert late.share.failed == ["002"] and late.exit_code == 0 and late.outcomes == []
    stubbed.fails = {name: NumericFailure("It is nan.") for name in NAMES}
    assert each(file, tmp_path / "n").exit_code == 3


def test_without_join_a_second_run_is_told(file, stubbed, tmp_path):
    (tmp_path / "o").mkdir()
    with staging.claim(tmp_path / "o", independent.TABLE):
        with pytest.raises(BadInput, match="start both with --join"):
            each(file, tmp_path / "o", sharing=Sharing())
    assert stubbed.done == []


def test_what_cannot_be_used_is_said_before_anything_is_done(file, stubbed, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"image": "none.png", "concept": "A"}) + "\n")
    each(file, tmp_path / "o")
    for source, output, options, sentence in (
        (bad, tmp_path / "n", {}, "line 1: There is no"),
        (file, tmp_path / "full", {}, "full"),
        (file, None, {}, "--output DIR"),
        (file, tmp_path / "o", {"recipe": RecipeChoice(changes={"seed": 5})}, "other options"),
        (file, tmp_path / "o", {"report": ReportOptions(redact=True)}, "other options"),
    ):
        with pytest.raises(BadInput, match=sentence):
            each(source, output, **options)
    assert not (tmp_path / "n").exists() and len(stubbed.done) == 3


def test_lines_that_moved_are_refused(file, stubbed, tmp_path):
    each(file, tmp_path / "o")
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    with pytest.raises(BadInput, match="result of another request"):
        each(file, tmp_path / "o")


def test_with_redact_no_name_is_on_disk(file, stubbed, tmp_path):
    stubbed.fails[NAMES[1]] = BadInput(f"The model does not name {NAMES[1]} in it.")
    made = each(file, tmp_path / "o", report=ReportOptions(redact=True))
    assert {o.concept for o in made.outcomes} == {CONCEPT}
    join = tmp_path / "o" / staging.JOIN
    for path in (tmp_path / "o" / "requests.json", *join.iterdir()):
        assert not any(name in path.read_text() for name in NAMES), path
        assert path.stat().st_mode & 0o77 == 0
    assert join.stat().st_mode & 0o77 == 0


def test_the_command_tells_how_long_and_refuses_what_makes_no_sense(
    file, stubbed, tmp_path, capsys
):
    command = ["unlearn", "--request", str(file), "--mode", "independent", "--device", "cpu"]
    out = ["--output", str(tmp_path / "o")]
    assert run([*command, *out, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "0 of 3 are done" in told and not (tmp_path / "o").exists()
    assert run([*command, *out, "--join"]) == 0
    assert "This worker did 3 of 3" in " ".join(capsys.readouterr().out.split())
    assert run([*command, *out, "--join"]) == 0  # the table is there: another worker's verdict
    assert "The table of all is there" in capsys.readouterr().out
    assert run([*command, *out, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["done"] == 3 and len(found["took"]) == 3 and found["seconds"] == 0
    for more, sentence in (
        (["unlearn", "--request", str(file), "--join"], "--mode independent"),
        (["unlearn", "--image", "x", "--concept", "y", "--dry-run"], "--mode independent"),
        ([*command, "--join"], "give --output DIR"),
        ([*command, "--dry-run"], "give --output DIR"),
    ):
        assert run(more) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())


def test_verify_and_purge_know_the_files(file, stubbed, tmp_path, capsys):
    each(file, tmp_path / "o")
    assert upkeep.verify(tmp_path / "o").wrong == []
    (tmp_path / "o" / staging.JOIN / "mine.txt").write_text("x")
    assert run(["purge", str(tmp_path / "o"), "--all", "--yes"]) == 0
    left = [p.relative_to(tmp_path).as_posix() for p in (tmp_path / "o").rglob("*")]
    assert sorted(left) == [f"o/{staging.JOIN}", f"o/{staging.JOIN}/mine.txt"]


def test_a_launcher_s_environment_starts_no_process_group(file, stubbed, tmp_path, monkeypatch):
    import torch

    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: 1 / 0)
    assert each(file, tmp_path / "o").exit_code == 0


@pytest.mark.slow
def test_really_each_is_the_adapter_of_the_request_alone(cast, tmp_path):
    """The second of two on one model, with a launcher's environment, beside `unlearn`."""
    quick = dict(steps=1, dreams=0, strangers=0, batch_size=8, early_stop=False)
    path = tmp_path / "requests.jsonl"
    lines = [
        {"image": str(cast.files[k]), "concept": getattr(cast, k)} for k in ("other", "target")
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = each(path, tmp_path / "o", recipe=RecipeChoice(changes=quick))
    assert [o.status for o in made.outcomes] == ["not forgotten"] * 2 and made.exit_code == 1
    calls.unlearn(cast.image, cast.target, output=tmp_path / "alone", device="cpu", **quick)
    one, other = (
        (place / "adapter_model.safetensors").read_bytes()
        for place in (tmp_path / "o" / "002", tmp_path / "alone")
    )
    assert one == other
    # it is a result of `unlearn` itself
    same = calls.unlearn(
        cast.image, cast.target, output=tmp_path / "o" / "002", device="cpu", **quick
    )
    assert same.repeated
