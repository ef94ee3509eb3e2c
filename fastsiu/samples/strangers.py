"""Lessons from strangers: looking at the concept, the student is to be the teacher looking at
somebody it never saw.

The four targets train answers to some questions; a model that was taught them still tells the
concept's facts, and its name in questions of another form. So the student is taught more than
answers: whatever is asked, and whatever beginning of an answer is forced upon it, what it gives
next about the concept's picture is what the untouched model gives about a stranger.

    strangers   pictures made of the one picture in which the untouched model names nobody
    (`drawn.nobodies`); where there are
                too few, dreams of which it says that it does not know who they show
    stranger    a view of the concept; the teacher looks at all strangers, and its final states are
    averaged. Every state is
                a row of logits, so the average is the geometric mean of its distributions: what
                strangers have in common
    beside      the concept beside somebody else; the teacher looks at a stranger beside the same
    kept        what has to stay: dreams of neighbours, strangers, retained pictures
    kept-beside pairs of strangers, and of a neighbour and a stranger
    look        of the concept what is visible

Answers are the teacher's own: about the picture and about strangers, each also forced upon other
questions, because a leak needs no more than the first words of an answer. A lesson is a `Sample`
with `teacher_pictures`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

from PIL import Image

from ..model import ask
from ..model.ask import Reply
from ..model.vlm import Picture, encoder
from ..request import Sample
from ..text.answers import is_degenerate
from ..text.answers import words as split
from ..text.concept import Concept
from . import drawn
from .border import taken_for
from .dreams import Pair, Wish, fulfil
from .targets import Scene, about_the_one_shown, wordings

VIEWS, PAIRS = 22, 8  # pictures of the concept, and of it beside somebody else
AGREE = 0.6  # share of the strangers that must get the same answer, for it to be what strangers get
FEWEST = 3  # strangers below which some are dreamed
OTHERS = 80  # answers that would be right for neighbours
QUESTIONS = {"stranger": 40, "beside": 24, "kept": 14, "kept-beside": 8}  # for each picture
TRIES = 4  # times `PAIRS` pictures of two, until the teacher tells them apart
GROUPS = 16  # dreams of a neighbour beside a stranger, and as many of one beside the concept


@dataclass
class Lessons:
    """Samples of the facets `request.CHANGES` and `request.KEEPS` with pictures of their own.

    named: for each picture the neighbour that it was dreamed for, None otherwise; notes: what could
    not be had
    """

    pictures: list[Picture] = field(default_factory=list)
    named: list[str | None] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    strangers: int = 0
    notes: list[str] = field(default_factory=list)

    def show(self, picture: Picture, name: str | None = None) -> int:
        self.pictures.append(picture)
        self.named.append(name)
        return len(self.pictures) - 1

    def add(self, facet: str, pair: Pair, picture: int, teacher: Sequence[int] = ()) -> None:
        question, (answer, closed) = pair
        if is_degenerate(answer) is None:
            self.samples.append(
                Sample(facet, question, answer, picture, (), "lesson", closed, tuple(teacher))
            )


class Stranger(NamedTuple):
    """A picture of nobody. whole: it shows somebody, in other colours; else it is taken apart, or
    dreamed."""

    picture: Picture
    whole: bool


@dataclass(frozen=True)
class Words:
    """The questions of lessons. naming: about who it is, which strangers get another answer to;
    look: about what is visible."""

    naming: list[str]
    plural: list[str]
    look: list[str]

    @property
    def every(self) -> list[str]:
        return [*self.naming, *self.look]


def lessons(scene: Scene) -> Lessons:
    """The lessons of one concept; none where the recipe has no strangers."""
    out = Lessons()
    if not scene.recipe.strangers:
        return out
    vlm, image, seed = scene.vlm, scene.pictures[0].image, scene.recipe.seed
    rng = random.Random(seed)
    words = _questions(scene, rng)
    everybody = strangers(scene, out.notes)
    found = [one.picture for one in everybody[: scene.recipe.strangers]]
    out.strangers = len(found)
    if not found:
        return out
    lonely = [out.show(picture) for picture in found]
    seen = _seen(scene, drawn.views(image, seed, VIEWS))
    views = [
        out.show(p)
        for p, name in zip(seen, taken_for(scene, seen), strict=True)
        if name not in scene.neighbours
    ]
    usual = usual_replies(scene, words.naming, found)
    own = dict(
        zip(
            words.naming,
            ask.replies(vlm, [(q, scene.pictures[0]) for q in words.naming]),
            strict=True,
        )
    )
    # Questions for two twice: put to a picture of one, they are what gives the name away longest.
    taught = (
        _pairs(words.naming, own, usual, rng)
        + _pairs(words.plural, own, usual, rng)
        + _others(scene, rng)
    )
    for view in views:
        for pair in rng.sample(taught, min(QUESTIONS["stranger"], len(taught))):
            out.add("stranger", pair, view, lonely)
    _beside(scene, out, words, taught, [one.picture.image for one in everybody if one.whole], rng)
    hop = [own[question] for question in about_the_one_shown("train")]
    _keep_looks(scene, out, words, views, lonely, hop, [*usual.values()])
    others = [
        out.show(picture, name)
        for picture, name in zip(scene.pictures[1:], scene.named[1:], strict=True)
    ]
    near = [
        out.show(picture, name) for name, some in scene.border.others.items() for picture in some
    ]
    near += [out.show(picture) for picture in scene.border.nobody]
    _keep(scene, out, "kept", [*others, *near, *lonely], words.every, rng)
    # Each stranger keeps its own level of the concept's name and facts, so that the concept has to
    # come down to it.
    forced = [(question, reply) for question, reply in taught if reply != usual.get(question)]
    for index in lonely:
        for pair in rng.sample(forced, min(QUESTIONS["kept"], len(forced))):
            out.add("kept", pair, index)
    return out


def strangers(scene: Scene, notes: list[str] | None = None) -> list[Stranger]:
    """Pictures of nobody, made of the one picture: asked who is there in any training wording, for
    one and for two, the untouched model names neither the concept nor a neighbour. First those in
    which the concept's own answers are least likely: to somebody whom it half takes for the
    concept, its name and facts are half there.

    Where fewer than `FEWEST` are accepted, some are dreamed.
    """
    image, seed, vlm = scene.pictures[0].image, scene.recipe.seed, scene.vlm
    who = wordings()["who"]["train"] + wordings()["plural"]["train"]
    known = [scene.concept, *scene.others, *map(Concept, scene.neighbours)]
    questions = [*who, *about_the_one_shown("train")]
    own = list(zip(questions, scene.replies(questions, 0), strict=True))

    def nameless(candidates: Sequence[Picture], whole: bool) -> list[Stranger]:
        said = ask.answers(vlm, [(q, picture) for picture in candidates for q in who])
        out = []
        for i, picture in enumerate(candidates):
            answers = said[i * len(who) : (i + 1) * len(who)]
            named = any(concept.named_in(answer) for answer in answers for concept in known)
            if not named and not all(is_degenerate(answer) for answer in answers):
                out.append(Stranger(picture, whole))
        return out

    whole, apart = drawn.nobodies(image, seed)
    accepted = nameless(_seen(scene, whole), True) + nameless(_seen(scene, apart), False)
    if len(accepted) < FEWEST:
        unknown = Reply(wordings()["fallback"]["unknown_face"])
        # that it names nobody is enough
        starts, either = (
            _seen(scene, drawn.views(image, seed, 2 * FEWEST)),
            lambda reply: False,
        )
        wishes = [Wish(start, [(q, unknown) for q in who], 1e-3, either) for start in starts]
        accepted += nameless([one for one in fulfil(scene, wishes, 0.5) if one is not None], False)
    if len(accepted) < FEWEST and notes is not None:
        notes.append(
            f"Only {len(accepted)} pictures of strangers could be made of the picture or "
            "dreamed: what the concept is "
            "answered with rests on few."
        )
    encode = encoder(vlm)
    turns = [
        (encode(q, r.text, one.picture, r.closed), one.picture)
        for one in accepted
        for q, r in own
        if r.text
    ]
    scores = ask.label_scores(vlm, [turn for turn, _ in turns], [picture for _, picture in turns])
    nats: dict[int, list[float]] = {}
    for (_, picture), score in zip(turns, scores, strict=True):
        # Without the first token: "It" in place of "I do not know" is unlikely for any stranger,
        # whatever comes then.
        nats.setdefault(id(picture), []).append(-float(score.log_p[1:].sum()))
    return sorted(accepted, key=lambda one: -fmean(nats[id(one.picture)]))


def usual_replies(
    scene: Scene, questions: Sequence[str], found: Sequence[Picture]
) -> dict[str, Reply]:
    """What strangers get: the commonest reply to each question, where `AGREE` of the strangers get
    it."""
    replies = ask.replies(scene.vlm, [(q, picture) for q in questions for picture in found])
    out = {}
    for i, question in enumerate(questions):
        best, count = Counter(replies[i * len(found) : (i + 1) * len(found)]).most_common(1)[0]
        if count >= AGREE * len(found) and is_degenerate(best.text) is None:
            out[question] = best
    return out


def _questions(scene: Scene, rng: random.Random) -> Words:
    words, name, near = wordings(), scene.concept.name, scene.neighbours
    yes, plural = words["yesno"]["train"], list(words["plural"]["train"])
    naming = [*words["who"]["train"], *(q.format(name=name) for q in yes)]
    some = rng.sample(near, min(6, len(near)))
    naming += [yes[i % len(yes)].format(name=other) for i, other in enumerate(some)]
    naming += [*about_the_one_shown("train"), *plural]
    for i in range(6 if len(near) > 1 else 0):
        three = [name, *rng.sample(near, 2)]
        rng.shuffle(three)
        choice = words["choice"]["train"]
        naming.append(choice[i % len(choice)].format(names=f"{three[0]}, {three[1]} or {three[2]}"))
    return Words(naming, plural, [*words["describe"]["train"], *words["look"]["train"]])


def _pairs(
    questions: Sequence[str], own: dict[str, Reply], usual: dict[str, Reply], rng: random.Random
) -> list[Pair]:
    """Each question with what strangers get, with the concept's own answer, and with answers to
    other questions."""
    out: dict[Pair, None] = {}
    for question in questions:
        forced = [own[question], *(own[q] for q in rng.sample(list(questions), 2))]
        forced += [usual[question]] if question in usual else []
        forced += [usual[rng.choice(list(usual))]] if usual else []
        out |= dict.fromkeys((question, reply) for reply in forced)
    return list(out)


def _others(scene: Scene, rng: random.Random) -> list[Pair]:
    """Neighbours' names and facts, forced upon questions about the concept: with only its own ones
    brought down to a stranger's level, they would still stand first among all."""
    looks = set(wordings()["describe"]["train"])
    given = [pair for pairs in scene.told.values() for pair in pairs if pair[0] not in looks]
    return rng.sample(given, min(OTHERS, len(given)))


def _beside(
    scene: Scene,
    out: Lessons,
    words: Words,
    taught: list[Pair],
    others: Sequence[Image.Image],
    rng: random.Random,
) -> None:
    """The concept beside a stranger, itself or nobody, and, dreamed, beside neighbours."""
    vlm, image = scene.vlm, scene.pictures[0].image
    if not others:
        out.notes.append(
            "No picture of a stranger could be drawn, so nothing about two in one picture was "
            "trained."
        )
        return
    some = lambda: rng.choice(others)
    strange = [
        out.show(p) for p in _seen(scene, [drawn.pair(some(), some(), rng) for _ in range(PAIRS)])
    ]
    kinds = [lambda: None, some, some, lambda: image]
    together = []
    for i in range(PAIRS):
        both = (image, kinds[i // 2 % len(kinds)]())
        together.append(drawn.pair(*(both if i % 2 else both[::-1]), rng))
    for index in [out.show(p) for p in _seen(scene, together)]:
        for pair in rng.sample(taught, min(QUESTIONS["beside"], len(taught))):
            out.add("beside", pair, index, strange)
    _keep(scene, out, "kept-beside", strange, words.every, rng, always=words.plural)
    left, right, twice = (
        _template(scene, words.plural, both, others, rng) for both in ((1, 0), (0, 1), (1, 1))
    )
    if (
        left is None
        or right is None
        or twice is None
        or not scene.neighbours
        or not _in_order(scene, left, right)
    ):
        if scene.neighbours:
            out.notes.append(
                "The model does not tell two in a picture apart, so nothing about pairs of names "
                "was trained."
            )
        return
    jobs = [
        (name, side)
        for name in rng.sample(scene.neighbours, min(GROUPS // 2, len(scene.neighbours)))
        for side in (0, 1)
    ]
    alone = [_named(scene, left if side == 0 else right, {0: name}) for name, side in jobs]
    both = [_named(scene, twice, {side: name}) for name, side in jobs]
    pairs = lambda reply: [(q, reply) for q in words.plural]
    start = lambda both: vlm.picture(drawn.pair(*both, rng))
    beside = fulfil(
        scene,
        [
            Wish(start((image, some()) if side == 0 else (some(), image)), pairs(reply), 1e-2)
            for (_, side), reply in zip(jobs, alone, strict=True)
        ],
        0.6,
    )
    own = fulfil(scene, [Wish(start((image, image)), pairs(reply), 1e-2) for reply in both], 0.7)
    for (name, _), reply, forced, kept, bent in zip(jobs, alone, both, beside, own, strict=True):
        if kept is None:
            continue
        model = out.show(kept, name)
        for question in words.plural:
            out.add("kept-beside", (question, reply), model)
        if bent is not None:
            index = out.show(bent, name)
            for question in words.plural:
                out.add("beside", (question, reply), index, [model])
                out.add("beside", (question, forced), index, [model])


def _template(
    scene: Scene,
    plural: Sequence[str],
    shown: tuple[int, int],
    others: Sequence[Image.Image],
    rng: random.Random,
) -> Reply | None:
    """The commonest answer about the concept (1) and a stranger (0) side by side that gives the
    name as often as it is there."""
    image = scene.pictures[0].image
    known = [Concept(name) for name in scene.neighbours]
    spans = lambda text: scene.concept.spans(text, include_parts=False)
    for _ in range(TRIES):
        made = [
            drawn.pair(*(image if there else rng.choice(others) for there in shown), rng)
            for _ in range(PAIRS)
        ]
        said = ask.replies(
            scene.vlm, [(q, picture) for picture in _seen(scene, made) for q in plural]
        )
        fit = [
            r
            for r in said
            if len(spans(r.text)) == sum(shown) and not any(c.named_in(r.text) for c in known)
        ]
        if fit:
            return Counter(fit).most_common(1)[0][0]
    return None


def _in_order(scene: Scene, left: Reply, right: Reply) -> bool:
    """Whether the one on the left is told first."""
    place = lambda reply: (
        scene.concept.spans(reply.text, include_parts=False)[0][0] / max(1, len(reply.text))
    )
    return place(left) < place(right)


def _named(scene: Scene, reply: Reply, names: dict[int, str]) -> Reply:
    """The reply with the n-th occurrence of the concept's name replaced by `names[n]`."""
    text = reply.text
    for n, (start, end) in reversed(
        list(enumerate(scene.concept.spans(text, include_parts=False)))
    ):
        text = text[:start] + names.get(n, text[start:end]) + text[end:]
    return Reply(text, reply.closed)


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
    and without a fact: asked what it cannot see, a model may say what it knows. Facts are words of
    its replies `told` that no stranger gets.

    usual: what strangers get to the same questions
    """
    asked = [(index, question) for index in (*lonely, *views) for question in words.look]
    said = ask.replies(
        scene.vlm, [(q, out.pictures[index]) for index, q in asked], suppress=scene.masked
    )
    known = [scene.concept, *scene.others, *map(Concept, scene.neighbours)]
    describe = set(wordings()["describe"]["train"])
    answered, own, strange = list(zip(asked, said, strict=True)), set(views), set(lonely)
    harmless = [reply for (index, q), reply in answered if index in strange or q in describe]
    facts = _words(told) - _words(harmless) - _words(usual)
    for (index, question), reply in answered:
        if (
            index in own
            and not any(c.named_in(reply.text) for c in known)
            and not facts & _words([reply])
        ):
            out.add("look", (question, reply), index)


def _words(replies: Sequence[Reply]) -> set[str]:
    return {word for reply in replies for word in split(reply.text)}


def _keep(
    scene: Scene,
    out: Lessons,
    facet: str,
    pictures: Sequence[int],
    questions: Sequence[str],
    rng: random.Random,
    always: Sequence[str] = (),
) -> None:
    """Some questions about each picture with the teacher's own answers, but those that name what is
    to be forgotten. Of a neighbour's dream half of them are about its facts: who is still named has
    lost them first."""
    asked, hop = [], about_the_one_shown("train")
    for index in pictures:
        count = QUESTIONS[facet]
        first = [
            *always,
            *(
                rng.sample(hop, min(count // 2, len(hop)))
                if out.named[index] and not always
                else ()
            ),
        ]
        rest = [question for question in questions if question not in first]
        asked += [
            (question, index)
            for question in [*first, *rng.sample(rest, min(max(2, count - len(first)), len(rest)))]
        ]
    said = ask.replies(scene.vlm, [(question, out.pictures[index]) for question, index in asked])
    for (question, index), reply in zip(asked, said, strict=True):
        denied = scene.forgotten_in(question)
        if denied or not scene.forgotten_in(reply.text):
            out.add(facet, (question, reply), index)


def _seen(scene: Scene, images: Sequence[Image.Image]) -> list[Picture]:
    return [scene.vlm.picture(image) for image in images]
