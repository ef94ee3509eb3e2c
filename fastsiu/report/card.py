"""The model card of a result: README.md, as the hub and PEFT read it. Pure.

Its metadata is what PEFT and the hub look for: the base and its relation, the library, the
pipeline, tags and the licence of the base. Its model-index has the verdict's rates and their
intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .. import __version__
from .render import template
from .summary import standing
from .words import CONCEPT, LIMITS, MEASURES, REMAINS, REMAINS_MERGED

NAME = "README.md"
TASK = "image-text-to-text"
DATASET = ("fastsiu-held-out", "Held-out questions about transforms of one picture")
WILSON = "Wilson 95 %"
SHOWN = ("steps", "rank", "lr", "alpha", "beta", "seed")  # of the recipe


@dataclass(frozen=True)
class Base:
    """The model that was unlearned.

    name:     as the card shows it; a directory's last part
    place:    its id on the hub; None for a directory that is none of the hub's
    revision: its commit
    terms:    `license`, `license_name` and `license_link` of its own card
    """

    name: str
    place: str | None = None
    revision: str | None = None
    terms: Mapping[str, str] = field(default_factory=dict)


def render_card(
    reports: Sequence[Mapping[str, Any]], base: Base, *, merged: bool, title: str = ""
) -> str:
    """README.md of a result.

    reports: report.json of each concept; a redacted one gives a card without the name
    merged:  a stand-alone model; else an adapter
    title:   of the model-index; a neutral one where it is left out
    """
    last = reports[-1]
    concepts = [str(report.get("concept") or CONCEPT) for report in reports]
    redacted = any(report.get("redacted") for report in reports)
    if redacted:
        concepts = [CONCEPT] * len(concepts)
    return template("card.md.j2").render(
        metadata=metadata(reports, base, merged=merged, title=title),
        base=base,
        merged=merged,
        concepts=concepts,
        redacted=redacted,
        results=[_result(report) for report in reports if report.get("verdict")],
        recipe={k: _value(v) for k, v in (last.get("recipe") or {}).items() if k in SHOWN},
        caveats=list(dict.fromkeys(c for r in reports for c in r.get("caveats") or ())),
        remains=REMAINS_MERGED if merged else REMAINS,
        limits=LIMITS[1:] if merged else LIMITS,
        version=__version__,
    )


def metadata(
    reports: Sequence[Mapping[str, Any]], base: Base, *, merged: bool, title: str = ""
) -> str:
    """The YAML block of the card, without its marks."""
    results = [result for report in reports for result in eval_results(report)]
    tags = ["fastsiu", "machine-unlearning"]
    relation = "finetune" if merged else "adapter"
    if not merged:
        tags.append("lora")
    if base.place is not None:
        tags.append(f"base_model:{relation}:{base.place}")
    more: dict[str, Any] = dict(base.terms)
    if base.place is not None:
        more["base_model_relation"] = relation
    data = ModelCardData(
        base_model=base.place,
        library_name="transformers" if merged else "peft",
        pipeline_tag=TASK,
        tags=sorted(tags),
        model_name=(title or "fastsiu-result") if results else None,
        eval_results=results or None,
        **more,
    )
    return str(data.to_yaml()).strip()


def eval_results(report: Mapping[str, Any]) -> list[EvalResult]:
    """The unlearned model's rates with their intervals, as a model-index has them; nothing where
    nothing was asked."""
    found = []
    for key, (heading, full, _) in MEASURES.items():
        rate = (report.get("after") or {}).get(key) or {}
        if rate.get("value") is None:
            continue
        interval = {"interval": WILSON, "low": rate.get("low"), "high": rate.get("high")}
        found.append(
            EvalResult(
                task_type=TASK,
                dataset_type=DATASET[0],
                dataset_name=DATASET[1],
                metric_type=key,
                metric_name=f"{heading}: {full}",
                metric_value=rate["value"],
                metric_args={"n": rate.get("n"), **interval},
            )
        )
    return found


def _result(report: Mapping[str, Any]) -> dict[str, Any]:
    sides = [report.get("before") or {}, report.get("after") or {}]
    return {
        "concept": str(report.get("concept") or CONCEPT),
        "standing": standing(report),
        "reasons": list(report.get("reasons") or []),
        "rates": [
            (heading, full, *(side.get(key) or {} for side in sides))
            for key, (heading, full, _) in MEASURES.items()
            if (sides[1].get(key) or {}).get("value") is not None
        ],
        "families": [f for f in report.get("families") or [] if f.get("applicable")],
        "forms": [
            (form.get("dtype"), form.get("verdict") or "not verified")
            for form in report.get("merged") or []
        ],
    }


def _value(setting: Any) -> Any:
    return setting.get("value") if isinstance(setting, Mapping) else setting
