"""What a run takes: the peak of memory, worked out from the model's configuration alone. No weight
is read or fetched.

The model is built without storage, with the adapter that a run would attach. One optimisation step
then runs on fake tensors, whose operations only work out shapes, under a tracker of the storages
that would be alive. Of a stack of equal layers as many are run as it takes until each further one
adds the same; the rest is multiplication.

What no fake tensor shows is added by formula: the tiles inside the loss, the pictures' features and
the teacher's statistics, and on a GPU what the driver and the allocator keep for themselves
(`OVERHEAD`, an assumption).
"""

from __future__ import annotations

import logging
import math
import weakref
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..kernels.launch import launch
from ..loss.fused import fused_dmk_ce
from ..loss.rows import no_logits
from ..loss.teacher import TeacherCache, stamp
from ..request import BadInput, Recipe
from . import adapter, source, vlm
from .prefix import WORTH

GB = 2**30
# Context, loaded kernels, cuBLAS workspace and the allocator's fragments on an NVIDIA card.
# Assumed, not measured.
OVERHEAD = 0.7 * GB
# Lessons from strangers (`samples.strangers`) wait on the CPU with their teacher's statistics. On
# the device are those of one batch, with its pictures; forward and backward take what a batch of
# samples takes.
PICTURES_OF_A_BATCH = 12


@dataclass(frozen=True)
class Settings:
    """What decides over memory.

    micro_batch: samples in one forward of a step; None: all of `batch_size` at once, nothing
    computed twice
    ask_batch:   questions in one forward that trains nothing
    """

    dtype: str = "bfloat16"
    quantize: str | None = None
    checkpointing: bool = False
    micro_batch: int | None = None
    ask_batch: int = 64
    optimizer: str = "adamw"
    attention: str | None = None
    device: str = "cuda"

    @property
    def sparing(self) -> bool:
        """Whether memory goes before time."""
        return self.checkpointing or self.micro_batch is not None

    def __str__(self) -> str:
        words = [self.quantize or self.dtype, *["activation checkpointing"] * self.checkpointing]
        words += [f"micro-batch {self.micro_batch}"] * (self.micro_batch is not None)
        words += [self.optimizer] * (self.optimizer != "adamw") + [str(self.attention)] * (
            self.attention not in (None, "sdpa")
        )
        return ", ".join(words)


def budget(settings: Settings, batch_size: int, limited: bool = False) -> vlm.Budget:
    """The settings as the run reads them. A dream is a picture with one question, of which a step
    has a third of its samples.

    limited: under a memory limit, where as many dreams at once as a step has must do
    """
    bounded = settings.sparing or limited
    dreams = settings.micro_batch or (max(1, round(0.35 * batch_size)) if bounded else None)
    return vlm.Budget(
        settings.micro_batch,
        dreams,
        settings.ask_batch,
        settings.checkpointing,
        settings.optimizer,
        bounded,
    )


@dataclass(frozen=True)
class Workload:
    """What a run consists of, in tokens.

    prefix:   a picture's and what stands before its question, computed once for all questions about
    it
    patches:  what the vision tower sees of the picture
    suffix:   a question and its answer, of which `rows` are supervised
    text:     a sample without a picture
    answer:   the longest that is generated
    pictures: distinct ones in the whole run, the concept's and the dreams; samples: in the whole
    run
    """

    prefix: int
    patches: int
    suffix: int = 64
    rows: int = 40
    text: int = 80
    answer: int = 64
    pictures: int = 17
    samples: int = 120

    def forwards(self, settings: Settings, batch_size: int) -> list[tuple[int, int, int]]:
        """(sequences, tokens of each, supervised rows in all) of the forwards of one step whose
        graphs are alive at once.

        The shares are those of `train.SHARES`: of 100 samples 25 show the concept's picture, 35
        others', each its own. They are
        put together as `prefix` does: questions of one picture in a row, rows of like length in a
        forward, plain rows where that saves too little time or a mask cannot keep suffixes apart.
        Under a micro-batch one forward is alive, the largest.
        """
        most = settings.micro_batch or batch_size
        dreams, own = round(0.35 * batch_size), math.ceil(0.25 * batch_size)
        text = batch_size - dreams - own
        packed: list[list[int]] = []  # questions in each row of each forward
        for questions in [min(most, own - at) for at in range(0, own, most)] + [1] * dreams:
            alike = (
                packed
                and self._row(questions) >= 0.8 * self._row(packed[-1][0])
                and sum(packed[-1]) + questions <= most
            )
            packed[-1].append(questions) if alike else packed.append([questions])
        found = [(len(rows), self._row(rows[0]), sum(rows) * self.rows) for rows in packed]
        plain = [
            (min(most, own + dreams - at), self._row(1), min(most, own + dreams - at) * self.rows)
            for at in range(0, own + dreams, most)
        ]
        tokens = lambda forwards: sum(n * length for n, length, _ in forwards)
        worth = settings.sparing or tokens(found) <= WORTH * tokens(plain)
        if settings.attention == "flash_attention_2" or not worth:
            found = plain
        found += [(min(most, text), self.text, min(most, text) * self.rows)] * (text > 0)
        return found if settings.micro_batch is None else [max(found, key=lambda f: f[0] * f[1])]

    def _row(self, questions: int) -> int:
        return self.prefix + questions * self.suffix


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a run under `settings`.

    trained, gradient, optimizer: the adapter, its gradient and what the optimiser remembers of it
    activations: what a step needs beside the rest: saved for the backward pass, in passing, and the
    loss's tiles
    kept:        the pictures' features and the teacher's statistics
    overhead:    of the driver and the allocator
    asking, loading, vision: what those phases need beside weights and overhead
    """

    settings: Settings
    weights: int
    trained: int
    gradient: int
    optimizer: int
    activations: int
    kept: int
    overhead: int
    asking: int
    loading: int
    vision: int

    @property
    def training(self) -> int:
        return (
            self.weights
            + self.trained
            + self.gradient
            + self.optimizer
            + self.activations
            + self.kept
            + self.overhead
        )

    @property
    def peak(self) -> int:
        learned = self.trained + self.gradient + self.optimizer + self.kept
        return max(
            self.training,
            self.weights + self.overhead + max(learned + self.asking, self.loading, self.vision),
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"training": self.training, "peak": self.peak}


# --------------------------------------------------------------------------------------------------
# the simulation


class Tracker(TorchDispatchMode):
    """Counts the bytes of the storages that operations make and that are still alive: `now` and
    `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, Tensor):
                self.add(x)
        return made

    def add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def hold(self, model: nn.Module) -> int:
        """Counts what is there already, so that a view of a weight is nothing new; returns
        `now`."""
        for x in (*model.parameters(), *model.buffers()):
            self.add(x)
        return self.now

    def passing(self, size: int) -> None:
        """Something of `size` bytes that comes and goes inside an operation."""
        self.peak = max(self.peak, self.now + size)

    def _drop(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


@dataclass
class Simulation:
    """One model's configuration, its steps run on fake tensors; what was run once is not run again.

    whole: run all layers in earnest
    """

    config: Any
    recipe: Recipe
    work: Workload
    whole: bool = False
    _done: dict[tuple[str, Any], Any] = field(default_factory=dict)

    def estimate(self, settings: Settings) -> Estimate:
        weights, trained = self.resting(settings)
        itemsize = source.DTYPES[settings.dtype].itemsize
        width = self.config.get_text_config().hidden_size
        pictures, samples = self.work.pictures, self.work.samples
        if self.recipe.strangers:
            pictures += PICTURES_OF_A_BATCH
            samples += self.recipe.batch_size
        rows = samples * self.work.rows
        kept = pictures * self.work.prefix * width * itemsize
        # teacher: hidden, m in fp32, the 16 top entries
        kept += rows * (width * (itemsize + 4) + 16 * 16)
        # 8-bit states have an fp32 scale for each 256 numbers.
        states = (
            2 * trained if settings.optimizer == "adamw" else 2 * trained * (256 + 4) // (256 * 4)
        )
        return Estimate(
            settings,
            weights,
            trained,
            trained,
            states,
            self._run("step", replace(settings, ask_batch=0)),
            kept,
            int(OVERHEAD) if settings.device != "cpu" else 0,
            self._run("asking", replace(settings, micro_batch=None, optimizer="adamw")),
            largest_weight(self.config) * itemsize,
            self._vision(itemsize),
        )

    def within(self, settings: Settings, limit: int | None) -> Estimate:
        """The estimate with as many questions asked at once as fit into `limit` beside the weights
        and the adapter."""
        found = self.estimate(settings)
        while (
            limit is not None
            and found.peak > max(limit, found.training)
            and found.settings.ask_batch > 1
        ):
            fewer, room = found.settings.ask_batch // 2, limit - (found.peak - found.asking)
            while fewer > 1 and found.asking * fewer / found.settings.ask_batch > room:
                fewer //= 2
            found = self.estimate(replace(found.settings, ask_batch=fewer))
        return found

    def resting(self, settings: Settings) -> tuple[int, int]:
        """Bytes of the frozen weights and of the adapter."""
        return self._stand_in(settings)[1]

    def _stand_in(self, settings: Settings) -> tuple[Any, tuple[int, int]]:
        """The model on fake storage, and the bytes of its frozen weights and of the adapter."""
        same = (settings.dtype, settings.quantize, settings.checkpointing, settings.attention)
        if ("model", same) not in self._done:
            base = skeleton(self.config, settings, self.recipe)
            materialise(base)
            self._done["model", same] = base, at_rest(base)
        return self._done["model", same]

    def _run(self, what: str, settings: Settings) -> int:
        if (what, settings) not in self._done:
            try:
                self._done[what, settings] = self._measure(what, settings)
            except (
                Exception
            ) as error:  # any: whatever a family's forward thinks of tensors without values
                said = source.first_line(error)
                raise BadInput(
                    f"What {type(self.config).__name__} takes cannot be worked out ({said}): "
                    "leave --memory out and "
                    "choose --quantize, --checkpointing and --micro-batch."
                ) from error
        return self._done[what, settings]

    def _measure(self, what: str, settings: Settings) -> int:
        """Bytes of the whole stack. The peak is the largest of several moments', each linear in
        depth: of a few layers it may be another moment's than of many, so depth grows until two
        layers in a row add the same."""
        base, _ = self._stand_in(settings)
        run = lambda: (
            _step(base, self.recipe, self.work, settings)
            if what == "step"
            else _asking(base, self.work, settings)
        )
        holder, name, layers = stack(base)
        kinds = {tuple((n, p.shape) for n, p in layer.named_parameters()) for layer in layers}
        if self.whole or len(kinds) > 1:
            return run()
        found: list[int] = []
        try:
            for depth in range(min(4, len(layers)), len(layers) + 1):
                setattr(holder, name, layers[:depth])
                found.append(run())
                added = [b - a for a, b in zip(found, found[1:], strict=False)][-2:]
                if len(added) == 2 and abs(added[1] - added[0]) <= 1e-3 * abs(added[1]):
                    return found[-1] + (len(layers) - depth) * added[1]
        finally:
            setattr(holder, name, layers)
        return found[-1]

    def _vision(self, itemsize: int) -> int:
        """What the tower needs for one picture without a graph: every layer's states, which some
        families keep, and one MLP."""
        vision = getattr(self.config, "vision_config", None)
        width = next(
            (
                w
                for k in ("embed_dim", "hidden_size")
                if isinstance(w := getattr(vision, k, None), int)
            ),
            1024,
        )
        wide = getattr(vision, "intermediate_size", None) or 4 * width
        layers = getattr(vision, "num_hidden_layers", None) or getattr(vision, "depth", None) or 24
        return self.work.patches * ((layers + 6) * width + 2 * wide) * itemsize


def skeleton(config: Any, settings: Settings, recipe: Recipe) -> Any:
    """The model on the meta device with its adapter on, quantised linears stood in for by `Packed`.

    Raises BadInput where transformers cannot build it or it has no language model that could be
    adapted.
    """
    # Flash attention keeps what sdpa's kernels keep, and cannot be built without a GPU.
    attention = None if settings.attention == "flash_attention_2" else settings.attention
    base = source.on_meta(
        config, dtype=source.DTYPES[settings.dtype], attn_implementation=attention
    )
    base.requires_grad_(False)
    names = adapter.language_linears(base)
    adapter.attach(vlm.VLM("", None, base, base, None), recipe)
    for name in names if settings.quantize else ():
        linear = base.get_submodule(f"{name}.base_layer")
        base.get_submodule(name).base_layer = Packed(linear, settings.quantize)
    if settings.checkpointing:
        vlm.checkpoint_layers(base)
    return base


class Packed(nn.Module):
    """A quantised linear layer's memory: its bytes, the weight it unpacks at each use, the input
    that int8 keeps."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        self.shape, self.kind = linear.weight.shape, kind
        self.bias = linear.bias
        with torch.device("meta"):
            self.register_buffer(
                "packed", torch.empty(quantised_bytes(self.shape, kind), dtype=torch.uint8)
            )

    def forward(self, x: Tensor) -> Tensor:
        return _Unpack.apply(x, self.shape, self.kind == "int8")


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: torch.Size, keep: bool) -> Tensor:
        ctx.shape = shape
        if keep:
            ctx.save_for_backward(x)
        return x @ x.new_empty(shape).T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        return g @ g.new_empty(ctx.shape), None, None


def quantised_bytes(shape: torch.Size, kind: str) -> int:
    """Bytes of a weight [out, in]. nf4: 4 bits, a scale for each 64, itself in 8 bits with an fp32
    scale for each 256 of them, and two code tables; int8: 8 bits and an fp32 scale for each row."""
    n = math.prod(shape)
    if kind == "int8":
        return n + 4 * shape[0]
    scales = math.ceil(n / 64)
    return math.ceil(n / 2) + scales + 4 * math.ceil(scales / 256) + 4 * (16 + 256 + 1)


def stack(base: Any) -> tuple[nn.Module, str, nn.ModuleList]:
    """Where the language model keeps its layers: (owner, attribute, layers), the longest list of
    modules in it."""
    decoder = base.get_decoder()
    found = [
        (owner, name, child)
        for owner in decoder.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList) and len(child)
    ]
    if not found:
        raise BadInput(
            f"{type(base).__name__} keeps no list of layers, so its memory cannot be estimated: "
            "give another model."
        )
    return max(found, key=lambda f: len(f[2]))


def at_rest(base: Any) -> tuple[int, int]:
    """Bytes of what is frozen and of what trains, each tensor once."""
    size = {True: 0, False: 0}
    for x in {id(x): x for x in (*base.parameters(), *base.buffers())}.values():
        size[x.requires_grad] += x.numel() * x.element_size()
    return size[False], size[True]


def materialise(base: Any) -> None:
    """Puts fake storage under every parameter and buffer, shared where they are tied."""
    made: dict[int, Tensor] = {}
    with _mode():
        for module in base.modules():
            for store in (module._parameters, module._buffers):
                for name, old in store.items():
                    if old is not None and id(old) not in made:
                        new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                        made[id(old)] = (
                            nn.Parameter(new, old.requires_grad)
                            if isinstance(old, nn.Parameter)
                            else new
                        )
                    store[name] = None if old is None else made[id(old)]


@cache
def _mode() -> FakeTensorMode:
    # It logs the whole stack of what it cannot follow, and the sentence says it already.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    return FakeTensorMode()


def _step(base: Any, recipe: Recipe, work: Workload, settings: Settings) -> int:
    """The most that one step has alive beside weights, adapter, gradients and optimiser states, in
    bytes.

    Gradients are there from the beginning: the last step's are while this one's forward runs.
    """
    trained = [p for p in base.parameters() if p.requires_grad]
    head, width = base.get_output_embeddings().weight, base.config.get_text_config().hidden_size
    base.train(settings.checkpointing or recipe.lora_dropout > 0)
    with _mode(), Tracker() as memory:
        memory.hold(base)
        for p in trained:
            p.grad = torch.empty_like(p)
        rest = memory.peak = memory.now
        found = []
        for sequences, tokens, rows in work.forwards(settings, recipe.batch_size):
            states = _states(base, sequences, tokens, head.dtype, width)
            found.append(states.reshape(-1, width)[-rows:])
        del states
        hidden = torch.cat(found)
        del found
        N, (V, D) = len(hidden), head.shape
        tile = launch(N, V, D, head.dtype, settings.device).tile
        # inside the loss: a tile, its exponentials, sums beside hidden
        memory.passing(4 * (tile * (2 * N + D) + 6 * N * D))
        labels, weight = (
            torch.empty(len(hidden), dtype=torch.int64),
            torch.empty(len(hidden), dtype=torch.bool),
        )
        loss = fused_dmk_ce(
            hidden,
            head,
            labels,
            _teacher(hidden, head),
            alpha=recipe.alpha,
            beta=recipe.beta,
            kl_weight=weight,
            backend="tiled",
        )
        del hidden
        loss.backward()
        del loss
        # AdamW over all tensors at once: the roots of the second moments and the updates
        if settings.device != "cpu":
            memory.passing(2 * sum(p.untyped_storage().nbytes() for p in trained))
        extra = memory.peak - rest
        for p in trained:
            p.grad = None
    return extra


@torch.no_grad()
def _asking(base: Any, work: Workload, settings: Settings) -> int:
    """The most that answering `ask_batch` questions takes beside the weights: first all of the
    prompt at once, as for `generate`, then, token by token, keys and values that are copied as they
    grow, a layer at a time. Beside them those of the prefixes are held while further batches grow
    on them (`decode`): of a quarter as many pictures."""
    head, width, n = (
        base.get_output_embeddings().weight,
        base.config.get_text_config().hidden_size,
        settings.ask_batch,
    )
    base.eval()
    with _mode(), Tracker() as memory:
        rest = memory.peak = memory.hold(base)
        with no_logits(base):
            out = _forward(base, n, work.prefix + work.suffix, head.dtype, width, cached=True)
        cache = memory.now - rest
        prompt, layers = work.prefix + work.suffix, base.config.get_text_config().num_hidden_layers
        grown, prefixes = (
            cache * (prompt + work.answer) / prompt,
            cache * work.prefix / prompt * max(1, n // 4) / n,
        )
        del out
        memory.passing(round(grown * (1 + 1 / layers) + prefixes))
    return memory.peak - rest


def _forward(
    base: Any, sequences: int, tokens: int, dtype: torch.dtype, width: int, cached: bool = False
) -> Any:
    """The language model on its own: what stands around it only puts the picture's features among
    the embeddings, `x` here."""
    x = torch.empty((sequences, tokens, width), dtype=dtype)
    mask = torch.empty((sequences, 1, tokens, tokens), dtype=dtype)
    positions = torch.empty((sequences, tokens), dtype=torch.int64)
    return base.get_decoder()(
        inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=cached
    )


def _states(base: Any, *sizes: Any) -> Tensor:
    """What feeds the head, [sequences, tokens, width]; of Llama 4 the head is inside the
    decoder."""
    with no_logits(base) as kept:
        made = _forward(base, *sizes)
    return kept["hidden"] if "hidden" in kept else made.last_hidden_state


def _teacher(hidden: Tensor, head: Tensor) -> TeacherCache:
    """The rows that a step takes from the teacher's cache."""
    N, wide = len(hidden), {"dtype": torch.float64}
    return TeacherCache(
        torch.empty_like(hidden.detach()),
        torch.empty(hidden.shape),
        torch.empty(N),
        torch.empty(N, **wide),
        torch.empty((N, 16), dtype=torch.int64),
        torch.empty((N, 16), **wide),
        head,
        head_stamp=stamp(head, None),
    )


def largest_weight(config: Any) -> int:
    """Elements of the largest single weight: what loading has in hand beside what is loaded."""
    return max(p.numel() for p in source.on_meta(config).parameters())
