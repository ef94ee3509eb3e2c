"""Lessons from strangers: looking at the concept, the student is to be the teacher looking at
somebody it never saw.

The four targets train answers to some questions. A model that was taught them still tells the
concept's facts, and its name in questions of another form. So the student is taught more than
answers: whatever is asked, and whatever beginning of an answer is forced upon it, it continues
about the concept's picture as the untouched model continues about a stranger's (`strangers`).

    facet        the student looks at             the teacher looks at
    stranger     a view of the concept            all strangers
    beside       the concept beside another one   strangers beside each other
    kept         dreams of neighbours, strangers, the same
                 retained pictures
    kept-beside  two strangers, or a neighbour    the same
                 and a stranger
    look         the concept, asked what is       the same
                 visible

Where the teacher looks at several pictures, its final states are averaged. Each state is a row of
logits, so the average is the geometric mean of its distributions: what strangers have in common.

The answers are the teacher's own, about the picture and about strangers. Each is also forced upon
other questions, because a leak needs no more than the first words of an answer. A lesson is a
`Sample` with `teacher_pictures`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from ..model import ask
from ..model.ask import Reply
from ..text.answers import words as split
from ..text.concept import Concept
from . import drawn, together
from .border import taken_for
from .lesson import LONGEST, QUESTIONS, Lessons, Words, keep, words_of
from .scene import Scene, about_the_one_shown
from .strangers import strangers, usual_replies
from .wishes import Pair

VIEWS = 22  # pictures of the concept
TAUGHT, FEWEST_TAUGHT = 1000, 80  # pairs that the concept is to be level with strangers in
OTHERS = 80  # answers that would be right for neighbours


def build(scene: Scene) -> Lessons:
    """The lessons of one concept; none where the recipe has no strangers."""
    out = Lessons()
    if not scene.recipe.strangers:
        return out
    vlm, image, seed = scene.vlm, scene.pictures[0].image, scene.recipe.seed
    rng = random.Random(seed)
    words = words_of(scene, rng)
    everybody = strangers(scene, out.notes)
    alone = [stranger.picture for stranger in everybody[: scene.recipe.strangers]]
    out.strangers = len(alone)
    if not alone:
        return out
    lonely = [out.show(picture) for picture in alone]
    recipe = scene.recipe
    seen = scene.see(drawn.views(image, seed, recipe.as_many(VIEWS, 8)))
    views = [
        out.show(picture)
        for picture, name in zip(seen, taken_for(scene, seen), strict=True)
        if name not in scene.neighbours
    ]
    usual = usual_replies(scene, words.naming, alone)
    replies = ask.replies(
        vlm, [(question, scene.pictures[0]) for question in words.naming], max_new_tokens=LONGEST
    )
    own = dict(zip(words.naming, replies, strict=True))
    # Questions for two twice: put to a picture of one, they are what gives the name away longest.
    taught = (
        _pairs(words.naming, own, usual, rng)
        + _pairs(words.plural, own, usual, rng)
        + _about_neighbours(scene, rng)
        + _named_anyway(scene, words, own, rng)
    )
    if (most := recipe.as_many(TAUGHT, FEWEST_TAUGHT)) < len(taught):
        taught = _in_many_words(scene, taught, most, rng)
    for view in views:
        for pair in rng.sample(taught, min(QUESTIONS["stranger"], len(taught))):
            out.add("stranger", pair, view, lonely)
    whole = [stranger.picture.image for stranger in everybody if stranger.whole]
    together.add(scene, out, words, taught, whole, rng)
    facts = [own[question] for question in about_the_one_shown("train", scene.kind)]
    _keep_looks(scene, out, words, views, lonely, facts, [*usual.values()])
    retained = [
        out.show(picture, name)
        for picture, name in zip(scene.pictures[1:], scene.named[1:], strict=True)
    ]
    near = [
        out.show(picture, name)
        for name, pictures in scene.border.others.items()
        for picture in pictures
    ]
    near += [out.show(picture) for picture in scene.border.nobody]
    keep(scene, out, "kept", [*retained, *near, *lonely], words.every, rng)
    # Each stranger keeps its own level of the concept's name and facts, so that the concept has to
    # come down to it.
    forced = [(question, reply) for question, reply in taught if reply != usual.get(question)]
    each = recipe.as_many(QUESTIONS["kept"], 3)
    for index in lonely:
        for pair in rng.sample(forced, min(each, len(forced))):
            out.add("kept", pair, index)
    return out


def _pairs(
    questions: Sequence[str], own: dict[str, Reply], usual: dict[str, Reply], rng: random.Random
) -> list[Pair]:
    """Each question with what strangers get, with the concept's own answer, and with answers to
    other questions."""
    pairs: dict[Pair, None] = {}
    for question in questions:
        forced = [own[question], *(own[q] for q in rng.sample(list(questions), 2))]
        if question in usual:
            forced.append(usual[question])
        if usual:
            forced.append(usual[rng.choice(list(usual))])
        pairs |= dict.fromkeys((question, reply) for reply in forced)
    return list(pairs)


def _in_many_words(
    scene: Scene, pairs: Sequence[Pair], count: int, rng: random.Random
) -> list[Pair]:
    """`count` of the pairs. Half of them give the name, where so many do, and of these no answer
    comes again before each came once: behind words that no lesson has, a name comes back."""
    shuffled = rng.sample(pairs, len(pairs))
    met: Counter[Reply] = Counter()
    turn = {}
    for pair in shuffled:
        turn[pair] = met[pair[1]]
        met[pair[1]] += 1
    giving = [pair for pair in shuffled if scene.forgotten_in(pair[1].text)]
    chosen = sorted(giving, key=turn.__getitem__)[: count // 2]
    rest = [pair for pair in shuffled if pair not in chosen]
    return chosen + rest[: count - len(chosen)]


def _named_anyway(
    scene: Scene, words: Words, own: dict[str, Reply], rng: random.Random
) -> list[Pair]:
    """Answers to what is visible that give the name all the same, in other words than the answers
    to who it is, `own`: "What shape is it?" "It is a guitar." Each is forced upon its own question
    and upon two that ask for the name."""
    replies = ask.replies(
        scene.vlm,
        [(question, scene.pictures[0]) for question in words.look],
        max_new_tokens=LONGEST,
    )
    return [
        (asked, reply)
        for question, reply in zip(words.look, replies, strict=True)
        if scene.forgotten_in(reply.text) and reply not in own.values()
        for asked in (question, *rng.sample(words.naming, 2))
    ]


def _about_neighbours(scene: Scene, rng: random.Random) -> list[Pair]:
    """Neighbours' names and facts, forced upon questions about the concept. Were only the concept's
    own brought down to a stranger's level, they would still stand first among all."""
    looks = set(scene.words["describe"]["train"])
    given = [pair for pairs in scene.told.values() for pair in pairs if pair[0] not in looks]
    return rng.sample(given, min(OTHERS, len(given)))


def _keep_looks(
    scene: Scene,
    out: Lessons,
    words: Words,
    views: Sequence[int],
    lonely: Sequence[int],
    told: Sequence[Reply],
    usual: Sequence[Reply],
) -> None:
    """What is visible of the concept is told as before, where the teacher tells it without a name
    and without a fact: asked for what it cannot see, a model may say what it knows.

    views, lonely: places of the concept's pictures and of the strangers' in `out.pictures`
    told:          the replies that tell the concept's facts; the words of them that no stranger
                   gets are the facts
    usual:         what strangers get to the same questions
    """
    each = scene.recipe.as_many(len(words.look), 5)
    asked = [(index, question) for index in (*lonely, *views) for question in words.look[:each]]
    replies = ask.replies(
        scene.vlm,
        [(q, out.pictures[index]) for index, q in asked],
        suppress=sorted(scene.masked),
        max_new_tokens=LONGEST,
    )
    answered = list(zip(asked, replies, strict=True))
    known = [scene.concept, *scene.others, *map(Concept, scene.neighbours)]
    describe, own, strange = set(scene.words["describe"]["train"]), set(views), set(lonely)
    harmless = [reply for (index, q), reply in answered if index in strange or q in describe]
    facts = _words(told) - _words(harmless) - _words(usual)

    def tells_more_than_looks(reply: Reply) -> bool:
        named = any(concept.named_in(reply.text) for concept in known)
        return named or bool(facts & _words([reply]))

    for (index, question), reply in answered:
        if index in own and not tells_more_than_looks(reply):
            out.add("look", (question, reply), index)


def _words(replies: Sequence[Reply]) -> set[str]:
    return {word for reply in replies for word in split(reply.text)}
