"""A model before its weights are loaded: its files, its configuration, and whether the options hold
on this machine."""

from __future__ import annotations

import importlib.util
import logging
import math
from pathlib import Path
from typing import Any, overload

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.utils import cached_file, extract_commit_hash

from ..guards import limited
from ..request import BadInput
from .faults import first_line
from .processor import NO_CODE, load_processor, refuse_own_code, take_limits_off, takes_suffix
from .processor import check_sizes as check_picture_sizes

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
QUANTIZE = ("nf4", "int8")
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")
ATTENTION = ("sdpa", "flash_attention_2", "eager")
# Bounds of a configuration's numbers, by the end of their names. Every model that exists is far
# inside of them.
SIZES = (
    ("num_attention_heads", (1, 4096)),
    ("num_key_value_heads", (1, 4096)),
    ("num_hidden_layers", (1, 2048)),
    ("num_layers", (0, 2048)),
    ("_layers", (0, 2048)),
    ("hidden_size", (1, 2**18)),
    ("intermediate_size", (0, 2**20)),
    ("vocab_size", (1, 2**24)),
    ("num_experts", (0, 2**14)),
    ("image_size", (1, 2**15)),
    ("patch_size", (1, 2**12)),
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")


def check_options(
    dtype: str, quantize: str | None, attention: str | None, optimizer: str = "adamw"
) -> None:
    """Raises BadInput for the name of a dtype, a quantisation, an attention or an optimiser that
    does not exist."""
    if dtype not in ("auto", *DTYPES):
        raise BadInput(f"The dtype {dtype!r} is unknown: choose one of auto, {', '.join(DTYPES)}.")
    if quantize is not None and quantize not in QUANTIZE:
        raise BadInput(
            f"The quantisation {quantize!r} is unknown: choose one of {', '.join(QUANTIZE)}."
        )
    if attention is not None and attention not in ATTENTION:
        raise BadInput(
            f"The attention {attention!r} is unknown: choose one of {', '.join(ATTENTION)}."
        )
    if optimizer not in OPTIMIZERS:
        raise BadInput(
            f"The optimizer {optimizer!r} is unknown: choose one of {', '.join(OPTIMIZERS)}."
        )


@overload
def check_device(device: str) -> torch.device: ...
@overload
def check_device(device: None) -> None: ...
def check_device(device: str | None) -> torch.device | None:
    """The device itself, None for None. Raises BadInput for one that cannot be used here."""
    if device is None:
        return None
    try:
        place = torch.device(device)
        if place.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(
            f"The device {device!r} cannot be used here ({first_line(error)}): choose cpu."
        ) from error
    return place


def check_packages(
    device: str, dtype: str, quantize: str | None, attention: str | None, optimizer: str
) -> None:
    """Raises BadInput where an option needs a package or a device that is missing."""
    for option in (
        quantize and f"--quantize {quantize}",
        optimizer != "adamw" and f"--optimizer {optimizer}",
    ):
        if option and not _installed("bitsandbytes"):
            raise BadInput(
                f"{option} needs bitsandbytes, which is not installed: pip install "
                "'fastsiu[quant]'."
            )
    if optimizer.startswith("paged") and device != "cuda":
        raise BadInput(
            f"--optimizer {optimizer} needs a CUDA GPU, and the device is {device}: choose "
            "adamw8bit."
        )
    if attention == "flash_attention_2":
        if device != "cuda":
            raise BadInput(
                f"--attention flash_attention_2 needs a CUDA GPU, and the device is {device}: "
                "choose sdpa."
            )
        if not _installed("flash_attn"):
            raise BadInput(
                "--attention flash_attention_2 needs flash-attn, which is not installed: "
                "pip install 'fastsiu[flash]', or choose sdpa."
            )
        if dtype == "float32":
            raise BadInput(
                "--attention flash_attention_2 computes in 16 bit only: choose --dtype bfloat16, "
                "or sdpa."
            )


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def shown_name(name: str) -> str:
    """A model's name as reports show it: of a directory the last part, for the rest is private."""
    return Path(name).name if Path(name).is_dir() else name


def check_directory(name: str) -> None:
    """Raises BadInput for a path that is not the directory of a model: it does not exist, or holds
    an adapter, or weights that are pickles. The id of a hub model passes."""
    path = Path(name)
    if (path.is_absolute() or name.startswith(".")) and not path.is_dir():
        raise BadInput(
            f"There is no model directory {name}: give a directory or a Hugging Face model id."
        )
    if not path.is_dir():
        return
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise BadInput(
                f"{name} holds an adapter and not a model: give its base with --model, and this "
                "with --adapter."
            )
        raise BadInput(
            f"{name} has no config.json: give the directory of a complete Hugging Face model."
        )
    if (path / "adapter_config.json").is_file():
        # Transformers would put the adapter on without a word, and nothing would take it off again.
        raise BadInput(
            f"{name} holds a model and an adapter: remove its adapter_config.json, or give the "
            "two apart."
        )
    check_weights_are_no_pickles(path)


def check_weights_are_no_pickles(path: Path) -> None:
    """Raises BadInput for a directory whose only weights are pickles: reading one can run any
    code."""
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickles and not any(path.glob("*.safetensors")):
        raise BadInput(
            f"The weights of {path} are no safetensors ({pickles[0]}), and FastSIU reads no "
            "pickles: load them with a program that you trust, and save_pretrained() them."
        )


def read_config(name: str, revision: str | None = None) -> Any:
    """A model's configuration; neither weights nor processor are read. Raises BadInput where there
    is no configuration, or one of which no model can be built."""
    check_directory(name)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, **NO_CODE)
    except Exception as error:  # any: it is others' code on a stranger's files; the reason is told
        refuse_own_code(name, error)
        raise BadInput(
            f"The configuration of {name} cannot be read ({first_line(error)}): check the "
            "model's name and the revision."
        ) from error
    check_sizes(config, name)
    return config


def check_sizes(config: Any, name: str) -> None:
    """Raises BadInput for a number of which no model could be built (`SIZES`). Without this check
    it would show as a crash inside transformers, or after minutes, or never."""
    parts = [config, *(getattr(config, key, None) for key in config.sub_configs)]
    for part in parts:
        for key, value in vars(part).items() if part is not None else ():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            low, high = next(
                (bounds for end, bounds in SIZES if key.endswith(end)), (-math.inf, math.inf)
            )
            if not low <= value <= high:
                raise BadInput(
                    f"The configuration of {name} has {key} = {value}: it would have to be "
                    f"between {low} and {high}; restore its config.json."
                )


def describe(name: str, revision: str | None) -> tuple[Any, Any, str | None]:
    """The small parts of a model: (configuration, processor, commit). A directory has no commit.

    Raises BadInput where configuration or processor is missing, and where the processor takes no
    pictures, has no tokenizer or no chat template.
    """
    config = read_config(name, revision)
    if not Path(name).is_dir():
        # Branches move: from here on everything is read from one commit, which the manifest names.
        found = cached_file(name, "config.json", revision=revision, local_files_only=True)
        revision = extract_commit_hash(found, None) or revision
    processor = load_processor(name, config, revision)
    if getattr(processor, "image_processor", None) is None:
        raise BadInput(
            f"The {type(processor).__name__} of {name} takes no pictures: save the model's full "
            "processor beside it, or give a model that sees."
        )
    if getattr(processor, "tokenizer", None) is None:
        raise BadInput(
            f"The {type(processor).__name__} of {name} has no tokenizer, so it cannot be asked "
            "in words: give a model that answers questions."
        )
    if not (getattr(processor, "chat_template", None) or takes_suffix(processor)):
        raise BadInput(
            f"{name} has no chat template, so nothing says how it is asked and how it answers: "
            "give a model that was trained to answer questions, or save its chat template beside "
            "it."
        )
    check_picture_sizes(processor, name)
    take_limits_off(processor)
    check_template(processor)
    return config, processor, revision


def check_template(processor: Any) -> None:
    """Raises BadInput for a chat template that takes too long or too much memory (`limited`)."""
    templates = getattr(processor, "chat_template", None)
    if not isinstance(templates, dict):
        templates = {"default": templates} if templates else {}
    tokenizer = getattr(processor, "tokenizer", processor)
    tokens = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    for template in templates.values():
        limited.check_template(template, tokens)


def dtype_name(config: Any, dtype: str, device: str) -> str:
    """The dtype's name; "auto" is fp32 on a CPU, elsewhere the dtype that is stored."""
    if dtype != "auto":
        return dtype
    stored = config.dtype or config.get_text_config().dtype or torch.float32
    return "float32" if torch.device(device).type == "cpu" else str(stored).removeprefix("torch.")


def quantisation(config: Any, quantize: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """The quantisation of the language model's linear layers, with `dtype` for the products. Raises
    BadInput for a model that is stored quantised."""
    if getattr(config, "quantization_config", None) is not None:
        raise BadInput(
            "The model is stored quantised already: leave --quantize out, or give the model that "
            "it was made from."
        )
    base = on_meta(config)
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=outside_decoder(base))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=outside_decoder(base),
    )


def on_meta(config: Any, **options: Any) -> Any:
    """The model of a configuration on the meta device, without weights. Raises BadInput where
    transformers cannot build it."""
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config, **options)
    except Exception as error:  # any, as above
        raise BadInput(
            f"{type(config).__name__} cannot be built as an image-text model "
            f"({first_line(error)}): give another model, or --attention eager where sdpa is "
            "refused."
        ) from error


def outside_decoder(base: Any) -> list[str]:
    """Full names of the largest modules that hold nothing of the language model's layers: head,
    vision tower, projector.

    The list replaces transformers' own list of modules that stay unquantised, so it has the head.
    """
    decoder, head, out = base.get_decoder(), base.get_output_embeddings(), []
    # Llama 4's decoder is a whole causal language model
    if any(m is head for m in decoder.modules()):
        out += [name for name, module in base.named_modules() if module is head]
    for holder, module in base.named_modules():
        if module is not decoder and any(m is decoder for m in module.modules()):
            inside = [
                (f"{holder}.{name}".lstrip("."), child) for name, child in module.named_children()
            ]
            out += [
                name for name, child in inside if all(m is not decoder for m in child.modules())
            ]
    return out
