"""What the terminal shows of an audit and of a push."""

from __future__ import annotations

from rich.console import Console

from ..audit import Audited
from ..evaluate import effect
from ..push import Pushed
from .results import families_table

STANDS = {
    effect.FORGOTTEN: "Forgotten in what was asked.",
    effect.REMAINS: "Not forgotten:",
    effect.IGNORED: "The adapter is not in effect:",
    effect.OTHER_MODEL: "Another model or another revision:",
    effect.OTHER_RESULT: "Not as promised:",
}
COMPARED = {
    "unchanged": "answers with the name that are still the untouched model's",
    "elsewhere": "answers about anything else that are the untouched model's",
    "base": "answers of the untouched model that are the report's",
    "promised": "answers changed by unlearning that are the report's",
    "rest": "answers about anything else that are the report's",
}


def audited_summary(console: Console, audited: Audited) -> None:
    """The families, what was compared with the promise, what is deployed and why."""
    report = audited.report
    families_table(console, report)
    for key, label in COMPARED.items():
        rate = report["deployed"][key]
        if rate["value"] is not None:
            count = f"{round(rate['value'] * rate['n'])} of {rate['n']}"
            console.print(f"  {label:60s} {count}", soft_wrap=True)
    console.print(STANDS[audited.status], soft_wrap=True)
    for reason in report["reasons"]:
        console.print(f"  {reason}", soft_wrap=True)
    for note in (*report["caveats"], *audited.notes):
        console.print(note, soft_wrap=True)
    if audited.output is not None:
        console.print(f"Written to {audited.output}", soft_wrap=True)


def pushed_summary(console: Console, pushed: Pushed) -> None:
    """The files that went, or would go, and where they are."""
    for name, size in pushed.files.items():
        console.print(f"  {size:>13,} bytes  {name}", soft_wrap=True, highlight=False)
    for note in pushed.notes:
        console.print(note, soft_wrap=True)
    readers = "everybody" if pushed.public else "its owner alone"
    if pushed.commit is None:
        console.print(
            f"Nothing was sent. These files would go to {pushed.repo}, for {readers} to read.",
            soft_wrap=True,
        )
        return
    console.print(
        f"Pushed to {pushed.url} at {pushed.commit}, for {readers} to read.", soft_wrap=True
    )
