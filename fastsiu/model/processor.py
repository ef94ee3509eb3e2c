"""A model's processor, which turns text and a picture into tensors, also where torchvision is not
installed.

Transformers' processors contain one for videos, and that needs torchvision, which has no build for
every torch. Pictures do not need it: most image processors come in a second version that needs
Pillow only, and transformers chooses it by itself.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import transformers
from transformers import (
    PROCESSOR_MAPPING,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
)
from transformers.utils import PushToHubMixin

from ..request import BadInput
from .faults import first_line

# Every `from_pretrained` gets it. Without it transformers asks on the terminal whether it may run
# Python code that comes with a model, and an answer can come from a pipe.
NO_CODE = {"trust_remote_code": False}

LIMITS = (
    "truncation",
    "truncation_strategy",
    "max_length",
    "stride",
    "padding",
    "pad_to_multiple_of",
    "is_split_into_words",
)


class NoVideos(PushToHubMixin):
    """Stands in for a processor for videos. All its settings are None: templates (SmolVLM's) and
    processors (MiniCPM-V's) read some, also where there is no video."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):  # Python itself looks for such names, for instance to copy
            raise AttributeError(name)

    def to_dict(self) -> dict[str, Any]:
        return {}


class WithoutVideos(ProcessorMixin):
    """In front of a processor class among the parents of a class: the class then needs no processor
    for videos, and so no torchvision."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        """The parent's check looks for the class of video processors, which cannot be imported
        without torchvision."""
        if name == "video_processor":
            return None
        return super().check_argument_for_proper_class(name, argument)


PARTS: dict[str, Callable[..., Any]] = {
    "image_processor": AutoImageProcessor.from_pretrained,
    "tokenizer": AutoTokenizer.from_pretrained,
    "feature_extractor": AutoFeatureExtractor.from_pretrained,
    "video_processor": lambda name, revision, trust_remote_code: NoVideos(),
}


def load_processor(name: str, config: Any, revision: str | None = None) -> Any:
    """The processor saved beside a model. Raises BadInput where there is none, or it needs a
    package that is not installed."""
    torchvision = importlib.util.find_spec("torchvision") is not None
    try:
        kind = processor_class(name, config, revision)
        if kind and "video_processor" in kind.get_attributes() and not torchvision:
            return assemble(kind, name, revision)
        return AutoProcessor.from_pretrained(name, revision=revision, **NO_CODE)
    except Exception as error:  # any: it is others' code on a stranger's files; the reason is told
        refuse_own_code(name, error)
        if "torchvision" in str(error).lower() and not torchvision:
            raise BadInput(
                f"The processor of {name} needs torchvision, which is not installed: "
                "pip install torchvision."
            ) from error
        line = first_line(error)
        if isinstance(error, ImportError):
            raise BadInput(
                f"The processor of {name} needs a package that is not installed ({line})."
            ) from error
        raise BadInput(
            f"{name} has no processor that transformers can load ({line}): "
            "save the processor beside the model, or give another model."
        ) from error


def processor_class(name: str, config: Any, revision: str | None) -> type[ProcessorMixin] | None:
    """The class that was saved, or else the one that transformers has for this kind of model."""
    saved, _ = ProcessorMixin.get_processor_dict(name, revision=revision)
    kind = getattr(transformers, saved.get("processor_class") or "", None)
    if isinstance(kind, type) and issubclass(kind, ProcessorMixin):
        return kind
    usual: Any = PROCESSOR_MAPPING[type(config)] if type(config) in PROCESSOR_MAPPING else None
    return usual


def assemble(kind: type[ProcessorMixin], name: str, revision: str | None) -> ProcessorMixin:
    """Does what `kind.from_pretrained` does, part by part, without a processor for videos."""
    parts = [PARTS[part](name, revision=revision, **NO_CODE) for part in kind.get_attributes()]
    saved, _ = kind.get_processor_dict(name, revision=revision)
    without: type[ProcessorMixin] = type(kind.__name__, (WithoutVideos, kind), {})
    return without.from_args_and_dict(parts, saved)


def check_sizes(processor: Any, name: str) -> None:
    """Raises BadInput where the processor would bring pictures to a size that no memory holds."""
    images = getattr(processor, "image_processor", None)
    # Where patches are merged, an edge is a number of pixels of the picture (Qwen2-VL's), else of
    # one side.
    edge = 2**26 if hasattr(images, "merge_size") else 2**15
    for key in ("size", "crop_size", "max_image_size"):
        size = getattr(images, key, None)
        for side in ("height", "width", "shortest_edge", "longest_edge"):
            value = size.get(side) if isinstance(size, Mapping) else getattr(size, side, None)
            most = edge if side.endswith("edge") else 2**15
            if value is not None and not (type(value) in (int, float) and 0 < value <= most):
                raise BadInput(
                    f"The processor of {name} brings pictures to {key} {side} = {value!r}: it "
                    f"would have to be between 1 and {most}; restore its settings."
                )


def take_limits_off(processor: Any) -> None:
    """Switches off the truncation and the padding that a tokenizer was saved with. They belong to
    its training, and a question that was cut is another question."""
    tokenizer = getattr(processor, "tokenizer", processor)
    for key in LIMITS:  # a processor takes these settings for options of every call
        getattr(tokenizer, "init_kwargs", {}).pop(key, None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()


def refuse_own_code(name: str, error: BaseException) -> None:
    """Raises BadInput where transformers failed because it was not let run the code of a model."""
    if "trust_remote_code" in str(error):
        raise BadInput(
            f"{name} comes with Python code of its own, and FastSIU never runs such code: give a "
            "model whose architecture is part of transformers."
        ) from error


def takes_suffix(processor: Any) -> bool:
    """Whether the answer goes in beside the question, as `suffix`, and not inside a chat template.

    Prefix language models need that: their processor marks in `token_type_ids` which tokens look
    both ways.
    """
    return "suffix" in inspect.signature(type(processor).__call__).parameters
