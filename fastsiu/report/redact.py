"""A report without names, questions and answers. It is built from what is known to hold none, so
anything new or unknown stays out.

Left out: the concept, its aliases and parts, its neighbours, every question and answer, file names
of pictures, the tokens of the name, a model's directory.
Kept: numbers, the verdict, hyper-parameters, the id of a hub model, and the program's own sentences
(`sentences`).
The adapter itself still answers whoever asks it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..evaluate.effect import STATUSES
from ..evaluate.eval_report import FORMAT
from ..request import FACETS, Recipe
from ..request import KINDS as CONCEPT_KINDS
from ..samples.kinds import ORIGINS as KIND_ORIGINS
from ..text.concept import COMMON_WORDS, Concept
from .sentences import FAMILIES, LEFT_OUT, STORED, is_setting, sentence
from .words import CONCEPT, INSIDE, MEASURES, METRICS, NOISE, ROWS

MODEL = "a model from a directory"
VERDICTS = ("forgotten", "not forgotten")
KINDS = tuple(MEASURES)
METRIC_KEYS = tuple(key for group in METRICS.values() for key in group)
THRESHOLDS = (*MEASURES, "lost", "new_degenerate", "refusal_rise", "renamed")
COUNTS = ("tokens_masked", "tokens", "vocabulary_masked")
STEP = ("step", "ce", "kl", "loss", "p_name", "retained", "strange", "anchored")
STAGES = (
    "load",
    "samples",
    "dreams",
    "strangers",
    "teacher",
    "directions",
    "train",
    "verdict",
    "untouched",
    "unlearned",
    "control",
    "ask",
    "judge",
    "merge",
)
CHOICES = {
    "adapt": ("language", "vision", "projector"),
    "dream_in": ("pixels", "features"),
    "schedule": ("constant", "cosine", "decay", "gone"),
    "substitute": ("description", "name"),
}
CHANGE = ("largest", "relative", "matrices", "of", "weights", "unchanged")
ORIGINS = ("default", "model width", "model directory", "preset paper", "command line")
SIDES = ("untouched", "unlearned", "strangers")  # of a family
DEPLOYED = ("unchanged", "elsewhere", "base", "promised", "rest")  # rates of an audit
INSIDE_SIDES = ("untouched", "unlearned", "control")  # of an attack from inside

Clean = Callable[[Any], Any]  # from a value of a report to what may be told of it


def redacted(report: Mapping[str, Any]) -> dict[str, Any]:
    """report.json with nothing in it that names or quotes. A redacted report stays the same."""
    done: dict[str, Any] = {"redacted": True, "concept": CONCEPT, "model": _model(report)}
    for key, clean in _SCHEMA.items():
        if key in report:
            done[key] = clean(report[key])
    return done


def _model(report: Mapping[str, Any]) -> str:
    """A hub id, unless a name or a word of a name is in it."""
    model = str(report.get("model") or "")
    names = [str(report.get("concept") or ""), *map(str, report.get("aliases") or ())]
    words = {
        w
        for name in names
        for w in re.findall(r"\w+", name.casefold())
        if len(w) > 2 and w not in COMMON_WORDS
    }
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None
    apart = re.sub(r"[/_.-]", " ", model)
    told = any(w in model.casefold() for w in words) or any(
        Concept(name).named_in(apart) for name in names if name.strip()
    )
    return model if hub and not told else MODEL


# Values -------------------------------------------------------------------------------------------


def _number(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float)) else None


def _nothing(value: Any) -> list[Any]:
    return []


def _one_of(known: tuple[str, ...]) -> Clean:
    return lambda value: value if value in known else None


def _only(keys: tuple[str, ...], clean: Clean) -> Clean:
    """A table with its known keys."""
    return lambda table: {k: clean(v) for k, v in (table or {}).items() if k in keys}


def _each(clean: Clean) -> Clean:
    return lambda values: [clean(v) for v in values or ()]


# Parts of a report --------------------------------------------------------------------------------


def _rate(rate: Any) -> dict[str, Any]:
    rate = rate or {}
    kept = _only(("value", "n", "low", "high"), _number)(rate)
    if rate.get("reason"):
        kept["reason"] = sentence(rate["reason"])
    return kept


def _family(family: Any) -> dict[str, Any]:
    """A family of questions with its figures, but no question and no answer."""
    family = family or {}
    key = family.get("family") if family.get("family") in FAMILIES else None
    return {
        "family": key,
        "asked": FAMILIES[key]["asked"] if key else None,
        "seeks": FAMILIES[key]["seeks"] if key else None,
        "n": _number(family.get("n")),
        "margin": _number(family.get("margin")),
        "allowed": _number(family.get("allowed")),
        "applicable": _number(family.get("applicable")),
        "failed": _number(family.get("failed")),
        **{side: _rate(family.get(side)) for side in SIDES},
        "examples": [],
    }


def _deployed(found: Any) -> dict[str, Any]:
    """What an audit found, without the sentences, which are among the reasons."""
    rates = {key: _rate((found or {}).get(key)) for key in DEPLOYED}
    return {"status": _one_of(STATUSES)((found or {}).get("status")), **rates}


def _headline(family: Any) -> Any:
    return family and _family(family)


def _inside(row: Any) -> dict[str, Any]:
    """A row of an attack from inside; an unknown setting is left out."""
    row = row or {}
    setting = str(row.get("setting"))
    kept = {
        "attack": _one_of(tuple(INSIDE))(row.get("attack")),
        "setting": setting if is_setting(setting) else LEFT_OUT,
        "side": _one_of(INSIDE_SIDES)(row.get("side")),
        **{key: _number(row.get(key)) for key in ("value", "n", "low", "high")},
    }
    if row.get("reason"):
        kept["reason"] = sentence(row["reason"])
    return kept


def _recipe(recipe: Any) -> dict[str, Any]:
    return {
        name: _setting(name, given)
        for name, given in (recipe or {}).items()
        if name in Recipe.__dataclass_fields__
    }


def _setting(name: str, given: Any) -> Any:
    clean = _one_of(CHOICES[name]) if name in CHOICES else _number
    if isinstance(given, Mapping):
        return {"value": clean(given.get("value")), "from": _one_of(ORIGINS)(given.get("from"))}
    return clean(given)


def _weights(change: Any) -> dict[str, Any]:
    matrix = (change or {}).get("matrix")
    return {"matrix": _matrix(matrix), **_only(CHANGE, _number)(change)}


def _matrix(name: Any) -> str | None:
    """The path of a parameter in the architecture."""
    if isinstance(name, str) and re.fullmatch(r"(?:[a-z0-9_]+\.)+(?:weight|bias)", name):
        return name
    return None


def _form(form: Any) -> dict[str, Any]:
    """A merged model in one precision, without the answers."""
    return {key: clean(form[key]) for key, clean in _FORM.items() if key in (form or {})}


_RATES = _only(KINDS, _rate)
_FORM: dict[str, Clean] = {
    "dtype": _one_of(STORED),
    "verdict": _one_of(VERDICTS),
    "reasons": _each(sentence),
    "reason": sentence,
    "thresholds": _only(THRESHOLDS, _number),
    "noise": _one_of(tuple(NOISE)),
    "families": _each(_family),
    "headline": _headline,
    "before": _RATES,
    "after": _RATES,
    "agreement": _RATES,
    "control": _RATES,
}
_SCHEMA: dict[str, Clean] = {
    "format": _one_of((FORMAT,)),
    "adapter": _number,
    "kind": _one_of(CONCEPT_KINDS),
    "kind_from": _one_of(KIND_ORIGINS),
    "verdict": _one_of(VERDICTS),
    "deployed": _deployed,
    "reasons": _each(sentence),
    "caveats": _each(sentence),
    "thresholds": _only(THRESHOLDS, _number),
    "noise": _one_of(tuple(NOISE)),
    "before": _RATES,
    "after": _RATES,
    "rows": _only(tuple(ROWS), _only(METRIC_KEYS, _rate)),
    "families": _each(_family),
    "headline": _headline,
    "not_asked": _each(sentence),
    "inside": _each(_inside),
    "answers": _nothing,
    "training": _each(_only(STEP, _number)),
    "recipe": _recipe,
    "samples": _only(FACETS, _number),
    "masks": _only(COUNTS, _number),
    "dreams": _each(_only(("accepted", "of"), _number)),
    "seconds": _only(STAGES, _number),
    "weights": _weights,
    "merged": _each(_form),
}
