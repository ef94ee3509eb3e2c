"""Launch rows and choices of backend that a GPU has measured. Written by `python benches/apply.py
FILE`: do not edit.

PLANS     (target, dtype, N) -> (blocks of the sums, blocks of the product, waves, bytes of a
          chunk, where it was measured)
BACKENDS  (target, dtype, N) -> (backend, where it was measured)

An entry is for its N and all below, down to the next; the largest is for all above, too.
"""

PLANS: dict[tuple[str, str, int], tuple[tuple[int, ...], tuple[int, ...], int, int, str]] = {}

BACKENDS: dict[tuple[str, str, int], tuple[str, str]] = {}
