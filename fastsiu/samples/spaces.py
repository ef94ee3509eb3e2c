"""Where dreams live: in the pixels of a picture, or in its features.

`InPixels` adds a grid of colours to the picture. So a dream is a picture, and its features lie
where those of real pictures lie: what is trained on such dreams also holds for a real picture of
the neighbour. Free features may lie anywhere, and what is trained on them may miss a real picture.
Few cells of the grid move. If all pixels were free, changes that nobody sees would deceive the
tower, as in an adversarial picture.

`InFeatures` moves the numbers that the tower hands to the projector, or those behind it. It is for
models whose processor has no `lens`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..model.adapter import projector
from ..model.faults import of_the_device
from ..model.features import READ, feature_tensors, map_features, split_features
from ..model.memory import DREAMS_SEEN
from ..model.turns import Picture
from ..model.vlm import VLM
from ..request import Recipe
from .lens import PIXELS, Lens, lens, with_grid

CELLS = 30  # on each side of the grid
FEW = 0.5  # how strongly cells are held at 0, in steps of the rate
# Bytes that the tower's graphs of a group may take beside the language model's. Larger ones are
# built again in the backward pass, which costs one more forward of the tower. It is so little that
# `plan` does not count it.
LIGHT = 2**26
EXACT = 1e-3  # how far a picture's features may change when others share its forward, relative


class Space(Protocol):
    """The dreams of one group. Each starts at a picture."""

    def shown(self, members: Sequence[int]) -> list[Any]:
        """The image features of some dreams, with a graph."""
        ...

    def pull(self, member: int) -> Tensor:
        """How far a dream is from its start: the mean square, in units of the start's spread."""
        ...

    def picture(self, member: int) -> Picture:
        """A dream as it is now, without a graph."""
        ...

    def optimiser(self, rate: float) -> torch.optim.Optimizer:
        """What moves the dreams. rate: in units of the start's spread"""
        ...


def space_of(vlm: VLM, recipe: Recipe, starts: Sequence[Picture], luck: int) -> Space:
    """The dreams that start at the given pictures: in pixels, unless the recipe or the model's
    processor says otherwise. luck: the seed of the noise in features"""
    lenses = lenses_for(vlm, starts) if recipe.dream_in == "pixels" else None
    if lenses is not None:
        return InPixels(vlm, starts, lenses)
    return InFeatures(vlm, starts, recipe.dream_noise, luck)


def lenses_for(vlm: VLM, starts: Sequence[Picture]) -> list[Lens] | None:
    """A lens for each picture; None where one has none."""
    sizes = {start.image.size: lens(vlm, start.image.size) for start in starts}
    found = [one for start in starts if (one := sizes[start.image.size]) is not None]
    return found if len(found) == len(starts) else None


class InPixels:
    """Dreams as pictures: `Space`."""

    def __init__(self, vlm: VLM, starts: Sequence[Picture], lenses: Sequence[Lens]) -> None:
        self.vlm, self.starts, self.lenses = vlm, starts, lenses
        inputs = {id(start): vlm.image_inputs(start.image) for start in starts}
        self.inputs = [inputs[id(start)] for start in starts]
        self.grids = [
            torch.zeros(3, CELLS, CELLS, device=vlm.device, requires_grad=True) for _ in starts
        ]
        # [levels], the mean of the three colours' standard deviations
        self.spreads = [
            max(1.0, float(np.asarray(start.image.convert("RGB")).reshape(-1, 3).std(0).mean()))
            for start in starts
        ]
        self.at_once = self._is_exact_at_once()
        self.light = not vlm.budget.sparing and self._graph() * len(starts) <= LIGHT

    def shown(self, members: Sequence[int]) -> list[Any]:
        most = min(DREAMS_SEEN, self.vlm.budget.dream_batch or DREAMS_SEEN)
        size = most if self.at_once else 1
        groups = [members[at : at + size] for at in range(0, len(members), size)]
        if self.light:
            return [one for group in groups for one in self._seen(group)]
        # The tower's graph of each group is built again in the backward pass. So two of them never
        # exist together, nor does one exist beside the language model's.
        return [
            one for group in groups for one in checkpoint(self._seen, group, use_reentrant=False)
        ]

    def pull(self, member: int) -> Tensor:
        return (self.grids[member] / self.spreads[member]).square().mean()

    def picture(self, member: int) -> Picture:
        return self.vlm.picture(with_grid(self.starts[member].image, self.grids[member].detach()))

    def optimiser(self, rate: float) -> torch.optim.Optimizer:
        return FewCells(
            [
                {"params": [grid], "lr": rate * spread}
                for grid, spread in zip(self.grids, self.spreads, strict=True)
            ]
        )

    def _seen(self, members: Sequence[int]) -> list[Any]:
        """The features of some dreams, in one forward of the tower."""
        inputs = []
        for i in members:
            pixels = self.lenses[i].added(self.inputs[i][PIXELS], self.grids[i])
            inputs.append({**self.inputs[i], PIXELS: pixels})
        if len(members) == 1:
            return [self.vlm.seen(inputs[0])]
        joined = {
            key: torch.cat([one[key] for one in inputs]) if isinstance(value, Tensor) else value
            for key, value in inputs[0].items()
        }
        return split_features(self.vlm.seen(joined), [self.starts[i].features for i in members])

    def _graph(self) -> int:
        """Bytes of the tower's graph of one dream: what it saves for the backward pass."""
        weights = {p.untyped_storage().data_ptr() for p in self.vlm.base.parameters()}
        saved: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            self._seen([0])
        return sum(size for place, size in saved.items() if place not in weights)

    @torch.no_grad()
    def _is_exact_at_once(self) -> bool:
        """Whether the pictures may go through the tower together: all have inputs of one shape, and
        two of them together get the features that each gets alone."""
        shapes = {
            tuple((key, x.shape) for key, x in one.items() if isinstance(x, Tensor))
            for one in self.inputs
        }
        if len(shapes) > 1 or len(self.inputs) < 2:
            return False
        try:
            together = self._seen([0, len(self.inputs) - 1])
        except Exception as error:  # any: the model's code says so in its own way
            if of_the_device(error):
                raise
            return False  # the family takes one picture a turn, so each is shown alone
        for features, start in zip(together, (self.starts[0], self.starts[-1]), strict=True):
            for one, own in zip(*map(_read, (features, start.features)), strict=True):
                near = EXACT * float(own.abs().max())
                if one.shape != own.shape or not torch.allclose(one, own, rtol=0, atol=near):
                    return False
        return True


def _read(features: Any) -> list[Tensor]:
    """All tensors of a picture's features that a language model reads."""
    found = tree_leaves([features.get(key) for key in READ])
    return [x for x in found if isinstance(x, Tensor)]


class FewCells(torch.optim.Optimizer):
    """Adam with one second moment for a whole grid, and a pull that leaves most cells at 0.

        m = .9 m + .1 g          v = .99 v + .01 mean(g^2)          (each without its bias)
        x = x - rate * m / sqrt(v)
        x_c = x_c * max(0, 1 - rate * FEW / |x_c|)                  for each cell c, of 3 colours

    Adam itself has a second moment for each number. It moves what matters and what does not at the
    same rate, so the whole dream becomes noise. The last line is the proximal step of the group
    lasso (Yuan and Lin 2006). The cells that are left tell the neighbour from the start.
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no loss to give back
        for group in self.param_groups:
            rate = group["lr"]
            for x in group["params"]:
                if x.grad is None:  # a dream that is done does not move
                    continue
                state = self.state[x]
                t = state["t"] = state.get("t", 0) + 1
                m = state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * x.grad
                v = state["v"] = 0.99 * state.get("v", 0.0) + 0.01 * x.grad.square().mean()
                x -= rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-12)
                far = x.norm(dim=0, keepdim=True).clamp_min(1e-12)  # [1, CELLS, CELLS]
                x *= (1 - rate * FEW / far).clamp_min(0)


class InFeatures:
    """Dreams as features: `Space`."""

    def __init__(self, vlm: VLM, starts: Sequence[Picture], noise: float, luck: int) -> None:
        self.starts = starts
        ways = {id(start): vision_space(vlm, start) for start in starts}
        self.first, self.project = zip(*(ways[id(start)] for start in starts), strict=True)
        self.spread = (
            self.first[0].reshape(-1, self.first[0].shape[-1]).std(0).clamp_min(1e-6)
        )  # [channels]
        generator = torch.Generator(device="cpu").manual_seed(luck)
        scale = noise * self.spread
        self.free = [
            (f + scale * torch.randn(f.shape, generator=generator).to(f)).requires_grad_()
            for f in self.first
        ]

    def shown(self, members: Sequence[int]) -> list[Any]:
        return [self.project[i](self.free[i]) for i in members]

    def pull(self, member: int) -> Tensor:
        return ((self.free[member] - self.first[member]) / self.spread).square().mean()

    @torch.no_grad()
    def picture(self, member: int) -> Picture:
        seen = self.project[member](self.free[member])
        return Picture(self.starts[member].image, seen, real=False)

    def optimiser(self, rate: float) -> torch.optim.Optimizer:
        # In units of the channels' spread over the patches, so that one number suits every
        # projector.
        return torch.optim.Adam(self.free, lr=rate * float(self.spread.mean()))


def vision_space(vlm: VLM, start: Picture) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Where to dream: the start picture's features there, and a function from such features to what
    the language model takes.

    The place is in front of the projector where the model has one of a known name. The reason: a
    projector's output lies close to a surface, and free vectors would leave that surface. The place
    is behind the projector where its name is unknown, and where the model puts rows of its own
    between the projector's, such as those that end a line of tiles.
    """
    there = torch.cat([x.reshape(-1, x.shape[-1]) for x in feature_tensors(start.features)])
    behind = there.float(), lambda x: replaced(start, x)
    name = projector(vlm.base)
    if name is None:
        return behind
    module = vlm.base.get_submodule(name)
    calls: list[tuple[Any, dict[str, Any]]] = []
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        vlm.picture(start.image)
    finally:
        hook.remove()
    # No call at all where the projector runs inside the language model's forward.
    if len(calls) != 1:
        return behind
    args, kwargs = calls[0]
    if not (args and isinstance(args[0], Tensor) and args[0].is_floating_point()):
        return behind
    with torch.no_grad():
        out = module(*args, **kwargs)
    if not isinstance(out, Tensor) or out.numel() != there.numel():
        return behind
    allowed = 1e-2 * float(there.abs().max())
    if not torch.allclose(out.reshape(there.shape), there, rtol=1e-2, atol=allowed):
        return behind
    front: Tensor = args[0]
    return front.float(), lambda x: replaced(start, module(x.to(front.dtype), *args[1:], **kwargs))


def replaced(start: Picture, flat: Tensor) -> Any:
    """The start picture's features, in their own shapes, with the numbers of `flat`, the
    projector's output."""
    rest = flat.reshape(-1, flat.shape[-1])

    def change(x: Tensor) -> Tensor:
        nonlocal rest
        rows = x.numel() // x.shape[-1]
        piece, rest = rest[:rows], rest[rows:]
        return piece.reshape(x.shape).to(x.dtype)

    return map_features(start.features, change)
