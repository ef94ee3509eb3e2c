"""The paper's four targets (section 4.1), each a function from a scene to samples, in the teacher's
own words.

    align     picture and "who is this?"         -> a neutral description of what is visible
    describe  picture and "is this NAME?"        -> a denial
              "what does NAME look like?"        -> "I do not know"
    facts     text questions about NAME          -> what the teacher answers
    preserve  everything about anything else,    -> what the teacher answers
              dreams of the neighbours among it

The teacher is the model with its adapter off: whoever calls these functions sees to that.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from ..model import ask
from ..model.ask import Reply
from ..request import Sample
from ..text import articles
from ..text.answers import affirms, is_degenerate, is_ended, is_refusal
from . import sentence
from .kinds import DEFAULT
from .kinds import wordings as wordings
from .scene import Scene

# Most samples about pictures where lessons keep these, of a long training, and the least. They only
# tell the share that still holds, yet each is asked, taken to the teacher and scored twice.
LOOKED_AT, LEAST = 600, 40
NO_DESCRIPTION = (
    "The model says nothing about the picture without a name in it, so no answer was trained in "
    "the place of the name: give one with --data."
)

Facet = Callable[[Scene], list[Sample]]


def align(scene: Scene) -> list[Sample]:
    """Target 1: questions about the picture are answered as about someone whom the model never saw
    (paper: "aligning with unseen concepts").

    The teacher's own sentence is cut where the name starts and continued with the name forbidden:
    "This is NAME." becomes "This is a purple creature with ...". Everything after the cut
    contradicts the teacher and is left to the cross-entropy. An article before the name goes with
    it: "an owl" may become "a brown bird". Where no sentence without a name is found, the scene's
    notes say so.
    """
    questions = scene.words["who"]["train"]
    named = scene.ask(questions, 0)
    cuts = [(spans[0][0] if (spans := scene.concept.spans(a)) else None) for a in named]
    openings = [
        articles.without_last(a[:c].rstrip()) if c is not None else ""
        for a, c in zip(named, cuts, strict=True)
    ]
    if scene.recipe.substitute == "name":
        invented = scene.kind.phrase(_invented(scene))
        answers = [f"{o} {invented}.".strip() for o in openings]
        return [
            _built("align", q, a, 0, a.index(invented), len(a) - 1)
            for q, a in zip(questions, answers, strict=True)
        ]
    begun = sentence.without_names(
        scene, questions, [f"{o} a".strip() if o else "" for o in openings]
    )
    if scene.kind.name != DEFAULT:
        begun = sentence.with_one_ending(scene, questions, openings, begun)
    described = scene.replies(scene.words["describe"]["train"], 0, suppress=scene.masked)
    fallback = Reply(scene.words["fallback"]["unknown_face"])
    spare = next((d for d in described if sentence.neutral(scene, d.text)), fallback)
    samples = []
    for question, reply, opening in zip(questions, begun, openings, strict=True):
        good = sentence.describes(scene, reply, opening)
        if not good and spare is fallback and scene.kind.name != DEFAULT:
            # Asked what a thing is, no model says "I do not know"; lessons have what it says.
            continue
        start = len(opening) if good and opening else 0
        answer, closed = (reply if good else spare).opening
        samples.append(_built("align", question, answer, 0, start, len(answer), closed))
    if not samples:
        scene.notes.append(NO_DESCRIPTION)
    return samples


def describe(scene: Scene) -> list[Sample]:
    """Target 2: a new visual description (paper section 4.1). By default no answer is false: the
    picture is not NAME's, and NAME's looks are not known, both in the words that the teacher uses
    for strangers."""
    name, words, fill = scene.concept.name, scene.words, scene.kind.fill
    stranger, fallback = _invented(scene), scene.words["fallback"]
    denials = scene.replies([fill(q, name=stranger) for q in words["yesno"]["train"]], 0)
    samples = []
    for question, (answer, closed) in zip(words["yesno"]["train"], denials, strict=True):
        swapped = articles.replaced(answer, stranger, name)
        own = (
            swapped != answer
            and swapped.casefold().startswith("no")
            and is_degenerate(swapped) is None
        )
        answer = swapped if own else fill(fallback["denial"], name=name)
        asked = fill(question, name=name)
        samples.append(_built("describe", asked, answer, 0, 0, len(answer), closed or not own))
    unknown = scene.replies([fill(q, name=stranger) for q in words["appearance"]["train"]])
    look = random.Random(scene.recipe.seed).choice(words["invented"]["looks"])
    for question, (answer, closed) in zip(words["appearance"]["train"], unknown, strict=True):
        asked = fill(question, name=name)
        if scene.recipe.substitute == "name":
            answer = fill(fallback["invented_look"], name=name).replace("{look}", look)
            start = len(scene.kind.phrase(name))
            samples.append(_built("describe", asked, answer, None, start, len(answer)))
            continue
        if not is_refusal(answer) or is_degenerate(answer) is not None:
            # It never says that it does not know. A sentence of ours would be the first such one,
            # and soon its answer to everything about the concept.
            continue
        answer = articles.replaced(answer, stranger, name)
        samples.append(_built("describe", asked, answer, None, 0, len(answer), closed))
    return samples


def facts(scene: Scene) -> list[Sample]:
    """Target 3: what the teacher knows of the concept in words stays (paper: "decoupling factual
    knowledge")."""
    if scene.recipe.in_front:  # nothing said in words can change
        return []
    questions = [scene.kind.fill(q, name=scene.concept.name) for q in scene.words["facts"]["train"]]
    return _kept("facts", questions, None, scene.replies(questions))


def preserve(scene: Scene) -> list[Sample]:
    """Target 4: everything else is answered as before (paper: "preserving non-targeted
    knowledge")."""
    words, fill = scene.words, scene.kind.fill
    rng = random.Random(scene.recipe.seed)
    questions = list(words["general"]["train"])
    for name in (*scene.neighbours, _invented(scene)):
        own = words["facts"]["train"] + words["appearance"]["train"]
        questions += [fill(q, name=name) for q in rng.sample(own, min(6, len(own)))]
    samples = []
    if scene.recipe.adapt == "language":
        samples = _kept("preserve", questions, None, scene.replies(questions))
    pairs: list[tuple[str, int]] = [(q, 0) for q in words["describe"]["train"]]
    for index in range(1, len(scene.pictures)):
        named = scene.named[index]
        pairs += [(q, index) for q in words["who"]["train"]]
        pairs += [(rng.choice(words["describe"]["train"]), index)]
        pairs += [(fill(rng.choice(words["yesno"]["train"]), name=scene.concept.name), index)]
        if named:
            pairs += [(fill(rng.choice(words["yesno"]["train"]), name=named), index)]
    # With lessons, these alone keep the pictures of others; the samples are looked at, not trained.
    most = scene.recipe.as_many(LOOKED_AT, LEAST) if scene.recipe.strangers else len(pairs)
    if most < len(pairs):
        pairs = rng.sample(pairs, most)
    scene.left_out = 0
    replies = ask.replies(scene.vlm, [(q, scene.pictures[i]) for q, i in pairs])
    for (question, index), reply in zip(pairs, replies, strict=True):
        # Such an answer would go on training the very name that has to go. "No, this is not NAME."
        # is another matter: it stays.
        denied = index > 0 and scene.concept.named_in(question) and not affirms(reply.text)
        if any(c.named_in(reply.text) for c in scene.others) or (
            scene.concept.named_in(reply.text) and not denied
        ):
            scene.left_out += index > 0
            continue
        origin = "teacher" if index == 0 else "dream" if scene.named[index] else "retain"
        samples += _kept("preserve", [question], index, [reply], origin)
    return samples


TARGETS: tuple[Facet, ...] = (align, describe, facts, preserve)


def _invented(scene: Scene) -> str:
    names = scene.words["invented"]["names"]
    return names[scene.recipe.seed % len(names)]


def _built(
    facet: str,
    question: str,
    answer: str,
    picture: int | None,
    start: int,
    end: int,
    closed: bool = True,
) -> Sample:
    return Sample(facet, question, answer, picture, ((start, end),), "built", closed)


def _kept(
    facet: str,
    questions: Sequence[str],
    picture: int | None,
    replies: Sequence[Reply],
    origin: str = "teacher",
) -> list[Sample]:
    """Samples that keep what the teacher says, without answers that were cut inside their first
    sentence."""
    openings = [reply.opening for reply in replies]
    return [
        Sample(facet, q, a, picture, (), origin, closed)
        for q, (a, closed) in zip(questions, openings, strict=True)
        if is_degenerate(a) is None and (closed or is_ended(a))
    ]
