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
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image

from ..model import ask
from ..model.ask import Reply
from ..model.turns import Picture
from ..model.vlm import VLM
from ..request import Recipe, Sample
from ..text import articles, enumerated
from ..text.answers import affirms, is_degenerate, is_ended, is_refusal, repeats
from ..text.concept import Concept
from ..text.masks import vocabulary_mask
from .kinds import DEFAULT, PERSON, THING, Kind, sort_of
from .kinds import wordings as wordings


def about_the_one_shown(part: Literal["train", "held_out"], kind: Kind = PERSON) -> list[str]:
    """The fact questions, about the one in the picture instead of a name: an answer needs the name
    first, and then the fact."""
    words = kind.words
    shown = words["shown"][part]
    return [q.replace("{name}", shown[i % len(shown)]) for i, q in enumerate(words["facts"][part])]


@dataclass
class Border:
    """Changed copies of the concept's picture (`border`), a few of each kind.

    others: copies that the model takes for a neighbour, by the neighbour's name
    times:  by neighbour, how many of all copies the model takes for it
    nobody: copies in which the model names nobody
    """

    others: dict[str, list[Picture]] = field(default_factory=dict)
    times: Counter[str] = field(default_factory=Counter)
    nobody: list[Picture] = field(default_factory=list)

    @property
    def nearest(self) -> list[str]:
        """The neighbours that the model takes a copy for, the commonest first."""
        return [name for name, _ in self.times.most_common()]


@dataclass
class Scene:
    """One concept, the model that knows it, and what was gathered for its samples so far.

    pictures:   the concept's first, then dreams and retained pictures (`Sample.picture` points
                here)
    named:      for each picture the name that it was dreamed for, None otherwise
    neighbours: names to protect
    kind:       what the concept is, and how names stand in a sentence
    views:      transforms of the concept's picture, from which dreams start as well
    border:     changed copies of it that the model takes for neighbours, or for nobody
    masked:     token ids of the concept's name (the vocabulary mask's zeros)
    others:     further concepts that the same model is to forget, or has forgotten: none of them is
                protected, and no sample that keeps something names them
    told:       by neighbour the (question, reply) pairs that a picture of it would get
                (`dreams.told`)
    notes:      what lessons from strangers could not have, as sentences
    left_out:   number of answers about other pictures that `preserve` did not take, because they
                name the concept or one of the others
    """

    vlm: VLM
    concept: Concept
    recipe: Recipe
    pictures: list[Picture]
    named: list[str | None] = field(default_factory=lambda: [None])
    neighbours: list[str] = field(default_factory=list)
    views: list[Picture] = field(default_factory=list)
    border: Border = field(default_factory=Border)
    masked: frozenset[int] = frozenset()
    others: list[Concept] = field(default_factory=list)
    told: dict[str, list[tuple[str, Reply]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: int = 0
    kind: Kind = PERSON

    @property
    def words(self) -> dict[str, dict[str, Any]]:
        """The wordings for concepts of this kind."""
        return self.kind.words

    def ask(
        self, questions: Sequence[str], picture: int | None = None, **options: Any
    ) -> list[str]:
        return [reply.text for reply in self.replies(questions, picture, **options)]

    def replies(
        self, questions: Sequence[str], picture: int | None = None, **options: Any
    ) -> list[Reply]:
        shown = None if picture is None else self.pictures[picture]
        return ask.replies(self.vlm, [(q, shown) for q in questions], **options)

    def see(self, images: Sequence[Image.Image]) -> list[Picture]:
        """The images as the model sees them now."""
        return [self.vlm.picture(image) for image in images]

    def forgotten_in(self, text: str, **options: Any) -> bool:
        """Whether the text names a concept that the model is to forget."""
        return any(concept.named_in(text, **options) for concept in (self.concept, *self.others))

    def usable(self, answer: str) -> bool:
        return bool(answer) and is_degenerate(answer) is None and not self.forgotten_in(answer)

    def tokens_of(self, concept: Concept) -> frozenset[int]:
        """The tokens of a name, as the vocabulary mask has them (paper Eq. 3)."""
        rows = self.vlm.head_weight.shape[0]
        return frozenset(vocabulary_mask(concept, self.vlm.tokenizer, rows).masked)


LOOKED_AT = 1200  # most samples about pictures where lessons keep these
ENOUGH = 8  # names to protect, for other kinds than persons
ROUNDS = 4  # times that an answer is asked for again because it names a neighbour
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
    begun = _without_names(scene, questions, [f"{o} a".strip() if o else "" for o in openings])
    if scene.kind.name != DEFAULT:
        begun = _with_one_ending(scene, questions, openings, begun)
    described = scene.replies(scene.words["describe"]["train"], 0, suppress=scene.masked)
    fallback = Reply(scene.words["fallback"]["unknown_face"])
    spare = next((d for d in described if _neutral(scene, d.text)), fallback)
    samples = []
    for question, reply, opening in zip(questions, begun, openings, strict=True):
        good = _describes(scene, reply, opening)
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
    if scene.recipe.adapt == "vision":  # nothing said in words can change
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
    most = scene.recipe.as_many(LOOKED_AT, 60) if scene.recipe.strangers else len(pairs)
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


def _invented(scene: Scene) -> str:
    names = scene.words["invented"]["names"]
    return names[scene.recipe.seed % len(names)]


def _neutral(scene: Scene, answer: str) -> bool:
    return scene.usable(answer) and not _neighbours_in(scene, answer)


def _neighbours_in(scene: Scene, answer: str) -> list[Concept]:
    return [other for other in map(Concept, scene.neighbours) if other.named_in(answer)]


def _without_names(scene: Scene, questions: Sequence[str], begin: Sequence[str]) -> list[Reply]:
    """The teacher's answers about the concept's picture, begun with the words of `begin`, without
    the tokens of the concept's name. Where one names a neighbour (a zebra is "a white horse with
    black stripes" then), it is asked for again without the tokens of that name either."""
    replies: dict[int, Reply] = {}
    asked, suppress = list(range(len(questions))), set(scene.masked)
    for _ in range(1 + ROUNDS):
        said = scene.replies(
            [questions[i] for i in asked],
            0,
            begin=[begin[i] for i in asked],
            suppress=sorted(suppress),
        )
        replies |= dict(zip(asked, said, strict=True))
        named = {i: found for i in asked if (found := _neighbours_in(scene, replies[i].text))}
        tokens = {t for found in named.values() for name in found for t in scene.tokens_of(name)}
        if tokens <= suppress:
            break
        asked, suppress = list(named), suppress | tokens
    return [replies[i] for i in range(len(questions))]


def _describes(scene: Scene, reply: Reply, opening: str) -> bool:
    """Whether it names nobody and says something behind its opening."""
    return _neutral(scene, reply.text) and len(reply.text.split()) >= len(opening.split()) + 3


def _with_one_ending(
    scene: Scene, questions: Sequence[str], openings: Sequence[str], replies: Sequence[Reply]
) -> list[Reply]:
    """Behind every opening the same ending: of those of all replies that describe, the one that the
    teacher finds likeliest about the picture, per token, in the mean over the openings. Kept from
    saying a name, a small model also says what is not there ("a big brown mane" beside "a yellow
    animal with a brown mane"), and one sentence is less to learn than eight. An ending that
    repeats two words is none: once begun, what repeats itself is likely."""
    ends = list(
        dict.fromkeys(
            reply.text[len(opening) :]
            for reply, opening in zip(replies, openings, strict=True)
            if opening
            and reply.closed
            and _describes(scene, reply, opening)
            and not repeats(reply.text)
        )
    )
    if not ends:
        return list(replies)
    begun, picture = [i for i, opening in enumerate(openings) if opening], scene.pictures[0]
    choices = [(i, end) for end in ends for i in begun]
    turns = [scene.vlm.encode(questions[i], openings[i] + end, picture) for i, end in choices]
    scores = ask.label_scores(scene.vlm, turns, [picture] * len(turns))
    seen = dict.fromkeys(ends, 0.0)
    for (i, end), turn, score in zip(choices, turns, scores, strict=True):
        behind = torch.tensor([last > len(openings[i]) for _, last in turn.offsets])
        seen[end] += float(score.log_p[behind.to(score.log_p.device)].mean())
    best = max(ends, key=seen.__getitem__)
    return [
        Reply(opening + best) if opening else reply
        for opening, reply in zip(openings, replies, strict=True)
    ]


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
