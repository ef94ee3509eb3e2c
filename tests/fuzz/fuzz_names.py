"""Names and texts of any characters: a name that is accepted is found in its own text, and spans
are places of the text."""

from __future__ import annotations

from collections.abc import Callable

from fastsiu.request import BadInput
from fastsiu.text.concept import Concept
from fastsiu.text.masks import CARRIERS

NAMES = (
    "Zorblax Quint",
    "Rose",
    "Ke$ha",
    "김철수",
    "山田太郎",
    "Иван Петров",
    "محمد صلاح",
    "O'Brien",
    "さくら",
    "\u0301a\u200b",
    "l33t",
    "नरेन्द्र मोदी",
    "Mother-in-law",
)
LONGEST = 200  # characters of a name
SEPARATOR = b"\0"

ALLOWED = (BadInput,)


def names(data: bytes) -> None:
    """data: a name and a text, with a zero byte between."""
    written, _, rest = data.partition(SEPARATOR)
    name, text = (
        written.decode("utf-8", "surrogateescape")[:LONGEST],
        rest.decode("utf-8", "replace"),
    )
    concept = Concept(name)
    for carrier in CARRIERS:
        given, start = name.strip(), carrier.index("{}")
        own = concept.spans(carrier.format(given), include_parts=False)
        assert (start, start + len(given)) in own, (given, carrier, own)
    spans = concept.spans(text)
    assert all(0 <= a < b <= len(text) for a, b in spans), spans
    assert all(one[1] <= other[0] for one, other in zip(spans, spans[1:], strict=False)), spans
    assert concept.named_in(text) == bool(spans)
    concept.leaks_in(text)


TARGETS: dict[str, Callable[[bytes], None]] = {"names": names}


def seeds(name: str) -> list[bytes]:
    texts = (
        f"This is {one}, and {other}'s hat." for one, other in zip(NAMES, NAMES[::-1], strict=True)
    )
    return [
        one.encode() + SEPARATOR + text.encode() for one, text in zip(NAMES, texts, strict=True)
    ]
