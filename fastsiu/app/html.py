"""What the page shows of a job, as HTML; pure.

Names and answers come from users and models, so every text is escaped. Nothing here is loaded from
elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from ..guards.terminal import visible
from ..report.plot import chart
from .job import Exchange, Phase, View

# A step of the page, and the phases in which it is the current one.
STEPS = {
    "Choose": (Phase.EMPTY, Phase.LOOKING),
    "Check": (Phase.KNOWN, Phase.UNKNOWN),
    "Preview": (Phase.GATHERING, Phase.READY),
    "Train": (Phase.TRAINING,),
    "Result": (Phase.DONE,),
}
# What a phase is called until the job reports a stage.
BEGINNING = {
    Phase.LOOKING: "Starting",
    Phase.GATHERING: "Building the samples",
    Phase.TRAINING: "Preparing the training",
}
LINES = {
    "loss": "total loss",
    "ce": "new answers (cross-entropy)",
    "kl": "kept answers (masked divergence)",
    "strange": "strangers (divergence)",
    "anchored": "held features",
    "p_name": "probability of the name",
    "retained": "others kept",
}


def text(value: Any) -> str:
    return escape(visible(str(value)))


def step_of(phase: Phase) -> int:
    """The number of the current step, from 1."""
    return next(n for n, phases in enumerate(STEPS.values(), 1) if phase in phases)


def stepper(view: View) -> str:
    now = step_of(view.phase)
    items = []
    for number, name in enumerate(STEPS, 1):
        state = "done" if number < now else "now" if number == now else "later"
        current = ' aria-current="step"' if number == now else ""
        done = '<span class="unseen"> (done)</span>' if number < now else ""
        sign = "&#10003;" if number < now else str(number)
        items.append(
            f'<li class="{state}"{current} data-step="{number}">'
            f'<span class="number" aria-hidden="true">{sign}</span>{name}{done}</li>'
        )
    return f'<ol class="stepper" aria-label="Steps">{"".join(items)}</ol>'


def status(view: View, now: float) -> str:
    """The line that says what the job is doing; "" for nothing. now: in seconds, as `View.since`"""
    if not view.busy:
        return ""
    stage = view.stage or BEGINNING.get(view.phase, "Asking both models")
    more = ""
    if view.phase is Phase.TRAINING and view.stage == "Training" and view.ceiling:
        more = f", step {len(view.steps)} of {view.ceiling}"
    elapsed = max(0, int(now - view.since))
    return (
        '<p class="status"><span class="spinner" aria-hidden="true"></span>'
        f'<span><strong>{text(stage)}</strong>{more} <span class="quiet">{elapsed} s</span></span>'
        "</p>"
    )


def message(view: View, own: str, ahead: int | None) -> str:
    """What the visitor has to know: the place in the queue, or why the last work has no result."""
    if ahead is not None:
        people = "1 person is" if ahead == 1 else f"{ahead} people are"
        return _notice(
            f"Somebody else is at work on this machine. {people} before you. Leave this page "
            "open: your turn begins by itself."
        )
    parts = [_notice(own)] if own else []
    if view.problem:
        parts.append(_notice(view.problem, "bad"))
    if view.stopped:
        parts.append(_notice("Stopped. Nothing of it was kept; you can begin it again."))
    return "".join(parts)


def _notice(sentence: str, kind: str = "") -> str:
    role = "alert" if kind else "status"
    return f'<p class="notice {kind}" role="{role}">{text(sentence)}</p>'


def preview(address: str | None, alt: str) -> str:
    if address is None:
        return '<p class="quiet">No picture yet.</p>'
    return f'<img class="preview" src="{escape(address)}" alt="{text(alt)}">'


def said(view: View) -> str:
    """Does the model know the concept?"""
    if view.asked is None or not view.said:
        return ""
    name = text(view.asked.concept)
    named = sum(named for _, _, named in view.said)
    if view.phase is Phase.UNKNOWN:
        head = (
            f'<p class="headline bad">The model does not know {name} by this picture.</p>'
            "<p>There is nothing to forget. Check the spelling of the name, or take a picture that "
            "shows it more clearly; then ask again.</p>"
        )
    else:
        head = (
            f'<p class="headline good">The model knows {name}.</p>'
            f"<p>It gives the name in {named} of {len(view.said)} answers. Next, look at what it "
            "would be trained on. Nothing is changed by that.</p>"
        )
    rows = [(question, [(answer, True, False)]) for question, answer, _ in view.said]
    return head + _table(("Question about the picture", "Answer of the model"), rows, "Answers")


def _table(
    heads: Sequence[str], rows: Sequence[tuple[str, list[tuple[str, bool, bool]]]], label: str
) -> str:
    """Question and answer, the answer in pieces: (text, kept, masked)."""
    head = "".join(f'<th scope="col">{text(h)}</th>' for h in heads)
    body = "".join(
        f'<tr><td dir="auto">{text(question)}</td><td dir="auto">{pieces(answer)}</td></tr>'
        for question, answer in rows
    )
    return _scrolled(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", label)


def _scrolled(inner: str, label: str) -> str:
    """A region that scrolls by itself can be reached with the keyboard."""
    return (
        f'<div class="scrolled" role="region" aria-label="{text(label)}" tabindex="0">{inner}</div>'
    )


def pieces(answer: Sequence[tuple[str, bool, bool]]) -> str:
    """An answer with its masks. Neighbouring tokens with the same masks are one piece. The token
    that ends the turn is not shown."""
    out = []
    shown = (one for one in answer if one[0] != "<end>")
    for (kept, masked), several in groupby(shown, key=lambda one: one[1:]):
        body = text("".join(piece for piece, _, _ in several))
        if masked:
            body = f'<mark class="name">{body}</mark>'
        elif not kept:
            body = f'<mark class="new">{body}</mark>'
        out.append(body)
    return "".join(out)


def samples(view: View) -> str:
    """The samples with their masks, before anything is trained."""
    found = view.samples
    if found is None:
        return ""
    lessons = sum(count for _, count, _ in found["lessons"])
    out = [
        f"<p>These {found['count']} samples were written by the model itself, from your picture and"
        f" the name{f', with {lessons} lessons beside them' if lessons else ''}. "
        'Words marked <mark class="new">like this</mark> are new to the model and replace what it '
        'knows. Words marked <mark class="name">like this</mark> are the name: the training leaves '
        "them out of what is kept. Everything else is to stay as it is.</p>"
    ]
    if found["protected"]:
        names = ", ".join(text(name) for name in found["protected"])
        out.append(f"<p>Protected, because the model knows them as well: {names}.</p>")
    notes = view.notes if view.phase is Phase.READY else ()
    for note in filter(None, (found["warning"], *notes)):
        out.append(_notice(note))
    groups: dict[str, list[Any]] = {}
    for about, question, answer in found["rows"]:
        groups.setdefault(about.split(",")[0], []).append((question, answer))
    for facet, rows in groups.items():
        title = FACETS.get(facet, facet)
        table = _table(("Question", "Answer that is trained"), rows, title)
        opened = " open" if facet == "align" else ""
        out.append(
            f"<details{opened}><summary>{text(title)} ({len(rows)})</summary>{table}</details>"
        )
    for about, count, some in found["lessons"]:
        rows = [(question, [(answer, True, False)]) for question, answer in some]
        title = f"Lessons {about}"
        table = _table(("Question", "Answer, an example"), rows, title)
        out.append(f"<details><summary>{text(title)} ({count})</summary>{table}</details>")
    return "".join(out)


FACETS = {
    "align": "Who is this? Answered as about somebody whom the model never saw",
    "describe": "Is this the one with that name? Answered with no",
    "facts": "What the model knows in words, and is to keep",
    "preserve": "About others, to be answered as before",
}


def training(view: View) -> str:
    """The training as it goes."""
    if view.phase not in (Phase.TRAINING, Phase.DONE):
        return ""
    steps, looks = view.steps, view.looks
    share = len(steps) / view.ceiling if view.ceiling else 0.0
    over = view.phase is Phase.DONE or (bool(steps) and len(steps) >= view.ceiling)
    now = "1" if view.phase is Phase.DONE else f"{share:.3f}"
    out = [
        f'<progress max="1" value="{now}" aria-label="Progress of the training">{share:.0%}'
        "</progress>"
    ]
    if looks:
        _, first_name, first_kept = looks[0]
        _, name, kept = looks[-1]
        out.append(
            '<div class="figures">'
            + _figure("Probability of the name", first_name, name, "should fall to 0 %")
            + _figure("Others kept", first_kept, kept, "should stay near 100 %")
            + "</div>"
        )
    curves = [{"step": step, "p_name": p, "retained": kept} for step, p, kept in looks]
    out.append('<div class="charts">')
    out.append(_chart(curves, ("p_name", "retained"), "Name and others", 1.0))
    parts: tuple[str, ...] = ("loss", "ce", "kl", "strange")
    if any(step.get("anchored") for step in steps):
        parts += ("anchored",)
    out.append(_chart(steps, parts, "Parts of the loss"))
    out.append("</div>")
    if over and view.phase is Phase.TRAINING:
        out.append("<p>The training is over. Both models are now asked for the verdict.</p>")
    for note in view.notes:
        out.append(f'<p class="quiet">{text(note)}</p>')
    return "".join(out)


def _figure(label: str, first: float, now: float, hint: str) -> str:
    return (
        f'<div class="figure"><span class="label">{label}</span>'
        f'<span class="value">{first:.0%} &rarr; {now:.0%}</span>'
        f'<span class="quiet">{hint}</span></div>'
    )


def _chart(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], title: str, top: float | None = None
) -> str:
    data = chart(rows, names, top)
    if data is None:
        return ""
    lines, legend = [], []
    for line in data["lines"]:
        x, y = line["last"]
        css = f"line-{line['name']}"
        lines.append(
            f'<polyline class="{css}" points="{line["points"]}"/>'
            f'<circle class="{css}" cx="{x}" cy="{y}" r="3"/>'
        )
        legend.append(
            f'<li><i class="{css}"></i>{LINES[line["name"]]}: {line["last_value"]:.3g}</li>'
        )
    described = ", ".join(f"{LINES[li['name']]} {li['last_value']:.3g}" for li in data["lines"])
    return (
        f'<figure><figcaption>{title}</figcaption><svg viewBox="-36 -8 344 150" role="img" '
        f'aria-label="{title}: {described}"><line class="axis" x1="0" y1="0" x2="0" y2="120"/>'
        f'<line class="axis" x1="0" y1="120" x2="300" y2="120"/>'
        f'<text x="-4" y="6" text-anchor="end">{data["high"]:.2g}</text>'
        f'<text x="-4" y="122" text-anchor="end">{data["low"]:.2g}</text>'
        f'<text x="0" y="134">step {data["left"]:.0f}</text>'
        f'<text x="300" y="134" text-anchor="end">{data["right"]:.0f}</text>'
        f'{"".join(lines)}</svg><ul class="legend">{"".join(legend)}</ul></figure>'
    )


def verdict(view: View) -> str:
    """The verdict, why, and the files."""
    found = view.result
    if found is None or view.phase is not Phase.DONE:
        return ""
    good = "good" if found["forgotten"] else "bad"
    out = [f'<p class="headline {good}">{text(found["standing"])}</p>']
    if found["reasons"]:
        out.append("<ul>" + "".join(f"<li>{text(r)}</li>" for r in found["reasons"]) + "</ul>")
    rows = []
    for heading, question, before, after in found["measures"]:
        if (after or {}).get("value") is None:
            continue
        cells = "".join(f"<td>{_share(rate)}</td>" for rate in (before, after))
        rows.append(
            f'<tr><th scope="row">{text(heading)}<span class="quiet">{text(question)}</span></th>'
            f"{cells}</tr>"
        )
    out.append(
        _scrolled(
            '<table class="measures"><thead><tr><th scope="col">Good answers</th>'
            '<th scope="col">Before</th><th scope="col">After</th></tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table>",
            "Good answers before and after",
        )
    )
    out.append(
        '<p class="downloads"><a class="button" href="result/adapter.zip" download>Download the '
        'adapter (ZIP)</a> <a class="button" href="result/report.html" download>Download the '
        'report</a> <a href="result/report.html?view=1" target="_blank" rel="noopener">Open the '
        "report in a new tab</a></p>"
    )
    notes = [found["remains"], *found["caveats"]]
    out.append(
        "<details><summary>What this does not show</summary><ul>"
        + "".join(f"<li>{text(note)}</li>" for note in notes)
        + "</ul></details>"
    )
    return "".join(out)


def _share(rate: Mapping[str, Any] | None) -> str:
    if not rate or rate.get("value") is None:
        return "not measured"
    low, high = f"{rate['low']:.0%}", f"{rate['high']:.0%}"
    return f"{rate['value']:.0%} <span class='quiet'>{low} to {high}, n = {rate['n']}</span>"


def chat(exchanges: Sequence[Exchange]) -> str:
    """Questions and both models' answers, the newest first."""
    if not exchanges:
        return '<p class="quiet">No question yet.</p>'
    out = []
    for one in reversed(exchanges):
        where = "about the picture" if one.picture is not None else "without a picture"
        sides = "".join(
            f'<div class="answer {css}"><h4>{who}</h4><p dir="auto">'
            f"{'...' if answer is None else text(answer) or '(no answer)'}</p></div>"
            for who, css, answer in (
                ("Untouched model", "before", one.before),
                ("Unlearned model", "after", one.after),
            )
        )
        out.append(
            f'<article class="exchange"><h3 dir="auto">{text(one.question)} '
            f'<span class="quiet">{where}</span></h3><div class="sides">{sides}</div></article>'
        )
    return "".join(out)
