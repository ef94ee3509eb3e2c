"""The story behind `fastsiu eval`: load, ask the untouched and the unlearned model, make rows of it, write the report."""

from __future__ import annotations

from .observe import Likelihood, Naming, Observations, carriers, examine, with_fluency
from .rows import report_of, row, verdict_answers

__all__ = ["Likelihood", "Naming", "Observations", "carriers", "examine", "report_of", "row", "verdict_answers", "with_fluency"]
