"""A step on fake tensors: the peak of memory, worked out from the model's configuration alone. No
weight is read or fetched.

The model is built without storage, with the adapter that a run would attach. One optimisation step
then runs on fake tensors, whose operations work out shapes only, under a tracker of the storages
that would be alive. A stack of equal layers is run with a few layers, until each further one adds
the same; the rest is multiplication.

Formulas add what no fake tensor shows: the tiles inside the loss, the pictures' features and the
teacher's statistics. On a GPU they also add what the driver and the allocator keep for themselves
(`OVERHEAD`, an assumption).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..kernels.launch import launch
from ..loss.fused import fused_dmk_ce
from ..loss.head import stamp
from ..loss.rows import no_logits
from ..loss.teacher import TeacherCache
from ..request import BadInput, Recipe
from . import source
from .faults import first_line
from .memory import DREAMS_SEEN, GB, Estimate, Layout, budget
from .placement import stack
from .skeleton import at_rest, fake_mode, largest_weight, materialise, skeleton
from .workload import Workload

# Context, loaded kernels, cuBLAS workspace and the allocator's fragments on an NVIDIA card.
# Assumed, not measured.
OVERHEAD = 0.7 * GB
# Lessons from strangers (`samples.strangers`) wait on the CPU with their teacher's statistics. The
# device holds those of one batch, with its pictures; forward and backward take what a batch of
# samples takes.
PICTURES_OF_A_BATCH = 12


class Tracker(TorchDispatchMode):
    """Counts the bytes of the storages that are alive: `now`, and the most so far, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.add(x)
        return result

    def add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def hold(self, model: nn.Module) -> int:
        """Counts the model's weights, so that a view of one is nothing new. Returns `now`."""
        for x in (*model.parameters(), *model.buffers()):
            self.add(x)
        return self.now

    def passing(self, size: int) -> None:
        """Counts `size` bytes that come and go inside an operation."""
        self.peak = max(self.peak, self.now + size)

    def _drop(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


@dataclass
class Simulation:
    """Runs the steps of one model's configuration on fake tensors, each step once.

    whole: run all layers, without multiplication
    """

    config: Any
    recipe: Recipe
    work: Workload
    whole: bool = False
    _done: dict[tuple[str, Any], Any] = field(default_factory=dict)

    def estimate(self, settings: Layout) -> Estimate:
        weights, trained = self.resting(settings)
        itemsize = source.DTYPES[settings.dtype].itemsize
        width = self.config.get_text_config().hidden_size
        pictures, samples = self.work.pictures, self.work.samples
        if self.recipe.strangers:
            pictures += PICTURES_OF_A_BATCH
            samples += self.recipe.batch_size
        rows = samples * self.work.rows
        features = pictures * self.work.prefix * width * itemsize
        # of the teacher: hidden, m in fp32, the 16 top entries
        statistics = rows * (width * (itemsize + 4) + 16 * 16)
        states = 2 * trained
        if settings.optimizer != "adamw":  # 8 bits, with an fp32 scale for each 256 numbers
            states = states * (256 + 4) // (256 * 4)
        return Estimate(
            settings,
            weights=weights,
            trained=trained,
            gradient=trained,
            optimizer=states,
            # a rehearsal keeps the parameters as they were until the step is done
            activations=self._run("step", replace(settings, ask_batch=0))
            + self._seen_anew(settings, itemsize)
            + (trained if self.recipe.relearn else 0),
            kept=features + statistics,
            overhead=int(OVERHEAD) if settings.device != "cpu" else 0,
            asking=self._run("asking", replace(settings, micro_batch=None, optimizer="adamw")),
            loading=largest_weight(self.config) * itemsize,
            vision=self._vision(settings, itemsize),
        )

    def within(self, settings: Layout, limit: int | None) -> Estimate:
        """The estimate with as many questions at once as fit into `limit` bytes beside the weights
        and the adapter."""
        estimate = self.estimate(settings)
        while limit is not None and estimate.peak > max(limit, estimate.training):
            questions = estimate.settings.ask_batch
            if questions <= 1:
                break
            fewer, room = questions // 2, limit - (estimate.peak - estimate.asking)
            while fewer > 1 and estimate.asking * fewer / questions > room:
                fewer //= 2
            estimate = self.estimate(replace(estimate.settings, ask_batch=fewer))
        return estimate

    def resting(self, settings: Layout) -> tuple[int, int]:
        """Bytes of the frozen weights and of the adapter."""
        return self._stand_in(settings)[1]

    def _stand_in(self, settings: Layout) -> tuple[Any, tuple[int, int]]:
        """The model on fake storage, and the bytes of its frozen weights and of the adapter."""
        same = (settings.dtype, settings.quantize, settings.checkpointing, settings.attention)
        if ("model", same) not in self._done:
            base = skeleton(self.config, settings, self.recipe)
            materialise(base)
            self._done["model", same] = base, at_rest(base)
        return self._done["model", same]

    def _run(self, what: str, settings: Layout) -> int:
        if (what, settings) not in self._done:
            try:
                self._done[what, settings] = self._measure(what, settings)
            # any: whatever a family's forward thinks of tensors without values
            except Exception as error:
                raise BadInput(
                    f"What {type(self.config).__name__} takes cannot be worked out "
                    f"({first_line(error)}): leave --memory out and choose --quantize, "
                    "--checkpointing and --micro-batch."
                ) from error
        return self._done[what, settings]

    def _measure(self, what: str, settings: Layout) -> int:
        """Bytes of the whole stack.

        The peak is the largest of several moments, each linear in depth. A few layers may have
        another moment as their peak than many, so depth grows until two layers in a row add the
        same.
        """
        base, _ = self._stand_in(settings)

        def run() -> int:
            if what == "step":
                return _step(base, self.recipe, self.work, settings)
            return _asking(base, self.work, settings)

        holder, name, layers = stack(base)
        kinds = {tuple((n, p.shape) for n, p in layer.named_parameters()) for layer in layers}
        if self.whole or len(kinds) > 1:
            return run()
        sizes: list[int] = []
        try:
            for depth in range(min(4, len(layers)), len(layers) + 1):
                setattr(holder, name, layers[:depth])
                sizes.append(run())
                added = [b - a for a, b in zip(sizes, sizes[1:], strict=False)][-2:]
                if len(added) == 2 and abs(added[1] - added[0]) <= 1e-3 * abs(added[1]):
                    return sizes[-1] + (len(layers) - depth) * added[1]
        finally:
            setattr(holder, name, layers)
        return sizes[-1]

    def _vision(self, settings: Layout, itemsize: int) -> int:
        """Bytes that the tower needs. For one picture without a graph: every layer's states, which
        some families keep, and one MLP. For dreams in pixels: what the backward pass needs of every
        layer, the inputs of its norms and products."""
        width, wide, layers = self._tower()
        plain = (layers + 6) * width + 2 * wide
        if not self.recipe.dreams or self.recipe.dream_in == "features":
            return self.work.patches * plain * itemsize
        dreams = budget(settings, self.recipe.batch_size).dream_batch or DREAMS_SEEN
        graph = min(dreams, DREAMS_SEEN) * layers * (10 * width + 2 * wide)
        return self.work.patches * max(plain, graph) * itemsize

    def _seen_anew(self, settings: Layout, itemsize: int) -> int:
        """Bytes that the backward pass needs of a step's pictures, where something in front of the
        language model trains: of every layer of the tower that trains (its input alone under
        checkpointing), and of the projector its inputs and outputs, beside those of LoRA in
        fp32."""
        if not self.recipe.sees_anew:
            return 0
        width, wide, layers = self._tower()
        most = settings.micro_batch or self.recipe.batch_size
        pictures = min(most, PICTURES_OF_A_BATCH)
        language = self.config.get_text_config().hidden_size
        seen = (width + 3 * language) * (itemsize + 4)
        if self.recipe.adapt == "vision":
            seen += layers * (width if settings.checkpointing else 10 * width + 2 * wide) * itemsize
        return pictures * self.work.patches * seen

    def _tower(self) -> tuple[int, int, int]:
        """Width, width of the MLP and number of layers of the vision tower."""
        vision = getattr(self.config, "vision_config", None)
        widths = (getattr(vision, name, None) for name in ("embed_dim", "hidden_size"))
        width = next((w for w in widths if isinstance(w, int)), 1024)
        wide = getattr(vision, "intermediate_size", None) or 4 * width
        layers = getattr(vision, "num_hidden_layers", None) or getattr(vision, "depth", None) or 24
        return width, wide, layers


def _step(base: Any, recipe: Recipe, work: Workload, settings: Layout) -> int:
    """The most bytes that one step has alive beside weights, adapter, gradients and optimiser
    states.

    Gradients are there from the beginning: those of the last step are, while this one's forward
    runs.
    """
    trained = [p for p in base.parameters() if p.requires_grad]
    head, width = base.get_output_embeddings().weight, base.config.get_text_config().hidden_size
    base.train(settings.checkpointing or recipe.lora_dropout > 0)
    with fake_mode(), Tracker() as memory:
        memory.hold(base)
        for p in trained:
            p.grad = torch.empty_like(p)
        rest = memory.peak = memory.now
        supervised = []
        for sequences, tokens, rows in work.forwards(settings, recipe.batch_size, recipe.in_front):
            states = _states(base, sequences, tokens, head.dtype, width, recipe.in_front)
            supervised.append(states.reshape(-1, width)[-rows:])
        del states
        hidden = torch.cat(supervised)
        del supervised
        N, (V, D) = len(hidden), head.shape
        tile = launch(N, V, D, head.dtype, settings.device).tile
        # inside the loss: a tile, its exponentials, sums beside hidden
        memory.passing(4 * (tile * (2 * N + D) + 6 * N * D))
        labels, weight = torch.empty(N, dtype=torch.int64), torch.empty(N, dtype=torch.bool)
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
def _asking(base: Any, work: Workload, settings: Layout) -> int:
    """The most bytes that answering `ask_batch` questions has alive beside the weights.

    First the whole prompt at once, as for `generate`; then, token by token, keys and values, which
    are copied as they grow, one layer at a time. Beside them stay those of the prefixes, on which
    further batches grow (`decode`): of a quarter as many pictures.
    """
    config, n = base.config.get_text_config(), settings.ask_batch
    head, width, layers = (
        base.get_output_embeddings().weight,
        config.hidden_size,
        config.num_hidden_layers,
    )
    prompt = work.prefix + work.suffix
    base.eval()
    with fake_mode(), Tracker() as memory:
        rest = memory.peak = memory.hold(base)
        with no_logits(base):
            out = _forward(base, n, prompt, head.dtype, width, cached=True)
        cache = memory.now - rest
        grown = cache * (prompt + work.answer) / prompt
        prefixes = cache * work.prefix / prompt * max(1, n // 4) / n
        del out
        memory.passing(round(grown * (1 + 1 / layers) + prefixes))
    return memory.peak - rest


def _forward(
    base: Any,
    sequences: int,
    tokens: int,
    dtype: torch.dtype,
    width: int,
    in_front: bool = False,
    cached: bool = False,
) -> Any:
    """The language model on its own. The model around it only puts the picture's features among the
    embeddings, `x` here. in_front: what makes the features is trained, so `x` has a gradient."""
    x = torch.empty((sequences, tokens, width), dtype=dtype, requires_grad=in_front)
    mask = torch.empty((sequences, 1, tokens, tokens), dtype=dtype)
    positions = torch.empty((sequences, tokens), dtype=torch.int64)
    return base.get_decoder()(
        inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=cached
    )


def _states(base: Any, *sizes: Any) -> Tensor:
    """The states that feed the head, [sequences, tokens, width]. Llama 4's head is inside the
    decoder."""
    with no_logits(base) as kept:
        output = _forward(base, *sizes)
    return kept["hidden"] if "hidden" in kept else output.last_hidden_state


def _teacher(hidden: Tensor, head: Tensor) -> TeacherCache:
    """The rows that a step takes from the teacher's cache."""
    N = len(hidden)
    return TeacherCache(
        torch.empty_like(hidden.detach()),
        torch.empty(hidden.shape),
        torch.empty(N),
        torch.empty(N, dtype=torch.float64),
        torch.empty((N, 16), dtype=torch.int64),
        torch.empty((N, 16), dtype=torch.float64),
        head,
        head_stamp=stamp(head, None),
    )
