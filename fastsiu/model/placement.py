"""One model over several devices: which module goes where.

The language model's layers are dealt to the devices in their order. All else (embeddings, vision
tower, projector, norm, head) stays on the first device. So hidden states, head, teacher and loss
are in one place, and a picture's features enter the model where they were made. accelerate moves
the states from one layer's device to the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from ..request import BadInput

AUTO = "auto"
FREE = 0.9  # share of a device's free memory that weights may take where nobody set a limit
OUTSIDE = ("cpu", "disk")  # where layers wait that fit onto no accelerator, in this order


@dataclass(frozen=True)
class Placement:
    """where:   module or parameter -> device, as transformers takes it (`device_map`)
    layers:  the device of each of the language model's layers
    weights: bytes of the weights on each device
    """

    where: dict[str, str]
    layers: tuple[str, ...]
    weights: dict[str, int]

    @property
    def first(self) -> str:
        """The device of all that is no layer."""
        return next(iter(self.weights))

    @property
    def waiting(self) -> dict[str, int]:
        """How many layers are not on a device of their own, by where they wait."""
        away = [place for place in self.layers if place in OUTSIDE and place != self.first]
        return {place: away.count(place) for place in dict.fromkeys(away)}

    @property
    def sentence(self) -> str:
        runs, at = [], 0
        for device, group in groupby(self.layers):
            count = len(list(group))
            runs.append(
                (device, f"layer {at}" if count == 1 else f"layers {at} to {at + count - 1}")
            )
            at += count
        words = []
        for device, size in self.weights.items():
            own = [text for place, text in runs if place == device]
            if device == self.first:
                own = ["embeddings, vision tower, head", *own]
            words.append(f"{device}: {', '.join(own)} ({size / 2**30:.2f} GB)")
        return f"The model lies on {len(words)} devices: {'; '.join(words)}."

    def as_dict(self) -> dict[str, Any]:
        return {"layers": list(self.layers), "weights": self.weights}


def accelerators() -> list[str]:
    """The names of all accelerators that torch sees."""
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return [f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())]


def settled(device: str | None) -> tuple[str | None, str]:
    """(the device, a sentence that may be empty): "auto" is the one device where there is one."""
    if device != AUTO:
        return device, ""
    here = accelerators()
    if len(here) > 1:
        return AUTO, ""
    only = here[0] if here else "cpu"
    return only, f"--device auto: only one device is here, so the model goes to {only}."


def room(limit: int | None = None) -> dict[str, int]:
    """Bytes that weights may take on each accelerator, and in memory beside them.

    limit: bytes of each accelerator; what is free on it when left out
    """
    from accelerate.utils import get_max_memory  # comes with peft

    free = get_max_memory()  # by number, and "cpu"
    here = {device: free[i] if limit is None else limit for i, device in enumerate(accelerators())}
    return {device: round(FREE * size) for device, size in (here | {"cpu": free["cpu"]}).items()}


def stack(base: Any) -> tuple[nn.Module, str, nn.ModuleList]:
    """The language model's layers, its longest list of modules: (owner, attribute, layers). Raises
    BadInput where it has no list."""
    decoder = base.get_decoder()
    lists = [
        (owner, name, child)
        for owner in decoder.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList) and len(child)
    ]
    if not lists:
        raise BadInput(
            f"{type(base).__name__} keeps no list of layers, so its memory cannot be estimated: "
            "give another model."
        )
    return max(lists, key=lambda owned: len(owned[2]))


def quantised_bytes(shape: torch.Size, kind: str) -> int:
    """Bytes of a weight [out, in].

    nf4:  4 bits, a scale in 8 bits for each 64, an fp32 scale for each 256 of those, two code
          tables
    int8: 8 bits, and an fp32 scale for each row
    """
    n = math.prod(shape)
    if kind == "int8":
        return n + 4 * shape[0]
    scales = math.ceil(n / 64)
    return math.ceil(n / 2) + scales + 4 * math.ceil(scales / 256) + 4 * (16 + 256 + 1)


def place(base: Any, given: Mapping[str, int], quantize: str | None = None) -> Placement:
    """Deals the layers of a model, also one on the meta device, over the devices of `given` (bytes
    for weights on each, the first device first) in proportion to their room. What fits onto none
    waits on the disk.

    Raises BadInput where what is no layer does not fit onto the first device.
    """
    _, _, layers = stack(base)
    names = {id(module): name for name, module in base.named_modules()}
    sizes = [_bytes(layer, quantize) for layer in layers]
    first, rest = (
        next(iter(given)),
        _bytes(base, None) - sum(_bytes(layer, None) for layer in layers),
    )
    if rest > given[first]:
        raise BadInput(
            f"What is no layer of the model takes {rest / 2**30:.2f} GB and {first} has room for "
            f"{given[first] / 2**30:.2f}: use a larger card, or --device cpu."
        )
    own = {device: given[device] for device in given if device == first or device not in OUTSIDE}
    left = own | {first: own[first] - rest}
    fair = (sum(sizes) + rest) / max(1, sum(own.values()))
    wanted = {d: max(0.0, size * fair - (rest if d == first else 0)) for d, size in own.items()}
    dealt = _deal(sizes, left, wanted) or _deal(sizes, left, left)
    if dealt is None:
        waits = {d: given[d] for d in given if d not in own} | {"disk": sum(sizes)}
        dealt = _deal(sizes, left | waits, left | waits)
    assert dealt is not None, "the disk takes all"
    devices = [first, *(d for d in dict.fromkeys(dealt) if d != first)]
    weights = {
        d: sum(size for size, place in zip(sizes, dealt, strict=True) if place == d)
        + (rest if d == first else 0)
        for d in devices
    }
    inside = {names[id(layer)]: device for layer, device in zip(layers, dealt, strict=True)}
    return Placement(_map(base, inside, first), tuple(dealt), weights)


def _deal(
    sizes: list[int], most: Mapping[str, float], wanted: Mapping[str, float]
) -> list[str] | None:
    """The device of each layer, in order: the next device begins where half a layer more would be
    beyond what is wanted of one. None where something then does not fit."""
    dealt: list[str] = []
    devices, used = list(most), 0.0
    for size in sizes:
        while devices and (
            used + size > most[devices[0]]
            or (len(devices) > 1 and used + size / 2 > wanted[devices[0]])
        ):
            devices, used = devices[1:], 0.0
        if not devices:
            return None
        dealt.append(devices[0])
        used += size
    return dealt


def _bytes(module: nn.Module, quantize: str | None) -> int:
    """Bytes of all parameters, each counted once. quantize: how linear layers are stored"""
    packed = (
        {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)} if quantize else set()
    )
    return sum(
        quantised_bytes(p.shape, quantize)
        if quantize and id(p) in packed
        else p.numel() * p.element_size()
        for p in {id(p): p for p in module.parameters()}.values()
    )


def _map(base: nn.Module, inside: Mapping[str, str], first: str) -> dict[str, str]:
    """The largest modules without a layer in them go to the first device, each under its name."""
    where: dict[str, str] = {}

    def visit(module: nn.Module, name: str) -> None:
        if name in inside:
            where[name] = inside[name]
        elif not any(layer.startswith(f"{name}." if name else "") for layer in inside):
            where[name] = first
        else:
            for key, _ in (
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ):
                where[f"{name}.{key}".lstrip(".")] = first
            for key, child in module.named_children():
                visit(child, f"{name}.{key}".lstrip("."))

    visit(base, "")
    return where


def check_trains(placed: Placement | None) -> None:
    """Raises BadInput for a model some of whose layers wait off the accelerators: accelerate brings
    their weights for the forward pass only."""
    if placed is not None and placed.waiting:
        raise BadInput(
            f"Some layers fit onto no card ({_waiting(placed)}), and nothing trains through "
            "those: use --quantize nf4, larger cards, or --device cpu."
        )


def check_adapts(placed: Placement | None) -> None:
    """Raises BadInput for a model some of whose layers wait off the accelerators: an adapter would
    have no device."""
    if placed is not None and placed.waiting:
        raise BadInput(
            f"Some layers fit onto no card ({_waiting(placed)}), and no adapter can be put onto "
            "those: use larger cards, or merge the adapter with --device cpu and give the merged "
            "model."
        )


def _waiting(placed: Placement) -> str:
    named = {"cpu": "in the CPU's memory", "disk": "on the disk"}
    return " and ".join(f"{count} {named[place]}" for place, count in placed.waiting.items())
