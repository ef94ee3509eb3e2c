"""Any image-text model of transformers: loaded, asked for hidden states without logits, its image
features taken once.

Nothing here knows a model family. Text goes through the processor and the chat template (`turns`).
Image features come from the model's own `get_image_features`, and enter by a keyword of its forward
(`features`). What the model does between its head and the logits is measured (`logits`).
docs/adding-a-family.md says what a model has to offer, in the order in which it is checked.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..loss.rows import no_logits
from ..request import BadInput
from . import placement, source
from .cache import as_keyword, cache_of
from .faults import first_line, told_as_the_models_fault
from .features import READ, crossed, features_entry, join_features, read_key
from .generation import set_aside
from .logits import probe_head
from .reading import check_finite, progress_bars, read
from .turns import Encoded, Picture, Turns, collate, per_token

SMALL = 20_000_000  # parameters


@dataclass(frozen=True)
class Budget:
    """How much is done at once. No field changes a result by more than rounding, except
    `optimizer`, which changes it a little.

    micro_batch:   samples in one forward of a step; None: all at once
    dream_batch:   dreams in one forward; None: all at once
    ask_batch:     questions in one forward that trains nothing
    checkpointing: layers keep their inputs only and are computed again in the backward pass
    optimizer:     "adamw", "adamw8bit" or "paged_adamw8bit"
    sparing:       prefixes are shared in the way that takes the least memory, also where another
                   way takes less time
    """

    micro_batch: int | None = None
    dream_batch: int | None = None
    ask_batch: int = 64
    checkpointing: bool = False
    optimizer: str = "adamw"
    sparing: bool = False


@dataclass
class VLM(Turns):
    """A loaded model.

    name:      hub id or directory
    revision:  the commit that a hub model was loaded from, whatever branch or tag was asked for;
               None for a directory
    model:     what gets called: a PEFT wrapper once an adapter is attached
    base:      what was loaded
    shares:    the ways of sharing a prefix that are exact on this model; `sharing.plan_sharing`
               fills it
    decodes:   by whether a prompt has a picture: why answers may not grow on a shared prefix, ""
               where they may; `decode.why_not` fills it
    aside:     settings of the model's generation_config that no answer follows
    placed:    where its layers lie, for a model over several devices; None for one device
    offload:   the directory of the layers that wait on the disk, as long as the model is there
    """

    name: str
    revision: str | None
    model: Any
    base: Any
    processor: Any
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    shares: tuple[str, ...] = ()
    decodes: dict[bool, str] = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)
    aside: tuple[str, ...] = ()
    placed: placement.Placement | None = None
    offload: TemporaryDirectory[str] | None = field(default=None, repr=False)

    @functools.cached_property
    def entry(self) -> str:
        """The keyword of the model's forward that takes image features. Raises BadInput where it
        has none."""
        return features_entry(self.base)

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    @property
    def devices(self) -> list[torch.device]:
        """All devices of its weights, the head's first."""
        all_of_them = (p.device for p in self.base.parameters() if not p.is_meta)
        return list(dict.fromkeys([self.device, *all_of_them]))

    @property
    def head_weight(self) -> Tensor:
        """[V, D], the output embedding."""
        return self.base.get_output_embeddings().weight

    @property
    def head_bias(self) -> Tensor | None:
        return self.base.get_output_embeddings().bias

    @property
    def head_options(self) -> dict[str, Any]:
        """The head as the loss has to know it: keywords of `fused_dmk_ce` and
        `TeacherCache.from_hidden`."""
        return {
            "head_bias": self.head_bias,
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
        }

    def image_features(self, image: Image.Image) -> Any:
        """One image after the vision tower and the projector, reduced to what the language model
        reads.

        Records a graph where the projector trains; wrap in `torch.no_grad()` otherwise.

        Raises BadInput where the processor or the model's `get_image_features` does not do what
        transformers' own do.
        """
        return self.seen(self.image_inputs(image))

    def image_inputs(self, image: Image.Image) -> dict[str, Any]:
        """What the model's processor makes of one image, on the model's device: "pixel_values" in
        the model's dtype and whatever else its family wants. Raises BadInput where it fails."""
        text = self.render(".", True)
        try:
            tensors = self.processor(
                text=[text], images=[image], return_tensors="pt", add_special_tokens=False
            )
        except Exception as error:  # any: its settings are a stranger's
            raise BadInput(
                "The model's processor does not take its chat template's text with a picture "
                f"({first_line(error)}): restore its settings, or save a template that marks "
                "where the picture is."
            ) from error
        dtype = next(self.base.parameters()).dtype
        return {
            k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in tensors.to(self.device).items()  # outside of `try`: the device may fail
        }

    def seen(self, inputs: dict[str, Any]) -> Any:
        """What the language model reads of one image, given its `image_inputs`. Raises BadInput
        where the model's `get_image_features` does not do what transformers' own do."""
        if self.entry == "cross_attention_states":
            return BaseModelOutputWithPooling(pooler_output=crossed(self.base, inputs))
        encoder = self.base.base_model.get_image_features
        taken = {k: inputs[k] for k in inspect.signature(encoder).parameters if k in inputs}
        features = encoder(**taken, return_dict=True)
        if not isinstance(features, dict):
            raise BadInput(
                f"The model's get_image_features gives a {type(features).__name__}: it would "
                f"need to give an output with one of {', '.join(READ)}."
            )
        unread = {"hidden_states", "attentions"}  # some families keep those of every vision layer
        if read_key(features) == "pooler_output":
            unread.add("last_hidden_state")
        for key in unread & set(features):
            features[key] = None
        return features

    def picture(self, image: Image.Image) -> Picture:
        with torch.no_grad():
            return Picture(image, self.image_features(image))

    def hidden(self, batch: Sequence[dict[str, Tensor]], features: Sequence[Any] = ()) -> Tensor:
        """The states that feed the head, [B, T, D], of whole turns, right-padded.

        batch:    inputs of turns
        features: one entry for each turn with a picture, in the order of the turns
        """
        return self.run(collate(batch, self.tokenizer.pad_token_id), features, use_cache=False)[0]

    def run(
        self, inputs: dict[str, Any], features: Sequence[Any] = (), **options: Any
    ) -> tuple[Tensor, Any]:
        """(the states that feed the head, [B, T, D], the model's output); no logits exist.

        inputs:   as the model's forward takes them, but for the image features
        features: one entry for each row with a picture, in the order of the rows
        options:  further keywords of the model's forward
        """
        inputs = {**inputs, **self.entering(features)}
        with no_logits(self.base) as kept:
            output = self.model(**inputs, **options)
        return kept["hidden"], output

    def entering(self, features: Sequence[Any]) -> dict[str, Any]:
        """The image features of a batch's turns as a keyword of the model's forward."""
        if not features:
            return {}
        joined = join_features(features)
        whole = self.entry == "mm_encoder_outputs"
        return {self.entry: {"image": joined} if whole else joined["pooler_output"]}

    def prompts(self, inputs: dict[str, Any], features: Sequence[Any]) -> dict[str, Any]:
        """The inputs of a batch of prompts for `generate`."""
        if not features or self.entry == "mm_encoder_outputs":
            return {**inputs, **self.entering(features)}
        # Layers that look across cache what they are given, and `generate` would give it to them
        # again with every token: all but the last token of the prompt go first.
        begun = {k: v[:, :-1] if per_token(inputs, k) else v for k, v in inputs.items()}
        _, output = self.run(begun, features, use_cache=True)
        return {**inputs, **as_keyword(cache_of(output))}

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> [n, V] fp32 logits, for a handful of rows."""
        x = hidden.float() @ self.head_weight.float().T
        return self.transformed(x if self.head_bias is None else x + self.head_bias.float())

    def transformed(self, x: Tensor) -> Tensor:
        """The head's product as logits: scale and softcap, as in the model's own forward."""
        x, cap = self.logit_scale * x, self.logit_softcap
        return x if cap is None else cap * torch.tanh(x / cap)


def encoder(vlm: VLM) -> Callable[..., Encoded]:
    """`vlm.encode`, which encodes the same words about pictures of one size once. They are one
    object then, and `parts` makes use of that."""
    known: dict[tuple[Any, ...], Encoded] = {}

    def encode(question: str, answer: str, picture: Picture | None, closed: bool = True) -> Encoded:
        key = (question, answer, closed, None if picture is None else picture.image.size)
        if key not in known:
            known[key] = vlm.encode(question, answer, picture, closed)
        return known[key]

    return encode


def load(
    name: str,
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
    attention: str | None = None,
    budget: Budget | None = None,
    bars: bool = False,
    room: Mapping[str, int] | None = None,
) -> VLM:
    """Loads a hub id or a directory, weight by weight, straight to its device. Code that comes with
    a model is never run.

    device:    "auto": over all accelerators (`placement`); the one device where there is one only
    dtype:     "auto": as stored on an accelerator, fp32 on a CPU
    quantize:  "nf4" or "int8": the language model's linear layers; all else (head, embeddings,
               vision tower) stays in `dtype`
    attention: "sdpa", "flash_attention_2" or "eager"; the model's own choice when left out
    bars:      transformers may draw its progress on stderr: bytes of a download, weights loaded
    room:      bytes for weights on each device, for "auto"; what is free there when left out

    Raises BadInput for:
    - a missing directory, and a directory without model or processor
    - a model that takes no pictures or no image features
    - a model whose forward fails on plain text or on a picture
    - options that cannot be honoured here

    Raises NumericFailure for a weight that is not finite.
    """
    source.check_directory(name)
    source.check_options(dtype, quantize, attention, budget.optimizer if budget else "adamw")
    if device == placement.AUTO and room is None:
        device, _ = placement.settled(device)
        room = placement.room() if device == placement.AUTO else None
    spread = room if device == placement.AUTO else None
    device = next(iter(spread)) if spread else device
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    place = source.check_device(device)
    budget = budget or Budget()
    source.check_packages(place.type, dtype, quantize, attention, budget.optimizer)
    for package in ("transformers", "bitsandbytes"):
        logging.getLogger(package).setLevel(logging.ERROR)
    with progress_bars(bars):
        files = read(name, revision, place, dtype, quantize, attention, spread)
    base, processor, revision = files.base, files.processor, files.revision
    base.eval()
    for module in base.modules():
        # bitsandbytes on a CPU with AVX512-BF16: the first forward of such a layer in eval mode
        # would put its weight into a layout for inference. No gradient reaches the layers before
        # it through that layout, and nothing says so.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    features_entry(base)
    if budget.checkpointing:
        checkpoint_layers(base)
    base.requires_grad_(False)
    check_finite(base, name)
    vlm = VLM(name, revision, base, base, processor, budget=budget)
    vlm.placed, vlm.offload = files.placed, files.offload
    vlm.aside = set_aside(base, vlm.tokenizer.eos_token_id)
    if vlm.tokenizer.pad_token_id is None:
        vlm.tokenizer.pad_token = vlm.tokenizer.eos_token
    # A model that cannot encode a turn is refused before anything else.
    vlm.encode("Who is this?", "Nobody.", None)
    vlm.logit_scale, vlm.logit_softcap = probe_head(base, vlm.encode_prompt("Who is this?", None))
    try_picture(vlm)
    return vlm


@torch.no_grad()
def try_picture(vlm: VLM) -> None:
    """Shows the model a grey picture. Raises BadInput where its tower or its forward fails because
    its files contradict each other, such as another number of image tokens in the processor's
    settings."""
    with told_as_the_models_fault(vlm.base, "with a"):
        picture = vlm.picture(Image.new("RGB", (224, 224), (127, 127, 127)))
        vlm.run(vlm.encode_prompt("Who is this?", picture), [picture.features], use_cache=False)


@contextlib.contextmanager
def threads(vlm: VLM) -> Iterator[None]:
    """Inside, a model of fewer than `SMALL` parameters computes on one thread of a CPU.

    A second thread gains it little. Where other processes want the cores, OpenMP's threads wait for
    each other: the embedded model's demo then took more than 7 minutes instead of 1.
    """
    before = torch.get_num_threads()
    if vlm.device.type == "cpu" and sum(p.numel() for p in vlm.base.parameters()) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def checkpoint_layers(base: Any) -> None:
    """From now on layers in training mode keep their inputs only and are computed again in the
    backward pass. Raises BadInput where the model has no such mode."""
    if not base.supports_gradient_checkpointing:
        raise BadInput(
            f"{type(base).__name__} has no activation checkpointing: train with a smaller micro "
            "batch instead."
        )
    base.activation_checkpointing_enable()
