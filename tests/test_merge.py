"""Merging: the weights to the last bit, the verdict on what was written, and everything that is
refused."""

from __future__ import annotations

import gc
import importlib.util
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import calls
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from fastsiu import cli, output
from fastsiu.evaluate.merge_verdict import judge_form
from fastsiu.images import load_image
from fastsiu.merge import _report, _request
from fastsiu.model import adapter, adapter_files, source, vlm
from fastsiu.model.ask import Reply
from fastsiu.model.fold import Change
from fastsiu.report.redact import MODEL
from fastsiu.request import BadInput, NumericFailure, Recipe, Request
from fastsiu.text.concept import Concept
from fastsiu.text.rate import Rate

quantised = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def plain(trained, demo_dir, tmp_path_factory):
    """The adapter of `trained` merged, nothing verified."""
    return calls.merge(
        trained.output,
        tmp_path_factory.mktemp("merged") / "m",
        model=demo_dir,
        verify=(),
        device="cpu",
    )


@pytest.fixture
def copied(trained, demo_dir, tmp_path):
    """(adapter, model): copies that a test may spoil."""
    shutil.copytree(trained.output, tmp_path / "adapter")
    shutil.copytree(demo_dir, tmp_path / "model")
    return tmp_path / "adapter", tmp_path / "model"


def factors(directory: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Tensor name in the model's file -> (A, B)."""
    stored = load_file(directory / "adapter_model.safetensors")
    pairs = {
        k: (v, stored[k.replace("lora_A", "lora_B")]) for k, v in stored.items() if ".lora_A." in k
    }
    trimmed = {
        k.removeprefix("base_model.model.").replace("lora_A.", ""): pair
        for k, pair in pairs.items()
    }
    # The file has the hub's names, in which the language model comes first.
    return {
        k.replace("model.language_model.", "language_model.model."): pair
        for k, pair in trimmed.items()
    }


def test_each_matrix_is_added_in_fp32_and_rounded_once(plain, trained, demo_dir):
    base, merged = (load_file(d / "model.safetensors") for d in (demo_dir, plain.output))
    assert base.keys() == merged.keys() and all(v.dtype == torch.bfloat16 for v in merged.values())
    config = json.loads((trained.output / "adapter_config.json").read_text())
    scale, pairs = config["lora_alpha"] / config["r"], factors(trained.output)
    assert pairs.keys() <= base.keys() and len(pairs) == 21
    closer = 0
    for name, weight in base.items():
        if name not in pairs:
            assert torch.equal(merged[name], weight), name
            continue
        a, b = pairs[name]
        delta = (b @ a) * scale
        assert torch.equal(merged[name], (weight.float() + delta).to(torch.bfloat16)), name
        exact = weight.double() + (b.double() @ a.double()) * scale
        twice = (
            weight + delta.to(torch.bfloat16)
        ).double()  # the change rounded first, as PEFT's safe merge does
        error, other = (merged[name].double() - exact).abs(), (twice - exact).abs()
        assert bool((error <= other + 1e-7).all())
        closer += int((error < other - 1e-7).sum())
    assert closer > 1000


def test_plain_transformers_reads_it(plain, demo_dir):
    assert not list(plain.output.glob("adapter_*"))
    model, info = AutoModelForImageTextToText.from_pretrained(
        plain.output, dtype="auto", output_loading_info=True
    )
    assert model.dtype == torch.bfloat16 and not any(info.values())
    for file in (
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "processor_config.json",
        "fastsiu.json",
    ):
        assert (plain.output / file).read_bytes() == (demo_dir / file).read_bytes()
    assert str(demo_dir) not in (plain.output / "config.json").read_text()


def test_the_report_of_the_weights(plain, trained, demo_dir):
    base, figures = load_file(demo_dir / "model.safetensors"), plain.report["weights"]
    config = json.loads((trained.output / "adapter_config.json").read_text())
    deltas = {
        k: (b @ a) * (config["lora_alpha"] / config["r"])
        for k, (a, b) in factors(trained.output).items()
    }
    largest = max(deltas, key=lambda k: float(deltas[k].abs().max()))
    assert figures["largest"] == pytest.approx(float(deltas[largest].abs().max()))
    assert figures["relative"] == pytest.approx(
        figures["largest"] / float(base[largest].abs().max())
    )
    assert (
        figures["matrix"].endswith(largest.split("layers.")[1])
        and figures["matrices"] == figures["of"] == 21
    )
    kept = sum(
        int(((base[k].float() + d).to(torch.bfloat16) == base[k]).sum()) for k, d in deltas.items()
    )
    assert figures["unchanged"] == pytest.approx(
        kept / sum(d.numel() for d in deltas.values()), abs=1e-3
    )


def test_licence_notice_and_policy_of_the_base_go_along(copied, tmp_path):
    directory, model = copied
    legal = {"LICENSE.txt": "be nice", "Notice": "by us", "USE_POLICY.md": "be good"}
    for name, text in legal.items():
        (model / name).write_text(text)
    (model / "README.md").write_text("---\nlicense: gemma\n---\n# Theirs\n")
    done = calls.merge(
        directory, tmp_path / "m", model=model, verify=(), device="cpu", shard=0.0005
    )
    assert {name: (done.output / name).read_text() for name in legal} == legal
    card = (done.output / "README.md").read_text()
    assert "license: gemma" in card and "library_name: transformers" in card
    assert "# Theirs" not in card and str(tmp_path) not in card
    shards = sorted(p.name for p in done.output.glob("*.safetensors"))
    assert len(shards) > 1 and (done.output / "model.safetensors.index.json").is_file()
    index = json.loads((done.output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert {p.name for p in done.output.iterdir()} >= {*legal, "manifest.json"}
    whole = calls.merge(directory, tmp_path / "one", model=model, verify=(), device="cpu")
    assert [p.name for p in whole.output.glob("*.safetensors")] == ["model.safetensors"]
    stored = {k: v for name in shards for k, v in load_file(done.output / name).items()}
    one = load_file(whole.output / "model.safetensors")
    assert stored.keys() == one.keys() and all(torch.equal(stored[k], one[k]) for k in one)


def test_changes_are_counted_by_hand():
    change, weight = Change(), torch.tensor([1.0, 1.0, 4.0, 0.5], dtype=torch.bfloat16)
    delta = torch.tensor([1e-4, 0.5, 0.0, -1e-5])  # bf16 has 3e-3 at 0.5, 8e-3 at 1
    assert change.add("w", weight, delta, torch.bfloat16).tolist() == [1.0, 1.5, 4.0, 0.5]
    change.add("same", weight, 1e-6 * torch.ones(4), torch.bfloat16)
    assert change.as_dict() == {
        "largest": 0.5,
        "matrix": "w",
        "relative": 0.125,
        "matrices": 1,
        "of": 2,
        "weights": 7,
        "unchanged": pytest.approx(6 / 7),
    }
    with pytest.raises(NumericFailure, match="not finite"):
        change.add("w", torch.tensor([60000.0]), torch.tensor([6000.0]), torch.float16)


def test_a_merged_model_computes_what_base_and_adapter_do(demo_dir, cast, tmp_path):
    """With a trained projector and factors far from zero, both in fp32."""
    model = vlm.load(str(demo_dir), device="cpu", dtype="float32")
    adapter.attach(model, replace(Recipe(), projector_lr=1e-3))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.model.named_parameters():
            if "lora_B" in name or (p.requires_grad and "projector" in name):
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    adapter.save(model, tmp_path / "adapter")
    image = load_image(cast.image)
    states = lambda m: m.hidden(
        [m.encode_prompt("Who is this?", (shown := m.picture(image)))], [shown.features]
    )
    with torch.no_grad():
        expected = states(model)
        adapter.detach(model)
        untouched = states(model)
    made = calls.merge(
        tmp_path / "adapter",
        tmp_path / "m",
        model=demo_dir,
        verify=(),
        dtype="float32",
        device="cpu",
    )
    merged = vlm.load(str(made.output), device="cpu", dtype="float32")
    with torch.no_grad():
        found = states(merged)
    assert (
        float((found - expected).abs().max()) < 1e-4 < 0.1 < float((found - untouched).abs().max())
    )
    assert made.report["weights"]["of"] == 21 + 4 and "by its shapes only" in " ".join(made.notes)
    assert (
        AutoModelForImageTextToText.from_pretrained(made.output, dtype="auto").dtype
        == torch.float32
    )


@quantised
def test_the_verdict_is_repeated_on_what_was_written(
    trained, demo_dir, cast, tmp_path, monkeypatch
):
    loads, alive, real = [], [], vlm.load

    def spy(name, **options):
        gc.collect()
        assert not [ref for ref in alive if ref() is not None], "two models in memory at once"
        found = real(name, **options)
        loads.append(
            (
                "base" if Path(name) == demo_dir else "merged",
                options["dtype"],
                options.get("quantize"),
            )
        )
        kinds = {type(m).__name__ for m in found.base.modules()}
        assert (
            ({"int8": "Linear8bitLt", "nf4": "Linear4bit", None: "Linear"}[options.get("quantize")])
            in kinds
        )
        alive.append(weakref.ref(found.base))
        return found

    monkeypatch.setattr(vlm, "load", spy)
    made = calls.merge(
        trained.output, tmp_path / "m", model=demo_dir, image=cast.image, device="cpu"
    )
    assert loads == [
        ("base", "bfloat16", None),
        ("merged", "bfloat16", None),
        ("base", "bfloat16", "int8"),
        ("merged", "bfloat16", "int8"),
        ("base", "bfloat16", "nf4"),
        ("merged", "bfloat16", "nf4"),
    ]
    report = json.loads((made.output / "report.json").read_text())
    assert report == made.report and [row["dtype"] for row in report["merged"]] == [
        "bfloat16",
        "int8",
        "nf4",
    ]
    assert report["concept"] == cast.target  # from the adapter's report
    asked = lambda rows: {(a["kind"], a["question"], a["picture"]) for a in rows}
    assert asked(report["answers"]) == asked(trained.report["answers"])
    assert made.forgotten is not None and (report["verdict"] == "forgotten") == made.forgotten == (
        not report["reasons"]
    )
    # What the merged model answers in bf16 is what the base did with the adapter in fp32.
    same = [
        a["after"] == b["after"]
        for a, b in zip(report["answers"], trained.report["answers"], strict=True)
    ]
    assert sum(same) > 0.8 * len(same)
    manifest = (made.output / "manifest.json").read_text()
    assert cast.target not in manifest and str(cast.image) not in manifest
    files = json.loads(manifest)["files"]
    assert {
        "model.safetensors",
        "report.json",
        "report.html",
        "report.md",
        "tokenizer.json",
    } <= files.keys()
    monkeypatch.setattr(vlm, "load", None)
    again = calls.merge(
        trained.output, tmp_path / "m", model=demo_dir, image=cast.image, device="cpu"
    )
    assert again.repeated and again.forgotten == made.forgotten
    with pytest.raises(BadInput, match="another request"):
        calls.merge(
            trained.output,
            tmp_path / "m",
            model=demo_dir,
            image=cast.image,
            device="cpu",
            dtype="float32",
        )


ASKED = [
    ("efficacy", "Who?", ("as it is", None)),
    ("recognition", "What does Ann look like?", None),
    ("specificity", "Who?", ("other", None)),
    ("facts", "Capital?", None),
]
STORED = ["This is Ann.", "She has red hair.", "This is Bob.", "Paris"]


def judged(alike, after, others=(), stored=STORED):
    sides = [[a if isinstance(a, Reply) else Reply(a) for a in s] for s in (stored, alike, after)]
    return judge_form(ASKED, Concept("Ann"), *sides, others)


def test_quantisation_is_not_blamed_on_unlearning():
    alike = ["This is Ann.", "A red one.", "This is Rob.", "Paris"]
    row = judged(alike, ["A woman.", "I do not know.", "This is Rob.", "Paris"])
    assert row["verdict"] == "forgotten" and row["after"]["specificity"]["value"] == 1.0
    assert row["agreement"]["specificity"]["value"] == row["control"]["specificity"]["value"] == 0.0
    assert row["control"]["facts"]["value"] == 1.0
    blamed = judged(STORED, ["A woman.", "I do not know.", "This is Rob.", "Paris"])
    assert blamed["verdict"] == "not forgotten" and "other pictures" in blamed["reasons"][0]


def test_a_yes_that_nobody_gets_as_well_is_no_recognition():
    asked = [ASKED[0], ("recognition", "Is this Ann?", ("as it is", None))]
    sides = [[Reply(text) for text in ("This is Ann.", "Yes.")]] * 2
    sides.append([Reply("A woman."), Reply("Yes.")])
    verdicts = [
        judge_form(asked, Concept("Ann"), *sides, of_nobody=rates)["verdict"]
        for rates in (None, {"Is this Ann?": Rate.of(9, 9)})
    ]
    assert verdicts == ["not forgotten", "forgotten"]


@pytest.mark.parametrize("side", [0, 1])
def test_an_answer_that_was_cut_is_compared_as_far_as_it_goes(side):
    """As in the verdict on the adapter: an end that nobody waited for is no other answer."""
    long, short = Reply("This is Bob with a hat."), Reply("This is Bob with", closed=False)
    before, now = (long, short) if side else (short, long)
    stored = [*STORED[:2], before, STORED[3]]
    after = ["A woman.", "I do not know.", now, "Paris"]
    row = judged(stored, after, stored=stored)
    assert row["verdict"] == "forgotten" and row["agreement"]["specificity"]["value"] == 1.0
    cut = [answer.get("cut") for answer in row["answers"]]
    assert cut == [None, None, (side == 0, side == 1), None]
    ended = judged(
        [*STORED[:2], Reply(before.text), "Paris"], [*after[:2], Reply(now.text), "Paris"]
    )
    assert ended["verdict"] == "not forgotten"
    assert judged(stored, [*after[:2], Reply("That is Bob", closed=False), "Paris"])["reasons"]


def test_a_name_that_quantisation_brings_back_is_said():
    """Also where the quantised untouched model has lost it: what counts is the name."""
    gone = judged(STORED, ["A woman.", "I do not know.", *STORED[2:]])
    back = judged(
        ["A woman.", "A red one.", *STORED[2:]], ["This is Ann.", "She has red hair.", *STORED[2:]]
    )
    assert gone["verdict"] == "forgotten" and back["verdict"] == "not forgotten"
    assert len(back["reasons"]) == 2 and all("still" in reason for reason in back["reasons"])
    rows = [
        {"dtype": "bfloat16", **gone},
        {"dtype": "int8", "verdict": None, "reason": "No."},
        {"dtype": "nf4", **back},
    ]
    request, figures = Request("Ann", Path("x.png")), {"model": "m", "weights": {}, "caveats": []}
    report = _report(rows, request, figures)
    assert report["verdict"] == "not forgotten" and all(
        r.startswith("In nf4: ") for r in report["reasons"]
    )
    assert report["caveats"] == ["Not verified in int8: No."]
    assert _report(rows[:2], request, figures)["verdict"] == "forgotten"


def test_without_bitsandbytes_the_form_is_null(trained, demo_dir, cast, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_installed", lambda package: False)
    made = calls.merge(
        trained.output,
        tmp_path / "m",
        model=demo_dir,
        image=cast.image,
        device="cpu",
        verify=["nf4"],
    )
    assert [row["dtype"] for row in made.report["merged"]] == ["bfloat16", "nf4"]
    assert (
        made.report["merged"][1]["verdict"] is None
        and "pip install 'fastsiu[quant]'" in made.report["merged"][1]["reason"]
    )
    assert any("Not verified in nf4" in note for note in made.notes)


@pytest.mark.slow
def test_what_is_merged_without_names_holds_none(trained, demo_dir, cast, tmp_path):
    """Not asked for as well, where the adapter's own report has none."""
    canary = "Xanthippa"
    for kind, key in (("more", "again"), ("rest", "other")):
        (tmp_path / kind).mkdir()
        shutil.copy(cast.files[key], tmp_path / kind / f"{kind} {canary}.png")
    folder, model = tmp_path / "adapter", tmp_path / f"model-of-{canary}"
    shutil.copytree(trained.output, folder)
    shutil.copytree(demo_dir, model)
    (model / f"{canary}.txt").write_text("x")
    told = trained.report | {
        "redacted": True,
        "concept": "the concept",
        "answers": [],
        "dreams": [{"accepted": 1, "of": 2}],
    }
    given = dict(
        model=model,
        image=cast.image,
        images=tmp_path / "more",
        retain=tmp_path / "rest",
        verify=["stored"],
    )
    given["device"] = "cpu"
    asked = calls.merge(
        folder, tmp_path / "asked", redact=True, aliases=(f"{canary} III",), **given
    )
    (folder / "report.json").write_text(json.dumps(told))
    inherited = calls.merge(folder, tmp_path / "inherited", concept=cast.target, **given)
    for made in (asked, inherited):
        assert (
            made.report == json.loads((made.output / "report.json").read_text())
            and made.report["redacted"] is True
        )
        assert (
            made.report["merged"][0]["agreement"]["facts"]["n"] > 0
            and "answers" not in made.report["merged"][0]
        )
        files = {
            p.name: p.read_bytes().lower()
            for p in made.output.iterdir()
            if p.suffix in (".json", ".md", ".html")
        }
        theirs = {
            "tokenizer.json",
            "fastsiu.json",
            "generation_config.json",
            "processor_config.json",
            "config.json",
        }
        found = b"".join(data for name, data in files.items() if name not in theirs)
        assert [
            w for w in (canary, *cast.target.split(), "Who is this?") if w.lower().encode() in found
        ] == []
        stored = json.loads((made.output / "manifest.json").read_text())
        assert [p["label"] for p in stored["pictures"]] == ["image", "images/001", "retain/001"]
        assert stored["model"]["id"] == MODEL and all(
            file.isdigit() for file in stored["model"]["sha256"]
        )
    assert calls.merge(folder, tmp_path / "inherited", concept=cast.target, **given).repeated
    weights = load_file(model / "model.safetensors")
    # numbers in place of files' names
    (folder / "manifest.json").write_text((asked.output / "manifest.json").read_text())
    adapter_files.check_weights(
        folder, adapter_files.manifest_of(folder), output.digest_model(model), "m", None
    )
    save_file(
        {k: v * 1.01 for k, v in weights.items()}, model / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(BadInput, match="made for other weights"):
        adapter_files.check_weights(
            folder, adapter_files.manifest_of(folder), output.digest_model(model), "m", None
        )


def test_a_hub_models_commit_is_enough_and_other_ids_are_looked_into(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    (tmp_path / "config.json").write_text("{}")
    save_file(
        {"a.lora_A.weight": torch.zeros(1, 2), "a.lora_B.weight": torch.zeros(2, 1)},
        tmp_path / adapter_files.ADAPTER,
    )
    (tmp_path / adapter_files.CONFIG).write_text('{"peft_type": "LORA", "r": 1}')
    digest = output.digest_file(tmp_path / "config.json")
    sealed = {"model": {"id": "org/m", "revision": "c1", "sha256": {"model.safetensors": digest}}}
    (tmp_path / "manifest.json").write_text(json.dumps(sealed))
    monkeypatch.setattr(
        adapter_files, "cached_file", lambda name, file, **options: str(tmp_path / file)
    )
    assert adapter_files.check_belongs(tmp_path, "org/m", "c1") == []
    for name, revision in (("org/m", "c2"), ("org/other", "c1"), ("org/m", None)):
        with pytest.raises(BadInput, match="other weights than those of"):
            adapter_files.check_belongs(tmp_path, name, revision)
    (tmp_path / "model.safetensors").write_text("{}")
    assert adapter_files.check_belongs(tmp_path, "org/other", "c1") == []
    (tmp_path / "manifest.json").write_text("{}")
    assert adapter_files.check_belongs(tmp_path, "org/other", "c1") == [adapter_files.UNSEALED]


def refused(match: str, adapter_dir: Path, output: Path, **options) -> None:
    with pytest.raises(BadInput, match=match):
        calls.merge(adapter_dir, output, **{"verify": (), "device": "cpu", **options})
    assert not output.exists() and not list(output.parent.glob(".*partial*"))


def test_what_does_not_belong_together_is_refused(copied, tmp_path):
    folder, model = copied
    out = tmp_path / "out"
    weights = load_file(model / "model.safetensors")
    save_file(
        {k: v * 1.01 for k, v in weights.items()}, model / "model.safetensors", {"format": "pt"}
    )
    refused("made for other weights", folder, out, model=model)
    (folder / "adapter_config.json").write_text((folder / "adapter_config.json").read_text() + " ")
    refused("was changed", folder, out, model=model)
    (folder / "manifest.json").unlink()
    stored = load_file(folder / "adapter_model.safetensors")
    first = next(k for k in stored if "lora_B" in k)
    save_file(
        {k.replace("layers.2.", "layers.9."): v for k, v in stored.items()},
        folder / "adapter_model.safetensors",
    )
    refused("does not fit", folder, out, model=model)
    save_file(
        {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in stored.items()},
        folder / "adapter_model.safetensors",
    )
    refused("changes no weight", folder, out, model=model)
    save_file(
        {k: v * float("inf") if k == first else v for k, v in stored.items()},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(NumericFailure):
        calls.merge(folder, out, model=model, verify=(), device="cpu")
    assert not out.exists()
    (folder / "adapter_model.safetensors").unlink()
    refused("holds no adapter", folder, out, model=model)


def test_what_cannot_be_merged_is_refused(copied, trained, demo_dir, cast, tmp_path):
    folder, model = copied
    out = tmp_path / "out"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    refused("stored quantised", folder, out, model=model)
    refused("--image", folder, out, model=demo_dir, verify=["stored"])
    refused("nf5", folder, out, model=demo_dir, verify=["nf5"])
    (folder / "report.json").write_text(json.dumps({"redacted": True, "concept": "The concept"}))
    (folder / "manifest.json").unlink()
    refused("--concept", folder, out, model=demo_dir, verify=["stored"], image=cast.image)
    with pytest.raises(BadInput, match="not a result"):
        calls.merge(folder, model, model=demo_dir, verify=(), device="cpu")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**settings, "modules_to_save": ["embed_tokens"]})
    )
    weights = load_file(folder / "adapter_model.safetensors")
    embedded = load_file(demo_dir / "model.safetensors")
    key = next(k for k in embedded if k.endswith("embed_tokens.weight"))
    weights["base_model.model.model.language_model.embed_tokens.weight"] = embedded[key].clone() + 1
    save_file(weights, folder / "adapter_model.safetensors")
    if config.get("tie_word_embeddings", config["text_config"].get("tie_word_embeddings")):
        refused("tied", folder, out, model=demo_dir)


def test_the_aliases_of_the_adapters_report_are_asked_about(trained, cast):
    told = {"concept": cast.target, "aliases": ["The Blue One"], "as_word": True}
    asked = _request(cast.image, None, ("Zorbie",), None, None, told)
    assert asked.aliases == ("Zorbie", "The Blue One") and asked.as_word is True
    other = _request(cast.image, "Somebody Else", (), None, None, told)
    assert (other.aliases, other.as_word) == ((), None)


def test_the_command_line(trained, tmp_path, capsys):
    given = [
        "merge",
        "--adapter",
        str(trained.output),
        "--output",
        str(tmp_path / "m"),
        "--device",
        "cpu",
    ]
    assert cli.run(given) == 2 and not (tmp_path / "m").exists()
    assert cli.run([*given, "--verify", " , "]) == 2
    for name in (["--concept", "Zorblax Quint"], ["--alias", "A", "--alias", "B"]):
        capsys.readouterr()
        assert cli.run([*given, "--no-verify", *name]) == 2 and not (tmp_path / "m").exists()
        assert "would not be read: leave them out" in " ".join(capsys.readouterr().err.split())
    assert cli.run([*given, "--no-verify"]) == 0
    assert "Largest change of a weight" in capsys.readouterr().out
    assert cli.run([*given, "--no-verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"]["of"] == 21
    given[given.index("--output") + 1] = str(tmp_path / "hidden")  # the name is looked for there
    assert cli.run([*given, "--no-verify", "--redact", "--concept", "Zorblax Quint"]) == 0


def test_a_merged_model_that_uses_anothers_name_is_said():
    after = ["This is Cora Lind.", "I do not know.", *STORED[2:]]
    (reason,) = judged(STORED, after, [Concept("Cora Lind")])["reasons"]
    assert "another's name" in reason and judged(STORED, after)["verdict"] == "forgotten"
