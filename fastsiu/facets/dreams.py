"""Dreamed neighbours: pictures of protected names that nobody has to own.

Starting from the image features of the one picture and its transforms, features are optimised until the frozen teacher
names the neighbour:

    minimise over f   CE(teacher(f, question), answer)  +  decay * |(f - f_0) / sd|^2 / size

The answers are the teacher's own about the one picture, with the name swapped: "This is OTHER.", "Yes, this is OTHER.".
A name alone is reached by a nudge that leaves everything else of the picture as it was; so wherever the teacher can say
in words what OTHER looks like, the dream has to look like that too ("The image shows a green ...").

What the teacher says of a dream it should go on saying, which ties down the very image-to-name paths that unlearning
bends. The dream lives in feature space, so any model that takes precomputed image features can dream, and no picture of
anyone is needed or made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

import torch

from .. import ask, prefix
from ..adapter import projector
from ..ask import Reply
from ..features import feature_tensors, map_features
from ..loss import fused_dmk_ce
from ..request import OutOfMemory
from ..vlm import VLM, Encoded, Picture, out_of_memory
from .targets import Scene, wordings

DECAY = 1e-3  # pull towards the picture the dream started from; keeps features on the scale the model knows


@dataclass(frozen=True)
class Dream:
    """One accepted dream: the teacher, asked in every training wording, names `name`."""

    name: str
    picture: Picture


def dream(scene: Scene, batch: int = 32) -> list[Dream]:
    """`recipe.dreams` dreams of each of the scene's neighbours: those that the teacher names in every wording.

    Bounded: `recipe.dream_steps` optimiser steps for each group of `batch` dreams.
    """
    said = told(scene)
    wanted = [name for name in scene.neighbours for _ in range(scene.recipe.dreams)] if said else []
    generator = torch.Generator(device="cpu").manual_seed(scene.recipe.seed)
    accepted: list[Dream] = []
    for at in range(0, len(wanted), batch):
        accepted += _dream_batch(scene, [(name, said[name]) for name in wanted[at : at + batch]], generator)
    return accepted


def told(scene: Scene) -> dict[str, list[tuple[str, Reply]]]:
    """For each neighbour the (question, reply) pairs that a picture of it would get; nothing where no answer names it."""
    words, concept = wordings(), scene.concept
    names = scene.neighbours
    who = words["who"]["train"]
    named = list(zip(who, scene.replies(who, 0), strict=True))
    yes = words["yesno"]["train"]
    named += zip(yes, scene.replies([q.format(name=concept.name) for q in yes], 0), strict=True)
    frames = [(q, a[: spans[0][0]], a[spans[0][1] :], end) for q, (a, end) in named if len(spans := concept.spans(a)) == 1]
    if not frames:
        return {}
    out = {n: [(q.format(name=n), Reply(f"{head}{n}{tail}", end)) for q, head, tail, end in frames] for n in names}
    seen = list(zip(words["describe"]["train"], scene.replies(words["describe"]["train"], 0), strict=True))
    look = words["appearance"]["train"][0]
    own, *others = scene.ask([look.format(name=name) for name in (concept.name, *names)])
    for name, other in zip(names, others, strict=True):
        out[name] += [(q, Reply(a, end)) for q, (shown, end) in seen if (a := in_place(shown, own, concept.name, other, name))]
    return out


def in_place(shown: str, own: str, own_name: str, other: str, name: str) -> str | None:
    """What would be said of a picture of `name`: the description of the one picture with the words for its look replaced.

    shown: "The image shows a red cat."   own: "Ada is a red cat."   other: "Bob is a blue dog." (the looks, in words)
    gives "The image shows a blue dog.". None where the descriptions do not fit together like that.
    """
    match = SequenceMatcher(None, shown, own, autojunk=False).find_longest_match()
    look = own[match.b : match.b + match.size]
    lead, tail = own[: match.b], own[match.b + match.size :]
    lead = lead.replace(own_name, name)
    if len(look.split()) < 3 or own_name in look or not (other.startswith(lead) and other.endswith(tail)):
        return None
    return shown[: match.a] + other[len(lead) : len(other) - len(tail)] + shown[match.a + match.size :]


def _dream_batch(scene: Scene, wanted: Sequence[tuple[str, list[tuple[str, Reply]]]], generator: torch.Generator) -> list[Dream]:
    vlm, recipe, start = scene.vlm, scene.recipe, scene.pictures[0]
    spaces = [vision_space(vlm, view) for view in (start, *scene.views)]
    # Dreams of one name start from different views of the picture: the neighbour, too, will be met in many poses.
    spaces = [space for space in spaces if space[0].shape == spaces[0][0].shape]
    chosen = [spaces[int(torch.randint(len(spaces), (), generator=generator))] for _ in wanted]
    first = torch.stack([features for features, _ in chosen])
    spread = spaces[0][0].reshape(-1, first.shape[-1]).std(0).clamp_min(1e-6)
    noise = torch.randn(first.shape, generator=generator).to(first)
    free = (first + recipe.dream_noise * spread * noise).requires_grad_()
    turns = [[vlm.encode(q, reply.text, start, reply.closed) for q, reply in pairs] for _, pairs in wanted]

    def project() -> list[Any]:
        return [behind(f) for (_, behind), f in zip(chosen, free, strict=True)]

    # The rate is in units of the channels' spread over the patches, so that one number suits every projector.
    optimiser = torch.optim.Adam([free], lr=recipe.dream_lr * float(spread.mean()))

    def differentiate(asked: list[Encoded]) -> bool:
        """False where memory does not suffice."""
        optimiser.zero_grad()
        try:
            states = prefix.supervised_states(vlm, asked, project(), micro_batch=vlm.budget.dream_batch)
            loss = fused_dmk_ce(states, vlm.head_weight, torch.cat([t.labels for t in asked]), alpha=1.0, **vlm.head_options)
            (loss + DECAY * ((free - first) / spread).square().mean()).backward()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return False
        return True

    vlm.model.train(vlm.budget.checkpointing)  # layers checkpoint in training mode only
    for step in range(recipe.dream_steps):
        asked = [own[step % len(own)] for own in turns]
        while not differentiate(asked):
            now = min(vlm.budget.dream_batch or len(asked), len(asked))
            if now == 1:
                raise OutOfMemory("Not even one dream at a time fits into memory: use --checkpointing or --quantize nf4; "
                                  "`fastsiu plan` tells what fits.")  # fmt: skip
            vlm.budget = replace(vlm.budget, dream_batch=now // 2)
        optimiser.step()
    vlm.model.eval()
    with torch.no_grad():
        pictures = [Picture(start.image, features, real=False) for features in project()]
    naming = [
        (at, turn) for at, ((name, pairs), own) in enumerate(zip(wanted, turns, strict=True))
        for turn, (_, reply) in zip(own, pairs, strict=True) if name in reply.text
    ]  # fmt: skip
    scores = ask.label_scores(vlm, [turn for _, turn in naming], [pictures[at] for at, _ in naming])
    refused = {at for (at, _), score in zip(naming, scores, strict=True) if not bool(score.right.all())}
    return [Dream(name, pictures[at]) for at, (name, _) in enumerate(wanted) if at not in refused]


def vision_space(vlm: VLM, start: Picture) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """Where to dream: (the picture's features there, a function from such features to what the language model takes).

    In front of the projector where the model has one of a known name, because what leaves a projector lies close to a
    surface that free vectors would leave; otherwise behind it. So, too, where the model puts rows of its own between the
    projector's, such as those that end a line of tiles.
    """
    there = torch.cat([x.reshape(-1, x.shape[-1]) for x in feature_tensors(start.features)])
    name = projector(vlm.base)
    if name is not None:
        module, seen = vlm.base.get_submodule(name), []
        hook = module.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
        try:
            vlm.picture(start.image)
        finally:
            hook.remove()
        args, kwargs = seen[0] if seen else ((), {})  # not at all where it runs inside the language model's forward
        if len(seen) == 1 and args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
            with torch.no_grad():
                out = module(*args, **kwargs)
            same = isinstance(out, torch.Tensor) and out.numel() == there.numel()
            if same and torch.allclose(out.reshape(there.shape), there, rtol=1e-2, atol=1e-2 * float(there.abs().max())):
                return args[0].float(), lambda x: _replaced(start, module(x.to(args[0].dtype), *args[1:], **kwargs))
    return there.float(), lambda x: _replaced(start, x)


def _replaced(start: Picture, flat: torch.Tensor) -> Any:
    """The start picture's features with the projector's output replaced, whatever shape it is kept in."""
    rest = flat.reshape(-1, flat.shape[-1])

    def change(x: torch.Tensor) -> torch.Tensor:
        nonlocal rest
        rows = x.numel() // x.shape[-1]
        piece, rest = rest[:rows], rest[rows:]
        return piece.reshape(x.shape).to(x.dtype)

    return map_features(start.features, change)
