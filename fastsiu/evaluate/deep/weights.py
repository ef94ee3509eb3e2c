"""Does the name or a fact come back when the adapter is weakened, or when it is folded into the
weights and these are rounded?

A rounding is simulated: the language model's linear layers get the values that the form can hold,
in their own dtype. Everything else (head, embeddings, vision tower, activations) stays as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ...model import adapter
from ...model.vlm import VLM
from ...request import BadInput
from ...text.rate import Rate
from .target import Row, Target, adapted, complete, hop_share, hops, naming_share, namings

SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)
BLOCK = 64  # weights that share a scale
# The 16 values of NF4 (arXiv 2305.14314) in a block whose largest absolute value is 1.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def run(
    loaded: VLM,
    target: Target,
    *,
    scales: Sequence[float] = SCALES,
    forms: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Rows of two shares, for each scale of the adapter and for each form: of answers that give the
    name, and of answers that give a fact away.

    scales: factors of the adapter's change
    forms:  keys of `FORMS`; None is all

    The untouched side of a form is the untouched model in the same rounding. The control is the
    rounded unlearned model with strangers. A form is null where the adapter cannot be folded.
    Afterwards the model is bit for bit as it was.

    Raises BadInput without an adapter, for an unknown form, and where the untouched model does not
    name the concept.
    """
    adapted(loaded)
    chosen = tuple(FORMS) if forms is None else tuple(forms)
    if unknown := [form for form in chosen if form not in FORMS]:
        raise BadInput(f"The form {unknown[0]!r} is unknown: choose from {', '.join(FORMS)}.")
    target = complete(loaded, target, dream=False)
    asked, about = namings(loaded, target), hops(loaded, target)
    kinds = {
        "naming": lambda shown: naming_share(loaded, target.concept, asked, shown),
        "two-hop": lambda shown: hop_share(loaded, target.concept, about, shown),
    }
    rows: list[Row] = []

    def put(setting: str, side: str, found: dict[str, Rate]) -> None:
        rows.extend(
            Row.share("weights", f"{setting}, {kind}", side, rate) for kind, rate in found.items()
        )

    look = lambda shown: {kind: share(shown) for kind, share in kinds.items()}
    with adapter.teacher(loaded):
        before = look(target.shown)
        put("adapter taken off", "unlearned", before)
        put("adapter taken off", "control", look(target.strangers))
    for scale in scales:
        with scaled(loaded, scale):
            put(f"adapter x {scale:g}", "untouched", before)
            put(f"adapter x {scale:g}", "unlearned", look(target.shown))
            put(f"adapter x {scale:g}", "control", look(target.strangers))
    for form in chosen:
        if why := why_not(loaded):
            rows += [Row.null("weights", f"merged, {form}, {kind}", why) for kind in kinds]
            continue
        with rounded(loaded, form, fold=False):
            put(f"merged, {form}", "untouched", look(target.shown))
        with rounded(loaded, form):
            put(f"merged, {form}", "unlearned", look(target.shown))
            put(f"merged, {form}", "control", look(target.strangers))
    return [row.as_dict() for row in rows]


@contextlib.contextmanager
def scaled(loaded: VLM, scale: float) -> Iterator[None]:
    """Inside, the change that the adapter makes is multiplied by `scale`."""
    layers = [m for m in loaded.base.modules() if isinstance(m, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    copies = list(_copies(loaded))
    trained = [_kept(new) for _, new in copies]
    try:
        for layer in layers:
            layer.scaling = {key: scale * value for key, value in layer.scaling.items()}
        for old, new in copies:
            new.data = old.data.to(new.dtype) + scale * (new.data - old.data.to(new.dtype))
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = scaling
        for (_, new), kept in zip(copies, trained, strict=True):
            new.data = kept.to(new.device)


def why_not(loaded: VLM) -> str:
    """Why the adapter cannot be folded into the weights and rounded; "" where it can."""
    layers = [
        (name, module)
        for name, module in loaded.base.named_modules()
        if isinstance(module, LoraLayer)
    ]
    for name, module in layers:
        if type(module.get_base_layer()) is not nn.Linear:
            return (
                f"The model's weights are quantised already ({name}), so no other rounding can be "
                "tried on them."
            )
        if module.lora_variant or any(module.lora_bias.values()):
            return f"The adapter is not plain LoRA ({name}), so it was not folded into the weights."
    return "" if layers else "The adapter is no LoRA, so it was not folded into the weights."


@contextlib.contextmanager
def rounded(loaded: VLM, form: str, fold: bool = True) -> Iterator[None]:
    """Inside, the language model's linear layers are rounded to `form`, and the adapter is off.
    With `fold` the adapter is folded into them before. The CPU's memory keeps the old weights
    meanwhile.

    Raises BadInput where the adapter cannot be folded.
    """
    if why := why_not(loaded):
        raise BadInput(why)
    changes = {
        id(m.get_base_layer().weight): _linear(m)
        for m in loaded.base.modules()
        if isinstance(m, LoraLayer)
    }
    language = {
        id(m.weight)
        for n, m in loaded.base.get_decoder().named_modules()
        if type(m) is nn.Linear and ".lora_" not in n
    }
    language.discard(id(loaded.head_weight))
    pairs = {id(old): new for old, new in _copies(loaded)} if fold else {}
    wanted = language | set(changes) | set(pairs)
    weights = [p for p in loaded.base.parameters() if id(p) in wanted]
    before = [_kept(p) for p in weights]
    try:
        with torch.no_grad():
            for p in weights:
                new = p.data.float()
                if fold and id(p) in changes:
                    new = new + changes[id(p)].get_delta_weight("default").float()
                if id(p) in pairs:
                    new = pairs[id(p)].data.float()
                p.data.copy_(FORMS[form](new) if id(p) in language else new)
        with adapter.teacher(loaded):
            yield
    finally:
        for p, kept in zip(weights, before, strict=True):
            p.data.copy_(kept)


def _linear(layer: LoraLayer) -> LoraLinear:
    """PEFT puts this class around every nn.Linear, and `why_not` lets no other layer through."""
    if not isinstance(layer, LoraLinear):
        raise TypeError(f"{type(layer).__name__} is not PEFT's LoRA of an nn.Linear")
    return layer


def _kept(p: Tensor) -> Tensor:
    """A copy in the CPU's memory."""
    return p.data.to("cpu", copy=True)


def _copies(loaded: VLM) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """(the model's own parameter, the adapter's trained copy) for every module that was trained as
    a whole: the projector, in the paper's set-up."""
    for module in loaded.base.modules():
        if isinstance(module, ModulesToSaveWrapper):
            trained = dict(module.modules_to_save["default"].named_parameters())
            for name, old in module.original_module.named_parameters():
                yield old, trained[name]


def _bf16(w: Tensor) -> Tensor:
    return w.bfloat16().float()


def _int8(w: Tensor) -> Tensor:
    """[out, in]; the scale of a row is its largest absolute value / 127."""
    scale = w.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (w / scale).round().clamp(-127, 127) * scale


def _int4(w: Tensor) -> Tensor:
    """Blocks of 64 weights, each -7 to 7 times the block's scale."""
    return _by_blocks(w, lambda unit: (7 * unit).round() / 7)


def _nf4(w: Tensor) -> Tensor:
    """Blocks of 64 weights, the nearest of `NF4` times the block's largest absolute value."""
    levels = torch.tensor(NF4, device=w.device)
    middles = (levels[1:] + levels[:-1]) / 2
    return _by_blocks(w, lambda unit: levels[torch.bucketize(unit, middles)])


def _by_blocks(w: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    blocks = nn.functional.pad(w.reshape(-1), (0, -w.numel() % BLOCK)).reshape(-1, BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return (change(blocks / scale) * scale).reshape(-1)[: w.numel()].reshape(w.shape)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "bf16": _bf16,
    "int8": _int8,
    "nf4": _nf4,
    "int4": _int4,
}
