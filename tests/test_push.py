"""A result goes to a stand-in for the hub: what goes, what never does, and that plain PEFT loads it
by its id."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer, errors_of
from huggingface_hub import ModelCard, constants, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from reports import report as made_report

from fastsiu import cli, manifest
from fastsiu import output as outputs
from fastsiu.disk.upkeep import verify
from fastsiu.model import licence
from fastsiu.push import Hub, collect, push
from fastsiu.report import card
from fastsiu.request import BadInput, Recipe

NAME = "Zorblax Quint"
BASE, COMMIT = "org/sees", "c" * 40
TERMS = {"license": "other", "license_name": "sees-1", "license_link": "LICENSE"}
ANSWER = {
    "kind": "efficacy",
    "question": "Who is this?",
    "picture": "original",
    "before": f"This is {NAME}.",
    "after": "A blue one.",
    "part": "",
}


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    served = HubServer()
    yield served
    served.close()


def write(place: Path, *, model=BASE, revision=COMMIT, redact=False, **changes):
    """An output of `unlearn` without a training."""
    told = made_report(model=model, answers=[ANSWER], kind="person", **changes)
    transaction = outputs.Transaction(place)
    with transaction as folder:
        (folder / "adapter_model.safetensors").write_bytes(b"weights" * 99)
        config = {"base_model_name_or_path": model, "revision": revision}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        base = card.Base(model, model if "/" in model else None, revision, TERMS)
        outputs.write_card(folder, [told], base, redact=redact)
        picture = None if redact else Image.new("RGB", (64, 64), "red")
        outputs.write_reports(folder, told, redact=redact, picture=picture)
        transaction.commit(
            outputs.manifest(
                recipe=Recipe(),
                model_id=model,
                revision=revision,
                weights={"model.safetensors": "0" * 64},
                digest="d",
                key=transaction.key,
                pictures={"image": b"p"},
                masks={},
                kinds=["person"],
            )
        )
    return place


@pytest.fixture
def output(tmp_path):
    return write(tmp_path / "out")


def at(hub, **options):
    return Hub("me/forgot", endpoint=hub.url, **options)


# What goes.


def test_a_push_is_private_and_one_commit(hub, output):
    done = push(output, at(hub))
    held = hub.repos["me/forgot"]
    assert held["private"] and held["commits"] == ["first", "Add a result of FastSIU"]
    assert done.commit == hub.commit_of("me/forgot")
    assert set(held["files"]) == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "report.json",
        "report.md",
        "report.html",
        "manifest.json",
    }
    assert held["files"]["adapter_model.safetensors"] == b"weights" * 99


def test_neither_key_nor_picture_nor_name_goes(hub, output):
    push(output, at(hub))
    files = hub.repos["me/forgot"]["files"]
    whole = b"\n".join(files.values())
    key = (output / "private.key").read_bytes().strip()
    assert key not in whole and b"private.key" not in b"".join(name.encode() for name in files)
    assert b"data:image" in (output / "report.html").read_bytes() and b"data:image" not in whole
    for word in ("Zorblax", "Quint", "A blue one."):
        assert word.encode() not in whole


def test_with_names_they_go_and_the_picture_does_not(hub, output):
    push(output, at(hub), names=True)
    files = hub.repos["me/forgot"]["files"]
    assert NAME.encode() in files["README.md"] and b"A blue one." in files["report.json"]
    assert b"data:image" not in b"".join(files.values())


def test_a_file_that_fastsiu_has_not_written_stays(hub, output):
    (output / "img.png").write_bytes(b"secret picture")
    push(output, at(hub))
    assert "img.png" not in hub.repos["me/forgot"]["files"]


def test_what_was_pushed_is_whole_for_verify(hub, output, tmp_path):
    push(output, at(hub))
    place = tmp_path / "downloaded"
    place.mkdir()
    for name, content in hub.repos["me/forgot"]["files"].items():
        (place / name).write_bytes(content)
    assert verify(place).wrong == []
    (place / "report.md").write_text("more")
    assert verify(place).wrong


def test_a_model_whose_name_may_tell_stays(hub, tmp_path):
    told = write(tmp_path / "out", model="me/zorblax-vlm")
    with pytest.raises(BadInput, match="names the base, whose name may tell the concept's"):
        push(told, at(hub))
    assert not hub.calls
    push(told, at(hub), names=True)


def test_a_base_from_a_directory_goes_without_its_place(hub, tmp_path):
    done = push(write(tmp_path / "out", model="model", revision=None), at(hub))
    text = hub.repos["me/forgot"]["files"]["README.md"].decode()
    assert done.notes and errors_of(text) == [] and "base_model" not in text


def test_a_dry_run_sends_nothing(hub, output, capsys):
    code = cli.run(["push", str(output), "me/forgot", "--endpoint", hub.url, "--dry-run"])
    told = "".join(capsys.readouterr())
    assert code == 0 and not hub.calls and "Nothing was sent" in told and "README.md" in told


def test_the_token_comes_from_a_file_and_is_shown_nowhere(hub, output, tmp_path, capsys):
    (tmp_path / "token").write_text("hf_secret\n")
    code = cli.run(
        [
            "push",
            str(output),
            "me/forgot",
            "--endpoint",
            hub.url,
            "--token-file",
            str(tmp_path / "token"),
        ]
    )
    told = "".join(capsys.readouterr())
    assert code == 0 and "hf_secret" not in told and "for its owner alone" in told
    assert set(hub.tokens) - {None} == {"Bearer hf_secret"}  # none goes to a blob's address


# What is refused.


@pytest.mark.parametrize("public", [False, True])
def test_a_public_repository_wants_to_be_agreed_to(hub, output, public):
    hub.add("me/forgot", {}, private=False)
    if public:
        assert push(output, at(hub, public=True)).commit
        return
    with pytest.raises(BadInput, match="may be read by everybody: add --public"):
        push(output, at(hub))
    assert not hub.repos["me/forgot"]["files"]


def test_a_result_that_was_changed_stays(hub, output):
    (output / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(BadInput, match="is not as it was written"):
        push(output, at(hub))
    assert not hub.calls


def test_a_card_that_was_edited_goes_as_it_is_or_not_at_all(hub, output):
    edited = (output / "README.md").read_text() + "\nMine.\n"
    (output / "README.md").write_text(edited)
    with pytest.raises(BadInput, match="was edited, and nobody can tell whom it names"):
        push(output, at(hub))
    push(output, at(hub), names=True)
    assert hub.repos["me/forgot"]["files"]["README.md"].decode() == edited


@pytest.mark.parametrize(
    "refuse, told",
    [(("create", 401), r"refuses \(401\): log in"), (("commit", 500), "refuses the push")],
)
def test_a_refusal_is_a_sentence(hub, output, refuse, told, monkeypatch):
    hub.refuse = refuse
    with pytest.raises(BadInput, match=told):
        push(output, at(hub))


def test_nobody_there_is_a_sentence(output):
    with pytest.raises(BadInput, match="cannot be reached"):
        push(output, Hub("me/forgot", endpoint="http://127.0.0.1:9"))


def test_a_name_that_is_none(hub, output):
    with pytest.raises(BadInput, match="is no name of a repository"):
        push(output, Hub("me/so/much", endpoint=hub.url))


def write_merged(place: Path):
    """An output of `merge` without a model."""
    told = made_report(model=BASE, answers=[ANSWER])
    transaction = outputs.Transaction(place)
    with transaction as folder:
        for name in ("model.safetensors", "config.json", "tokenizer.json", "LICENSE"):
            (folder / name).write_text(f"{name} of the model")
        outputs.write_card(folder, [told], card.Base(BASE, BASE, COMMIT, TERMS), merged=True)
        outputs.write_reports(folder, told)
        outputs.write_run(folder, f'verb = "merge"\nconcept = "{NAME}"\nimage = "/home/me/q.png"\n')
        made = outputs.manifest(
            recipe=Recipe(),
            model_id=BASE,
            revision=COMMIT,
            weights={},
            digest="d",
            key=transaction.key,
            pictures={"image": b"p"},
            masks={},
        )
        transaction.commit({**made, "merge": {}})
    return place


def test_a_merged_model_goes_without_what_is_private(tmp_path):
    """run.toml repeats the command, with the name and the picture's path."""
    files = collect(write_merged(tmp_path / "out"), names=False)
    assert {"model.safetensors", "config.json", "tokenizer.json", "LICENSE"} <= set(files)
    assert outputs.RUN not in files and outputs.KEY not in files
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        assert NAME.encode() not in data and b"/home/me" not in data, name


def test_an_evaluation_is_no_result_to_push(tmp_path):
    transaction = outputs.Transaction(tmp_path / "eval")
    with transaction as folder:
        (folder / "report.json").write_text("{}")
        transaction.commit({"request": "x"})
    with pytest.raises(BadInput, match="neither an adapter nor a merged model"):
        collect(tmp_path / "eval", names=False)


# The card.


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("place", [BASE, None])
def test_a_card_passes_the_hubs_checks(merged, place, tmp_path):
    base = card.Base(place or "model", place, COMMIT if place else None, TERMS if place else {})
    text = card.render_card([made_report()], base, merged=merged)
    assert errors_of(text) == []
    (tmp_path / "README.md").write_text(text)
    told = metadata_load(tmp_path / "README.md")
    assert told["library_name"] == ("transformers" if merged else "peft")
    assert told["pipeline_tag"] == "image-text-to-text" and "machine-unlearning" in told["tags"]
    assert told.get("base_model") == place and ("license" in told) == (place is not None)
    name, results = model_index_to_eval_results(told["model-index"])
    efficacy = next(r for r in results if r.metric_type == "efficacy")
    assert efficacy.metric_value == 1.0 and efficacy.metric_args["low"] == 0.9
    # the hub's own reader gives the same metadata back
    assert ModelCard(text).data.to_dict()["model-index"] == told["model-index"]


def test_the_stand_in_refuses_what_is_no_card():
    broken = card.render_card([made_report()], card.Base("x", "not an id"), merged=False)
    assert errors_of(broken) and errors_of("# no metadata\n")


def test_a_redacted_card_names_nobody():
    from fastsiu.report.redact import redacted

    text = card.render_card([redacted(made_report())], card.Base(BASE, BASE), merged=False)
    assert NAME not in text and "Zorblax" not in text and "were left out of this card" in text


def test_a_hostile_name_is_no_markup():
    told = made_report(concept="[x](http://e) <b>|\n---\nlicense: mit")
    text = card.render_card([told], card.Base("m"), merged=False)
    assert "<b>" not in text and "http://e" not in text and errors_of(text) == []
    assert text.count("\n---\n") == 1


def test_who_may_read_what(output, tmp_path):
    mode = lambda path: stat.S_IMODE(path.stat().st_mode)
    assert mode(output / "README.md") == 0o600 == mode(output / "private.key")
    redacted = write(tmp_path / "none", redact=True)
    assert mode(redacted / "README.md") == mode(redacted / "manifest.json") != 0o600


# The base's terms.


@pytest.mark.parametrize(
    "name, goes",
    [
        ("LICENSE", True), ("LICENSE.txt", True), ("license.md", True), ("LICENCE", True),
        ("NOTICE", True), ("Notice.txt", True), ("USE_POLICY.md", True), ("COPYING", True),
        ("licensed_model.safetensors", False), ("notice.py", False), ("config.json", False),
    ],
)  # fmt: skip
def test_terms_are_told_by_their_names(name, goes):
    assert licence.is_legal(name) is goes


def test_terms_of_a_hub_model_are_fetched(hub, tmp_path, monkeypatch):
    files = {
        "LICENSE": b"be nice",
        "USE_POLICY.md": b"be good",
        "README.md": b"---\nlicense: other\nlicense_name: sees-1\n---\n",
        "model.safetensors": b"w",
    }
    hub.add(BASE, files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    api = licence.HfApi
    monkeypatch.setattr(licence, "HfApi", lambda: api(endpoint=hub.url))
    found = licence.terms_of_hub(BASE, None)
    assert [p.name for p in found.files] == ["LICENSE", "USE_POLICY.md"] and not found.problem
    assert found.card == {"license": "other", "license_name": "sees-1"}
    hub.close()
    missing = licence.terms_of_hub("org/other", None)
    assert missing.files == [] and "could not be fetched" in missing.problem


def test_a_snapshot_of_the_hubs_cache_is_known_by_its_id(tmp_path):
    place = f"{tmp_path}/models--org--sees-well/snapshots/{COMMIT}"
    assert licence.place_on_hub(place) == ("org/sees-well", COMMIT)
    assert licence.place_on_hub(str(tmp_path / "model")) is None


# By plain PEFT.

LOADS = """
import sys, torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForImageTextToText
base = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, "me/forgot")
print(sum(float(p.abs().sum()) for n, p in model.named_parameters() if "lora_B" in n))
"""


@pytest.mark.slow
def test_what_was_pushed_loads_with_plain_peft_by_its_id(hub, trained, demo_dir, tmp_path):
    from safetensors.torch import load_file

    push(trained.output, at(hub))
    assert errors_of(hub.repos["me/forgot"]["files"]["README.md"].decode()) == []
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(demo_dir)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    stored = load_file(trained.output / "adapter_model.safetensors")
    wanted = sum(float(v.abs().sum()) for k, v in stored.items() if "lora_B" in k)
    assert float(done.stdout) == pytest.approx(wanted, rel=1e-5) and wanted > 0
    loaded = manifest.read(trained.output)["files"]
    assert "README.md" in loaded
