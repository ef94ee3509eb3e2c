"""--redact: no name, question, answer or file name in any byte of what is written; and the
sentences that may stay do stay."""

from __future__ import annotations

import ast
import json
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import calls
import pytest
from reports import evaluation, report

from fastsiu import output
from fastsiu.evaluate import deep, directories, eval_report, run
from fastsiu.evaluate.attacks import table
from fastsiu.evaluate.held_out import NULL
from fastsiu.judging.family import Family
from fastsiu.model import adapter, adapter_files
from fastsiu.report import redact
from fastsiu.report.redact import redacted
from fastsiu.report.render import LIMITS, render_html, render_markdown
from fastsiu.report.sentences import LEFT_OUT, sentence
from fastsiu.request import BadInput, Recipe
from fastsiu.text.rate import Rate
from fastsiu.train import Step
from fastsiu.verdict import Answer, judge

CANARY = "Xanthippa"


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        p.relative_to(directory).as_posix(): p.read_bytes().lower()
        for p in directory.rglob("*")
        if p.is_file()
    }


def leaks(directory: Path, *secrets: str) -> list[tuple[str, str]]:
    """(secret, file) wherever one stands in a file or its name, in any case; of a name, each of its
    words as well."""
    words = {w for s in secrets for w in (s, *s.split()) if len(w) > 3}
    found = files_of(directory)
    return [
        (w, f)
        for w in words
        for f, data in found.items()
        if w.lower().encode() in data or w.lower() in f.lower()
    ]


def planted(value, word):
    """The same with `word` in place of every text, and as one more key of every table and entry of
    every list."""
    if isinstance(value, dict):
        return {k: planted(v, word) for k, v in value.items()} | {word: word}
    if isinstance(value, (list, tuple)):
        texts = not value or isinstance(value[0], str)
        return [*(planted(v, word) for v in value), *([word] if texts else [])]
    return word if isinstance(value, str) else value


def merged():
    """A report of a merge in two precisions, one of which could not be had."""
    given = evaluation()
    rates = {key: given[key] for key in ("before", "after", "thresholds")}
    form = {
        "dtype": "bfloat16",
        "verdict": "not forgotten",
        "reasons": ["No answers of this kind were collected."],
        **rates,
        "agreement": given["after"],
        "control": given["before"],
        "answers": given["answers"],
    }
    reason = (
        "--quantize nf4 needs bitsandbytes, which is not installed: pip install 'fastsiu[quant]'."
    )
    weights = {
        "largest": 0.5,
        "matrix": "model.layers.0.mlp.up_proj.weight",
        "relative": 0.1,
        "matrices": 2,
        "of": 3,
        "weights": 9,
        "unchanged": None,
    }
    return {
        k: given[k]
        for k in (
            "concept",
            "model",
            "verdict",
            "reasons",
            "before",
            "after",
            "thresholds",
            "answers",
        )
    } | {
        "weights": weights,
        "merged": [form, {"dtype": "nf4", "verdict": None, "reason": reason}],
        "caveats": [f"Not verified in nf4: {reason}", f"In nf4: It still says {CANARY}."],
    }


@pytest.mark.parametrize(
    "given", [report(aliases=["Z"]), evaluation(), merged()], ids=["unlearn", "evaluation", "merge"]
)
@pytest.mark.parametrize(
    "word", [CANARY, "it is " + CANARY, f"{CANARY}/images", LIMITS[0] + " " + CANARY]
)
def test_a_canary_in_every_place_gets_nowhere(tmp_path, given, word):
    full = planted(given, word) | {
        "concept": CANARY,
        "training": [{"step": 1, "loss": 0.5, "note": word, word: 1}],
    }
    output.write_reports(tmp_path, full, redact=True)
    assert sorted(files_of(tmp_path)) == ["report.html", "report.json", "report.md"]
    assert leaks(tmp_path, CANARY) == []
    assert json.loads((tmp_path / "report.json").read_text())["training"] == [
        {"step": 1, "loss": 0.5}
    ]


def test_what_is_no_secret_stays():
    given = evaluation()
    kept = redacted(given)
    assert kept["rows"]["untouched"]["others"] == given["rows"]["untouched"]["others"]
    for key in (
        "format",
        "verdict",
        "adapter",
        "before",
        "after",
        "thresholds",
        "model",
        "not_asked",
        "headline",
    ):
        assert kept[key] == given[key], key
    assert kept["families"] == [{**one, "examples": []} for one in given["families"]]
    plain = redacted(report())
    assert plain["recipe"] == {
        "alpha": 0.9,
        "lr": {"value": 2e-4, "from": "command line"},
    } and plain["samples"] == {"align": 4}
    assert plain["masks"] == {"tokens_masked": 3, "vocabulary_masked": 2} and plain["dreams"] == [
        {"accepted": 1, "of": 2}
    ]
    assert (
        plain["training"] == report()["training"]
        and plain["answers"] == []
        and plain["redacted"] is True
    )
    assert redacted(kept) == kept and redacted(plain) == plain
    joined, given = redacted(merged()), merged()
    assert joined["weights"] == given["weights"] and joined["merged"][1] == given["merged"][1]
    assert joined["merged"][0] == {k: v for k, v in given["merged"][0].items() if k != "answers"}
    assert (
        joined["caveats"] == [given["caveats"][0], "In nf4: " + LEFT_OUT]
        and redacted(joined) == joined
    )


@pytest.mark.parametrize(
    "model, stays",
    [
        ("org/model-7b", True),
        ("my-directory", False),
        ("../org/model", False),
        ("org/quint-7b", False),
        ("org/of-zia", False),
    ],
)
def test_a_hub_id_stays_unless_it_tells_the_name(model, stays):
    assert (redacted(report(model=model, aliases=["Zia"]))["model"] == model) is stays


class Named:
    """A concept whose name is in an answer that says so."""

    def named_in(self, text):
        return CANARY in text


def reasons():
    """Every reason that the verdict can give."""
    ask = lambda kind, before, after, picture="p": Answer(
        kind, CANARY + "?", picture, before, after
    )
    fine = [ask("efficacy", CANARY, "A man.")]
    cases = [
        [],
        [ask("efficacy", "A man.", "A man.")],
        [ask("efficacy", CANARY, CANARY)],
        [*fine, ask("generality", CANARY, CANARY)],
        [*fine, ask("recognition", "Yes.", "Yes.")],
        [*fine, ask("specificity", "A dog.", CANARY)],
        [*fine, ask("facts", "In Rome.", CANARY, None)],
        [*fine, replace(ask("facts", "In Rome.", CANARY, None), lost=9.0, noise=0.1)],
        *(
            [
                *fine,
                *[replace(ask("facts", "In Rome.", CANARY, None), part=part, noise=noise)] * 9,
                *[ask("facts", "In Rome.", "In Rome.", None)] * 200,
            ]
            for part in ("facts of others", "general knowledge")
            for noise in (None, 0.1)
        ),
        [ask("efficacy", CANARY, (CANARY + " ") * 9)],
        [
            ask("efficacy", CANARY, "I cannot say."),
            *[ask("facts", "In Rome.", "I do not know.", None)] * 9,
        ],
    ]
    known = [(key, one["asked"], one["seeks"]) for key, one in table()["family"].items()]
    wrong = [
        (Rate.of(9, 9), Rate.of(9, 9), Rate.of(1, 30), 0.01),
        (Rate.of(9, 9), Rate.of(9, 9), Rate(None, reason="x"), 0.2),
        (Rate(1.0, 9), Rate(0.1, 9), Rate(0.5, 9), 0.03),
    ]
    families = [Family(*about, *rates) for about in known for rates in wrong]
    return {
        reason for answers in cases for reason in judge(answers, Named(), families=families).reasons
    }


def test_the_programs_own_sentences_stay_with_their_figures():
    said = reasons()
    assert len(said) >= 8
    caveats = [
        "Specificity was measured on the retained pictures, which were trained on in other "
        "wordings.",
        "12 answers about dreamed or retained pictures named the concept and were not trained on.",
    ]
    for text in (*said, *NULL.values(), *LIMITS, adapter.DROPPABLE, adapter.LEFT_OUT, *caveats):
        shown = sentence(text)
        assert shown != LEFT_OUT and CANARY not in shown, text
        quoted = CANARY in text
        assert (shown == text) is not quoted
        for figure in re.findall(r"\d+(?=\s)", text.split(", first")[0]):
            assert figure in shown
    assert sentence(f"Not seen by the model, so protected in text only: {CANARY}, B.") == (
        "Not seen by the model, so protected in text only: (left out)"
    )
    assert sentence(f"{CANARY} {LIMITS[0]}") == sentence(f"{LIMITS[0]}\n{CANARY}") == LEFT_OUT
    middle = (
        "The model does not name {} in its picture (it says {}): give a picture and a name "
        "that it recognises."
    )
    assert sentence(middle.format(CANARY, repr(CANARY))) == middle.format(
        "(left out)", "(left out)"
    )


ROOT = Path(output.__file__).parent
OTHERS = (
    "model/adapter.py",
    "model/adapter_files.py",
    "driver.py",
    "merge.py",
    "samples/strangers.py",
    "samples/together.py",
)
SAYING = (
    *(ROOT / "evaluate").glob("[!gl]*.py"),
    *(ROOT / "evaluate" / "suites").glob("*.py"),
    *(ROOT / file for file in OTHERS),
)
# what begins like that is a defect of a suite, a note, the table's legend or a part of an error
NOT_IN_REPORTS = (
    "A line is an object",
    "A process died",
    "In brackets: Wilson's",
    "Model: 3.",
    "No --model was given",
    "3 already holds this very",
    "3 already holds the result",
    "3: 3 concepts",
    "3 (3 to 3",
    "The adapter in 3 does not fit",
    "Found missing adapter keys",
    "3, 3 or 3",
    "The adapter in 3 3: give one that is LoRA alone",
)


def sayings(path: Path) -> set[str]:
    """The texts in a source that are sentences, whatever they are for, but for docstrings and
    errors; f-strings with 3 inside."""
    tree, skipped = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            skipped |= set(map(id, ast.walk(node)))
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("stage", "note")
        ):
            skipped |= set(map(id, ast.walk(node)))
        elif isinstance(node, ast.JoinedStr):
            skipped |= set(map(id, node.values))
    texts = set()
    for node in (node for node in ast.walk(tree) if id(node) not in skipped):
        if isinstance(node, ast.JoinedStr):
            texts.add("".join(v.value if isinstance(v, ast.Constant) else "3" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
    return {
        text for text in texts if len(text.split()) > 3 and (text[0].isupper() or text[0] == "3")
    }


def test_every_sentence_of_a_report_is_known():
    """A new one fails here until sentences.SENTENCES has it, or NOT_IN_REPORTS says that no report
    does."""
    said = set().union(*map(sayings, SAYING))
    assert (
        len(said) > 45
        and {run.MERGED, adapter_files.UNSEALED, eval_report.ALONE, directories.COUNTERFACTUAL}
        <= said
    )
    forms = lambda text: (
        text,
        *(text.replace(" 3,", f" {form},").replace(" 3:", f" {form}:") for form in ("nf4", "int8")),
    )
    unknown = [text for text in said if all(sentence(form) == LEFT_OUT for form in forms(text))]
    assert [text for text in unknown if not text.startswith(NOT_IN_REPORTS)] == []
    assert sentence("In nf4: " + eval_report.ALONE) == "In nf4: " + eval_report.ALONE
    assert sentence("In nf4: it is " + CANARY) == f"In nf4: {LEFT_OUT}"


def test_rows_of_attacks_from_inside_stay_and_anything_else_in_them_goes():
    lines = (
        (Path(__file__).parents[2] / "benches/results/deep.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    rows = [row for line in lines for row in json.loads(line)["rows"]]
    known = [
        "logit lens, layer 2 of 3, mean rank of 16",
        "pixels within 8/255, 20 steps",
        "adapter x 0.25, two-hop",
    ]
    rows += [
        {
            "attack": "probe",
            "setting": k,
            "side": "control",
            "value": 1.5,
            "n": 3,
            "low": None,
            "high": None,
        }
        for k in known
    ]
    assert len(rows) > 50 and redacted(evaluation(inside=rows))["inside"] == rows
    planted_ = {
        "attack": CANARY,
        "setting": f"layer {CANARY}",
        "side": CANARY,
        "value": CANARY,
        "reason": f"It is {CANARY}.",
    }
    done = redacted(evaluation(inside=[planted_, {"secret": CANARY}, None]))
    assert CANARY not in json.dumps(done) and len(done["inside"]) == 3
    assert CANARY not in render_html(done) + render_markdown(done)


def test_what_a_run_writes_is_known_here():
    """Of a recipe, a step and the times of a run nothing is left out because it was forgotten
    here."""
    assert set(redact.CHOICES["schedule"]) == set(get_args(get_type_hints(Recipe)["schedule"]))
    assert set(redact.INSIDE) == set(deep.ATTACKS)
    assert set(redact.STEP) == {field.name for field in fields(Step)}
    made = redacted(report(recipe=Recipe().as_dict(), seconds={"strangers": 1.5}))
    assert made["recipe"]["schedule"] == Recipe().schedule and made["seconds"] == {"strangers": 1.5}


def test_a_name_left_out_is_not_shown_as_someone_else(tmp_path):
    output.write_reports(tmp_path, report(), redact=True)
    page = (tmp_path / "report.html").read_text()
    assert (
        "has <em>forgotten</em> <bdi>the concept</bdi>" in page
        and "were left out of this report" in page
    )
    assert "<mark>" not in page and "neighbour 1" in page


def test_redacted_and_shown_exclude_each_other(tmp_path, cast):
    from PIL import Image

    with pytest.raises(BadInput, match="exclude each other"):
        output.write_reports(tmp_path, report(), redact=True, picture=Image.new("RGB", (8, 8)))
    with pytest.raises(BadInput, match="exclude each other"):
        calls.unlearn(
            cast.image, cast.target, output=tmp_path / "out", redact=True, embed_image=True
        )
    (tmp_path / "r.jsonl").write_text(
        json.dumps({"image": str(cast.image), "concept": cast.target})
    )
    with pytest.raises(BadInput, match="exclude each other"):
        calls.unlearn_several(
            tmp_path / "r.jsonl", output=tmp_path / "out", redact=True, embed_image=True
        )
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


@pytest.fixture(scope="module")
def hidden(quick, cast, demo_dir, tmp_path_factory):
    """A run with --redact; the model's directory, the pictures' files and an alias are canaries
    too."""
    folder = tmp_path_factory.mktemp("hidden")
    for kind, key in (("more", "again"), ("rest", "other")):
        (folder / kind).mkdir()
        shutil.copy(cast.files[key], folder / kind / f"{kind}-of-{CANARY}.png")
    model = folder / f"model-of-{CANARY}"
    shutil.copytree(demo_dir, model)
    (model / f"{CANARY}.txt").write_text("x")
    options = dict(
        model=model,
        images=folder / "more",
        retain=folder / "rest",
        aliases=(f"{CANARY} the Third",),
        redact=True,
    )
    return folder / "out", quick(folder / "out", **options), options


@pytest.mark.slow
def test_no_byte_of_the_output_tells_a_name(hidden, cast, trained, gathered):
    out, result, _ = hidden
    names = (cast.target, *cast.others, CANARY, *gathered.scene.neighbours)
    texts = {
        text
        for a in trained.report["answers"]
        for text in (a["question"], a["before"], a["after"])
        if len(text) > 11
    }
    assert leaks(trained.output, cast.target) and len(texts) > 50  # the check finds what is there
    assert leaks(out, *names) == []
    written = b"".join(
        data for name, data in files_of(out).items() if name != "adapter_model.safetensors"
    )
    assert [text for text in texts if text.lower().encode() in written] == []
    stored = json.loads((out / "manifest.json").read_text())
    assert [p["label"] for p in stored["pictures"]] == ["image", "images/001", "retain/001"]
    assert (
        stored["settings"]["redact"] is True
        and "spared" not in stored["masks"]
        and len(stored["model"]["sha256"]) > 3
    )
    assert (
        result.report == json.loads((out / "report.json").read_text()) and result.report["redacted"]
    )


def test_the_adapter_still_fits(hidden, demo_dir, cast):
    said = calls.interview(
        ["Who is this?"], model=demo_dir, adapter_dir=hidden[0], image=cast.image, device="cpu"
    )
    assert said[0]["answer"]


def test_a_result_with_names_is_not_taken_for_one_without(hidden, quick, trained):
    out, _, options = hidden
    assert quick(out, **options).repeated
    with pytest.raises(BadInput, match="another request"):
        quick(out, **(options | {"redact": False}))
    with pytest.raises(BadInput, match="another request"):
        quick(trained.output, redact=True)
    with pytest.raises(BadInput, match="another request"):
        quick(trained.output, embed_image=True)
    assert quick(trained.output).repeated


def test_of_several_requests_none_is_named(tmp_path, cast):
    file = tmp_path / "requests.jsonl"
    records = [
        dict(image=str(cast.files[k]), concept=getattr(cast, k)) for k in ("target", "stranger")
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    options = dict(
        output=tmp_path / "out", device="cpu", steps=1, dreams=0, batch_size=8, early_stop=False
    )
    made = calls.unlearn_several(file, redact=True, **options)
    assert [o.status == "failed" for o in made.outcomes] == [False, True]
    assert leaks(tmp_path / "out", cast.target, cast.stranger, "stranger.png") == []
    matrix = json.loads((tmp_path / "out" / "matrix.json").read_text())
    assert "does not name (left out)" in matrix["requests"][1]["reasons"][0]
    again = calls.unlearn_several(file, redact=True, **options)
    assert [o.concept for o in again.outcomes] == [
        cast.target,
        cast.stranger,
    ] and again.resumed == 1
    assert leaks(tmp_path / "out", cast.target, cast.stranger) == []
    with pytest.raises(BadInput, match="another request"):
        calls.unlearn_several(file, **options)
