"""What the LoRA factors may read: a few directions of each layer's input.

LoRA adds B A x to what a linear layer makes of its input x. Whatever A reads changes, for every
input, also in texts that no sample holds. So the rows of A stay in the directions F [d, k] in which
the inputs of what is to change have the most energy against those of what is to stay:

    maximise  tr(F^T C F)  against  tr(F^T S F)

C and S are second moments (the mean of x x^T, divided by its trace): C of the lessons that change
something; S the sum of two, of the lessons that keep something and of texts that the untouched
model makes up itself. The solution is the generalised eigenvectors C v = w S v of the largest w.
After each step of the optimiser A becomes A F F^T. The adapter stays an ordinary one.

Where the factors are in front of the language model, C and S are those of what the layers read of
the pictures of these lessons: of the concept, and of others by themselves.

No part of the paper. The idea of keeping updates out of the inputs that are to stay is that of the
null space of features (Wang et al., "Training Networks in Null Space of Feature Covariance for
Continual Learning", CVPR 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from PIL.Image import Image
from torch import Tensor, nn

from ..model import adapter, ask, prefix
from ..model.features import map_features
from ..model.turns import Encoded, Picture
from ..model.vlm import VLM
from ..request import CHANGES, KEEPS, Recipe
from ..samples.corpus import Corpus

LESSONS = 64  # of each half, evenly spread
TEXTS = 32  # that the untouched model makes up
TURNS = 16  # in one forward
SWEEPS = 8  # over the ratio of both energies, to find its largest eigenvectors
RIDGE = 1e-3  # added to S, in units of the mean of its diagonal: some directions are never used
# The same in front of the language model. Kept pictures are fewer and more alike than texts, so a
# direction that they do not use may well be one of others' pictures.
RIDGE_IN_FRONT = 0.1
# What a change of S weighs against one of C, once training is over: the first at which the names
# stay gone.
CALM = (1.0, 0.3, 0.1)
# Of each kind about so many tokens count. Their inputs are summed up as second moments; those wider
# than `WIDE` are kept as they are, since a moment of 11,008 would take 0.5 GB.
TOKENS, WIDE = 2048, 2048
# Of all that at a time; for layers beyond that the model runs once more. Where memory is scarce an
# eighth of it, and a quarter of the tokens: less than a step takes, whose gradients and optimiser
# states are not there yet.
BYTES = 5 * 2**28


class Kept(NamedTuple):
    """What a factor may read of an input of width d.

    basis:    F [d, k], orthonormal, fp32, on the layer's device. k is 0 where nothing that is to
              change reaches the layer
    changing: F^T C F, [k, k]
    staying:  F^T S F, [k, k]
    """

    basis: Tensor
    changing: Tensor
    staying: Tensor

    def calm(self, weight: float) -> Tensor:
        """[k, k]: A F times this does about the same to what is to change, and less to what is to
        stay; A C (C + weight S)^-1 in these directions."""
        own, other = self.changing.double(), self.staying.double()
        return torch.linalg.solve(own + weight * other, own).T.float()


@dataclass(frozen=True)
class Directions:
    """What the adapter's factors may read, by adapted layer."""

    of: dict[nn.Module, Kept]

    def hold(self) -> None:
        """Takes out of every factor A what lies in other directions."""
        for layer, kept in self.of.items():
            _change(layer, kept.basis, kept.basis.T)

    def settle(self, gone: Callable[[], bool]) -> None:
        """After the last step: every factor A gives way to one that reads less of what is to stay,
        as much less (`CALM`) as the names stay gone; all stays as it was where they never do.

        gone: whether the names are gone
        """
        if not self.of:
            return
        before = {layer: _own(layer).clone() for layer in self.of}
        for weight in CALM:
            for layer, kept in self.of.items():
                _own(layer).copy_(before[layer])
                _change(layer, kept.basis, kept.calm(weight), kept.basis.T)
            if gone():
                return
        for layer, factor in before.items():
            _own(layer).copy_(factor)


FREE = Directions({})  # nothing is held anywhere


def _change(layer: nn.Module, *by: Tensor) -> None:
    """Multiplies the layer's factor A with matrices, from the right."""
    product = own = _own(layer)
    for matrix in by:
        product = product @ matrix
    own.copy_(product)


def _own(layer: nn.Module) -> Tensor:
    """The layer's factor A without a graph, as far as it is on this rank: FSDP2 shards its rows."""
    weight: Any = _factor(layer).weight
    return (weight.to_local() if hasattr(weight, "to_local") else weight).detach()


def find(vlm: VLM, lessons: Sequence[Corpus], recipe: Recipe) -> Directions:
    """The `recipe.directions` directions of each adapted layer. Layers with a narrower input stay
    free; so do all where no lesson changes anything.

    An adapter is on, and off while the model runs.

    lessons: those that change something, and those that keep something

    Raises OutOfMemory where one turn at a time does not fit.
    """
    count = recipe.directions
    of_changing: _Turns | _Seen
    of_kept: _Turns | _Seen
    if recipe.in_front:
        of_changing, of_kept = _Seen.of(lessons, CHANGES[0]), _Seen.of(lessons, KEEPS[0])
    else:
        of_changing, of_kept = _Turns.of(lessons, CHANGES), _Turns.of(lessons, KEEPS)
    if not count or not len(of_changing):
        return FREE
    found: dict[nn.Module, Kept] = {}
    with (
        torch.no_grad(),
        adapter.teacher(vlm),
        torch.random.fork_rng([d for d in vlm.devices if d.type == "cuda"]),
    ):
        torch.manual_seed(recipe.seed)
        kinds = [of_changing, of_kept]
        ridge = RIDGE_IN_FRONT if recipe.in_front else RIDGE
        if not recipe.in_front:
            texts = ask.made_up(vlm, TEXTS, recipe.seed)
            kinds.append(_Turns(texts, [None] * len(texts)))
        adapted = _adapted(vlm, recipe.in_front)
        wide = [layer for layer in adapted if _factor(layer).in_features > count]
        shared = _same_inputs(vlm, wide, of_changing)
        tokens, room = (TOKENS // 4, BYTES // 8) if vlm.budget.sparing else (TOKENS, BYTES)
        for group in _groups(list(shared), tokens, room):
            changing, *staying = (_inputs(vlm, group, turns, tokens) for turns in kinds)
            for layer in group:
                kept = [inputs.pop(layer) for inputs in staying]
                few = _factor(layer).in_features > WIDE
                best = apart_in_span if few else apart
                own = best(changing.pop(layer), kept, count, ridge=ridge)
                found |= dict.fromkeys([layer, *shared[layer]], own)
    return Directions(found)


def apart(
    changing: Tensor,
    staying: Sequence[Tensor],
    count: int,
    width: int | None = None,
    ridge: float = RIDGE,
) -> Kept:
    """The `count` directions in which `changing` has the most energy against the sum of `staying`,
    each in units of its own whole energy; none where `changing` has none.

    changing, staying: second moments, or sums of x x^T, [d, d]
    width:             of the inputs, where the moments are those of a part of their space
    ridge:             added to S, in units of the mean of its diagonal

    Twice as many directions are looked for as are wanted (Halko, Martinsson and Tropp 2011); the
    better half is exact to rounding then.
    """
    d = len(changing)
    if not bool(changing.any()):
        return Kept(changing.new_zeros(d, 0), *(changing.new_zeros(0, 0) for _ in range(2)))
    change = changing.double() / changing.double().trace()
    stay = sum(
        (x.double() / x.double().trace() for x in staying if bool(x.any())),
        start=torch.zeros_like(change),
    )
    stay.diagonal().add_(ridge * max(1.0, float(stay.trace())) / (width or d))
    root = torch.linalg.cholesky(stay)
    half = torch.linalg.solve_triangular(root, change, upper=False)
    ratio = torch.linalg.solve_triangular(root, half.T, upper=False)
    most = min(count, d)
    vectors, _, _ = torch.svd_lowrank(ratio, q=min(2 * most, d), niter=SWEEPS)
    best = torch.linalg.solve_triangular(root.T, vectors[:, :most], upper=True)
    basis = torch.linalg.qr(best).Q
    # Eigenvectors span it, so the pencil may be cut down to it.
    parts = (basis, basis.T @ change @ basis, basis.T @ stay @ basis)
    return Kept(*(x.float().contiguous() for x in parts))


def apart_in_span(
    changing: Tensor, staying: Sequence[Tensor], count: int, ridge: float = RIDGE
) -> Kept:
    """`apart` for inputs [n, d] of few rows. The best directions lie in the span of all inputs,
    because outside of it nothing is to change; so the moments are those of that span."""
    given = [changing, *staying]
    span = torch.linalg.qr(torch.cat(given).double().T).Q
    inside = [x.double() @ span for x in given]
    change, *stay = (x.T @ x for x in inside)
    found = apart(change, stay, count, changing.shape[1], ridge)
    return found._replace(basis=(span @ found.basis.double()).float().contiguous())


@dataclass(frozen=True)
class _Turns:
    """Turns with the features that each shows."""

    turns: Sequence[Encoded]
    features: Sequence[Any]

    @classmethod
    def of(cls, lessons: Sequence[Corpus], facets: tuple[str, ...]) -> _Turns:
        """At most `LESSONS` of the lessons of these facets, evenly spread."""
        turns, features = [], []
        for corpus in lessons:
            members = [i for i, sample in enumerate(corpus.samples) if sample.facet in facets]
            shown, few = corpus.shown(), min(LESSONS, len(members))
            for i in (members[k * len(members) // few] for k in range(few)):
                turns.append(corpus.turns[i])
                features.append(None if (p := shown[i]) is None else p.features)
        return cls(turns, features)

    def __len__(self) -> int:
        return len(self.turns)

    def first(self) -> _Turns:
        return _Turns(self.turns[:1], self.features[:1])

    def every(self, rows: int, tokens: int) -> int:
        """Of how many tokens one is read, so that about `tokens` are in all. Shared prefixes count
        for each turn."""
        whole = sum(turn.inputs["input_ids"].shape[1] for turn in self.turns)
        return max(1, math.ceil(whole / tokens))

    def run(self, vlm: VLM, size: int) -> None:
        """The model's forwards, `size` turns at a time."""
        for at in range(0, len(self.turns), size):
            turns, shown = self.turns[at : at + size], self.features[at : at + size]
            here = {
                id(x): map_features(x, lambda t: t.to(vlm.device)) for x in shown if x is not None
            }
            prefix.supervised_states(
                vlm, turns, [None if x is None else here[id(x)] for x in shown], micro_batch=size
            )


@dataclass(frozen=True)
class _Seen:
    """Pictures, as what is in front of the language model sees them."""

    images: Sequence[Image]

    @classmethod
    def of(cls, lessons: Sequence[Corpus], facet: str) -> _Seen:
        """The pictures with pixels of a facet's lessons; of one that shows a picture by itself."""
        found: dict[int, Picture] = {}
        for corpus in lessons:
            found |= corpus.seen_in((facet,))
        return cls([picture.image for picture in found.values()])

    def __len__(self) -> int:
        return len(self.images)

    def first(self) -> _Seen:
        return _Seen(self.images[:1])

    def every(self, rows: int, tokens: int) -> int:
        """As `_Turns.every`. rows: what a layer reads of one picture"""
        return max(1, math.ceil(rows * len(self.images) / tokens))

    def run(self, vlm: VLM, size: int) -> None:
        """The forwards of tower and projector, one picture at a time."""
        for image in self.images:
            vlm.image_features(image)


def _adapted(vlm: VLM, in_front: bool) -> list[nn.Module]:
    """The adapted linear layers in front of the language model, or those of it."""
    inside = set(vlm.base.get_decoder().modules())
    every: Iterator[nn.Module] = vlm.base.modules()
    found = [x for x in every if isinstance(x, LoraLayer) and "default" in x.lora_A]
    return [layer for layer in found if (layer not in inside) is in_front]


def _factor(layer: nn.Module) -> nn.Linear:
    """The factor A, that reads the layer's input."""
    factor = layer.lora_A["default"]  # type: ignore[index]  # a ModuleDict of PEFT's
    assert isinstance(factor, nn.Linear)
    return factor


def _same_inputs(
    vlm: VLM, layers: Sequence[nn.Module], given: _Turns | _Seen
) -> dict[nn.Module, list[nn.Module]]:
    """The layers, each with those that read the very same input after it, as keys and values do
    beside queries. One turn, or one picture, tells."""
    last: list[tuple[nn.Module, Tensor]] = []
    reads_with: dict[nn.Module, nn.Module] = {}

    def heard(layer: nn.Module, x: Tensor) -> None:
        if last and last[0][1] is x:
            reads_with[layer] = last[0][0]
        else:
            last[:] = [(layer, x)]

    with _listening(layers, heard):
        given.first().run(vlm, 1)
    shared: dict[nn.Module, list[nn.Module]] = {
        layer: [] for layer in layers if layer not in reads_with
    }
    for layer, first in reads_with.items():
        shared[first].append(layer)
    return shared


def _groups(layers: Sequence[nn.Module], tokens: int, room: int) -> Iterator[list[nn.Module]]:
    """The layers in groups whose inputs, of three kinds and so many tokens each, take at most
    `room` bytes."""
    group: list[nn.Module] = []
    taken = 0
    for layer in layers:
        d = _factor(layer).in_features
        size = 3 * 4 * d * (d if d <= WIDE else tokens)
        if group and taken + size > room:
            yield group
            group, taken = [], 0
        group.append(layer)
        taken += size
    if group:
        yield group


def _inputs(
    vlm: VLM, layers: Sequence[nn.Module], given: _Turns | _Seen, tokens: int
) -> dict[nn.Module, Tensor]:
    """What the layers read of about so many tokens of what is given: the sum of x x^T, [d, d], or
    for a layer wider than `WIDE` the inputs x themselves, [n, d]. fp32."""

    def run(size: int) -> dict[nn.Module, Tensor]:
        read: dict[nn.Module, Tensor] = {}
        for layer in layers:
            factor = _factor(layer)
            d = factor.in_features
            read[layer] = torch.zeros(d if d <= WIDE else 0, d, device=factor.weight.device)

        def heard(layer: nn.Module, x: Tensor) -> None:
            rows = x.reshape(-1, x.shape[-1])
            some = rows[:: given.every(len(rows), tokens)].float()
            if some.shape[1] <= WIDE:
                read[layer].addmm_(some.T, some)
            else:
                read[layer] = torch.cat([read[layer], some])

        with _listening(layers, heard):
            given.run(vlm, size)
        return read

    return ask.fitting(vlm, run, TURNS)


@contextmanager
def _listening(
    layers: Sequence[nn.Module], heard: Callable[[nn.Module, Tensor], None]
) -> Iterator[None]:
    """Inside, `heard` gets each of the layers with what goes into it."""
    handles = [
        layer.register_forward_pre_hook(lambda layer, given: heard(layer, given[0]))
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
