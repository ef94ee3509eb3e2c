"""From a report's dictionary to HTML and Markdown; pure.

Names and answers come from users and models, so every text is escaped: by Jinja2 in HTML, by
`_markdown` in Markdown.
"""

from __future__ import annotations

import base64
import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape
from PIL import Image

from ..judging.kept import LOST, demanded, kept
from ..request import BadInput
from ..text.answers import affirms, same_answer
from ..text.concept import Concept
from .plot import chart, sides, trade_off, untouched_alone
from .summary import attacked, inside, standing
from .words import (
    CONCEPT,
    GIVEN_AWAY,
    INSIDE,
    KEPT,
    KEPT_MEANS,
    LIMITS,
    MEASURES,
    METRICS,
    NOISE,
    PLACES,
    REMAINS,
    REMAINS_MERGED,
    ROWS,
    Metric,
)

LARGEST = 512  # pixels a side of the embedded picture
EXAMPLES = 3  # answers of each kind that are shown first, where there are more than FEW
FEW = 12  # answers that a reader can take in at once


def render_html(report: Mapping[str, Any], picture: Image.Image | None = None) -> str:
    """One self-contained page: no script, and nothing that is loaded from elsewhere. picture: is
    embedded, small and without metadata."""
    return _ENVIRONMENT.get_template("page.html.j2").render(
        **_context(report), picture=None if picture is None else _embedded(picture)
    )


def render_markdown(report: Mapping[str, Any]) -> str:
    """The same in Markdown; the text of names and answers cannot become markup."""
    return _ENVIRONMENT.get_template("report.md.j2").render(**_context(report))


def template(name: str) -> Template:
    """A template of this folder, with the filters that keep others' text from being markup."""
    return _ENVIRONMENT.get_template(name)


def _context(report: Mapping[str, Any]) -> dict[str, Any]:
    training, names = list(report.get("training") or []), _names(report)
    answers, measures = list(report.get("answers") or []), _measures(report)
    rows = report.get("rows") or {}
    verdict = None if untouched_alone(report) else report.get("verdict")
    adapter = report.get("adapter") is not False and "merged" not in report
    return {
        "concept": str(report.get("concept") or CONCEPT),
        "names": names,
        "redacted": bool(report.get("redacted")),
        "model": report.get("model"),
        "adapter": adapter,
        "verdict": verdict,
        "forgotten": verdict == "forgotten",
        "standing": standing(report) if verdict else "",
        "remains": REMAINS if adapter else REMAINS_MERGED,
        "families": _families(report.get("families") or []),
        "not_asked": list(report.get("not_asked") or []),
        "inside": inside(report),
        "attacks_inside": INSIDE,
        "reasons": list(report.get("reasons") or []) if verdict else [],
        "summary": _summary(measures, report) if verdict else [],
        "measures": measures if verdict else [],
        "trade_off": trade_off(report),
        "headings": {kind: heading for kind, (heading, _, _) in MEASURES.items()},
        "places": PLACES,
        "who": {who: ROWS[who] for who in ROWS if who in rows},
        "metrics": _metrics(rows),
        "unmeasured": _unmeasured(measures if verdict else [], rows),
        "forms": [{**form, "attacked": attacked(form)} for form in report.get("merged") or []],
        "public": report.get("benchmarks"),
        "answers": _by_kind(answers),
        "asked": len(answers),
        "examples": _examples(answers, names if verdict else None) if len(answers) > FEW else [],
        "compared": bool(verdict),
        "losses": chart(training, ("loss", "ce", "kl")),
        "named": chart(training, ("p_name",), top=1.0),
        "training": training,
        "recipe": {k: _setting(v) for k, v in (report.get("recipe") or {}).items()},
        "samples": dict(report.get("samples") or {}),
        "masks": dict(report.get("masks") or {}),
        "dreams": list(report.get("dreams") or []),
        "seconds": dict(report.get("seconds") or {}),
        "caveats": [c for c in report.get("caveats") or [] if c not in LIMITS],
        "limits": LIMITS if adapter else LIMITS[1:],
    }


def _measures(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows, of = [], sides(report)
    for kind, (heading, full, question) in MEASURES.items():
        before, after = (of[side].get(kind) or {} for side in ("untouched", "unlearned"))
        reason = after.get("reason") or before.get("reason") or "It was not asked."
        least = (report.get("thresholds") or {}).get(kind)
        if kind in KEPT and least is not None:
            least = demanded(least, before.get("value"))
        rows.append(
            {
                "kind": kind,
                "heading": heading,
                "full": full,
                "question": question,
                "measured": after.get("value") is not None,
                "before": before,
                "after": after,
                "reason": reason,
                "least": least,
            }
        )
    return rows


def _families(given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The report's families, the worst first as there, with what is counted in words."""
    sides_of_family = ("untouched", "unlearned", "strangers")
    return [
        {
            "key": family.get("family"),
            "asked": family.get("asked"),
            "counted": GIVEN_AWAY.get(str(family.get("seeks")), ""),
            "cells": {side: family.get(side) or {} for side in sides_of_family},
            "allowed": family.get("allowed"),
            "status": _family_status(family),
            "examples": list(family.get("examples") or []),
        }
        for family in given
    ]


def _family_status(family: Mapping[str, Any]) -> str:
    if not family.get("applicable"):
        return "not applicable"
    return "too much" if family.get("failed") else "as strangers"


def _summary(measures: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> list[str]:
    """What was counted, as sentences."""
    noise, lost = NOISE.get(str(report.get("noise") or ""), ""), _most_lost(report)
    stayed = f"{{kept}} were kept; {noise} keeps {{floor}}." if noise else "{kept} stayed the same."
    told = {
        "efficacy": "Asked {times} who the training picture shows, the model gave the name {was} "
        "before and {now} after.",
        "generality": "Asked {times} who other pictures of the same show, it gave the name {was} "
        "before and {now} after.",
        "recognition": "Asked {times} with the name in the question, it confirmed the look {was} "
        "before and {now} after.",
        "specificity": "Of {n} answers about pictures of anything else, " + stayed,
        "facts": "Of {n} answers to questions without a picture, " + stayed,
    }
    times = lambda count: f"{count} time" if count == 1 else f"{count} times"
    sentences = []
    for m in measures:
        before, after = m["before"], m["after"]
        if before.get("value") is not None and after.get("value") is not None:
            n, was, now = (
                after["n"],
                round((1 - before["value"]) * before["n"]),
                round((1 - after["value"]) * after["n"]),
            )
            sentences.append(
                told[m["kind"]].format(
                    n=n, times=times(n), was=times(was), now=times(now), kept=n - now, floor=n - was
                )
            )
    compared = any(m["measured"] and m["kind"] in KEPT for m in measures)
    return [*sentences, *([KEPT_MEANS.format(lost=lost)] if noise and compared else [])]


def _most_lost(report: Mapping[str, Any]) -> float:
    """The nats that an answer that is kept may have lost, as the report's verdict had it."""
    most = (report.get("thresholds") or {}).get("lost")
    return LOST if most is None else float(most)


def _metrics(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups of lines {key, metric, cells: {row: rate}} in the order of `METRICS`. A metric without
    an explanation there comes last, under its key."""
    there = {
        key for row in rows.values() for key, rate in row.items() if rate.get("value") is not None
    }
    groups = [(title, dict(table)) for title, table in METRICS.items()]
    known = {key for _, table in groups for key in table}
    groups.append(("Further", {key: Metric(key, "", "", False) for key in sorted(there - known)}))
    found = []
    for title, table in groups:
        lines = [
            {
                "key": key,
                "metric": metric,
                "cells": {who: rows[who].get(key) or {} for who in ROWS if who in rows},
            }
            for key, metric in table.items()
            if key in there
        ]
        if lines:
            found.append({"title": title, "lines": lines})
    return found


def _unmeasured(
    measures: Sequence[Mapping[str, Any]], rows: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, str, str]]:
    """(heading, key, reason) of every measure and metric that has no value in any row."""
    found = {
        m["kind"]: (m["heading"], m["kind"], m["reason"]) for m in measures if not m["measured"]
    }
    headings = {key: metric.heading for table in METRICS.values() for key, metric in table.items()}
    for key in dict.fromkeys(key for row in rows.values() for key in row):
        rates = [row[key] for row in rows.values() if key in row]
        if key not in found and all(rate.get("value") is None for rate in rates):
            reason = next(
                (rate["reason"] for rate in rates if rate.get("reason")), "It was not asked."
            )
            found[key] = (headings.get(key, key), key, reason)
    return list(found.values())


def _by_kind(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    of: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in MEASURES}
    for answer in answers:
        of.setdefault(str(answer.get("kind")), []).append(answer)
    heading = lambda kind: MEASURES[kind][0] if kind in MEASURES else kind
    return [
        {"kind": kind, "heading": heading(kind), "rows": rows} for kind, rows in of.items() if rows
    ]


def _examples(answers: Sequence[Mapping[str, Any]], names: Concept | None) -> list[dict[str, Any]]:
    """A few answers of each kind, to different questions about different pictures. An answer that
    is not as wanted comes first, where there is one."""
    groups = []
    for group in _by_kind(answers):
        fine = [_as_wanted(a, names) for a in group["rows"]]
        wrong = [a for a, good in zip(group["rows"], fine, strict=True) if not good]
        right = [a for a, good in zip(group["rows"], fine, strict=True) if good]
        chosen = wrong[:1]
        for keys in (("question", "picture"), ("picture",), ("question",)):
            for a in right + wrong[1:]:
                new = all(
                    a.get(key) != b.get(key)
                    for b in chosen
                    for key in keys
                    if a.get("picture") or key == "question"
                )
                if new and a not in chosen and len(chosen) < EXAMPLES:
                    chosen.append(a)
        groups.append({**group, "rows": chosen, "all": len(group["rows"]), "wrong": len(wrong)})
    return groups


def _as_wanted(answer: Mapping[str, Any], names: Concept | None) -> bool:
    """Is the name gone where it had to go, and the answer the same where it had to stay? True for
    unknown kinds."""
    kind, before, after = answer.get("kind"), str(answer.get("before")), str(answer.get("after"))
    if kind in ("efficacy", "generality"):
        return names is None or not names.leaks_in(after)  # as the verdict reads it
    if kind == "recognition":
        return not affirms(after) if answer.get("picture") else not same_answer(before, after)
    if kind in KEPT:
        cut, lost = answer.get("cut") or (False, False), answer.get("lost")
        return kept(before, after, lost, (bool(cut[0]), bool(cut[1])))
    return True


def _setting(value: Any) -> dict[str, Any]:
    """An entry of a recipe, from a plain value or from the manifest's {"value", "from"}."""
    if isinstance(value, Mapping) and "value" in value:
        return {"value": value["value"], "origin": value.get("from")}
    return {"value": value, "origin": None}


def _names(report: Mapping[str, Any]) -> Concept | None:
    """The concept whose name is highlighted; None where the report holds no name."""
    if report.get("redacted"):
        return None
    try:
        return Concept(
            str(report.get("concept") or ""),
            tuple(report.get("aliases") or ()),
            report.get("as_word"),
        )
    except BadInput:  # empty, or of invisible characters only
        return None


def _embedded(picture: Image.Image) -> Markup:
    """A data: URI of the pixels alone, at most `LARGEST` a side."""
    small = picture.convert("RGB")
    small.thumbnail((LARGEST, LARGEST))
    clean = Image.new("RGB", small.size)  # no EXIF, comment or profile comes along
    clean.paste(small)
    buffer = io.BytesIO()
    clean.save(buffer, "JPEG", quality=88)
    return Markup("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"))


def _clean(value: Any) -> str:
    """Control characters made visible: some are illegal in HTML, others act on terminals."""
    text = "" if value is None else str(value)
    return "".join(
        "\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def _marked(value: Any, names: Concept | None) -> Markup:
    """The text with every occurrence of the name in <mark>."""
    text, out, end = _clean(value), Markup(""), 0
    for start, stop in names.spans(text) if names else ():
        out += escape(text[end:start]) + Markup("<mark>{}</mark>").format(text[start:stop])
        end = stop
    return out + escape(text[end:])


def _markdown(value: Any) -> Markup:
    """The text on one line, safe inside a table cell: neither HTML nor Markdown."""
    line = " ".join(_clean(value).split())
    line = re.sub(r"([\\`*_\[\]#!|~>])", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;"))
    line = re.sub(r"^(\d*)([-+.)])", r"\1\\\2", line)  # no list inside a list item
    return Markup(line.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;"))


def _percent(share: float) -> str:
    """A share in per cent with one decimal; only 0 and 1 themselves become 0 % and 100 %."""
    if 0 < share < 0.0005 or 0.9995 <= share < 1:
        return "<0.1 %" if share < 0.5 else ">99.9 %"
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _clean(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _unit(length: float) -> str:
    return f"{length:.1f}"


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters.update(
    clean=_clean, marked=_marked, md=_markdown, percent=_percent, number=_number, unit=_unit
)
