"""Several requests in one load: order, failures, interruptions, what must not be retained, and who
is still forgotten."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import calls
import pytest
import torch
from safetensors.torch import load_file

from fastsiu import cli, driver, images, session, settings, train
from fastsiu.demo.world import LOOKALIKES
from fastsiu.disk import request_file, upkeep
from fastsiu.model import ask
from fastsiu.request import BadInput, NumericFailure, OutOfMemory, Recipe, Request, Sample
from fastsiu.samples import corpus
from fastsiu.samples.beside import samples_beside
from fastsiu.settings import RecipeChoice
from fastsiu.step.look import Probe
from fastsiu.text.concept import Concept, concept_of

torch.set_num_threads(1)

QUICK = dict(device="cpu", steps=1, dreams=0, strangers=0, batch_size=8, early_stop=False)
WEIGHTS = "adapter_model.safetensors"


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def adapter_of(directory):
    return load_file(directory / WEIGHTS)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def lines(cast):
    """Three requests; the second is about a picture that the model does not recognise."""
    return SimpleNamespace(
        target=dict(image=str(cast.files["target"]), concept=cast.target),
        bad=dict(image=str(cast.files["stranger"]), concept=cast.stranger),
        other=dict(image=str(cast.files["other"]), concept=cast.other),
    )


@pytest.fixture(scope="module")
def sequence(lines, tmp_path_factory):
    """All three, one after another."""
    folder = tmp_path_factory.mktemp("sequence")
    file = write(folder / "requests.jsonl", lines.target, lines.bad, lines.other)
    return SimpleNamespace(
        file=file,
        output=folder / "out",
        made=calls.unlearn_several(file, output=folder / "out", **QUICK),
    )


# --------------------------------------------------------------------------------------------------
# the file


@pytest.mark.parametrize(
    "record, sentence",
    [
        ("{", "line 2: "),
        ([], "must be strings"),
        ({"image": "x.png"}, "must be strings"),
        ({"image": "", "concept": "Ann"}, "'image' is empty"),
        ({"image": "x.png", "concept": "Ann", "retain": ""}, "'retain' is empty"),
        ({"image": "x.png", "concept": " "}, "name is empty"),
        ({"image": "x.png", "concept": "A", "colour": 1}, "'colour' is none of"),
        ({"image": "x.png", "concept": "A", "aliases": "B"}, "must be a list of names"),
        ({"image": "x.png", "concept": "first  NAME"}, "asked for on line 1 already"),
    ],
)
def test_a_bad_line_is_named(tmp_path, record, sentence):
    file = write(tmp_path / "r.jsonl", {"image": "x.png", "concept": "First Name"})
    with file.open("a") as stream:
        stream.write(record if isinstance(record, str) else json.dumps(record))
    with pytest.raises(BadInput, match="line 2") as error:
        request_file.read_requests(file)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("first", "second"), [("Ann", "Ann Lee"), ("Ann Lee", "Ann"), ("Castle Ann", "Ann")]
)
def test_a_name_inside_of_another_is_another_request(tmp_path, first, second):
    file = write(
        tmp_path / "r.jsonl", *({"image": "x.png", "concept": name} for name in (first, second))
    )
    assert [request.concept for _, request in request_file.read_requests(file)] == [first, second]


def test_paths_count_from_the_file(tmp_path):
    record = dict(
        image="a.png",
        concept="A",
        aliases=["B"],
        protect=["C"],
        images="more",
        retain="rest",
        data="own.jsonl",
    )
    (tmp_path / "r.jsonl").write_text("\ufeff\n" + json.dumps(record) + "\n\n", encoding="utf-8")
    assert request_file.read_requests(tmp_path / "r.jsonl") == [
        (
            2,
            Request(
                "A",
                tmp_path / "a.png",
                ("B",),
                ("C",),
                tmp_path / "more",
                tmp_path / "rest",
                tmp_path / "own.jsonl",
            ),
        )
    ]


def test_what_cannot_be_used_is_said_before_the_model_is_loaded(
    tmp_path, monkeypatch, lines, sequence
):
    monkeypatch.setattr(driver.vlm, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    good = write(tmp_path / "r.jsonl", lines.target)
    for file, options, sentence in (
        (tmp_path / "none.jsonl", {}, "There is no file"),
        (tmp_path / "empty.jsonl", {}, "holds no request"),
        (
            write(tmp_path / "b.jsonl", lines.target, dict(lines.other, image="none.png")),
            {},
            "line 2",
        ),
        (good, dict(output=tmp_path / "full"), "full"),
        (good, dict(mode="both"), "'both' is unknown"),
        (good, dict(output=sequence.output), "results of other requests"),
        (sequence.file, dict(output=sequence.output, mode="joint"), "results of other requests"),
        (sequence.file, dict(output=sequence.output, seed=5), "output"),
    ):
        with pytest.raises(BadInput) as error:
            calls.unlearn_several(file, **(dict(output=tmp_path / "out") | QUICK | options))
        assert sentence in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["sequence", "joint"])
def test_samples_that_cannot_be_used_are_told_before_the_model_is_loaded(
    tmp_path, monkeypatch, lines, mode
):
    """Else the training of the requests before them would be over."""
    monkeypatch.setattr(driver.vlm, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    (tmp_path / "own.jsonl").write_text('{"question": "Who?"}\n')
    file = write(tmp_path / "r.jsonl", lines.target, dict(lines.other, data="own.jsonl"))
    with pytest.raises(BadInput, match="line 2: .*own.jsonl, line 1"):
        calls.unlearn_several(file, **(dict(output=tmp_path / "out", mode=mode) | QUICK))
    assert not (tmp_path / "out").exists()


def test_what_is_printed_of_redacted_requests_names_nobody(tmp_path, capsys, cast):
    """Neither the JSON of the result nor the notes on the way, which a log may keep."""
    lines = [{"image": str(cast.image), "concept": name} for name in ("Zorblax Quint", "Bob Mar")]
    file = write(tmp_path / "r.jsonl", *lines)
    command = ["unlearn", "--request", str(file), "--mode", "joint", "--redact", "--json"]
    assert cli.run([*command, "--device", "cpu", "--output", str(tmp_path / "o")]) == 2
    printed = "".join(capsys.readouterr())
    assert '"failed"' in printed
    assert not [w for w in ("Zorblax", "Quint", "Bob", "Mar ", cast.image.name) if w in printed]


# --------------------------------------------------------------------------------------------------
# one after another


def test_each_has_an_output_and_a_failure_costs_the_others_nothing(sequence, lines, tmp_path):
    made, output = sequence.made, sequence.output
    assert [o.line for o in made.outcomes] == [1, 2, 3] and [o.output for o in made.outcomes] == [
        "001",
        None,
        "003",
    ]
    assert (
        made.outcomes[1].status == "failed"
        and "does not name" in made.outcomes[1].reasons[0]
        and not made.forgotten
    )
    assert sorted(p.name for p in output.iterdir()) == ["001", "003", "matrix.json"]
    for o in (made.outcomes[0], made.outcomes[2]):
        report = json.loads((output / o.output / "report.json").read_text(encoding="utf-8"))
        assert (report["verdict"], report["reasons"], report["concept"]) == (
            o.status,
            o.reasons,
            o.concept,
        )
        assert (output / o.output / "manifest.json").is_file()
    first, last = (
        json.loads((output / n / "report.json").read_text(encoding="utf-8"))["samples"]
        for n in ("001", "003")
    )
    # the first one's are trained on again
    assert all(last[facet] == 2 * first[facet] for facet in ("align", "describe"))
    without = calls.unlearn_several(
        write(tmp_path / "r.jsonl", lines.target, lines.other), output=tmp_path / "out", **QUICK
    )
    assert same(adapter_of(output / "001"), adapter_of(tmp_path / "out/001"))
    assert same(adapter_of(output / "003"), adapter_of(tmp_path / "out/002"))
    assert not same(adapter_of(output / "001"), adapter_of(output / "003")) and without.matrix[-1][
        "after"
    ] == [1, 2]


def test_the_matrix_asks_everything_so_far(sequence, loaded, cast):
    assert [row["after"] for row in sequence.made.matrix] == [[1], [1, 3]]
    assert [set(row["named"]) for row in sequence.made.matrix] == [{"1"}, {"1", "3"}]
    assert all(0 <= share <= 1 for row in sequence.made.matrix for share in row["named"].values())
    stored = json.loads((sequence.output / "matrix.json").read_text(encoding="utf-8"))
    assert stored["matrix"] == sequence.made.matrix and stored["order"] == [1, 3]
    # one step forgets nothing: the matrix says so
    assert sequence.made.matrix[0]["named"]["1"] > 0.5


def test_again_does_what_is_missing_and_no_more(sequence, monkeypatch):
    before = {
        p: p.stat().st_mtime_ns for p in sequence.output.rglob("*") if p.name != "matrix.json"
    }
    # tries the one that failed once more
    again = calls.unlearn_several(sequence.file, output=sequence.output, **QUICK)
    assert (
        again.resumed == 2
        and again.outcomes == sequence.made.outcomes
        and again.matrix == sequence.made.matrix
    )
    assert before == {
        p: p.stat().st_mtime_ns for p in sequence.output.rglob("*") if p.name != "matrix.json"
    }


def test_a_table_that_was_changed_decides_no_verdict(sequence, tmp_path):
    place = shutil.copytree(sequence.output, tmp_path / "out")
    table = json.loads((place / "matrix.json").read_text(encoding="utf-8"))
    for one in table["requests"]:
        one["status"], one["reasons"] = "gone for good", ["because"]
    (place / "matrix.json").write_text(json.dumps(table), encoding="utf-8")
    assert upkeep.verify(place).wrong == [f"{place / 'matrix.json'} is not as written."]
    again = calls.unlearn_several(sequence.file, output=place, **QUICK)
    assert again.outcomes == sequence.made.outcomes


def test_every_training_starts_from_a_fresh_adapter_and_holds_all_so_far(
    lines, tmp_path, monkeypatch
):
    fit, seen = train.fit, []

    def watched(vlm, corpus, objective, recipe, probe, *rest, **options):
        seen.append(
            (
                recipe.steps,
                [float(p.abs().max()) for n, p in vlm.model.named_parameters() if "lora_B" in n],
            )
        )
        looks = [probe() for _ in range(2)]
        # of two, each sees another half
        assert looks[0].shares == len(seen) and (looks[0] == looks[1]) is (len(seen) == 1)
        return fit(vlm, corpus, objective, recipe, probe, *rest, **options)

    monkeypatch.setattr(train, "fit", watched)
    calls.unlearn_several(
        write(tmp_path / "r.jsonl", lines.target, lines.other), output=tmp_path / "out", **QUICK
    )
    assert [steps for steps, _ in seen] == [QUICK["steps"], 2 * QUICK["steps"]]
    assert all(B and not any(B) for _, B in seen)


def test_looks_in_turn_see_everything(loaded, gathered, monkeypatch):
    """Of three requests a look costs what one request's costs, and three in a row have scored every
    turn once."""
    scored, score = [], ask.label_scores

    def watched(vlm, turns, pictures, **options):
        # The same words about two pictures are one turn.
        scored.append(
            [(id(turn), id(picture)) for turn, picture in zip(turns, pictures, strict=True)]
        )
        return score(vlm, turns, pictures, **options)

    look = Probe([gathered.scene] * 3, gathered.corpus)
    monkeypatch.setattr(ask, "label_scores", watched)
    looks = [look() for _ in range(3)]
    of_names, of_samples = scored[0::2], scored[1::2]
    shown = gathered.corpus.shown()
    whole = sorted(
        (id(turn), id(picture)) for turn, picture in zip(gathered.corpus.turns, shown, strict=True)
    )
    assert sorted(sum(of_samples, [])) == whole and all(one.shares == 3 for one in looks)
    for parts in (of_names, of_samples):
        assert (
            len(set(sum(parts, []))) == sum(map(len, parts))
            and max(map(len, parts)) <= min(map(len, parts)) + 5
        )
    assert all(one.learned > 0 or one.retained > 0 for one in looks)


def test_a_glance_at_the_names_of_several_takes_turns_too(gathered, monkeypatch):
    """The names are gone when each share was good, one after the other."""
    probe, asked = Probe([gathered.scene] * 3, gathered.corpus), []
    likely = iter((0.0, 0.0, 0.9, 0.0, 0.0, 0.0))
    monkeypatch.setattr(Probe, "_p_name", lambda self, share: asked.append(share) or next(likely))
    assert [probe.gone() for _ in range(6)] == [False] * 5 + [True]
    assert asked == [slice(i, None, 3) for i in (0, 1, 2)] * 2


def test_an_interrupted_run_ends_as_if_it_had_not_been(sequence, lines, tmp_path, monkeypatch):
    file = write(tmp_path / "r.jsonl", lines.target, lines.other)
    learn, begun = session.learn, []

    def interrupted(*given, **options):
        begun.append(1)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return learn(*given, **options)

    monkeypatch.setattr(session, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calls.unlearn_several(file, output=tmp_path / "out", **QUICK)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["001", "matrix.json"]
    made = calls.unlearn_several(file, output=tmp_path / "out", **QUICK)
    assert made.resumed == 1 and same(
        adapter_of(tmp_path / "out/002"), adapter_of(sequence.output / "003")
    )


def test_killed_between_the_output_and_the_matrix(sequence, lines, tmp_path, monkeypatch):
    """The output counts: it is not made again, and the row of the matrix is."""
    out = tmp_path / "out"
    shutil.copytree(sequence.output, out)
    stored = json.loads((out / "matrix.json").read_text(encoding="utf-8"))
    stored |= dict(order=[1], matrix=stored["matrix"][:1])
    (out / "matrix.json").write_text(json.dumps(stored), encoding="utf-8")
    monkeypatch.setattr(session, "learn", lambda *a, **k: pytest.fail("something was trained"))
    made = calls.unlearn_several(sequence.file, output=out, **QUICK)
    assert (
        made.resumed == 2
        and made.matrix == sequence.made.matrix
        and made.outcomes == sequence.made.outcomes
    )


@pytest.mark.parametrize(
    "at, error",
    [
        (1, NumericFailure("It is nan.")),
        (2, NumericFailure("It is nan.")),
        (2, OutOfMemory("It is nan, and does not fit.")),
    ],
)
def test_a_training_that_fails_leaves_nothing_behind(
    lines, sequence, tmp_path, monkeypatch, at, error
):
    """The next request in the same process is trained as if the failed one had never been there."""
    fit, begun = train.fit, []

    def diverges(vlm, *given, **options):
        begun.append(1)
        if len(begun) == at:
            with torch.no_grad():
                for p in vlm.model.parameters():
                    if p.requires_grad:
                        p.fill_(float("nan"))
            vlm.model.train()
            raise error
        return fit(vlm, *given, **options)

    monkeypatch.setattr(train, "fit", diverges)
    records = (
        [lines.target, lines.other]
        if at == 1
        else [lines.target, dict(lines.other, concept="Nobody Else"), lines.other]
    )
    monkeypatch.setattr(session, "check_known", lambda *given: None)
    made = calls.unlearn_several(
        write(tmp_path / "r.jsonl", *records), output=tmp_path / "out", **QUICK
    )
    assert made.outcomes[at - 1].status == "failed" and "nan" in made.outcomes[at - 1].reasons[0]
    monkeypatch.undo()
    if at == 2:
        assert same(adapter_of(tmp_path / "out/003"), adapter_of(sequence.output / "003"))
        return
    calls.unlearn_several(
        write(tmp_path / "alone.jsonl", lines.other), output=tmp_path / "alone", **QUICK
    )
    assert same(adapter_of(tmp_path / "out/002"), adapter_of(tmp_path / "alone/001"))


# --------------------------------------------------------------------------------------------------
# at once


def test_joint(lines, cast, tmp_path, monkeypatch):
    file = write(tmp_path / "r.jsonl", lines.target, lines.bad, lines.other)
    made = calls.unlearn_several(file, mode="joint", output=tmp_path / "out", **QUICK)
    joint = tmp_path / "out" / "joint"
    assert [o.status for o in made.outcomes][1] == "failed" and [
        o.output for o in made.outcomes
    ] == ["joint", None, "joint"]
    assert [row["after"] for row in made.matrix] == [[1, 3]] and adapter_of(joint)
    concepts = [
        json.loads((joint / n / "report.json").read_text(encoding="utf-8"))["concept"]
        for n in ("001", "002")
    ]
    assert concepts == [lines.target["concept"], lines.other["concept"]]
    steps = json.loads((joint / "001/report.json").read_text(encoding="utf-8"))["training"]
    assert len(steps) == 2  # the ceiling is that of both
    stored = (tmp_path / "out/matrix.json").read_text(encoding="utf-8")
    # only the manifest speaks of pictures, and by commitments
    assert str(cast.files["stranger"]) not in stored
    monkeypatch.setattr(session, "learn", lambda *a, **k: pytest.fail("something was trained"))
    again = calls.unlearn_several(file, mode="joint", output=tmp_path / "out", **QUICK)
    assert again.outcomes == made.outcomes and again.matrix == made.matrix
    # Killed between the output and the matrix: the output counts, and what was to be asked is
    # asked.
    cut = json.loads(stored)
    for request in cut["requests"]:
        request |= dict(status="", reasons=[], output=None) if request["line"] != 2 else {}
    (tmp_path / "out/matrix.json").write_text(json.dumps(cut | dict(matrix=[])), encoding="utf-8")
    again = calls.unlearn_several(file, mode="joint", output=tmp_path / "out", **QUICK)
    assert again.outcomes == made.outcomes and again.matrix == made.matrix
    with file.open("a") as stream:
        stream.write(json.dumps(dict(lines.other, concept="Somebody Else")) + "\n")
    with pytest.raises(BadInput, match="nothing can be added"):
        calls.unlearn_several(file, mode="joint", output=tmp_path / "out", **QUICK)


def test_nobody_who_is_forgotten_is_retained(loaded, cast):
    """Neither protected nor named in an answer about a picture that is kept; and asking to protect
    one is refused."""
    recipe, _ = settings.choose_recipe(
        str(settings.EMBEDDED), RecipeChoice("default", dict(dreams=1, dream_steps=5, strangers=0))
    )
    quiet = dict(listener=session.Listener(), seconds={})
    picture = images.load_image(cast.image)
    request = Request(cast.target, cast.image, retain=cast.files["other"].parent)
    alone = session.prepare(loaded, request, recipe, picture, **quiet)
    gone = next(n for n in alone.scene.neighbours if n != LOOKALIKES.get(cast.target))
    both = session.prepare(
        loaded, request, recipe, picture, others=[Concept(gone), Concept(cast.other)], **quiet
    )
    assert {gone, cast.other} & set(alone.scene.neighbours) and not {gone, cast.other} & set(
        both.scene.neighbours
    )
    kept = [
        s.answer for s in both.corpus.samples if s.picture is not None and s.facet == "preserve"
    ]
    before = [
        s.answer for s in alone.corpus.samples if s.picture is not None and s.facet == "preserve"
    ]
    assert any(cast.other in answer for answer in before) and not any(
        cast.other in a or gone in a for a in kept
    )
    assert both.scene.left_out > alone.scene.left_out
    # In words neither, where a later request has other words for the look.
    words = {
        s.question for s in alone.corpus.samples if s.facet == "preserve" and s.picture is None
    }
    look, name = next(
        (q, n) for q in sorted(words) for n in alone.scene.neighbours if f"appearance of {n}" in q
    )
    denial = Sample("describe", look, "I do not know.")
    later = SimpleNamespace(
        scene=SimpleNamespace(concept=Concept(name)), corpus=SimpleNamespace(samples=[denial])
    )
    left = {
        s.question
        for s in samples_beside(alone, [later]).samples
        if s.facet == "preserve" and s.picture is None
    }
    assert words - left == {look}
    with pytest.raises(BadInput, match="forgotten and protected"):
        protected = Request(cast.target, cast.image, protect=(gone,))
        session.prepare(loaded, protected, recipe, picture, others=[Concept(gone)], **quiet)


def test_joined_corpora(loaded, cast, gathered):
    one = gathered.corpus
    some = one.pick([i for i, s in enumerate(one.samples) if s.facet in ("align", "describe")])
    assert {s.facet for s in some.samples} == {"align", "describe"} and len(some.samples) < len(
        one.samples
    )
    both = corpus.join([one, some])
    shift, n = len(one.pictures), len(one.samples)
    assert both.pictures == one.pictures + some.pictures
    for a, b in zip(both.samples[n:], some.samples, strict=True):
        assert (
            a.picture == (None if b.picture is None else b.picture + shift) and a.answer == b.answer
        )
    ends = [r.stop for r in map(both.rows, range(len(both.samples)))]
    assert [both.rows(i).start for i in range(len(both.samples))] == [0, *ends[:-1]]
    other = corpus.build(loaded, Concept(cast.other), one.samples[:1], one.pictures, Recipe())
    mask = corpus.join([one, other]).mask
    assert torch.equal(mask.keep, one.mask.keep & other.mask.keep)
    assert set(mask.masked) == set(one.mask.masked) | set(other.mask.masked)


# --------------------------------------------------------------------------------------------------
# the command line


def test_the_command_line(sequence, tmp_path, capsys):
    from fastsiu.cli import run

    given = [
        "unlearn",
        "--request",
        str(sequence.file),
        "--output",
        str(sequence.output),
        "--steps",
        "1",
        "--batch-size",
        "8",
    ]
    assert run(["unlearn", "--image", "x.png"]) == 2 and "--request" in capsys.readouterr().err
    assert run([*given, "--concept", "A"]) == 2 and "exclude each other" in capsys.readouterr().err
    assert run([*given, "--mode", "joint"]) == 2 and "other requests" in " ".join(
        capsys.readouterr().err.split()
    )
    write(tmp_path / "r.jsonl", *map(json.loads, sequence.file.read_text().splitlines()[:1]))
    made = [
        "unlearn",
        "--request",
        str(tmp_path / "r.jsonl"),
        "--output",
        str(tmp_path / "out"),
        "--steps",
        "1",
    ]
    assert run([*made, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (
        not found["forgotten"]
        and found["requests"][0]["output"] == "001"
        and found["matrix"][0]["after"] == [1]
    )
    assert run(made) == 1
    shown = capsys.readouterr().out
    assert (
        "after 1" in shown
        and "Not all forgotten." in shown
        and "1 of 1 were done already." in shown
    )


def test_a_line_says_the_kind(tmp_path):
    line = {"image": "x.png", "concept": "lion"}
    ((_, request),) = request_file.read_requests(write(tmp_path / "r.jsonl", line))
    assert request.kind is None
    ((_, request),) = request_file.read_requests(
        write(tmp_path / "s.jsonl", line | {"kind": "thing"})
    )
    assert request.kind == "thing"
    for wrong in ("monster", 1, ["thing"]):
        with pytest.raises(BadInput, match="line 1: The kind .* is unknown: choose from person"):
            request_file.read_requests(write(tmp_path / "t.jsonl", line | {"kind": wrong}))


@pytest.mark.parametrize(
    ("given", "read"), [({}, None), ({"as_word": True}, True), ({"as_word": False}, False)]
)
def test_a_line_says_how_a_word_counts(tmp_path, given, read):
    file = write(tmp_path / "r.jsonl", {"image": "x.png", "concept": "Rose", **given})
    ((_, request),) = request_file.read_requests(file)
    assert request.as_word is read and concept_of(request).as_word is read
    with pytest.raises(BadInput, match="as_word must be true, false or null"):
        request_file.read_requests(
            write(tmp_path / "s.jsonl", {"image": "x.png", "concept": "Rose", "as_word": 1})
        )
