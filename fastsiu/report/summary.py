"""What a report comes to, in a few words: the standing, the families of questions, the attacks from
inside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def standing(report: Mapping[str, Any]) -> str:
    """The verdict in one sentence that claims no more than was asked; "" where nothing was
    unlearned."""
    verdict = report.get("verdict")
    if verdict not in ("forgotten", "not forgotten"):
        return ""
    asked = [family for family in report.get("families") or [] if family.get("applicable")]
    failed = sum(bool(family.get("failed")) for family in asked)
    more = ((report.get("after") or {}).get("generality") or {}).get("value") is not None
    where = (
        "this picture, its transforms and other pictures of it"
        if more
        else "this picture and its transforms"
    )
    families = "1 family of questions" if len(asked) == 1 else f"{len(asked)} families of questions"
    if verdict == "forgotten" and asked:
        return f"Forgotten: in {families} on {where} the model answers as it does about strangers."
    if verdict == "forgotten":
        return (
            "Forgotten as far as it was asked, in the questions below; nothing tried to get it "
            "back in other ways."
        )
    if failed:
        return (
            f"Not forgotten: in {failed} of {families} on {where} the model tells more than it "
            "does about strangers."
        )
    return "Not forgotten: see the reasons."


def attacked(report: Mapping[str, Any]) -> str:
    """The result of the families of questions in a few words, for a report or for one form of a
    merged model."""
    asked = [family for family in report.get("families") or [] if family.get("applicable")]
    if not asked:
        return "asked in other ways: nothing"
    failed = [str(family.get("family")) for family in asked if family.get("failed")]
    told = f"{len(failed)} of {len(asked)} families tell more than of strangers"
    return f"asked in other ways: {told}{': ' if failed else ''}{', '.join(failed)}"


@dataclass(frozen=True)
class Inside:
    """One attack from inside the model, in one setting.

    cells:  for each side ("untouched", "unlearned", "control") its value in words, "" where there
            is none
    reason: why the unlearned model has no value
    """

    attack: str
    setting: str
    cells: dict[str, str]
    reason: str = ""


def inside(report: Mapping[str, Any], brief: bool = False) -> list[Inside]:
    """The rows of report.json's `inside`, with the sides of one setting together. A control with a
    suffix ("...: unseen face, same name") is a setting of its own.

    brief: for a series of steps of training, only the number of steps that it takes
    """
    settings: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in report.get("inside") or []:
        key = (str(row["attack"]), str(row["setting"]))
        settings.setdefault(key, {})[str(row["side"])] = row
    out = []
    for (attack, setting), rows in settings.items():
        if brief and attack == "relearn" and re.match(r"\d+ pictures?, .*\d steps?(:|$)", setting):
            continue
        cells = {
            side: _inside_value(rows.get(side), setting)
            for side in ("untouched", "unlearned", "control")
        }
        reason = str((rows.get("unlearned") or {}).get("reason") or "")
        out.append(Inside(attack, setting, cells, reason))
    return out


def _inside_value(row: Mapping[str, Any] | None, setting: str) -> str:
    """A share in per cent; a rank, a number of steps and an AUC as they are."""
    if row is None:
        return ""
    if row.get("value") is None:
        return "none"
    share = row.get("low") is not None and "AUC" not in setting
    return f"{100 * row['value']:.0f} %" if share else f"{row['value']:.3g}"
