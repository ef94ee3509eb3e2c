"""Names to protect that the untouched model gives in words; `alternatives` has those that it weighs
for the picture."""

from __future__ import annotations

from collections.abc import Sequence

from ..text import enumerated
from .kinds import DEFAULT, THING, sort_of
from .scene import Scene

ENOUGH = 8  # names to protect, for other kinds than persons


def neighbours(scene: Scene, limit: int = 24, rounds: int = 4) -> list[str]:
    """Names to protect: whom the teacher names when it is asked who is like NAME, then who is like
    those, and so on for `rounds` rounds or until there are `limit` names.

    For kinds other than persons it ends with `ENOUGH` names, because small models soon enumerate
    anything. The first round for a thing also asks for others of its sort: "Name ten animals."

    Names that are to be forgotten as well are not returned, but the teacher is asked about them.
    Where a name has "the" before it, the scene's kind learns that.
    """
    kind, words, fresh = scene.kind.name, scene.words, [scene.concept.name]
    enough = limit if kind == DEFAULT else min(limit, ENOUGH)
    # Asked what is like a lion, small models go on about lions.
    suppress = () if kind == DEFAULT else sorted(scene.masked)
    of_its_sort = [f"Name ten {sort_of(scene.vlm, fresh[0], scene.kind)}."] if kind == THING else []
    names: list[str] = []
    protected = lambda: [name for name in names if not scene.forgotten_in(name)]
    for i in range(rounds):
        templates = words["neighbours"]["train"]
        questions = [scene.kind.fill(q, name=n) for n in fresh for q in templates]
        questions += of_its_sort if i == 0 else []
        answers = scene.ask(questions, suppress=suppress)
        fresh = []
        for question, answer in zip(questions, answers, strict=True):
            for name in _alike(scene, answer):
                known = name in names or name in question or is_concept(scene, name)
                if not known and name not in fresh:
                    fresh.append(name)
        names += fresh
        if not fresh or len(protected()) >= enough:
            break
    return protected()[:limit]


def _alike(scene: Scene, answer: str) -> list[str]:
    """The names in an answer to who or what is like another one."""
    not_names = scene.words["fallback"]["not_names"]
    if scene.kind.name == DEFAULT:
        return capitalised_names(answer, not_names)
    if scene.kind.name == THING:
        return enumerated.listed(answer)
    found = enumerated.proper(answer, not_names)
    scene.kind = scene.kind.knowing({name: f"the {name}" for name, definite in found if definite})
    return [name for name, _ in found] or enumerated.listed(answer)


def is_concept(scene: Scene, name: str) -> bool:
    """Whether it names the concept; of a thing also in another form: "lionesses", "Giraffa"."""
    if scene.concept.named_in(name):
        return True
    if scene.kind.name != THING:
        return False
    own = scene.concept.name.lower().split()
    return (
        set(name.split()) <= set(own)
        or scene.concept.leaks_in(name)
        or enumerated.derived(name, scene.concept.name)
    )


def capitalised_names(text: str, not_names: Sequence[str]) -> list[str]:
    """Runs of capitalised words, split at punctuation: "A B, C D and E" gives three. Scripts
    without capitals give none."""
    names: list[str] = []
    run: list[str] = []
    for word in [*text.split(), ""]:
        bare = word.strip(".,;:!?\"'()[]«»“”‘’")
        if bare[:1].isupper() and bare not in not_names:
            run.append(bare)
        elif run:
            names.append(" ".join(run))
            run = []
        if run and word[-1:] in ".,;:!?)":
            names.append(" ".join(run))
            run = []
    return [name for name in dict.fromkeys(names) if len(name) >= 3]
