"""Tiny models of several architectures for the fictional world, untrained. All classes are those
that Transformers ships.

Each function is one architecture: configuration, tokenizer, image processor and chat template. It
keeps what sets the family apart: how patches become image tokens, what frames them in the text,
positions in three dimensions, masks that let image tokens see each other. A picture has 6 x 6
patches and 9 image tokens. `make` puts the parts together.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from fastsiu.demo import MODEL_DIR, tiny
from fastsiu.demo.world import SIZE, World
from fastsiu.model.adapter import projector
from fastsiu.model.processor import load_processor

PATCH = 10  # pixels
PATCHES = SIZE // PATCH  # along a picture's side
# Image tokens of one picture: each family makes one of 2 x 2 patches, in its own way.
TOKENS = (PATCHES // 2) ** 2
WIDTH = 128  # of the language model
TOWER = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 288,
}
HALF: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # pixels in [-1, 1]


@dataclass
class Made:
    """An untrained model with its processor.

    side: number of rows, and of columns, that a picture has where its features enter the projector
    save_processor: writes the processor's files to a directory
    """

    model: Any  # a PreTrainedModel; what its family adds, such as `generate`, has no common type
    processor: ProcessorMixin
    side: int
    save_processor: Callable[[Path], Any]

    def save(self, directory: Path) -> None:
        self.model.save_pretrained(directory)
        self.save_processor(directory)


@dataclass(frozen=True)
class Parts:
    """The parts of a model's directory.

    config:    the model's configuration
    tokenizer: with the family's special tokens
    images:    the image processor
    processor: name of the processor's class
    template:  the chat template
    side:      as in `Made`
    options:   further entries of processor_config.json
    """

    config: Any
    tokenizer: PreTrainedTokenizerFast
    images: Any
    processor: str
    template: str
    side: int = PATCHES // 2
    options: dict[str, Any] = field(default_factory=dict)

    def save_processor(self, directory: Path) -> None:
        """Writes the files that a directory of the hub has. They are written part by part: a
        processor with a part for videos needs torchvision to save itself."""
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(directory)
        self.images.save_pretrained(directory)
        described = {"processor_class": self.processor, **self.options}
        (directory / "processor_config.json").write_text(
            json.dumps(described, indent=1) + "\n", encoding="utf-8"
        )
        (directory / "chat_template.jinja").write_text(self.template, encoding="utf-8")
        shutil.copy(MODEL_DIR / "fastsiu.json", directory)  # the recipe for models of this size


def make(name: str, world: World, directory: Path) -> Made:
    """An untrained model in float32 with its processor. The processor's files are written to
    `directory` first and read back from there."""
    if name == "llava":
        tokenizer = tiny.build_tokenizer(world)
        processor = tiny.build_processor(tokenizer)
        return Made(
            tiny.build_model(tokenizer), processor, SIZE // tiny.PATCH, processor.save_pretrained
        )
    parts = ARCHITECTURES[name](world)
    parts.save_processor(directory)
    model = AutoModelForImageTextToText.from_config(parts.config, dtype=torch.float32)
    body = model.base_model
    tower = next(
        getattr(body, name)
        for name in ("vision_tower", "vision_model", "visual")
        if hasattr(body, name)
    )
    tiny.initialise_tower(tower)
    for weight in model.get_submodule(projector(model)).parameters():
        if weight.ndim == 2 and not weight.any():  # Gemma 3's begins at zero
            torch.nn.init.normal_(weight, std=0.02)
    tiny.set_generation(model, parts.tokenizer)
    return Made(
        model, load_processor(str(directory), parts.config), parts.side, parts.save_processor
    )


# Chat templates -----------------------------------------------------------------------------------


def _turns(user: str, assistant: str, close: str, image: str, text: str = "{{ c.text }}") -> str:
    """A chat template. `user` and `assistant` open a turn, `close` ends it, `image` stands for a
    picture, `text` for its words."""
    return (
        "{{ bos_token or '' }}{% for m in messages %}"
        f"{{% if m.role == 'assistant' %}}{assistant}{{% else %}}{user}{{% endif %}}"
        f"{{% for c in m.content if c.type == 'image' %}}{image}{{% endfor %}}"
        f"{{% for c in m.content if c.type == 'text' %}}{text}{{% endfor %}}{close}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{assistant}{{% endif %}}"
    )


CHAT = ("<|im_start|>", "<|im_end|>")
CHAT_ROLES = ("user\n", "assistant\n")


def _chat(image: str) -> str:
    return _turns("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n", image)


# Configurations -----------------------------------------------------------------------------------


def _text(tokenizer: PreTrainedTokenizerFast, kind: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **more,
    }


def _square() -> dict[str, int]:
    return {"height": SIZE, "width": SIZE}


# Architectures ------------------------------------------------------------------------------------


def qwen2_vl(world: World) -> Parts:
    """Rotary positions in two dimensions in the tower, in three in the language model; a merger of
    2 x 2 patches."""
    tokenizer = tiny.build_tokenizer(
        world,
        bos=None,
        eos="<|im_end|>",
        others=CHAT,
        roles=CHAT_ROLES,
        named={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
    )
    tower = {
        "depth": TOWER["num_hidden_layers"],
        "embed_dim": TOWER["hidden_size"],
        "num_heads": TOWER["num_attention_heads"],
        "mlp_ratio": 3,
        "hidden_size": WIDTH,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "hidden_act": "gelu",
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    marks = {
        f"{key}_id": getattr(tokenizer, f"{key}_id")
        for key in ("image_token", "video_token", "vision_start_token", "vision_end_token")
    }
    config = transformers.Qwen2VLConfig(
        text_config=_text(tokenizer, "qwen2_vl_text", rope_parameters=rope),
        vision_config=tower,
        **marks,
        **tiny.ids(tokenizer),
    )
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=2,
        temporal_patch_size=2,
        **HALF,
        size={"shortest_edge": SIZE**2, "longest_edge": SIZE**2},
    )
    return Parts(
        config,
        tokenizer,
        images,
        "Qwen2VLProcessor",
        _chat("<|vision_start|><|image_pad|><|vision_end|>"),
    )


def internvl(world: World) -> Parts:
    """A tower with a class token and learnt positions, 2 x 2 patches shuffled into one token, a
    Qwen2 language model."""
    tokenizer = tiny.build_tokenizer(
        world,
        bos=None,
        eos="<|im_end|>",
        others=CHAT,
        roles=CHAT_ROLES,
        named={
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
    )
    tower = {
        "model_type": "internvl_vision",
        **TOWER,
        "image_size": [SIZE, SIZE],
        "patch_size": [PATCH, PATCH],
        "attention_bias": True,
        "layer_scale_init_value": 1.0,
    }
    config = transformers.InternVLConfig(
        vision_config=tower,
        text_config=_text(tokenizer, "qwen2"),
        image_seq_length=TOKENS,
        downsample_ratio=0.5,
        image_token_id=tiny.token_id(tokenizer, "<IMG_CONTEXT>"),
        **tiny.ids(tokenizer),
    )
    images = transformers.GotOcr2ImageProcessorPil(
        size=_square(), crop_to_patches=True, min_patches=1, max_patches=1, **HALF
    )
    return Parts(
        config,
        tokenizer,
        images,
        "InternVLProcessor",
        _chat("<IMG_CONTEXT>\n"),
        options={"image_seq_length": TOKENS},
    )


def idefics3(world: World) -> Parts:
    """A SigLIP tower, a connector that is one matrix, a Llama language model, spoken to as SmolVLM
    is."""
    grid = tuple(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7))
    tokenizer = tiny.build_tokenizer(
        world,
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        others=grid,
        roles=("User:", "Assistant:", "\n"),
        named={
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
    )
    config = transformers.Idefics3Config(
        vision_config={**TOWER, "image_size": SIZE, "patch_size": PATCH},
        text_config=_text(tokenizer, "llama"),
        scale_factor=2,
        image_token_id=tiny.token_id(tokenizer, "<image>"),
        **tiny.ids(tokenizer),
    )
    images = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": SIZE},
        max_image_size={"longest_edge": SIZE},
        do_image_splitting=False,
        **HALF,
    )
    template = _turns("User:", "Assistant:", "<end_of_utterance>\n", "<image>", " {{ c.text }}")
    return Parts(
        config, tokenizer, images, "Idefics3Processor", template, PATCHES, {"image_seq_len": TOKENS}
    )


def gemma3(world: World) -> Parts:
    """A SigLIP tower, 2 x 2 patches averaged, image tokens that see each other, layers that slide
    and one that does not."""
    tokenizer = tiny.build_tokenizer(
        world,
        bos="<bos>",
        eos="<end_of_turn>",
        others=("<start_of_turn>",),
        roles=("user\n", "model\n", "\n\n"),
        named={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )
    tower = {
        "model_type": "siglip_vision_model",
        **TOWER,
        "image_size": SIZE,
        "patch_size": PATCH,
        "vision_use_head": False,
    }
    text = _text(
        tokenizer,
        "gemma3_text",
        head_dim=WIDTH // 4,
        query_pre_attn_scalar=WIDTH // 4,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
    )
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=tower,
        mm_tokens_per_image=TOKENS,
        **tiny.ids(tokenizer),
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    images = transformers.Gemma3ImageProcessorPil(size=_square(), **HALF)
    template = _turns(
        "<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>\n", "<start_of_image>"
    )
    return Parts(
        config,
        tokenizer,
        images,
        "Gemma3Processor",
        template,
        PATCHES,
        {"image_seq_length": TOKENS},
    )


ARCHITECTURES: dict[str, Callable[[World], Parts]] = {
    "qwen2-vl": qwen2_vl,
    "internvl": internvl,
    "idefics3": idefics3,
    "gemma3": gemma3,
}
