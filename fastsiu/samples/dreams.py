"""Dreamed neighbours: pictures of protected names that nobody has to own.

Starting from the image features of the one picture and its transforms, features are optimised until
the frozen teacher names the neighbour, tells its facts and describes it:

    minimise over f   CE(teacher(f, question), answer)  +  decay * |(f - f_0) / sd|^2 / size

The answers are the teacher's own about the one picture, with what belongs to the concept replaced
by what belongs to the neighbour (`in_place`): "This is OTHER.", "It was born in LIMA.", "The image
shows a green ...". A name alone is reached by a nudge that leaves everything else of the picture as
it was: such a dream would keep a name and lose the facts.

`decay` differs between the dreams of one name. A small one leads far away, where the neighbour's
own pictures may be; a large one stops close to the concept's picture, at the border that unlearning
must not move.

What the teacher says of a dream it should go on saying, which ties down the very image-to-name
paths that unlearning bends. The dream lives in feature space, so any model that takes precomputed
image features can dream, and no picture of anyone is needed or made.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch

from ..loss.fused import fused_dmk_ce
from ..model import ask, prefix
from ..model.adapter import projector
from ..model.ask import Reply
from ..model.features import feature_tensors, map_features
from ..model.vlm import VLM, Encoded, Picture, encoder, out_of_memory
from ..request import OutOfMemory
from .targets import Scene, about_the_one_shown, wordings

DECAYS = (1e-3, 3e-2, 1e-1)  # of the dreams of one name, in turns
EXTRA = 0.8  # share of further dreams, of look-alikes:
NEAREST = (0, 0, 1)  # by their places in each order of the neighbours, in turns
# of the steps, where there are lessons: of several dreams of one name, each asked something else
SHORTER = 2 / 3
UNNAMED = 10  # of a neighbour's answers without its name, as many are asked of one dream
SURE = math.log(2)  # nats: a token that costs less has more than half of the probability

Pair = tuple[str, Reply]  # a question and the answer that the dream is to get


@dataclass(frozen=True)
class Dream:
    """A dream of `name`. picture: None where the teacher, asked in every training wording, does not
    name it in each."""

    name: str
    picture: Picture | None


@dataclass(frozen=True)
class Wish:
    """What one dream is to become: where it starts, what it is to be answered, and which of the
    answers it is accepted by."""

    start: Picture
    pairs: Sequence[Pair]
    decay: float
    must: Callable[[Reply], bool] = lambda reply: True


def dream(scene: Scene, batch: int = 32) -> list[Dream]:
    """`recipe.dreams` dreams of each of the scene's neighbours, and some more of those that look
    alike where there are lessons.

    Bounded: at most `recipe.dream_steps` optimiser steps for each group of `batch` dreams.
    """
    said = scene.told = told(scene)
    if not said:
        return []
    rng = random.Random(scene.recipe.seed)
    # Dreams of one name start from different views of the picture: the neighbour, too, will be met
    # in many poses.
    starts = [scene.pictures[0], *scene.views]
    share = SHORTER if scene.recipe.strangers else 1.0
    named = lambda name: lambda reply: name in reply.text

    def some(name: str) -> list[Pair]:
        """Every answer that gives the name, and some of the others: in all dreams of a name each
        has its turn."""
        rest = [pair for pair in said[name] if not named(name)(pair[1])]
        return [pair for pair in said[name] if named(name)(pair[1])] + rng.sample(
            rest, min(UNNAMED, len(rest))
        )

    def dreamed(names: Sequence[str]) -> list[tuple[str, Wish, Picture | None]]:
        wishes = [
            Wish(rng.choice(starts), some(name), DECAYS[i % len(DECAYS)], named(name))
            for i, name in enumerate(names)
        ]
        groups = [wishes[at : at + batch] for at in range(0, len(wishes), batch)]
        found = [one for group in groups for one in fulfil(scene, group, rng.random(), share)]
        return list(zip(names, wishes, found, strict=True))

    made = dreamed([name for name in said for _ in range(scene.recipe.dreams)])
    if scene.recipe.strangers:
        made += dreamed(more(alike(scene, made), round(EXTRA * len(made))))
    return [Dream(name, picture) for name, _, picture in made]


def more(orders: Sequence[Sequence[str]], count: int) -> list[str]:
    """The names of `count` further dreams: each order's nearest in turn, so that where they agree
    one name gets most."""
    turns = [(order, NEAREST[i]) for i in range(len(NEAREST)) for order in orders]
    return [
        order[place % len(order)]
        for order, place in itertools.islice(itertools.cycle(turns), count)
    ]


def alike(scene: Scene, made: Sequence[tuple[str, Wish, Picture | None]]) -> list[list[str]]:
    """The neighbours in several orders, in each those first that look most like the concept. No one
    order finds all look-alikes:

    as the teacher named them when it was asked who is like the concept; by the way that their
    dreams had to go; by how likely the teacher is to take the picture and its views for them; and
    those that it takes changed copies of the picture for (`border`), where there are any.
    """
    ways: dict[str, list[float]] = {}
    for name, wish, picture in made:
        ways.setdefault(name, []).append(math.inf if picture is None else _way(wish.start, picture))
    pictures = [scene.pictures[0], *scene.views[:5]]
    asked, encode = [(name, picture) for name in ways for picture in pictures], encoder(scene.vlm)
    naming = {name: scene.told[name][0] for name in ways}
    turns = [
        encode(naming[n][0], naming[n][1].text, picture, naming[n][1].closed)
        for n, picture in asked
    ]
    likely = dict.fromkeys(ways, 0.0)
    for (name, _), score in zip(
        asked, ask.label_scores(scene.vlm, turns, [picture for _, picture in asked]), strict=True
    ):
        likely[name] += float(score.log_p.sum())
    taken = [name for name in scene.border.nearest if name in ways]
    orders = [
        taken,
        list(ways),
        sorted(ways, key=lambda n: fmean(ways[n])),
        sorted(ways, key=lambda n: -likely[n]),
    ]
    return [order for order in orders if order]


def _way(start: Picture, end: Picture) -> float:
    """The mean square of what lies between two pictures' features, in units of each channel's
    spread over the first's patches."""
    a, b = (
        torch.cat([x.reshape(-1, x.shape[-1]) for x in feature_tensors(one.features)]).float()
        for one in (start, end)
    )
    return float(((b - a) / a.std(0).clamp_min(1e-6)).square().mean())


def told(scene: Scene) -> dict[str, list[Pair]]:
    """For each neighbour the (question, reply) pairs that a picture of it would get; nothing where
    no answer names it."""
    words, concept, names = wordings(), scene.concept, scene.neighbours
    who, yes = words["who"]["train"], words["yesno"]["train"]
    named = list(zip(who, scene.replies(who, 0), strict=True))
    named += zip(yes, scene.replies([q.format(name=concept.name) for q in yes], 0), strict=True)
    frames = [
        (q, a[: spans[0][0]], a[spans[0][1] :], end)
        for q, (a, end) in named
        if len(spans := concept.spans(a)) == 1
    ]
    if not frames:
        return {}
    out = {
        n: [(q.format(name=n), Reply(f"{head}{n}{tail}", end)) for q, head, tail, end in frames]
        for n in names
    }
    # What is said of the one shown, with the question in words that tells the same of a name.
    asked = [(q, words["appearance"]["train"][0]) for q in words["describe"]["train"]]
    if scene.recipe.strangers:
        asked += zip(about_the_one_shown("train"), words["facts"]["train"], strict=True)
    seen = scene.replies([q for q, _ in asked], 0)
    inwords = scene.ask([text.format(name=n) for n in (concept.name, *names) for _, text in asked])
    own = inwords[: len(asked)]
    for k, name in enumerate(names, 1):
        other = inwords[k * len(asked) : (k + 1) * len(asked)]
        for (question, _), (shown, end), mine, theirs in zip(asked, seen, own, other, strict=True):
            if answer := in_place(shown, mine, concept.name, theirs, name):
                out[name].append((question, Reply(answer, end)))
    return out


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


def fulfil(
    scene: Scene, wishes: Sequence[Wish], luck: float = 0.0, share: float = 1.0
) -> list[Picture | None]:
    """For each wish the dreamed picture, None where the teacher does not give every answer that it
    `must`.

    luck:  between 0 and 1, decides the noise and the order of the questions
    share: of `recipe.dream_steps`, as many steps at most

    A dream that has got every one of its answers, each when it was asked last, is done and is not
    optimised further.

    Raises OutOfMemory where not even one dream at a time fits into memory.
    """
    vlm, recipe = scene.vlm, scene.recipe
    if not wishes:
        return []
    places = {id(wish.start): vision_space(vlm, wish.start) for wish in wishes}
    spaces = [places[id(wish.start)] for wish in wishes]
    generator = torch.Generator(device="cpu").manual_seed(recipe.seed + int(luck * 2**31))
    rng = random.Random(f"{recipe.seed} {luck}")
    first = [space for space, _ in spaces]
    spread = first[0].reshape(-1, first[0].shape[-1]).std(0).clamp_min(1e-6)
    free = [
        (
            f + recipe.dream_noise * spread * torch.randn(f.shape, generator=generator).to(f)
        ).requires_grad_()
        for f in first
    ]
    encode = encoder(vlm)
    turns = [[encode(q, r.text, wish.start, r.closed) for q, r in wish.pairs] for wish in wishes]
    decks: list[list[int]] = [[] for _ in wishes]
    right: list[set[int]] = [set() for _ in wishes]
    # The rate is in units of the channels' spread over the patches, so that one number suits every
    # projector.
    optimiser = torch.optim.Adam(free, lr=recipe.dream_lr * float(spread.mean()))

    def differentiate(members: list[int], asked: list[Encoded]) -> torch.Tensor | None:
        """Each supervised token's nats; None where memory does not suffice."""
        optimiser.zero_grad(set_to_none=True)  # a dream that is not asked does not move
        try:
            shown = [spaces[i][1](free[i]) for i in members]
            states = prefix.supervised_states(vlm, asked, shown, micro_batch=vlm.budget.dream_batch)
            nats = fused_dmk_ce(
                states,
                vlm.head_weight,
                torch.cat([t.labels for t in asked]),
                alpha=1.0,
                reduction="none",
                **vlm.head_options,
            )
            # A dream's own mean, so that no dream's rate depends on how many others there are.
            parts = nats.split([len(turn.labels) for turn in asked])
            pull = [
                wishes[i].decay * ((free[i] - first[i]) / spread).square().mean() for i in members
            ]
            torch.stack(
                [part.mean() + p for part, p in zip(parts, pull, strict=True)]
            ).sum().backward()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None
        return nats.detach()

    vlm.model.train(vlm.budget.checkpointing)  # layers checkpoint in training mode only
    for _ in range(round(share * recipe.dream_steps)):
        members = [i for i, own in enumerate(turns) if len(right[i]) < len(own)]
        if not members:
            break
        for i in members:
            decks[i] = decks[i] or rng.sample(range(len(turns[i])), len(turns[i]))
        chosen = [decks[i].pop() for i in members]
        asked = [turns[i][k] for i, k in zip(members, chosen, strict=True)]
        while (nats := differentiate(members, asked)) is None:
            now = min(vlm.budget.dream_batch or len(asked), len(asked))
            if now == 1:
                raise OutOfMemory(
                    "Not even one dream at a time fits into memory: use --checkpointing or "
                    "--quantize nf4; "
                    "`fastsiu plan` tells what fits."
                )
            vlm.budget = replace(vlm.budget, dream_batch=now // 2)
        optimiser.step()
        for i, k, part in zip(
            members, chosen, nats.split([len(turn.labels) for turn in asked]), strict=True
        ):
            (right[i].add if bool((part < SURE).all()) else right[i].discard)(k)
    vlm.model.eval()
    with torch.no_grad():
        pictures = [
            Picture(w.start.image, s[1](f), real=False)
            for w, s, f in zip(wishes, spaces, free, strict=True)
        ]
    checked = [
        (i, turn)
        for i, wish in enumerate(wishes)
        for turn, (_, reply) in zip(turns[i], wish.pairs, strict=True)
        if wish.must(reply)
    ]
    scores = ask.label_scores(vlm, [turn for _, turn in checked], [pictures[i] for i, _ in checked])
    refused = {
        i for (i, _), score in zip(checked, scores, strict=True) if not bool(score.right.all())
    }
    return [None if i in refused else picture for i, picture in enumerate(pictures)]


def vision_space(vlm: VLM, start: Picture) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """Where to dream: (the picture's features there, a function from such features to what the
    language model takes).

    In front of the projector where the model has one of a known name, because what leaves a
    projector lies close to a surface that free vectors would leave; otherwise behind it. So, too,
    where the model puts rows of its own between the projector's, such as those that end a line of
    tiles.
    """
    there = torch.cat([x.reshape(-1, x.shape[-1]) for x in feature_tensors(start.features)])
    name = projector(vlm.base)
    if name is not None:
        module, seen = vlm.base.get_submodule(name), []
        hook = module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        try:
            vlm.picture(start.image)
        finally:
            hook.remove()
        # not at all where it runs inside the language model's forward
        args, kwargs = seen[0] if seen else ((), {})
        if (
            len(seen) == 1
            and args
            and isinstance(args[0], torch.Tensor)
            and args[0].is_floating_point()
        ):
            with torch.no_grad():
                out = module(*args, **kwargs)
            same = isinstance(out, torch.Tensor) and out.numel() == there.numel()
            if same and torch.allclose(
                out.reshape(there.shape), there, rtol=1e-2, atol=1e-2 * float(there.abs().max())
            ):
                return args[0].float(), lambda x: _replaced(
                    start, module(x.to(args[0].dtype), *args[1:], **kwargs)
                )
    return there.float(), lambda x: _replaced(start, x)


def _replaced(start: Picture, flat: torch.Tensor) -> Any:
    """The start picture's features with the projector's output replaced, whatever shape it is kept
    in."""
    rest = flat.reshape(-1, flat.shape[-1])

    def change(x: torch.Tensor) -> torch.Tensor:
        nonlocal rest
        rows = x.numel() // x.shape[-1]
        piece, rest = rest[:rows], rest[rows:]
        return piece.reshape(x.shape).to(x.dtype)

    return map_features(start.features, change)
