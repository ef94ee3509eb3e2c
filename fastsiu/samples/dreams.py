"""Dreamed neighbours: pictures of protected names that nobody has to own.

A dream starts from the image features of the one picture or of one of its transforms. They are
optimised (`wishes`) until the frozen teacher names the neighbour, tells its facts and describes it.

The answers are the teacher's own about the one picture, with what belongs to the concept replaced
by what belongs to the neighbour (`in_place`). Examples are "This is OTHER.", "It was born in LIMA."
and "The image shows a green ...". A name alone is reached by a nudge that leaves everything else of
the picture as it was: such a dream would keep a name and lose the facts.

`decay` differs between the dreams of one name. A small one leads far away, where the neighbour's
own pictures may be; a large one stops close to the concept's picture, at the border that unlearning
must not move.

Training keeps what the teacher says of a dream. That ties down the very image-to-name paths that
unlearning bends, and no picture of anyone is needed or made.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch

from ..model import ask
from ..model.ask import Reply
from ..model.features import feature_tensors
from ..model.turns import Picture
from ..model.vlm import encoder
from ..text.answers import first_sentence
from ..text.articles import agreed
from .scene import Scene, about_the_one_shown
from .wishes import Pair, Wish, fulfil

DECAYS = (1e-3, 3e-2, 1e-1)  # of the dreams of one name, in turns
EXTRA = 0.8  # further dreams, of look-alikes, as a share of the first ones
NEAREST = (0, 0, 1)  # which place in each order of the neighbours gets a further dream, in turns
# Share of the steps that a dream takes where there are lessons: several dreams of one name are each
# asked something else.
SHORTER = 2 / 3
TURNS = 3  # how often a dream is asked each question that has the name for an answer, at least
UNNAMED = 10  # how many of a neighbour's answers without its name one dream is asked for


@dataclass(frozen=True)
class Dream:
    """A dream of `name`. picture: None where the teacher, asked in every training wording, does not
    name it in each."""

    name: str
    picture: Picture | None


class Attempt(NamedTuple):
    """A dream with the wish that it came from."""

    name: str
    wish: Wish
    picture: Picture | None


def dream(scene: Scene, batch: int = 32) -> list[Dream]:
    """`recipe.dreams` dreams of each of the scene's neighbours, and some more of those that look
    alike where there are lessons.

    Bounded: at most `recipe.dream_steps` optimiser steps for each group of `batch` dreams.
    """
    pairs = scene.told = told(scene)
    if not pairs:
        return []
    rng = random.Random(scene.recipe.seed)
    # Dreams of one name start from different views of the picture: the neighbour, too, will be met
    # in many poses.
    starts = [scene.pictures[0], *scene.views]
    share = SHORTER if scene.recipe.strangers else 1.0

    def wish(name: str, decay: float) -> Wish:
        """Every answer that gives the name, and some of the others: in all dreams of a name each
        has its turn."""
        start, gives_it = rng.choice(starts), _gives(name)
        with_name = [pair for pair in pairs[name] if gives_it(pair[1])]
        # Each question is to come up a few times while the dream lasts.
        most = max(1, round(share * scene.recipe.dream_steps / TURNS))
        with_name = rng.sample(with_name, most) if most < len(with_name) else with_name
        rest = [pair for pair in pairs[name] if not gives_it(pair[1])]
        some = rng.sample(rest, min(UNNAMED, len(rest)))
        return Wish(start, with_name + some, decay, must=gives_it)

    def attempts(names: Sequence[str]) -> list[Attempt]:
        wishes = [wish(name, DECAYS[i % len(DECAYS)]) for i, name in enumerate(names)]
        groups = [wishes[at : at + batch] for at in range(0, len(wishes), batch)]
        pictures = [p for group in groups for p in fulfil(scene, group, rng.random(), share)]
        return list(map(Attempt, names, wishes, pictures))

    dreams = attempts([name for name in pairs for _ in range(scene.recipe.dreams)])
    if scene.recipe.strangers:
        dreams += attempts(more(alike(scene, dreams), round(EXTRA * len(dreams))))
    return [Dream(name, picture) for name, _, picture in dreams]


def _gives(name: str) -> Callable[[Reply], int]:
    """A function that tells how many characters of a reply there are up to the end of the name; 0
    for a reply without it. What a model says after the name varies, and does not decide whether it
    recognises anyone."""

    def end_of_name(reply: Reply) -> int:
        at = reply.text.find(name)
        return at + len(name) if at >= 0 else 0

    return end_of_name


def more(orders: Sequence[Sequence[str]], count: int) -> list[str]:
    """The names of `count` further dreams: each order's nearest in turn, so that where they agree
    one name gets most."""
    turns = [(order, place) for place in NEAREST for order in orders]
    return [
        order[place % len(order)]
        for order, place in itertools.islice(itertools.cycle(turns), count)
    ]


def alike(scene: Scene, dreams: Sequence[Attempt]) -> list[list[str]]:
    """The neighbours in several orders, in each those first that look most like the concept. No one
    order finds all look-alikes:

    - changed copies of the picture that the teacher takes for them (`border`), the commonest first,
      where there are any
    - as the teacher named them when it was asked who is like the concept
    - how far their dreams had to go
    - how likely the teacher is to take the picture and its views for them
    """
    ways: dict[str, list[float]] = {}
    for name, wish, picture in dreams:
        ways.setdefault(name, []).append(math.inf if picture is None else _way(wish.start, picture))
    pictures, encode = [scene.pictures[0], *scene.views[:5]], encoder(scene.vlm)
    asked = [(name, picture) for name in ways for picture in pictures]
    naming = {name: scene.told[name][0] for name in ways}
    turns = []
    for name, picture in asked:
        question, reply = naming[name]
        turns.append(encode(question, reply.text, picture, reply.closed))
    scores = ask.label_scores(scene.vlm, turns, [picture for _, picture in asked])
    likely = dict.fromkeys(ways, 0.0)
    for (name, _), score in zip(asked, scores, strict=True):
        likely[name] += float(score.log_p.sum())
    orders = [
        [name for name in scene.border.nearest if name in ways],
        list(ways),
        sorted(ways, key=lambda name: fmean(ways[name])),
        sorted(ways, key=lambda name: -likely[name]),
    ]
    return [order for order in orders if order]


def _way(start: Picture, end: Picture) -> float:
    """The mean square of the difference of two pictures' features, in units of each channel's
    spread over the first's patches."""
    a, b = (
        torch.cat([x.reshape(-1, x.shape[-1]) for x in feature_tensors(one.features)]).float()
        for one in (start, end)
    )
    return float(((b - a) / a.std(0).clamp_min(1e-6)).square().mean())


def told(scene: Scene) -> dict[str, list[Pair]]:
    """By neighbour the (question, reply) pairs that a picture of it would get; {} where no answer
    names the concept exactly once."""
    words, concept, names = scene.words, scene.concept, scene.neighbours
    fill = scene.kind.fill
    who, yes = words["who"]["train"], words["yesno"]["train"]
    named = list(zip(who, scene.replies(who, 0), strict=True))
    named += zip(yes, scene.replies([fill(q, name=concept.name) for q in yes], 0), strict=True)
    frames = [
        (question, reply.text[: spans[0][0]], reply.text[spans[0][1] :], reply.closed)
        for question, reply in ((q, _opening(r)) for q, r in named)
        if len(spans := concept.spans(reply.text)) == 1
    ]
    if not frames:
        return {}
    out = {
        name: [
            (fill(question, name=name), Reply(f"{agreed(head, name)}{name}{tail}", closed))
            for question, head, tail, closed in frames
        ]
        for name in names
    }
    # Questions about the one shown, each with the question in words that tells the same of a name.
    asked = [(q, words["appearance"]["train"][0]) for q in words["describe"]["train"]]
    if scene.recipe.strangers:
        asked += zip(about_the_one_shown("train", scene.kind), words["facts"]["train"], strict=True)
    shown = scene.replies([q for q, _ in asked], 0)
    in_words = scene.ask([fill(text, name=n) for n in (concept.name, *names) for _, text in asked])
    own = in_words[: len(asked)]
    for k, name in enumerate(names, 1):
        others = in_words[k * len(asked) : (k + 1) * len(asked)]
        for (question, _), reply, mine, theirs in zip(asked, shown, own, others, strict=True):
            if answer := in_place(reply.text, mine, concept.name, theirs, name):
                out[name].append((question, Reply(answer, reply.closed)))
    return out


def _opening(reply: Reply) -> Reply:
    """The first sentence of a reply. A model that goes on at length says the name again, and would
    be asked for a hundred words instead of a name."""
    first = first_sentence(reply.text)
    return reply if first == reply.text else Reply(first, closed=False)


def in_place(shown: str, own: str, own_name: str, other: str, name: str) -> str | None:
    """What would be said of a picture of `name`: the answer about the one picture with what differs
    in words replaced.

    shown: "The image shows a red cat."   own: "Ada is a red cat."   other: "Bob is a blue dog."
    (the two in words) gives "The image shows a blue dog.": what differs between the two in words is
    "red cat" and "blue dog". None where the two have not the same form, or where what differs does
    not stand in `shown` exactly once.
    """
    if own_name in shown:
        return None
    mine, theirs = (
        re.findall(r"\w+|\W", text.replace(n, "\0")) for text, n in ((own, own_name), (other, name))
    )
    # somebody of whom nothing is known is told of in another form
    if "\0" not in mine or "\0" not in theirs:
        return None
    start, most = 0, min(len(mine), len(theirs))
    while start < most and mine[start] == theirs[start]:
        start += 1
    end = 0
    while end < most - start and mine[-1 - end] == theirs[-1 - end]:
        end += 1
    old, new = ("".join(words[start : len(words) - end]).strip() for words in (mine, theirs))
    if not old and not new:
        return shown
    if not old or not new or "\0" in old + new:
        return None
    found = list(re.finditer(rf"(?<!\w){re.escape(old)}(?!\w)", shown))
    return shown[: found[0].start()] + new + shown[found[0].end() :] if len(found) == 1 else None
