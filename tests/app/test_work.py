"""The worker's commands on the embedded model: the same adapter as without the app."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import typer
from PIL import Image

from fastsiu import manifest
from fastsiu.app import work as working
from fastsiu.app.job import Asked
from fastsiu.app.work import Work, _done
from fastsiu.cli import app as cli_app
from fastsiu.cli import config
from fastsiu.model.memory import Layout
from fastsiu.request import BadInput, Recipe
from fastsiu.settings import Settings

FEW = {"steps": 9, "lr": 3e-3, "dreams": 1, "dream_steps": 5, "strangers": 0, "neighbours": 1}
RECIPE = {**FEW, "batch_size": 8, "seed": 3}


@pytest.fixture(scope="module")
def worked(cast, tmp_path_factory):
    """Everything that the app does with the target, once."""
    place, events = tmp_path_factory.mktemp("work"), []
    work = Work(lambda kind, value: events.append((kind, value)), {"device": "cpu"}, RECIPE)
    asked = Asked(cast.target, cast.image)
    said, samples = work.look(asked), work.gather(asked)
    result = work.train(asked, place / "result", place / "adapter.zip")
    return SimpleNamespace(
        work=work, asked=asked, place=place, events=events, said=said, samples=samples, **result
    )


@pytest.mark.slow
def test_the_adapter_is_the_one_of_unlearn(worked, cast, demo_dir, tmp_path):
    import calls

    calls.unlearn(
        cast.image, cast.target, model=demo_dir, device="cpu", output=tmp_path / "out", **RECIPE
    )
    adapter = "adapter_model.safetensors"
    own, other = (place / adapter for place in (worked.place / "result", tmp_path / "out"))
    assert own.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_what_is_told_on_the_way(worked, cast):
    assert all(named for _, _, named in worked.said)
    assert worked.samples["count"] >= len(worked.samples["rows"]) > 20
    masked = [text for _, _, answer in worked.samples["rows"] for text, _, name in answer if name]
    assert masked
    assert all(text.strip().casefold() in cast.target.casefold() for text in masked), masked
    looks = [value for kind, value in worked.events if kind == "look"]
    assert [step for step, _, _ in looks] == [8]
    steps = [value for kind, value in worked.events if kind == "step"]
    assert steps[-1][0]["step"] == len(steps) == 9
    assert steps[-1][1] == 9


@pytest.mark.slow
def test_another_process_answers_with_the_stored_adapter(worked, cast):
    other = Work(lambda kind, value: None, {"device": "cpu"}, RECIPE)
    place, question = worked.place / "result", "Who is this?"
    for picture in (cast.image, None):
        before, after = worked.work.ask(worked.asked, place, question, picture)
        assert other.ask(worked.asked, place, question, picture) == (before, after)
        if picture is not None:
            assert cast.target in before


@pytest.mark.slow
def test_the_untouched_model_is_asked_after_a_training(worked, cast):
    stranger = Asked(cast.stranger, cast.files["stranger"])
    assert not any(named for _, _, named in worked.work.look(stranger))
    assert all(named for _, _, named in worked.work.look(worked.asked))


@pytest.mark.parametrize("redact", [False, True])
def test_the_file_that_repeats_a_training_lacks_the_picture_alone(tmp_path, redact):
    asked = Asked('Zo "Q"', tmp_path / "upload.png", str(tmp_path), ("A", "B"), "person", redact)
    text = working.run_file(asked, Settings("cpu", memory=2.5))
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    _, filled = config.defaults(typer.main.get_command(cli_app), [], tmp_path / "run.toml")
    told = {"kind": "person", "device": "cpu", "memory": "2.5"}
    private = {"concept": 'Zo "Q"', "alias": ["A", "B"], "model": str(tmp_path)}
    assert filled["unlearn"] == told | ({"redact": True} if redact else private)
    assert "browser: image." in text and "upload" not in text
    assert ("redacted: concept, alias, model." in text) == redact
    assert 'model = "owner/name"' in working.run_file(
        Asked("Z", tmp_path, "owner/name"), Settings()
    )


def test_what_cannot_be_used_is_a_sentence(tmp_path):
    work = Work(lambda kind, value: None, {}, {})
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    asked = Asked("Ann", tmp_path / "a.png", model=str(tmp_path))
    assert _done(work.look, (asked,)) == (
        "refused",
        f"{tmp_path} has no config.json: give the directory of a complete Hugging Face model.",
    )
    with pytest.raises(BadInput):
        work.look(asked)


@pytest.fixture
def loads(monkeypatch, tmp_path):
    """A model's directory, and a worker whose loads are counted."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    made, planned = [], []

    def load(model, layout, room, listener):
        made.append(layout)
        return SimpleNamespace(name=model.name)

    def choose(model, settings, recipe, picture, listener):
        planned.append(picture.size)
        return Layout(micro_batch=len(planned))

    monkeypatch.setattr(working, "load", load)
    monkeypatch.setattr(working, "choose_layout", choose)
    monkeypatch.setattr(working.adapter, "detach", lambda loaded: None)

    def worker(**settings):
        work = Work(lambda kind, value: None, settings, {})
        asked = Asked("Ann Bole", tmp_path / "p.png", str(tmp_path))
        return work, lambda side: work._model(asked, Recipe(), Image.new("RGB", (side, side)))

    return SimpleNamespace(place=tmp_path, made=made, planned=planned, worker=worker)


def test_a_model_that_changed_on_the_disk_is_loaded_anew(loads):
    """Else the manifest would say that the new files were trained on."""
    work, model = loads.worker()
    assert model(8) is model(8) and len(loads.made) == 1
    before = work.weights
    (loads.place / "model.safetensors").write_bytes(b"trained on")
    assert work.weights == before  # those of the weights in memory
    model(8)
    assert len(loads.made) == 2 and work.weights != before
    assert work.weights == manifest.digest_model(loads.place)


def test_a_larger_picture_is_planned_for_under_a_memory_limit(loads):
    work, model = loads.worker(memory=4.0)
    for side in (8, 4, 8, 16, 8):
        model(side)
    assert loads.planned == [(8, 8), (16, 16)] and len(loads.made) == 2
    _, model = loads.worker()
    for side in (8, 16):
        model(side)
    assert len(loads.made) == 3


def test_a_failure_of_our_own_is_told_without_its_values(capfd):
    def fails():
        raise KeyError("a private name")

    kind, sentence = _done(fails, ())
    assert kind == "refused"
    assert "KeyError" in sentence
    assert "private name" not in sentence + capfd.readouterr().err
