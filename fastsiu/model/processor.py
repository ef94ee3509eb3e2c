"""A model's processor: what turns text and a picture into tensors, also where torchvision is not
installed.

Transformers' processors bring one for videos along, and those need torchvision, which has no build
for every torch. Pictures
do not: most image processors come in a second version that needs Pillow only, and transformers
takes it by itself.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
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

# Of every `from_pretrained`: left out, transformers asks on the terminal whether it may run Python
# code that comes with a model, and an answer can come from a pipe.
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
    """In place of a processor for videos. Any of its settings is None: templates (SmolVLM's) and
    processors (MiniCPM-V's) read some, also where there is no video."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):  # Python's own questions, such as those of a copy
            raise AttributeError(name)

    def to_dict(self) -> dict[str, Any]:
        return {}


class WithoutVideos:
    """Before a processor class: one that needs no processor for videos, and so no torchvision."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        """The parent's check looks for the class of video processors, which cannot be imported
        without torchvision."""
        return (
            None
            if name == "video_processor"
            else super().check_argument_for_proper_class(name, argument)
        )


PARTS = {
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
        made = processor_class(name, config, revision)
        if made and "video_processor" in made.get_attributes() and not torchvision:
            return assemble(made, name, revision)
        return AutoProcessor.from_pretrained(name, revision=revision, **NO_CODE)
    except Exception as error:  # any: it is others' code on a stranger's files; the reason is told
        refuse_own_code(name, error)
        if "torchvision" in str(error).lower() and not torchvision:
            raise BadInput(
                f"The processor of {name} needs torchvision, which is not installed: "
                "pip install torchvision."
            ) from error
        line = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        if isinstance(error, ImportError):
            raise BadInput(
                f"The processor of {name} needs a package that is not installed ({line})."
            ) from error
        raise BadInput(
            f"{name} has no processor that transformers can load ({line}): "
            "save the processor beside the model, or give another model."
        ) from error


def processor_class(name: str, config: Any, revision: str | None) -> type[ProcessorMixin] | None:
    """The one that was saved, or else the one that transformers has for this kind of model."""
    saved, _ = ProcessorMixin.get_processor_dict(name, revision=revision)
    found = getattr(transformers, saved.get("processor_class") or "", None)
    if isinstance(found, type) and issubclass(found, ProcessorMixin):
        return found
    return PROCESSOR_MAPPING[type(config)] if type(config) in PROCESSOR_MAPPING else None


def assemble(made: type[ProcessorMixin], name: str, revision: str | None) -> ProcessorMixin:
    """What `made.from_pretrained` does, part by part, with no processor for videos."""
    parts = [PARTS[part](name, revision=revision, **NO_CODE) for part in made.get_attributes()]
    saved, _ = made.get_processor_dict(name, revision=revision)
    return type(made.__name__, (WithoutVideos, made), {}).from_args_and_dict(parts, saved)


def check_sizes(processor: Any, name: str) -> None:
    """Raises BadInput where pictures would be brought to a size that no memory holds."""
    images = getattr(processor, "image_processor", None)
    # With patches that are merged, the edges are numbers of pixels (Qwen2-VL's), else of one side.
    edge = 2**26 if hasattr(images, "merge_size") else 2**15
    for key in ("size", "crop_size", "max_image_size"):
        size = getattr(images, key, None)
        for side in ("height", "width", "shortest_edge", "longest_edge"):
            value = size.get(side) if isinstance(size, Mapping) else getattr(size, side, None)
            most = edge if side.endswith("edge") else 2**15
            if value is not None and not (type(value) in (int, float) and 0 < value <= most):
                raise BadInput(
                    f"The processor of {name} brings pictures to {key} {side} = {value!r}: it "
                    "would have to be "
                    f"between 1 and {most}; restore its settings."
                )


def take_limits_off(processor: Any) -> None:
    """No text is cut or padded because a tokenizer was saved with a truncation or a padding
    switched
    on: both are of whoever trained it, and a question cut short is another question."""
    tokenizer = getattr(processor, "tokenizer", processor)
    for key in LIMITS:  # a processor takes them for options of every call
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
            "model whose "
            "architecture is part of transformers."
        ) from error


def takes_suffix(processor: Any) -> bool:
    """Whether the answer goes in beside the question, as `suffix`, and not inside a chat template.

    So it is with prefix language models: their processor marks, in `token_type_ids`, which tokens
    look both ways.
    """
    return "suffix" in inspect.signature(type(processor).__call__).parameters
