"""Tiny models of every family, built from their configurations and saved as the hub saves them:
weights, tokenizer, image processor, chat template. No download, and no torchvision: see `Pictures`
below for the three families that would need it. `python -P tests/helpers/families.py` measures them
and prints what is in docs/families.md (-P: tests/triton is not the package).

Each builder is what a family is made of here, the kinds of layers that matter present: one that
slides and one that does not, one with a recurrent state and one with attention, one that looks at
the picture across. `save` writes the directory.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import inspect
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    BaseImageProcessor,
    BatchFeature,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.processing_utils import ImagesKwargs

from fastsiu.loss.rows import no_logits
from fastsiu.model import adapter, features, parts, prefix, sharing, vlm
from fastsiu.model.turns import Encoded, Picture
from fastsiu.model.vlm import VLM
from fastsiu.request import Recipe

# WIDTH of an attention head; SIDE of a picture, in pixels
HIDDEN, HEADS, WIDTH, SIDE = (
    32,
    2,
    16,
    28,
)
CORPUS = [
    "USER: What is this? ASSISTANT: This is a cat on a mat. Who is in the picture? Describe the "
    "image, please. "
    "<|im_start|>user assistant system model\nNo, it is not. Two plus three is five. I do not know."
] * 4


@dataclass(frozen=True)
class Parts:
    """What a family's directory holds. `options`: further entries of its processor_config.json."""

    config: Any
    tokenizer: Any
    images: Any
    processor: str
    template: str | None
    options: dict[str, Any] = field(default_factory=dict)


WAYS = ("packed", "key/value", "packed key/value")


@dataclass(frozen=True)
class Family:
    """build:     its parts
    shares:    the ways of sharing a prefix that are exact where the questions differ
    transform: scale and softcap between the head and the logits
    fp32:      relative difference allowed of hidden states and of gradients; fp64: the same, and
    `why` where it is not 1e-9
    needs:     a package without which its processor cannot be made
    broken:    releases of transformers whose own code of the family fails, each with the error
    """

    build: Callable[[], Parts]
    shares: tuple[str, ...] = WAYS
    transform: tuple[float, float | None] = (1.0, None)
    fp32: float = 1e-5
    fp64: float = 1e-9
    why: str = ""
    needs: str = ""
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def fault(self) -> str | None:
        """What fails in the transformers that is installed; None: nothing."""
        return self.broken.get(transformers.__version__)

    @property
    def name(self) -> str:
        return self.build.__name__


# Tokenizers, templates, layers --------------------------------------------------------------------


@functools.cache
def _bytes() -> str:
    """Byte pairs as a tokenizer.json: about 300 of them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return made.to_str()


def tokenizer(*special, bos="<s>", eos="</s>", **named):
    """named: image_token="<image>" and the like, which become attributes."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bytes()),
        bos_token=bos,
        eos_token=eos,
        pad_token="<pad>",
        extra_special_tokens=named,
        padding_side="right",
    )
    tokens = [t for t in ("<pad>", bos, eos, *named.values(), *special) if t]
    made.add_tokens(list(dict.fromkeys(tokens)), special_tokens=True)
    return made


CHAT = ("<|im_start|>", "<|im_end|>")


def ids(tok, **names):
    """image_token_id="<image>" -> its number."""
    return {key: tok.convert_tokens_to_ids(token) for key, token in names.items()}


def turns(user, assistant, close, image, closing=None):
    """A chat template: `user` and `assistant` open a turn, `close` (an answer: `closing`) ends it,
    `image` is a picture."""
    part = f"{{% if c.type == 'image' %}}{image}{{% else %}}{{{{ c.text }}}}{{% endif %}}"
    return (
        f"{{% for m in messages %}}{{% if m.role == 'user' %}}{user}{{% else %}}{assistant}{{% "
        "endif %}"
        f"{{% for c in m.content %}}{part}{{% endfor %}}"
        f"{{% if m.role == 'user' %}}{close}{{% else %}}{closing or close}{{% endif %}}{{% "
        "endfor %}"
        f"{{% if add_generation_prompt %}}{assistant}{{% endif %}}"
    )


def chatml(image):
    return turns("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n", image)


def vicuna(image="<image>\n"):
    # LLaVA 1.5's: leaves both ends to the tokenizer
    return turns("USER: ", "ASSISTANT: ", " ", image)


def gemma(image):
    return turns("<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>\n", image)


def text(tok, kind, **more):
    return {
        "model_type": kind,
        "vocab_size": len(tok),
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "head_dim": WIDTH,
        "max_position_embeddings": 1024,
        "pad_token_id": tok.pad_token_id,
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
        **more,
    }


def vision(kind, **more):
    return {
        "model_type": kind,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 14,
        **more,
    }


def siglip(**more):
    return vision("siglip_vision_model", vision_use_head=False, **more)


def square(**more):
    return {"size": {"height": SIDE, "width": SIDE}, **more}


CLIP = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
PINS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}


# Pictures for families whose only image processor needs torchvision -------------------------------


class Pictures(BaseImageProcessor):
    """One tile: as much of an image processor as a test needs where torchvision, and so the
    family's own, is not there. It is put into transformers' own table of image processors, as a
    package that brings a new one would do."""

    side = SIDE

    def __call__(self, images, return_tensors=None, **_):
        pictures = [p for group in images for p in (group if isinstance(group, list) else [group])]
        arrays = [
            np.asarray(p.resize((self.side, self.side)), dtype=np.float32).transpose(2, 0, 1)
            / 127.5
            - 1
            for p in pictures
        ]
        return BatchFeature(self.tensors(np.stack(arrays)), tensor_type=return_tensors)

    def fetch_images(self, images):
        return images


class TinyLlama4ImageProcessor(Pictures):
    def tensors(self, pixels):
        return {"pixel_values": pixels, "aspect_ratios": [[1, 1]] * len(pixels)}


class TinyCohere2ImageProcessor(Pictures):
    patch_size = 2  # tokens along the side of a tile

    def tensors(self, pixels):
        return {"pixel_values": pixels, "num_patches": [1] * len(pixels)}


class RowsAndColumns(ImagesKwargs, total=False):
    return_row_col_info: bool


class TinyLfm2ImageProcessor(Pictures):
    valid_kwargs = RowsAndColumns
    patch, use_thumbnail, tile_size, encoder_patch_size, downsample_factor = 7, False, SIDE, 7, 2
    do_image_splitting, min_tiles, max_tiles, min_image_tokens, max_image_tokens = False, 1, 1, 4, 4

    def tensors(self, pixels):
        n, c, h, w = pixels.shape
        p, a = self.patch, h // self.patch
        patches = (
            pixels.reshape(n, c, a, p, a, p)
            .transpose(0, 2, 4, 3, 5, 1)
            .reshape(n, a * a, p * p * c)
        )
        return {
            "pixel_values": patches,
            "pixel_attention_mask": np.ones((n, a * a), dtype=np.int64),
            "spatial_shapes": np.full((n, 2), a),
            "image_rows": [1] * n,
            "image_cols": [1] * n,
            "image_sizes": [[h, w]] * n,
        }


def pictures(config, stand_in):
    AutoImageProcessor.register(
        type(config),
        image_processor_classes={"pil": stand_in, "torchvision": stand_in},
        exist_ok=True,
    )
    return stand_in()


# LLaVA and its kind -------------------------------------------------------------------------------


def clip():
    return vision("clip_vision_model", projection_dim=16)


LLAVA = {
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


def llava():
    tok = tokenizer(image_token="<image>")
    config = transformers.LlavaConfig(
        vision_config=clip(),
        text_config=text(tok, "llama"),
        image_token_index=tok.image_token_id,
        image_seq_length=4,
    )
    return Parts(
        config, tok, transformers.CLIPImageProcessorPil(**CLIP), "LlavaProcessor", vicuna(), LLAVA
    )


def llava_next(kind="mistral", **more):
    tok = tokenizer(image_token="<image>")
    config = transformers.LlavaNextConfig(
        vision_config=clip(),
        text_config=text(tok, kind, **more),
        image_seq_length=4,
        image_token_index=tok.image_token_id,
        image_grid_pinpoints=PINS,
    )
    images = transformers.LlavaNextImageProcessorPil(**CLIP, image_grid_pinpoints=PINS)
    return Parts(config, tok, images, "LlavaNextProcessor", vicuna(), LLAVA)


def llava_next_granite():
    """A text model with a scale on its logits, which the wrapper's own forward leaves out."""
    return llava_next(
        "granite",
        logits_scaling=8.0,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.25,
    )


def llava_onevision():
    tok = tokenizer(*CHAT, image_token="<image>", video_token="<video>", bos=None, eos="<|im_end|>")
    config = transformers.LlavaOnevisionConfig(
        vision_config=siglip(),
        text_config=text(tok, "qwen2"),
        image_token_index=tok.image_token_id,
        image_grid_pinpoints=PINS,
        video_token_index=tok.video_token_id,
    )
    images = transformers.LlavaOnevisionImageProcessorPil(**square(), image_grid_pinpoints=PINS)
    options = {"num_image_tokens": 4, "vision_feature_select_strategy": "full"}
    return Parts(config, tok, images, "LlavaOnevisionProcessor", chatml("<image>\n"), options)


def fast_vlm():
    """A convolutional tower. The released ones are timm's; the language model cannot tell."""
    tok = tokenizer(*CHAT, image_token="<image>", bos=None, eos="<|im_end|>")
    tower = {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "layer_type": "basic",
        "hidden_size": 32,
    }
    config = transformers.FastVlmConfig(
        vision_config=tower, text_config=text(tok, "qwen2"), image_token_index=tok.image_token_id
    )
    options = {
        "patch_size": 7,
        "vision_feature_select_strategy": "full",
        "num_additional_image_tokens": 0,
    }
    return Parts(
        config,
        tok,
        transformers.CLIPImageProcessorPil(**CLIP),
        "LlavaProcessor",
        chatml("<image>\n"),
        options,
    )


# Positions in three dimensions --------------------------------------------------------------------

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
INTERLEAVED = {**ROPE, "mrope_interleaved": True}
MERGED = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "out_hidden_size": HIDDEN,
    "num_heads": 2,
}
DEEP = {
    **MERGED,
    "patch_size": 16,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}


def qwen(config, kind, tower, processor, patch=14, rope=None, **more):
    tok = tokenizer(
        *CHAT,
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        bos=None,
        eos="<|im_end|>",
    )
    found = {
        f"{k}_token_id": getattr(tok, f"{k}_token_id")
        for k in ("image", "video", "vision_start", "vision_end")
    }
    made = config(
        text_config=text(tok, kind, rope_parameters=rope or ROPE, **more),
        vision_config=tower,
        **found,
    )
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=patch, min_pixels=(2 * patch) ** 2, max_pixels=(4 * patch) ** 2
    )
    return Parts(
        made, tok, images, processor, chatml("<|vision_start|><|image_pad|><|vision_end|>")
    )


def qwen2_vl():
    tower = {"depth": 2, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2}
    return qwen(transformers.Qwen2VLConfig, "qwen2_vl_text", tower, "Qwen2VLProcessor")


def qwen2_5_vl():
    tower = {**MERGED, "fullatt_block_indexes": [1]}
    return qwen(transformers.Qwen2_5_VLConfig, "qwen2_5_vl_text", tower, "Qwen2_5_VLProcessor")


def qwen3_vl():
    """Image features enter several layers (deepstack)."""
    return qwen(
        transformers.Qwen3VLConfig, "qwen3_vl_text", DEEP, "Qwen3VLProcessor", 16, INTERLEAVED
    )


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def qwen3_vl_moe():
    return qwen(
        transformers.Qwen3VLMoeConfig,
        "qwen3_vl_moe_text",
        DEEP,
        "Qwen3VLProcessor",
        16,
        INTERLEAVED,
        **EXPERTS,
    )


LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}


def qwen3_5():
    """Linear attention: a recurrent state beside the keys and values."""
    rope, tower = (
        {**INTERLEAVED, "partial_rotary_factor": 1.0},
        {k: v for k, v in DEEP.items() if "deepstack" not in k},
    )
    return qwen(
        transformers.Qwen3_5Config, "qwen3_5_text", tower, "Qwen3VLProcessor", 16, rope, **LINEAR
    )


def glm4v():
    tok = tokenizer(
        *CHAT,
        "<|begin_of_image|>",
        "<|end_of_image|>",
        "<|begin_of_video|>",
        "<|end_of_video|>",
        image_token="<|image|>",
        video_token="<|video|>",
        bos=None,
        eos="<|im_end|>",
    )
    found = ids(
        tok,
        image_token_id="<|image|>",
        video_token_id="<|video|>",
        image_start_token_id="<|begin_of_image|>",
        image_end_token_id="<|end_of_image|>",
        video_start_token_id="<|begin_of_video|>",
        video_end_token_id="<|end_of_video|>",
    )
    config = transformers.Glm4vConfig(
        text_config=text(tok, "glm4v_text", rope_parameters=ROPE),
        **found,
        vision_config={**MERGED, "patch_size": 14, "image_size": 56},
    )
    images = transformers.Glm4vImageProcessorPil(
        size={"shortest_edge": 28 * 28 * 2, "longest_edge": 56 * 56 * 2}
    )
    return Parts(
        config, tok, images, "Glm4vProcessor", chatml("<|begin_of_image|><|image|><|end_of_image|>")
    )


# Google's: image tokens that see one another both ways, sliding windows, softcaps -----------------


def paligemma(kind="gemma", **more):
    """The question is part of what looks both ways, so that a prefix can be shared only with the
    question in it."""
    tok = tokenizer(image_token="<image>", bos="<bos>", eos="<eos>")
    # the processor adds tokens for places and segments
    described = text(tok, kind, **more) | {"vocab_size": len(tok) + 1152}
    config = transformers.PaliGemmaConfig(
        vision_config=siglip(projection_dim=HIDDEN),
        text_config=described,
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
        image_token_index=tok.image_token_id,
    )
    images = transformers.SiglipImageProcessorPil(**square(image_seq_length=4))
    return Parts(config, tok, images, "PaliGemmaProcessor", None)


def paligemma2():
    return paligemma("gemma2", **SLIDING, final_logit_softcapping=0.5, attn_logit_softcapping=50.0)


def gemma3():
    tok = tokenizer(
        "<start_of_turn>",
        "<end_of_turn>",
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        bos="<bos>",
        eos="<eos>",
    )
    config = transformers.Gemma3Config(
        text_config=text(tok, "gemma3_text", **SLIDING),
        vision_config=siglip(),
        mm_tokens_per_image=4,
        boi_token_index=tok.boi_token_id,
        eoi_token_index=tok.eoi_token_id,
        image_token_index=tok.image_token_id,
    )
    return Parts(
        config,
        tok,
        transformers.Gemma3ImageProcessorPil(**square()),
        "Gemma3Processor",
        gemma("<start_of_image>"),
        {"image_seq_length": 4},
    )


def gemma4():
    tok = tokenizer(
        "<start_of_turn>",
        "<end_of_turn>",
        image_token="<|image|>",
        boi_token="<|image>",
        eoi_token="<image|>",
        audio_token="<|audio|>",
        boa_token="<|audio>",
        eoa_token="<audio|>",
        video_token="<|video|>",
        bos="<bos>",
        eos="<eos>",
    )
    described = text(
        tok,
        "gemma4_text",
        **SLIDING,
        global_head_dim=WIDTH,
        final_logit_softcapping=0.5,
        vocab_size_per_layer_input=len(tok),
        hidden_size_per_layer_input=8,
        use_bidirectional_attention="vision",
    )
    tower = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "patch_size": 8,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    }
    found = {
        f"{k}_token_id": getattr(tok, f"{k}_token_id")
        for k in ("image", "boi", "eoi", "video", "audio", "boa")
    }
    config = transformers.Gemma4Config(
        text_config=described,
        vision_config=tower,
        audio_config=None,
        eoa_token_index=tok.eoa_token_id,
        **found,
    )
    images = transformers.Gemma4ImageProcessorPil(
        patch_size=8, pooling_kernel_size=2, max_soft_tokens=70
    )
    return Parts(
        config, tok, images, "Gemma4Processor", gemma("<|image|>"), {"image_seq_length": 70}
    )


# Tiles --------------------------------------------------------------------------------------------


def idefics3(
    config=transformers.Idefics3Config,
    images=transformers.Idefics3ImageProcessorPil,
    processor="Idefics3Processor",
):
    grid = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    tok = tokenizer(
        *grid,
        "<global-img>",
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        end_of_utterance_token="<end_of_utterance>",
        global_image_token="<global-img>",
        bos="<|im_start|>",
        eos="<end_of_utterance>",
    )
    tower = {k: v for k, v in vision("", patch_size=7).items() if k != "model_type"}
    made = config(
        vision_config=tower,
        text_config=text(tok, "llama"),
        image_token_id=tok.image_token_id,
        scale_factor=2,
        pad_token_id=tok.pad_token_id,
    )
    seen = images(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    template = turns("<|im_start|>User:", "Assistant:", "<end_of_utterance>\n", "<image>")
    return Parts(made, tok, seen, processor, template, {"image_seq_len": 4})


def smolvlm():
    return idefics3(
        transformers.SmolVLMConfig, transformers.SmolVLMImageProcessorPil, "SmolVLMProcessor"
    )


def internvl():
    tok = tokenizer(
        *CHAT,
        context_image_token="<IMG_CONTEXT>",
        start_image_token="<img>",
        end_image_token="</img>",
        video_token="<video>",
        bos=None,
        eos="<|im_end|>",
    )
    tower = {**vision("internvl_vision"), "image_size": [SIDE, SIDE], "patch_size": [7, 7]}
    config = transformers.InternVLConfig(
        vision_config=tower,
        text_config=text(tok, "qwen2"),
        image_seq_length=4,
        image_token_id=tok.context_image_token_id,
    )
    images = transformers.GotOcr2ImageProcessorPil(
        **square(crop_to_patches=True, min_patches=1, max_patches=2)
    )
    return Parts(
        config, tok, images, "InternVLProcessor", chatml("<IMG_CONTEXT>\n"), {"image_seq_length": 4}
    )


def cohere2_vision():
    tok = tokenizer(
        *CHAT,
        image_token="<|IMG_PATCH|>",
        boi_token="<|START_OF_IMG|>",
        eoi_token="<|END_OF_IMG|>",
        img_line_break_token="<|IMG_LINE_BREAK|>",
        eos="<|im_end|>",
    )
    config = transformers.Cohere2VisionConfig(
        vision_config=siglip(patch_size=7),
        text_config=text(tok, "cohere2", logit_scale=0.25, **SLIDING),
        downsample_factor=2,
        image_token_id=tok.image_token_id,
        alignment_intermediate_size=64,
    )
    return Parts(
        config,
        tok,
        pictures(config, TinyCohere2ImageProcessor),
        "Cohere2VisionProcessor",
        chatml("<|IMG_PATCH|>"),
    )


def aya_vision():
    tok = tokenizer(
        *CHAT,
        "<|START_OF_IMG|>",
        "<|END_OF_IMG|>",
        "<|IMG_PATCH|>",
        "<|IMG_LINE_BREAK|>",
        "TILE_GLOBAL",
        "TILE_1",
        "TILE_2",
        image_token="<image>",
        eos="<|im_end|>",
    )
    config = transformers.AyaVisionConfig(
        vision_config=siglip(patch_size=7),
        text_config=text(tok, "cohere2", logit_scale=0.25, **SLIDING),
        downsample_factor=2,
        image_token_index=tok.convert_tokens_to_ids("<|IMG_PATCH|>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        alignment_intermediate_size=64,
    )
    images = transformers.GotOcr2ImageProcessorPil(
        **square(crop_to_patches=True, min_patches=1, max_patches=2)
    )
    return Parts(
        config,
        tok,
        images,
        "AyaVisionProcessor",
        chatml("<image>"),
        {"patch_size": 7, "img_size": SIDE, "downsample_factor": 2},
    )


def mistral3(config=transformers.Mistral3Config, **more):
    tok = tokenizer(
        "[INST]",
        "[/INST]",
        image_token="[IMG]",
        image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
    )
    made = config(
        vision_config=vision("pixtral", image_size=56, head_dim=8),
        text_config=text(tok, "mistral"),
        image_token_index=tok.image_token_id,
        spatial_merge_size=1,
        **more,
    )
    images = transformers.PixtralImageProcessorPil(
        size={"longest_edge": 56}, patch_size={"height": 14, "width": 14}
    )
    template = turns("[INST]", "[/INST]", "", "[IMG]", "</s>")
    if importlib.util.find_spec("torchvision"):
        return Parts(made, tok, images, "PixtralProcessor", template, {"patch_size": 14})
    # Pixtral's own cannot be imported without torchvision. This one writes the same placeholders
    # but for the breaks of lines.
    options = LLAVA | {"vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    return Parts(made, tok, images, "LlavaProcessor", template, options)


# A picture seen across, from layers of their own; experts and chunks; convolutions over tokens ----


def mllama():
    tok = tokenizer(
        "<|python_tag|>", *CHAT, image_token="<|image|>", bos="<|begin_of_text|>", eos="<|im_end|>"
    )
    tower = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_size": 24,
        "vision_output_dim": 32,
        "image_size": SIDE,
        "patch_size": 14,
        "max_num_tiles": 2,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    described = text(tok, "mllama_text_model", num_hidden_layers=3, cross_attention_layers=[1])
    config = transformers.MllamaConfig(
        vision_config=tower, text_config=described, image_token_index=tok.image_token_id
    )
    images = transformers.MllamaImageProcessorPil(**square(max_image_tiles=2))
    return Parts(config, tok, images, "MllamaProcessor", chatml("<|image|>"))


def llama4():
    tok = tokenizer(
        *CHAT,
        "<|image_start|>",
        "<|image_end|>",
        "<|patch|>",
        "<|tile_x_separator|>",
        "<|tile_y_separator|>",
        image_token="<|image|>",
        bos="<|begin_of_text|>",
        eos="<|im_end|>",
    )
    tower = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "image_size": SIDE,
        "patch_size": 7,
    }
    described = text(
        tok,
        "llama4_text",
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=16,
        no_rope_layers=[1, 0],
        layer_types=["chunked_attention", "full_attention"],
    )
    config = transformers.Llama4Config(
        vision_config=tower,
        text_config=described,
        **ids(
            tok,
            boi_token_index="<|image_start|>",
            eoi_token_index="<|image_end|>",
            image_token_index="<|patch|>",
        ),
    )
    return Parts(
        config,
        tok,
        pictures(config, TinyLlama4ImageProcessor),
        "Llama4Processor",
        chatml("<|image|>"),
        {"patch_size": 7, "pixel_shuffle_ratio": 0.5},
    )


def lfm2_vl():
    tok = tokenizer(
        *CHAT,
        image_token="<image>",
        image_start_token="<|image_start|>",
        image_end_token="<|image_end|>",
        image_thumbnail_token="<|img_thumbnail|>",
        eos="<|im_end|>",
    )
    config = transformers.Lfm2VlConfig(
        vision_config=vision(
            "siglip2_vision_model", num_patches=16, patch_size=7, vision_use_head=False
        ),
        text_config=text(
            tok, "lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
        ),
        image_token_id=tok.image_token_id,
        projector_hidden_size=32,
    )
    return Parts(
        config, tok, pictures(config, TinyLfm2ImageProcessor), "Lfm2VlProcessor", chatml("<image>")
    )


# Nobody wrote a line for these: they follow transformers' public API ------------------------------


def vipllava():
    """Features of several layers of the tower."""
    tok = tokenizer(image_token="<image>")
    config = transformers.VipLlavaConfig(
        vision_config={**clip(), "num_hidden_layers": 2},
        text_config=text(tok, "llama"),
        image_token_index=tok.image_token_id,
        vision_feature_layer=[-2, -1],
    )
    return Parts(
        config, tok, transformers.CLIPImageProcessorPil(**CLIP), "LlavaProcessor", vicuna(), LLAVA
    )


def idefics2():
    """A resampler makes the picture's tokens."""
    tok = tokenizer(
        "<end_of_utterance>",
        image_token="<image>",
        image_boundary_token="<fake_token_around_image>",
        eos="<end_of_utterance>",
    )
    tower = {k: v for k, v in vision("", patch_size=7).items() if k != "model_type"}
    resampler = {
        "hidden_size": HIDDEN,
        "resampler_n_latents": 4,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "resampler_head_dim": 16,
        "num_key_value_heads": 1,
    }
    config = transformers.Idefics2Config(
        vision_config=tower,
        perceiver_config=resampler,
        text_config=text(tok, "mistral"),
        image_token_id=tok.image_token_id,
    )
    images = transformers.Idefics2ImageProcessorPil(
        size={"shortest_edge": 14, "longest_edge": SIDE}, do_image_splitting=False
    )
    template = turns("User:", "Assistant:", "<end_of_utterance>\n", "<image>")
    return Parts(config, tok, images, "Idefics2Processor", template, {"image_seq_len": 4})


def ovis2():
    """A visual vocabulary."""
    marks = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    tok = tokenizer(*CHAT, *marks, "<IMG_ATOM>", image_token="<image>", bos=None, eos="<|im_end|>")
    tower = {
        **vision("ovis2_vision", patch_size=7),
        "vocab_size": 40,
        "hidden_stride": 2,
        "num_visual_indicator_tokens": 5,
    }
    config = transformers.Ovis2Config(
        vision_config=tower,
        text_config=text(tok, "qwen2"),
        image_token_id=tok.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tok.convert_tokens_to_ids(list(marks)),
        hidden_size=HIDDEN,
        vocab_size=len(tok),
    )
    images = transformers.Ovis2ImageProcessorPil(**square(crop_to_patches=False))
    return Parts(
        config, tok, images, "Ovis2Processor", chatml("<image>\n"), {"image_seq_length": 4}
    )


def deepseek_vl():
    tok = tokenizer(*CHAT, image_token="<image_placeholder>", eos="<|im_end|>")
    config = transformers.DeepseekVLConfig(
        vision_config=siglip(), text_config=text(tok, "llama"), image_token_id=tok.image_token_id
    )
    images = transformers.DeepseekVLImageProcessorPil(**square(min_size=14))
    return Parts(
        config,
        tok,
        images,
        "DeepseekVLProcessor",
        chatml("<image_placeholder>"),
        {"num_image_tokens": 4},
    )


def qwen3_5_moe():
    rope, tower = (
        {**INTERLEAVED, "partial_rotary_factor": 1.0},
        {k: v for k, v in DEEP.items() if "deepstack" not in k},
    )
    more = {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32}
    return qwen(
        transformers.Qwen3_5MoeConfig,
        "qwen3_5_moe_text",
        tower,
        "Qwen3VLProcessor",
        16,
        rope,
        **more,
    )


def granite4_vision():
    """Features of several layers of the tower enter several layers of the language model; a scale
    on the logits that counts."""
    tok = tokenizer(image_token="<image>")
    tower = siglip(num_hidden_layers=2) | {"hidden_size": 64, "patch_size": 7}
    described = text(
        tok,
        "granite4_vision_text",
        logits_scaling=8.0,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.25,
    )
    config = transformers.Granite4VisionConfig(
        vision_config=tower,
        text_config=described,
        image_token_index=tok.image_token_id,
        image_grid_pinpoints=PINS,
        image_seq_length=4,
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 0]],
        spatial_target_layers=[1],
        vision_feature_select_strategy="full",
        projector_dropout=0.0,
    )
    images = transformers.LlavaNextImageProcessorPil(**CLIP, image_grid_pinpoints=PINS)
    options = {"patch_size": 7, "vision_feature_select_strategy": "full", "downsample_rate": "1/2"}
    return Parts(config, tok, images, "Granite4VisionProcessor", vicuna(), options)


NORMS = "its norms compute in fp32 whatever the dtype"
STATE = ("key/value",)  # all that can be had where layers carry a state from token to token
# Its forward reads a field that its language model's output has not. Until 5.23.0 it did not.
NO_OUTPUTS = "AttributeError: 'MoeCausalLMOutputWithPast' object has no attribute 'image_outputs'"
LINEAR_ATTENTION = {
    "shares": STATE,
    "fp32": 1e-4,
    "fp64": 1e-4,
    "why": "linear attention computes in fp32 whatever the dtype",
}

FAMILIES = {
    f.name: f
    for f in (
        Family(llava),
        Family(llava_next),
        Family(llava_next_granite),
        Family(llava_onevision),
        Family(fast_vlm),
        Family(qwen2_vl),
        Family(qwen2_5_vl),
        Family(qwen3_vl),
        Family(qwen3_vl_moe, fp64=1e-7, why="its router computes in fp32"),
        Family(qwen3_5, **LINEAR_ATTENTION),
        Family(glm4v),
        Family(paligemma, ()),
        Family(paligemma2, (), (1.0, 0.5), fp64=1e-7, why="its softmax computes in fp32"),
        Family(gemma3),
        Family(gemma4, transform=(1.0, 0.5), fp64=1e-7, why=NORMS),
        Family(idefics3),
        Family(smolvlm, needs="num2words"),
        Family(internvl),
        Family(cohere2_vision, fp64=1e-7, why=NORMS),
        Family(aya_vision, fp64=1e-7, why=NORMS),
        Family(mistral3),
        Family(mllama),
        Family(llama4, fp64=1e-7, why=NORMS, broken={"5.24.0": NO_OUTPUTS}),
        Family(lfm2_vl, STATE),
        Family(vipllava),
        Family(idefics2),
        Family(ovis2),
        Family(deepseek_vl),
        Family(qwen3_5_moe, **LINEAR_ATTENTION),
        Family(granite4_vision, transform=(0.125, None)),
    )
}


# Directories --------------------------------------------------------------------------------------


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (SIDE, 2 * SIDE, 3), dtype=np.uint8)
    )


def save(family: Family, directory: Path) -> Path:
    """Weights N(0, 0.15), far from the all but linear start of a fresh model; what begins as a
    closed gate is opened."""
    parts = family.build()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(parts.config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif "gate" in name and parameter.numel() == 1:
            torch.nn.init.constant_(parameter, 0.5)
    model.save_pretrained(directory)
    parts.tokenizer.save_pretrained(directory)
    parts.images.save_pretrained(directory)
    described = {"processor_class": parts.processor, **parts.options}
    (directory / "processor_config.json").write_text(json.dumps(described))
    if parts.template is not None:
        (directory / "chat_template.jinja").write_text(parts.template)
    return directory


# Cases and what is measured of them ---------------------------------------------------------------

SAID = (
    ("What is this?", "This is a cat on a mat.", 0),
    ("Who is in the picture?", "I do not know.", 0),
    ("Is it five?", "No.", 1),
    ("What is two plus three?", "Two plus three is five.", None),
    ("Describe the image, please.", "A cat, it is on a mat.", 0),
    ("What is this?", "It is not a cat.", 1),
    ("Who is five?", "I do not know.", None),
    ("Describe it.", "A mat.", None),
)


@dataclass
class Case:
    """A family's directory as fastsiu loads it, with an adapter far from zero and turns about two
    pictures and about none.

    tower: names of the modules without children that saw the two pictures, each with the number of
    its calls
    """

    family: Family
    directory: Path
    vlm: VLM
    turns: list[Encoded]
    shown: list[Picture | None]
    tower: dict[str, int]

    @property
    def features(self):
        return [None if p is None else p.features for p in self.shown]

    def double(self) -> Case:
        """The same case in fp64, its pictures seen anew."""
        twin = copy.deepcopy(self.vlm.model).double()
        without_rounding(twin)
        twin.base_model.model.set_experts_implementation("eager")  # grouped products know no fp64
        loaded = replace(self.vlm, model=twin, base=twin.base_model.model)
        again = {id(p): loaded.picture(p.image) for p in self.shown if p is not None}
        return replace(self, vlm=loaded, shown=[p and again[id(p)] for p in self.shown])


def open_case(family: Family, directory: Path, **options: Any) -> Case:
    loaded = vlm.load(str(save(family, directory)), device="cpu", **options)
    with calls(loaded.base) as ran:
        seen = [loaded.picture(picture(seed)) for seed in (0, 1)]
    language = {*loaded.base.get_decoder().modules(), loaded.base.get_output_embeddings()}
    tower = {name: n for name, n in ran.items() if loaded.base.get_submodule(name) not in language}
    shown = [None if which is None else seen[which] for *_, which in SAID]
    encoded = [
        loaded.encode(question, answer, p)
        for (question, answer, _), p in zip(SAID, shown, strict=True)
    ]
    adapter.attach(loaded, Recipe(rank=4, lora_dropout=0.0))
    random = torch.Generator().manual_seed(1)
    for name, parameter in loaded.model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=random)
    return Case(family, directory, loaded, encoded, shown, tower)


def without_rounding(model):
    """RMSNorms of most families compute in fp32 whatever the dtype: here they do not, on these
    instances."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and isinstance(
            getattr(module, "weight", None), Tensor
        ):
            eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            x = torch.randn(3, len(module.weight), dtype=module.weight.dtype)
            plain = lambda x, eps=eps: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            weights = [module.weight, 1 + module.weight]  # Gemma's convention
            weight = min(weights, key=lambda w: float((plain(x) * w - module(x)).abs().max()))
            assert torch.allclose(plain(x) * weight, module(x), atol=1e-5)
            module.forward = lambda x, plain=plain, weight=weight: plain(x) * weight


@contextlib.contextmanager
def calls(model):
    """Inside, how often each module without children runs, by its name."""
    found = Counter()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: found.update([name]))
        for name, module in model.named_modules()
        if not any(module.children())
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class Products(TorchFunctionMode):
    """Inside, counts the products with one weight."""

    def __init__(self, weight):
        self.weight, self.seen = weight, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen += function is torch.nn.functional.linear and args[1] is self.weight
        return function(*args, **(kwargs or {}))


def separate(case: Case) -> Tensor:
    """[N, D]: each turn in a forward of its own, with its pixels: nothing is cached, shared, padded
    or masked."""
    loaded, rows = case.vlm, []
    for (question, answer, _), turn, shown in zip(SAID, case.turns, case.shown, strict=True):
        inputs = dict(turn.inputs)
        if shown is not None:
            suffix = {"suffix": [answer]} if loaded.suffixed else {}
            text, ids = loaded.render(question, True), turn.inputs["input_ids"]
            found = loaded.processor(
                text=[text],
                images=[shown.image],
                return_tensors="pt",
                add_special_tokens=False,
                **suffix,
            )
            # of the prompt; of a prefix language model, of the whole turn
            begun = found["input_ids"]
            assert torch.equal(begun, ids[:, : begun.shape[1]]) and (
                not loaded.suffixed or begun.shape == ids.shape
            )
            inputs = dict(found) if loaded.suffixed else {**found, **turn.inputs}
            dtype = loaded.head_weight.dtype
            inputs = {
                k: v.to(dtype) if v.is_floating_point() else v
                for k, v in inputs.items()
                if k != "labels"
            }
        with no_logits(loaded.base) as kept:
            loaded.model(**inputs, use_cache=False)
        rows.append(kept["hidden"][0, turn.rows])
    return torch.cat(rows)


def gradients(case: Case, states: Tensor) -> tuple[Tensor, Tensor]:
    """The states, and the adapter's gradient for an upstream gradient that no permutation of the
    rows leaves as it is."""
    case.vlm.model.zero_grad(set_to_none=True)
    direction = torch.linspace(-1, 2, states.numel(), dtype=states.dtype).view_as(states).sin()
    (states * direction).sum().backward()
    return states.detach(), torch.cat(
        [p.grad.flatten() for p in case.vlm.model.parameters() if p.grad is not None]
    )


def apart(found, expected) -> tuple[float, float]:
    """The relative differences of states and of gradients."""
    return tuple(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def shared(case: Case, way: str, micro_batch: int | None = None) -> tuple[Tensor, Tensor]:
    """States and gradients of the shared-prefix path. `way`: "plain" as well, which shares the
    picture's features only."""
    case.vlm.shares = () if way == "plain" else (way,)
    return gradients(
        case, prefix.supervised_states(case.vlm, case.turns, case.features, micro_batch=micro_batch)
    )


def plan(case: Case) -> tuple[tuple[str, ...], list[str]]:
    said: list[str] = []
    return sharing.plan_sharing(case.vlm, case.turns, case.shown, said.append), said


# The table of docs/families.md --------------------------------------------------------------------


def row(family: Family, directory: Path) -> str:
    """Measures a family: states / gradients, relative to separate forwards with pixels, all at once
    or two at a time."""
    case = open_case(family, directory)
    exact, _ = plan(case)
    expected, cells = gradients(case, separate(case)), {}
    for way in ("plain", *exact):
        pairs = [apart(shared(case, way, most), expected) for most in (None, 2)]
        cells[way] = " / ".join(f"{max(pair[i] for pair in pairs):.0e}" for i in (0, 1))
    twin = case.double()
    expected = gradients(twin, separate(twin))
    fp64 = max(max(apart(shared(twin, way), expected)) for way in ("plain", *exact))
    loaded = case.vlm
    scale = "" if loaded.logit_scale == 1 else f"scale {loaded.logit_scale:g}"
    head = scale or (f"softcap {loaded.logit_softcap:g}" if loaded.logit_softcap else "plain")
    tied = loaded.base.get_input_embeddings().weight is loaded.head_weight
    linears = sum(hasattr(module, "lora_A") for module in loaded.base.modules())
    beside = f" ({family.why})" if family.why else ""
    columns = [
        family.name,
        cells["plain"],
        *(cells.get(way, "-") for way in WAYS),
        f"{fp64:.0e}{beside}",
        f"{head}{', tied' if tied else ''}",
        str(linears),
        loaded.entry,
    ]
    return f"| {' | '.join(columns)} |"


def others() -> dict[str, list[str]]:
    """The classes that transformers calls image-text-to-text, by how image features enter them; ""
    where they cannot."""
    found: dict[str, list[str]] = {}
    for kind, name in sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()):
        taken = inspect.signature(getattr(transformers, name).forward).parameters
        found.setdefault(
            next((entry for entry in features.ENTRIES if entry in taken), ""), []
        ).append(kind)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    parts.WORTH, parts.FORWARD = float("inf"), 0  # sharing is used at these sizes too
    names = ("family", "plain", *WAYS, "fp64, worst", "head", "linears", "features enter by")
    print(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}")
    for made in FAMILIES.values():
        if made.fault:
            said = f"broken in transformers {transformers.__version__} ({made.fault})"
            print(f"| {made.name} | {said} |{' - |' * (len(names) - 2)}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            print(row(made, Path(folder)), flush=True)
    for entry, kinds in others().items():
        print(f"\n{len(kinds)} model types with {entry or 'none of them'}: {', '.join(kinds)}")
