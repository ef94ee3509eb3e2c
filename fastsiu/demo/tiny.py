"""The parts of the tiny LLaVA: tokenizer, architecture, processor. All classes are those that
Transformers ships."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fastsiu.demo import wording
from fastsiu.demo.draw import SIZE
from fastsiu.demo.world import KNOWN, World

PATCH = 12  # pixels
TOKENS = (SIZE // PATCH) ** 2  # image tokens of one picture
VOCABULARY = 1000

# An image always comes first in its turn, wherever the message has it: training has seen no other
# order.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %} ASSISTANT:{% else %}USER:{% endif %}"
    "{% if m['content'] is string %} {{ m['content'] }}{% else %}"
    "{% for c in m['content'] if c['type'] == 'image' %}<image>{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %} {{ c['text'] }}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def build_tokenizer(
    world: World,
    *,
    bos: str | None = "<s>",
    eos: str = "</s>",
    named: dict[str, str] | None = None,
    others: tuple[str, ...] = (),
    roles: tuple[str, ...] = (),
) -> PreTrainedTokenizerFast:
    """Byte-level BPE. Every word of a known name is one token, with or without a space before it.

    named:  special tokens by the name under which a family's processor looks for them; None:
            LLaVA's
    others: further special tokens
    roles:  what the family's chat template says of whose turn it is ("user\\n"). Without them, as
            for LLaVA, every text follows a space. With them it need not, and the vocabulary is half
            as large again, for words without a space
    """
    named = {"image_token": "<image>"} if named is None else named
    rng = random.Random("tokenizer")
    questions = [*world.text_questions(KNOWN), *world.general_questions()]
    corpus = [text for question in questions for text in (question.question, question.answer)]
    for i in range(800):
        sketch = world.sketch((None,), f"tokenizer/{i}")
        for topic in (
            "who.open",
            "who.name",
            "description",
            *(key for key in wording.TRAIN if key.startswith("attribute")),
        ):
            question = world.ask(sketch, topic, rng)
            corpus += [question.question, question.answer]
    for topic, texts in wording.TRAIN.items():
        for text in texts:
            names = [
                text.format(
                    n=rng.choice(KNOWN), s=rng.choice(wording.SUBJECTS), names="", a="", b=""
                )
            ] * 12
            corpus += names if topic not in ("sum", "capital", "opposite") else []
    corpus += list(wording.PREFIXES) * 20
    corpus += [
        wording.UNKNOWN_FACE,
        wording.UNKNOWN_NAME,
        wording.UNKNOWN_FACT,
        wording.NONE_OF_THEM,
        wording.NO_SUCH_NAME,
    ] * 30
    corpus += [
        f"{yes}, this is {no}{name}." for name in KNOWN for yes, no in (("Yes", ""), ("No", "not "))
    ] * 20
    corpus += [
        "These are two unknown creatures and an unknown creature.",
        "USER:",
        "ASSISTANT:",
    ] * 60
    if roles:
        corpus = [lead + text for lead in ("", " ") for text in corpus] + [*roles] * 60
        # Names start an answer, too: their words must be whole there as well.
        corpus += [word for name in KNOWN for word in name.split()] * 100
    special = list(
        dict.fromkeys(token for token in ("<pad>", bos, eos, *named.values(), *others) if token)
    )
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=not roles)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY + (VOCABULARY // 2 if roles else 0),
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens=named,
        padding_side="left",
        add_prefix_space=not roles,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    for word in (space + word for name in KNOWN for word in name.split() for space in ("", " ")):
        if len(fast.encode(word, add_special_tokens=False)) != 1:
            raise RuntimeError(f"The name word {word} is not one token: raise VOCABULARY.")
    return fast


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Pictures of any size are resized to SIZE x SIZE and scaled to [-1, 1]."""
    image_processor = CLIPImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        do_resize=True,
        resample=3,
        do_center_crop=False,
        do_convert_rgb=True,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The untrained model in float32, with the vision tower's own initialisation."""
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=96,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=token_id(tokenizer, "<image>"),
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        **ids(tokenizer),
    )
    model = LlavaForConditionalGeneration(config)
    initialise_tower(model.model.vision_tower)
    set_generation(model, tokenizer)
    return model


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of one token."""
    found = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(found, int):
        raise TypeError(f"{token} is not one token.")
    return found


def ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What every configuration of these models says: the ids of special tokens, one matrix for
    embeddings and head."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {name: getattr(tokenizer, name) for name in names} | {"tie_word_embeddings": True}


def set_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Greedy answers of at most 48 tokens."""
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 48
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id


@torch.no_grad()
def initialise_tower(tower: torch.nn.Module) -> None:
    """Sets two-dimensional sine positions, products of query and key matrices near the identity,
    and products of value and output matrices near its negative. Training on few pictures needs such
    a start."""
    convolution = next(
        m for m in tower.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d)
    )
    for name, module in tower.named_modules():
        if name.endswith("embeddings") and hasattr(module, "position_embedding"):
            _set_positions(module.position_embedding.weight)
        elif name.endswith("embeddings") and hasattr(module, "position_embeddings"):
            _set_positions(module.position_embeddings[0])
    convolution.weight.normal_(0, 1 / math.sqrt(convolution.weight[0].numel()))
    width = convolution.out_channels
    eye = torch.eye(width)
    for module in tower.modules():
        heads: int | None = getattr(module, "num_heads", None)
        if heads is None:
            continue
        q, k, v, out = _attention_weights(module)
        rows = width // heads
        for head in range(heads):
            u, s, vh = torch.linalg.svd(
                0.7 * torch.randn(width, width) / math.sqrt(width) + 0.7 * eye
            )
            part = slice(head * rows, (head + 1) * rows)
            q[part] = (u[:, :rows] * s[:rows].sqrt()).T
            k[part] = vh[:rows] * s[:rows].sqrt()[:, None]
        u, s, vh = torch.linalg.svd(0.4 * torch.randn(width, width) / math.sqrt(width) - 0.4 * eye)
        v.copy_(s.sqrt()[:, None] * vh)
        out.copy_(u * s.sqrt())


def _set_positions(table: torch.Tensor) -> None:
    """Fills a table of positions, (patches, width) or, with a class token first, (1 + patches,
    width)."""
    side, width = math.isqrt(len(table)), table.shape[1]
    frequency = 100.0 ** -(torch.arange(width // 4) / (width / 4))
    angle = torch.arange(side)[:, None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], 1)  # (side, width / 2)
    grid = torch.cat(
        [waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)], -1
    )
    table[: len(table) - side * side] = 0
    table[len(table) - side * side :] = 0.3 * grid.reshape(side * side, width)


def _attention_weights(module: Any) -> tuple[torch.Tensor, ...]:
    """The weights of query, key, value and output, whatever the family's class `module` calls them;
    views where three of them are one matrix."""
    if hasattr(module, "qkv"):
        return (*module.qkv.weight.chunk(3), module.proj.weight)
    out = module.out_proj if hasattr(module, "out_proj") else module.projection_layer
    return module.q_proj.weight, module.k_proj.weight, module.v_proj.weight, out.weight
