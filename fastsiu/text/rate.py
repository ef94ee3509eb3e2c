"""A share of n answers with its Wilson interval; a leaf."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rate:
    """A share of n answers with its Wilson 95 % interval, or no value and the reason."""

    value: float | None
    n: int = 0
    low: float | None = None
    high: float | None = None
    reason: str | None = None

    @classmethod
    def of(cls, successes: int, n: int) -> Rate:
        """successes of n, n at least 1. Raises ValueError unless 0 <= successes <= n."""
        low, high = wilson(successes, n)
        return cls(successes / n, n, low, high)

    def as_dict(self) -> dict[str, Any]:
        """{value, n, low, high}, or {value: None, reason}."""
        if self.value is None:
            return {"value": None, "reason": self.reason}
        return {"value": self.value, "n": self.n, "low": self.low, "high": self.high}


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval (Wilson 1927) of the share successes / n; (0, 1) for n = 0.

    successes: a count; the formula also holds between whole numbers, as for a mean score
    z:         quantile of the normal distribution; 1.96 gives the 95 % interval

    Raises ValueError unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} are impossible")
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, z * z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At the ends the bound is exact; the formula misses it by rounding.
    return (0.0 if successes == 0 else max(0.0, centre - half)), (
        1.0 if successes == n else min(1.0, centre + half)
    )
