"""Tries the templates and patterns of a model or an adapter under a limit of time and memory.

A chat template is a program, and a regular expression can take years. Nothing can stop either
inside of this process, so a child process tries each one first, on inputs like the real ones.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from ..request import BadInput

SECONDS = 5.0
MEGABYTES = 1024

_LIMITS = """
import json, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (%d, %d))
    resource.setrlimit(resource.RLIMIT_AS, (%d, %d))
except (ImportError, ValueError, OSError):
    pass  # the system has no such limit; the parent's clock still counts
given = json.load(sys.stdin)
"""

# The environment is that of transformers. An exception of the template is of no interest here: the
# model's own processor raises it again, with its reason. Only the limits count.
_TEMPLATE = """
import jinja2, jinja2.ext, jinja2.sandbox
class Generation(jinja2.ext.Extension):
    tags = {"generation"}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)
def refuse(message):
    raise jinja2.TemplateError(message)
made = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
made.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False)
made.globals.update(raise_exception=refuse, strftime_now=lambda form: "")
for messages, opened in given["turns"]:
    try:
        text = made.from_string(given["template"]).render(
            messages=messages, add_generation_prompt=opened, **given["tokens"])
    except MemoryError:
        raise
    except Exception:  # any: what a template refuses is told where it is rendered for good
        continue
    if len(text) > 1_000_000:
        raise MemoryError
"""

_PATTERNS = """
import re
for pattern in given["patterns"]:
    try:
        known = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        print(json.dumps(f"{pattern[:80]!r}: {error}"))
        break
    for name in given["names"]:
        known.fullmatch(name)
        known.search(name)
"""


def check_template(template: str, tokens: dict[str, str]) -> None:
    """Raises BadInput for a chat template that does not end, or whose text does not.

    tokens: the special tokens by their names, which templates refer to
    """
    _check_template(template, tuple(sorted(tokens.items())))


@functools.lru_cache  # planning and loading check one model twice; an exception is not cached
def _check_template(template: str, tokens: tuple[tuple[str, str], ...]) -> None:
    turns = []
    for question in ("Who is this?", "Who is this? " * 40):
        for image in ([], [{"type": "image"}]):
            asked = {"role": "user", "content": [*image, {"type": "text", "text": question}]}
            answer = {"role": "assistant", "content": [{"type": "text", "text": "Nobody."}]}
            turns += [([asked], True), ([asked, answer], False)]
    given = {"template": template, "turns": turns, "tokens": dict(tokens)}
    if _run(_TEMPLATE, given) is None:
        raise BadInput(
            f"The model's chat template takes more than {SECONDS:g} s or {MEGABYTES} MB for a "
            "question: "
            "give the model another template."
        )


def check_patterns(patterns: Sequence[str], names: Iterable[str], where: str) -> None:
    """Raises BadInput for a pattern that is no regular expression, or that takes too long on one of
    the names.

    where: the pattern's place, for the sentence
    """
    if not patterns:
        return
    complaint = _run(_PATTERNS, {"patterns": list(patterns), "names": list(names)})
    if complaint is None:
        raise BadInput(
            f"A pattern in {where} takes more than {SECONDS:g} s on the model's layers: write "
            "the layers' names instead."
        )
    if complaint:
        raise BadInput(
            f"A pattern in {where} is no regular expression ({json.loads(complaint)}): mend it."
        )


def _run(code: str, given: Any) -> str | None:
    """Runs code in a child process that reads `given` as JSON. Returns what it prints; None where a
    limit stopped it. Raises RuntimeError where it fails for another reason."""
    limit = MEGABYTES * 2**20
    prelude = _LIMITS % (SECONDS, SECONDS + 1, limit, limit)
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", prelude + code],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            timeout=12 * SECONDS,  # of the clock; the limit is of CPU time, where a system has one
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode < 0 or done.stderr.rstrip().endswith("MemoryError"):
        return None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RuntimeError(f"The trial of a template or pattern failed: {last[0]}")
    return done.stdout
