"""Lists of fields in docstrings ("name:  what it is", with a hanging second line) as Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

FIELD = re.compile(r"^(?P<names>\*{0,2}[a-z_]\w*(?:, \*{0,2}\w+)*)(?::\s+|\s{2,})(?P<text>\S.*)$")


class Fields(Extension):
    """Rewrites every docstring when its object has been read."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = listed(escaped(obj.docstring.value))


def escaped(text: str) -> str:
    """`fastsiu-<random>/` outside code is a word, not HTML."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else p.replace("<", "&lt;") for p in parts)


def listed(text: str) -> str:
    """The docstring with its fields as items of a list; all other lines stay."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        # two short fields may share a line: "a: text;  b: text"
        parts = re.split(r"[;,]?\s{2,}(?=[a-z_]\w*: )", line) if FIELD.match(line) else []
        fields = [match.group("names", "text") for part in parts if (match := FIELD.match(part))]
        if fields:
            lines += [] if inside else [""]
            lines += [f"- `{names}`: {words}" for names, words in fields]
        elif inside and line.startswith(" "):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line)
        inside = bool(fields) or (inside and line.startswith(" "))
    return "\n".join(lines)
