"""Text as TOML, which Python reads but does not write."""

from __future__ import annotations


def string(text: str) -> str:
    """A basic string of TOML: every character that is not plain as its escape."""
    short = {'"': '\\"', "\\": "\\\\"}
    plain = lambda c: c.isprintable() and not 0xD800 <= ord(c) <= 0xDFFF
    escape = lambda c: short.get(c) or (c if plain(c) else f"\\U{ord(c):08x}")
    return '"' + "".join(map(escape, text)) + '"'
