"""From options to settings: which model, which recipe, how it is computed, what reports show.

Options that travel together are one object, from the verbs down. What was left out is chosen here,
and said before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict

import torch
from PIL.Image import Image

from .guards.strict_json import read_json
from .images import load_image
from .model import adapter, placement, plan, source, vlm
from .model.memory import GB, Layout
from .request import PAPER, BadInput, Recipe, check_flags
from .session import Listener

# what a model's own directory may say about the hyper-parameters it needs
MODEL_RECIPE = "fastsiu.json"
RATES = (1e-4, 1.5e-3)  # bounds of the learning rate that follows from a model's width
# From this width of the language model on the projector is trained, and features of kept pictures
# are held with this weight (`step.anchor`). Measured at 576 only (benches/real_words.py).
WIDE, ANCHOR = 512, 10.0
# There the adapter reads so many directions of each input (`step.directions`).
DIRECTIONS = {"language": 32, "projector": 4}
# Times the rate that follows from the width: where the adapter reads a few directions of the
# language model's inputs only, and in the projector.
HELD, IN_PROJECTOR = 2.0, 4.0
# the path alone: what draws and trains it is the command line's
EMBEDDED = Path(__file__).parent / "demo" / "model"
DEMO_NOTE = (
    "No --model was given: this is the embedded demo model, which knows only its own fictional "
    "creatures."
)


@dataclass(frozen=True)
class ModelRef:
    """Which model.

    place:    hub id or directory; None is the embedded demo model
    revision: branch, tag or commit of a hub model
    """

    place: str | Path | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("model", self.place), ("revision", self.revision)):
            if not isinstance(value, str | Path | None):
                raise BadInput(f"{name} is a {type(value).__name__}: give text.")

    @property
    def name(self) -> str:
        return str(EMBEDDED if self.place is None else self.place)

    @property
    def is_directory(self) -> bool:
        return Path(self.name).is_dir()


@dataclass(frozen=True)
class RecipeChoice:
    """Where the hyper-parameters come from.

    preset:  "default" or "paper"
    changes: fields of `Recipe` by name; a value of None is left to the preset
    """

    preset: str = "default"
    changes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def is_default(self) -> bool:
        return self.preset == "default" and all(v is None for v in self.changes.values())


@dataclass(frozen=True)
class Settings:
    """How a run is computed. None: chosen, by the memory limit where there is one.

    device:        "cpu", "cuda", "cuda:1" ...; "auto": over all GPUs; the first GPU where there is
                   one
    dtype:         "auto" (as stored), "bfloat16", "float16" or "float32"
    memory:        GB that the run may take, on each of several devices; the settings that are left
                   out are chosen to fit
    quantize:      "nf4" or "int8": the language model's weights in 4 or 8 bits
    attention:     "sdpa", "flash_attention_2" or "eager"
    checkpointing: whether a layer's activations are computed twice
    micro_batch:   samples in one forward of a step; changes memory, not the result
    optimizer:     "adamw", "adamw8bit" or "paged_adamw8bit"
    """

    device: str | None = None
    dtype: str = "auto"
    memory: float | None = None
    quantize: str | None = None
    attention: str | None = None
    checkpointing: bool | None = None
    micro_batch: int | None = None
    optimizer: str | None = None

    def __post_init__(self) -> None:
        check_flags(checkpointing=self.checkpointing)
        if not isinstance(self.memory, int | float | None) or isinstance(self.memory, bool):
            raise BadInput(f"memory is {self.memory!r:.40}: give a number of GB, such as 12.")
        several = self.micro_batch
        if several is not None and (type(several) is not int or not 1 <= several <= 4096):
            raise BadInput(
                f"micro_batch is {several!r:.40}: give a whole number between 1 and 4096."
            )

    @property
    def limited(self) -> bool:
        return self.memory is not None

    @property
    def given(self) -> dict[str, Any]:
        """Fields of `memory.Layout` that were asked for and stay as they are."""
        names = ("quantize", "attention", "checkpointing", "micro_batch", "optimizer")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class ReportOptions:
    """What reports show.

    redact:      names, questions, answers and file names stay out of everything written
    embed_image: report.html shows the training picture
    run:         the text of run.toml, the file that repeats the run; no such file where it is
                 empty
    """

    redact: bool = False
    embed_image: bool = False
    run: str = ""

    def __post_init__(self) -> None:
        check_flags(redact=self.redact, embed_image=self.embed_image)

    @property
    def deciding(self) -> dict[str, bool]:
        """The options that were asked for. They are part of the request: a request that was
        answered with names is not done for whoever wants none. Without either a request stays what
        it was."""
        asked = (("redact", self.redact), ("embed_image", self.embed_image))
        return {name: True for name, wanted in asked if wanted}


class Options(TypedDict, total=False):
    """The keywords of `fastsiu.unlearn` that are sorted into the objects above."""

    model: str | Path | None
    revision: str | None
    preset: str
    device: str | None
    dtype: str
    memory: float | None
    quantize: str | None
    attention: str | None
    checkpointing: bool | None
    micro_batch: int | None
    optimizer: str | None
    redact: bool
    embed_image: bool
    alpha: float | None
    beta: float | None
    steps: int | None
    lr: float | None
    rank: int | None
    lora_alpha: float | None
    batch_size: int | None
    renormalize: bool | None
    substitute: str | None
    adapt: str | None
    seed: int | None


@dataclass(frozen=True)
class Chosen:
    """Keywords, sorted: `driver.unlearn(request, **vars(sort_options(keywords)))`."""

    model: ModelRef
    recipe: RecipeChoice
    settings: Settings
    report: ReportOptions


def sort_options(options: Mapping[str, Any]) -> Chosen:
    """Sorts keywords by the object that has a field of the name; the rest are fields of `Recipe`.

    Raises BadInput for a keyword that is none of them, when the recipe is chosen.
    """
    rest = dict(options)
    take = lambda names: {name: rest.pop(name) for name in names if name in rest}
    model = ModelRef(rest.pop("model", None), rest.pop("revision", None))
    settings = Settings(**take([f.name for f in fields(Settings)]))
    report = ReportOptions(**take([f.name for f in fields(ReportOptions)]))
    return Chosen(model, RecipeChoice(rest.pop("preset", "default"), rest), settings, report)


# The recipe ---------------------------------------------------------------------------------------


def choose_recipe(
    model: str, choice: RecipeChoice, revision: str | None = None
) -> tuple[Recipe, dict[str, str]]:
    """The hyper-parameters and where each came from: command line, preset, the model's own
    directory, the width of its language model (`_by_width`), default.

    Raises BadInput for a field or a preset that does not exist, and for a configuration that cannot
    be read.
    """
    known = {f.name for f in fields(Recipe)}
    given = {k: v for k, v in choice.changes.items() if v is not None}
    if unknown := sorted(set(given) - known):
        raise BadInput(
            f"There is no hyper-parameter {unknown[0]!r}: choose from {', '.join(sorted(known))}."
        )
    if choice.preset not in ("default", "paper"):
        raise BadInput(f"The preset {choice.preset!r} is unknown: choose 'default' or 'paper'.")
    paper = choice.preset == "paper"
    own = {} if paper else _model_recipe(model)
    # An anchor waits until it is known what is trained.
    last = {name: value for name, value in given.items() if name == "anchor"}
    recipe = (PAPER if paper else Recipe()).with_overrides(**own)
    recipe = recipe.with_overrides(**{k: v for k, v in given.items() if k not in last})
    origin = dict.fromkeys(known, "preset paper" if paper else "default")
    origin |= dict.fromkeys(own, "model directory") | dict.fromkeys(given, "command line")
    left = {name for name in ("adapt", "anchor", "directions", "lr") if origin[name] == "default"}
    if own:  # it was chosen for the part that it says, or for the language model
        left.discard("adapt")
    if left and (config := _config(model, revision)) is not None:
        chosen = _by_width(recipe, config, left)
        recipe = recipe.with_overrides(**chosen)
        origin |= dict.fromkeys(chosen, "model width")
    return recipe.with_overrides(**last), origin


def _by_width(recipe: Recipe, config: Any, left: Collection[str]) -> dict[str, Any]:
    """What follows from the width of the language model, of the fields that nobody chose."""
    width = getattr(config.get_text_config(), "hidden_size", None)
    if not isinstance(width, int):
        return {}
    chosen: dict[str, Any] = {}
    # Lessons from strangers tell what changes from what stays.
    wide = width >= WIDE and recipe.strangers > 0
    if wide:
        free = "adapt" in left and not recipe.projector_lr and _has_projector(config)
        adapt = chosen["adapt"] = "projector" if free else recipe.adapt
        chosen["directions"] = DIRECTIONS.get(adapt, 0)
        chosen["anchor"] = ANCHOR if adapt == "projector" else 0.0
    changed = {k: v for k, v in chosen.items() if k in left and v != getattr(recipe, k)}
    if "lr" in left:
        now = recipe.with_overrides(**changed)
        if wide and now.adapt == "projector":
            changed["lr"] = rate_for(width, IN_PROJECTOR)
        else:
            changed["lr"] = rate_for(width, HELD if now.directions and now.strangers else 1.0)
    return changed


def _has_projector(config: Any) -> bool:
    """Whether the model has a projector that we know. What cannot be built is told when it is
    loaded."""
    try:
        adapter.projector_linears(source.on_meta(config))
    except BadInput:
        return False
    return True


def rate_for(width: int, times: float = 1.0) -> float:
    """The learning rate of LoRA for a language model of so many hidden units, two digits.

    The best rate falls with the width to the power of about 3/4, from about 5e-4 at 2000 (Schulman
    et al., "LoRA Without Regret", Thinking Machines 2025). Measured here at 576 only.

    times: that rate, for factors that read a few directions only or are in the projector
    """
    low, high = RATES
    return float(f"{times * min(high, max(low, 5e-4 * (2000 / width) ** 0.75)):.1e}")


def _config(model: str, revision: str | None) -> Any:
    """The model's configuration; None where a directory has none, which is told when it is
    loaded."""
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        return None
    return source.read_config(model, revision)


def _model_recipe(model: str) -> dict[str, Any]:
    path = Path(model) / MODEL_RECIPE
    if not path.is_file():
        return {}
    known = {f.name for f in fields(Recipe)}
    read = read_json(path, what=str(path), remedy="mend it or remove it", shape={"recipe": dict})
    if "recipe" not in read:
        raise BadInput(
            f"{path} is not a JSON object with an object 'recipe': mend it or remove it."
        )
    values = dict(read["recipe"])
    if unknown := sorted(set(values) - known):
        raise BadInput(f"{path} names an unknown hyper-parameter {unknown[0]!r}: remove it.")
    return values


# The layout in memory -----------------------------------------------------------------------------


def choose_layout(
    model: ModelRef, settings: Settings, recipe: Recipe, picture: Image | None, listener: Listener
) -> Layout:
    """What was asked for; under a memory limit the least sparing layout that fits it, which is said
    before anything is loaded.

    Raises BadInput where an option makes no sense or, under a limit, nothing fits.
    """
    device, said = placement.settled(settings.device)
    if said:
        listener.note(said)
    room = _room(settings) if device == placement.AUTO else {}
    device = next(iter(room), device)
    source.check_device(device)
    first_gpu = "cuda" if torch.cuda.is_available() else "cpu"
    asked = Layout(
        dtype=settings.dtype,
        device=device or first_gpu,
        room=tuple(room.items()),
        **settings.given,
    )
    source.check_options(settings.dtype, asked.quantize, asked.attention, asked.optimizer)
    if settings.memory is None:
        return asked
    assert picture is not None, "a memory limit is about one picture's tokens"
    source.check_directory(model.name)
    config, processor, _ = source.describe(model.name, model.revision)
    work = plan.workload_of(config, processor, picture)
    planned = plan.plan(
        model.name,
        settings.memory,
        asked,
        recipe=recipe,
        config=config,
        work=work,
        fixed=frozenset(settings.given),
    )
    if planned.chosen is None:
        raise BadInput(planned.sentence)
    listener.note(planned.sentence)
    return planned.chosen.settings


def _room(settings: Settings) -> dict[str, int]:
    """Bytes for weights on each device, for "auto"."""
    return placement.room(None if settings.memory is None else round(settings.memory * GB))


def deciding(layout: Layout) -> dict[str, Any]:
    """Those settings that decide the result, as the manifest and the digest of a request have them;
    those left alone are not."""
    values = {"quantize": layout.quantize, "attention": layout.attention}
    values["optimizer"] = layout.optimizer if layout.optimizer != "adamw" else None
    return {k: v for k, v in values.items() if v is not None}


def load(model: ModelRef, layout: Layout, room: vlm.Budget, listener: Listener) -> vlm.VLM:
    """The model, with a progress line for each of its parts."""
    listener.stage("Loading the model")
    with listener.loading() as bars:
        loaded = vlm.load(
            model.name,
            revision=model.revision,
            device=placement.AUTO if layout.room else layout.device,
            room=dict(layout.room) if layout.room else None,
            dtype=layout.dtype,
            quantize=layout.quantize,
            attention=layout.attention,
            budget=room,
            bars=bars,
        )
    if loaded.placed is not None:
        listener.note(loaded.placed.sentence)
    return loaded


def plan_for(
    model: ModelRef,
    settings: Settings,
    recipe: RecipeChoice,
    *,
    image: Path | None = None,
    image_tokens: int | None = None,
) -> plan.Plan:
    """What a run would take, from the configuration alone: no weight is read.

    settings.device: the card's kind, "cuda" where it is None
    image: a picture whose tokens are counted, for which the model's processor is loaded as well
    image_tokens: tokens of a picture, where the configuration does not say
    """
    name, revision = model.name, model.revision
    chosen, _ = choose_recipe(name, recipe, revision)
    device, said = placement.settled(settings.device or "cuda")
    room = _room(settings) if device == placement.AUTO else {}
    device = next(iter(room), device)
    assert device is not None
    try:
        torch.device(device)
    except RuntimeError as error:
        raise BadInput(f"There is no device {device!r}: choose cuda, cpu or auto.") from error
    given = {**settings.given, "dtype": settings.dtype, "device": device}
    if room:
        given["room"] = tuple(room.items())
    config = work = None
    if image is not None:
        picture = load_image(image)
        source.check_directory(name)
        config, processor, revision = source.describe(name, revision)
        work = plan.workload_of(config, processor, picture)
    made = plan.plan(
        name,
        settings.memory,
        Layout(**given),
        recipe=chosen,
        config=config,
        work=work,
        revision=revision,
        image_tokens=image_tokens,
        fixed=frozenset(given),
    )
    return replace(made, assumed=[*made.assumed, said]) if said else made
