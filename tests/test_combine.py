"""Adapters that were trained apart, added up: what is written, what is asked, what is refused."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import calls
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from fastsiu import cli, combine, driver, manifest, push
from fastsiu.disk import staging, upkeep
from fastsiu.model import adapter
from fastsiu.report.redact import redacted
from fastsiu.report.sentences import LEFT_OUT
from fastsiu.report.words import CONCEPT
from fastsiu.request import BadInput, Recipe, Request
from fastsiu.settings import ModelRef, ReportOptions, Settings
from fastsiu.verdict import Answer, judge

ADAPTER = "adapter_model.safetensors"
REPORT = {"verdict": "forgotten", "reasons": [], "caveats": [], "masks": {}, "kind": "character"}


@pytest.fixture(scope="module")
def outputs(loaded, cast, demo_dir, tmp_path_factory):
    """Finished outputs that nobody trained: `one` and `two` of a concept each, `hidden` is `two`
    without names, `joint` of both, `sequence` as its second request has it, `vision` of the target,
    and `projector`."""
    folder = tmp_path_factory.mktemp("outputs")
    weights = manifest.digest_model(demo_dir)
    who = {key: Request(getattr(cast, key), cast.files[key]) for key in ("target", "other")}

    def write(name, keys, recipe, reports=None, settings=None, **lora):
        calls.bent(loaded, recipe, 0.02)
        told = [
            {**REPORT, "concept": who[key].concept, "model": demo_dir.name}
            for key in reports or keys
        ]
        sealed = driver.Sealed(recipe, {}, name, weights, settings or {})
        try:
            driver.write(folder / name, loaded, [who[key] for key in keys], told, sealed)
        finally:
            adapter.detach(loaded)

    write("one", ["target"], Recipe(rank=2))
    write("two", ["other"], Recipe(rank=4, lora_alpha=3.0, seed=1))
    write("hidden", ["other"], Recipe(rank=4), settings={"redact": True})
    write("joint", ["target", "other"], Recipe(rank=2))
    write("sequence", ["other", "target"], Recipe(rank=2), ["target"])
    write("vision", ["target"], Recipe(rank=2, adapt="vision"))
    write("projector", ["target"], Recipe(rank=2, projector_lr=1e-4))
    return folder


@pytest.fixture
def file(cast, tmp_path):
    path = tmp_path / "requests.jsonl"
    keys = ("stranger", "other", "target")
    lines = [{"image": str(cast.files[k]), "concept": getattr(cast, k)} for k in keys]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def asked(loaded, monkeypatch):
    """The model is there already, and a verdict is quick: the name is gone where it is not in
    `still`. `scenes` has what was judged, and whether the sum was on."""
    state = SimpleNamespace(still=(), scenes=[], ons=[])

    def decide(scene, more, rest):
        state.scenes.append(scene)
        layers = [m for m in scene.vlm.model.modules() if isinstance(m, LoraLayer)]
        state.ons.append({m.r["default"] for m in layers})
        after = scene.concept.name if scene.concept.name in state.still else "A creature."
        answers = [Answer("efficacy", "Who is this?", "as it is", scene.concept.name, after)]
        return judge(answers, scene.concept), answers

    monkeypatch.setattr(combine, "decide", decide)
    monkeypatch.setattr(combine, "load", lambda *given: loaded)
    return state


def added(places, file, output, **options):
    options = {"settings": Settings("cpu")} | options
    return combine.combine(places, file, output=output, **options)


def deltas(loaded, directory):
    """What an adapter adds to each weight, in fp64 and with PEFT's own scale."""
    adapter.load(loaded, directory)
    try:
        return {
            name: m.scaling["default"]
            * (m.lora_B["default"].weight.double() @ m.lora_A["default"].weight.double())
            for name, m in loaded.base.named_modules()
            if isinstance(m, LoraLayer)
        }
    finally:
        adapter.detach(loaded)


def test_a_picture_beside_a_report_without_names_is_refused_before_anything_is_asked(
    outputs, file, asked, tmp_path
):
    shown = ReportOptions(embed_image=True)
    with pytest.raises(BadInput, match="exclude each other"):
        added([outputs / "one", outputs / "hidden"], file, tmp_path / "sum", report=shown)
    assert not asked.scenes and not (tmp_path / "sum").exists()


def test_the_sum_is_an_output_with_the_verdict_of_each(
    outputs, file, asked, loaded, cast, tmp_path
):
    asked.still = (cast.other,)
    made = added([outputs / "one", outputs / "two"], file, tmp_path / "sum")
    assert [(r.line, r.verdict, r.alone) for r in made.rows] == [
        (3, "forgotten", "forgotten"),
        (2, "not forgotten", "forgotten"),
    ]
    assert made.exit_code == 1 and made.rank == 6 and asked.ons == [{6}, {6}]
    assert [row.named for row in made.rows] == [0.0, 1.0]
    # each is asked as one of several that are to be forgotten, so none of them is protected
    assert [[o.name for o in s.others] for s in asked.scenes] == [[cast.other], [cast.target]]
    assert not any(cast.other in s.neighbours or cast.target in s.neighbours for s in asked.scenes)
    one, two, both = (deltas(loaded, p) for p in (outputs / "one", outputs / "two", made.output))
    top = max(float(delta.abs().max()) for delta in both.values())
    assert one.keys() == two.keys() == both.keys() and top > 0
    for name, delta in both.items():
        assert torch.allclose(delta, one[name] + two[name], rtol=0, atol=1e-6 * top), name
    assert upkeep.verify(made.output).wrong == []
    sealed = manifest.read(made.output)
    assert not {"recipe", "seeds", "masks"} & sealed.keys()
    assert [part["sha256"][ADAPTER] for part in sealed["combined"]] == [
        manifest.digest_file(outputs / name / ADAPTER) for name in ("one", "two")
    ]
    report = json.loads((made.output / "002" / "report.json").read_text())
    assert report["concept"] == cast.other and combine.SUM.format(2) in report["caveats"]
    assert not set(push.collect(made.output, names=False)) & {"private.key", "run.toml"}
    asked.still = ()  # nobody is asked again
    again = added([outputs / "one", outputs / "two"], file, tmp_path / "sum")
    assert again.repeated and again.rows == made.rows and again.rank == 6 and len(asked.ons) == 2
    with pytest.raises(BadInput, match="another request"):
        added([outputs / "two", outputs / "one"], file, tmp_path / "sum")


def test_each_may_be_added_less_than_once(outputs, file, asked, loaded, tmp_path):
    places = [outputs / "one", outputs / "two"]
    made = added(places, file, tmp_path / "half", weight=0.5)
    one, two, both = (deltas(loaded, p) for p in (*places, made.output))
    top = max(float(delta.abs().max()) for delta in both.values())
    for name, delta in both.items():
        assert torch.allclose(delta, 0.5 * (one[name] + two[name]), rtol=0, atol=1e-6 * top), name
    report = json.loads((made.output / "001" / "report.json").read_text())
    assert "Each of the adapters was added 0.5 times." in report["caveats"]
    assert LEFT_OUT not in redacted(report)["caveats"]
    assert manifest.read(made.output)["settings"]["weight"] == 0.5
    with pytest.raises(BadInput, match="another request"):
        added(places, file, tmp_path / "half")
    for wrong in (0.0, -1.0, float("nan"), 1e9):
        with pytest.raises(BadInput, match="give a number above 0, at most 100"):
            added(places, file, tmp_path / "n", weight=wrong)


def test_language_and_vision_and_outputs_of_several_concepts(
    outputs, file, asked, loaded, tmp_path
):
    made = added([outputs / "vision", outputs / "two"], file, tmp_path / "sum")
    assert made.exit_code == 0 and made.rank == 4
    assert all(scene.recipe.sees_anew for scene in asked.scenes)  # the pictures are seen anew
    with_vision, two, both = (
        deltas(loaded, p) for p in (outputs / "vision", outputs / "two", made.output)
    )
    assert not with_vision.keys() & two.keys() and both.keys() == with_vision.keys() | two.keys()
    with pytest.raises(BadInput, match="forget the same concept"):
        added([outputs / "joint", outputs / "two"], file, tmp_path / "n")
    with pytest.raises(BadInput, match="is a sum already"):
        added([made.output, outputs / "two"], file, tmp_path / "n")


def test_without_names_the_picture_tells_the_line(outputs, file, asked, cast, tmp_path):
    told = ReportOptions(run=f'request = "{cast.target}.jsonl"')
    made = added([outputs / "one", outputs / "hidden"], file, tmp_path / "sum", report=told)
    assert [(row.line, row.concept) for row in made.rows] == [(3, CONCEPT), (2, CONCEPT)]
    for path in tmp_path.joinpath("sum").rglob("*"):
        text = path.read_bytes() if path.is_file() else b""
        assert cast.target.encode() not in text and cast.other.encode() not in text, path
    shutil.copytree(outputs / "hidden", tmp_path / "keyless")
    (tmp_path / "keyless" / "private.key").unlink()
    with pytest.raises(BadInput, match="private.key"):
        added([outputs / "one", tmp_path / "keyless"], file, tmp_path / "n")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[::2]))
    with pytest.raises(BadInput, match="0 lines of .* have the picture"):
        added([outputs / "one", outputs / "hidden"], file, tmp_path / "n")


@pytest.mark.parametrize(
    "names, sentence",
    [
        (["one"], "has nothing to be added to"),
        (["one", "one"], "forget the same concept .*line 3"),
        (["one", "vision"], "forget the same concept"),
        (["two", "projector"], "has trained the whole module"),
        (["two", "sequence"], "forgets 2 concepts and reports on 1"),
        (["two", "nothing"], "no usable JSON"),
        (["two", "."], "no usable JSON"),
        (["two", "spoilt"], "is not as it was written"),
        (["two", "bare"], "holds no adapter"),
    ],
)
def test_what_cannot_be_added_is_refused_before_anything_is_loaded(
    names, sentence, outputs, file, tmp_path, monkeypatch
):
    monkeypatch.setattr(combine, "load", lambda *given: pytest.fail("loaded"))
    shutil.copytree(outputs / "one", tmp_path / "spoilt")
    stored = load_file(tmp_path / "spoilt" / ADAPTER)
    save_file({key: 2 * tensor for key, tensor in stored.items()}, tmp_path / "spoilt" / ADAPTER)
    (tmp_path / "bare").mkdir()
    content = {"request": "x", "files": {}}
    (tmp_path / "bare" / "manifest.json").write_text(
        json.dumps(content | {manifest.SEAL: manifest.seal(content)})
    )
    places = [p if (p := tmp_path / name).exists() and name != "." else outputs / name
              for name in names]  # fmt: skip
    with pytest.raises(BadInput, match=sentence):
        added(places, file, tmp_path / "sum")
    assert not (tmp_path / "sum").exists() and not staging.leftovers(tmp_path)


def test_a_line_and_a_picture_for_each_concept(outputs, file, asked, cast, tmp_path):
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    places = [outputs / "one", outputs / "two"]
    for changes, sentence in (
        ({"concept": "Somebody Else"}, f"no line about {cast.target}"),
        ({"image": "none.png"}, "line 3: .*none.png"),
        ({"image": str(cast.files["stranger"])}, f"does not name {cast.target}"),
    ):
        file.write_text("".join(json.dumps(x) + "\n" for x in [*lines[:2], lines[2] | changes]))
        with pytest.raises(BadInput, match=sentence):
            added(places, file, tmp_path / "sum")
    assert not (tmp_path / "sum").exists() and not staging.leftovers(tmp_path)
    assert not asked.scenes
    file.write_text(
        "".join(json.dumps(x | {"concept": x["concept"].upper()}) + "\n" for x in lines)
    )
    assert added(places, file, tmp_path / "sum").exit_code == 0  # however a name is written


def test_an_adapter_for_another_base_is_refused(outputs, file, demo_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(combine, "load", lambda *given: pytest.fail("loaded"))
    shutil.copytree(demo_dir, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    first = next(iter(weights))
    save_file(weights | {first: weights[first] + 1}, tmp_path / "model" / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(BadInput, match="made for other weights"):
        added([outputs / "one", outputs / "two"], file, tmp_path / "sum",
              model=ModelRef(str(tmp_path / "model")))  # fmt: skip
    assert not (tmp_path / "sum").exists()


def test_a_failure_leaves_nothing_behind_and_the_model_untouched(
    outputs, file, asked, loaded, tmp_path, monkeypatch
):
    monkeypatch.setattr(combine, "decide", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        added([outputs / "one", outputs / "two"], file, tmp_path / "sum")
    assert not (tmp_path / "sum").exists() and not staging.leftovers(tmp_path)
    assert not any(isinstance(module, LoraLayer) for module in loaded.base.modules())


def test_the_command(outputs, file, asked, cast, tmp_path, capsys):
    asked.still = (cast.other,)
    command = ["combine", str(outputs / "one"), str(outputs / "two"), "--request", str(file)]
    command += ["--device", "cpu", "--output", str(tmp_path / "sum")]
    assert cli.run(command) == 1
    shown = capsys.readouterr().out
    assert "Not all forgotten." in shown and "line 2: The name or a part of it" in shown
    assert (tmp_path / "sum" / "run.toml").stat().st_mode & 0o777 == 0o600
    assert cli.run([*command, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["rank"] == 6 and [c["verdict"] for c in found["concepts"]] == [
        "forgotten", "not forgotten",
    ]  # fmt: skip
    assert cli.run([*command[:2], "--request", str(file)]) == 2
    assert "nothing to be added to" in " ".join(capsys.readouterr().err.split())


def test_names_are_left_out_where_that_is_asked_for(outputs, file, asked, cast, tmp_path):
    hidden = ReportOptions(redact=True)
    made = added([outputs / "one", outputs / "two"], file, tmp_path / "sum", report=hidden)
    assert {row.concept for row in made.rows} == {CONCEPT}
    assert cast.target not in (made.output / "001" / "report.md").read_text()


@pytest.mark.slow
def test_really_the_verdict_is_about_what_was_written(outputs, file, demo_dir, cast, tmp_path):
    """No stub: answers of the report are those of the stored adapter."""
    made = added([outputs / "one", outputs / "two"], file, tmp_path / "sum")
    report = json.loads((made.output / "001" / "report.json").read_text())
    texts = [a for a in report["answers"] if a["picture"] is None][:8]
    said = calls.interview([a["question"] for a in texts], model=demo_dir, device="cpu",
                           adapter_dir=made.output)  # fmt: skip
    assert texts and [row["answer"] for row in said] == [a["after"] for a in texts]
    assert report["families"] and made.exit_code == (0 if made.forgotten else 1)
