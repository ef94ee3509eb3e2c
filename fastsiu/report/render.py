"""From the report's dictionary to HTML and Markdown; a pure function of its input.

Names and answers come from users and models, so every text is escaped: by Jinja2 in HTML, by `_markdown` in Markdown.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

# kind -> (heading, what a full bar means, the question in words)
MEASURES = {
    "efficacy": ("The training picture", "answers without the name", "Is the name gone for it, cropped, turned or blurred?"),
    "generality": ("Other pictures of it", "answers without the name", "Is the name gone for pictures not used in training?"),
    "recognition": ("Questions that hold the name", "answers that confirm nothing", "Is its look denied when asked by name?"),
    "specificity": ("Pictures of anything else", "answers unchanged", "Does the model answer about other pictures as before?"),
    "facts": ("Questions without a picture", "answers unchanged", "Does the model still know in words what it knew?"),
}
LIMITS = (
    "The adapter can be dropped; only merged weights forget.",
    "This is a technical measurement on the questions listed here. It is no statement of legal compliance.",
    "Other wordings, other pictures and further training may bring the name back.",
)


def render_html(report: Mapping[str, Any]) -> str:
    """One self-contained page: no script, no picture, nothing loaded from anywhere."""
    return _ENVIRONMENT.get_template("page.html.j2").render(**_context(report))


def render_markdown(report: Mapping[str, Any]) -> str:
    """The same in Markdown; the text of names and answers cannot become markup."""
    return _ENVIRONMENT.get_template("report.md.j2").render(**_context(report))


def _context(report: Mapping[str, Any]) -> dict[str, Any]:
    concept = str(report["concept"])
    training = list(report.get("training") or [])
    return {
        "concept": concept,
        "model": report.get("model"),
        "forgotten": report.get("verdict") == "forgotten",
        "reasons": list(report.get("reasons") or []),
        "measures": _measures(report),
        "answers": _by_kind(report.get("answers") or []),
        "losses": _chart(training, ("loss", "ce", "kl")),
        "named": _chart(training, ("p_name",), top=1.0),
        "training": training,
        "recipe": {k: _setting(v) for k, v in (report.get("recipe") or {}).items()},
        "samples": dict(report.get("samples") or {}),
        "masks": dict(report.get("masks") or {}),
        "dreams": list(report.get("dreams") or []),
        "seconds": dict(report.get("seconds") or {}),
        "caveats": [c for c in report.get("caveats") or [] if c not in LIMITS],
        "limits": LIMITS,
        "name_pattern": _name_pattern(concept),
    }


def _measures(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for kind, (heading, full, question) in MEASURES.items():
        before, after = ((report.get(side) or {}).get(kind) or {} for side in ("before", "after"))
        reason = after.get("reason") or before.get("reason") or "It was not asked."
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
                "least": (report.get("thresholds") or {}).get(kind),
            }
        )
    return rows


def _by_kind(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    known = {kind: [a for a in answers if a.get("kind") == kind] for kind in MEASURES}
    return [{"kind": kind, "heading": MEASURES[kind][0], "rows": rows} for kind, rows in known.items() if rows]


def _setting(value: Any) -> dict[str, Any]:
    """A recipe's entry, plain or as the manifest writes it."""
    if isinstance(value, Mapping) and "value" in value:
        return {"value": value["value"], "origin": value.get("from")}
    return {"value": value, "origin": None}


def _chart(training: Sequence[Mapping[str, Any]], names: Sequence[str], top: float | None = None) -> dict[str, Any] | None:
    """Polylines in a box of 300 x 120 units; points that are missing or not finite are left out."""
    series = {}
    for name in names:
        points = [(i if row.get("step") is None else row["step"], row.get(name)) for i, row in enumerate(training)]
        series[name] = [(float(x), float(y)) for x, y in points if isinstance(y, (int, float)) and math.isfinite(y)]
    series = {name: points for name, points in series.items() if points}
    if not series:
        return None
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    left, right = min(xs), max(xs)
    low, high = min(0.0, *ys), max(ys) if top is None else max(top, *ys)
    high = high if high > low else low + 1.0

    def place(x: float, y: float) -> str:
        across = 0.5 if right == left else (x - left) / (right - left)
        return f"{300 * across:.1f},{120 * (high - y) / (high - low):.1f}"

    lines = [
        {
            "name": name,
            "points": " ".join(place(x, y) for x, y in points),
            "last": place(*points[-1]).split(","),
            "first_value": points[0][1],
            "last_value": points[-1][1],
        }
        for name, points in series.items()
    ]
    return {"lines": lines, "low": low, "high": high, "zero": 120 * high / (high - low), "left": left, "right": right}


def _name_pattern(concept: str) -> re.Pattern[str]:
    parts = [concept.strip(), *(part for part in concept.split() if len(part) > 2)]
    parts = sorted({p for p in parts if p}, key=len, reverse=True)
    return re.compile("|".join(re.escape(p) for p in parts) or r"(?!)", re.IGNORECASE)


def _clean(value: Any) -> str:
    """Control characters made visible: some are illegal in HTML, others act on terminals."""
    text = "" if value is None else str(value)
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def _marked(value: Any, pattern: re.Pattern[str]) -> Markup:
    """The text with every occurrence of the name in <mark>."""
    text, out, end = _clean(value), Markup(""), 0
    for match in pattern.finditer(text):
        out += escape(text[end : match.start()]) + Markup("<mark>{}</mark>").format(match[0])
        end = match.end()
    return out + escape(text[end:])


def _markdown(value: Any) -> Markup:
    """The text on one line, safe inside a table cell: neither HTML nor Markdown."""
    line = " ".join(_clean(value).split())
    line = re.sub(r"([\\`*_\[\]#!|~>])", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;"))
    line = re.sub(r"^(\d*)([-+.)])", r"\1\\\2", line)  # no list inside a list item
    return Markup(line.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;"))


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _clean(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters.update(clean=_clean, marked=_marked, md=_markdown, percent=_percent, number=_number)
