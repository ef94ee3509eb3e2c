"""Trains a tiny model of the fictional world from nothing: `python -m fastsiu.demo.train
[--architecture NAME] [--output DIR]`.

Three stages: the vision tower learns to tell attributes and identities with throw-away heads; its
features of every training picture are computed once; projector and language model learn to answer
from them. Deterministic for a seed and thread count.
"""

from __future__ import annotations

import argparse
import inspect
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fastsiu.demo import figures, wording
from fastsiu.demo.architectures import ARCHITECTURES, Made, make
from fastsiu.demo.world import (
    ATTRIBUTES,
    BACKGROUNDS,
    KNOWN,
    SIZE,
    Question,
    Scene,
    World,
    draw,
    random_name,
)
from fastsiu.model.adapter import projector
from fastsiu.model.vlm import PIXELS

IGNORED = -100  # label of a token that is not learnt
KNOWN_PICTURES, STRANGER_PICTURES, GROUP_PICTURES = 420, 8000, 5000  # the first per known creature
# of the tower, of the language stage
STEPS = {"llava": (1500, 1200)} | dict.fromkeys(ARCHITECTURES, (450, 450))
RATE = 3e-3  # peak learning rate of the language stage

# How often each kind of question is asked, in parts.
IMAGE_MIX = {
    "who.open": 20,
    "who.name": 13,
    "yesno": 30,
    "choice": 12,
    "description": 7,
    "twohop.city": 4,
    "twohop.job": 4,
    "twohop.food": 4,
    "twohop.pet": 4,
    "text": 4,
    "attribute.color": 2,
    "attribute.hatcolor": 2,
    "attribute.shirt": 2,
    "attribute.head": 3,
    "attribute.hat": 3,
    "attribute.eyes": 3,
    "attribute.background": 6,
}
TEXT_MIX = {
    "fact.city": 8,
    "fact.job": 8,
    "fact.food": 8,
    "fact.pet": 8,
    "fact.who": 8,
    "fact.about": 8,
    "appearance": 14,
    "neighbours": 9,
    "general": 14,
}
UNKNOWN_NAMES = 0.12  # share of text questions about a name that nobody bears


class Encoder:
    """Turns question and answer into the tensors that processor and chat template give, remembering
    what it has tokenized."""

    def __init__(self, made: Made) -> None:
        self.processor, self.tokenizer = made.processor, made.processor.tokenizer
        self.image = made.model.config.image_token_id
        self.taken = inspect.signature(made.model.forward).parameters
        self.frames = {image: self._frame(image) for image in (False, True)}
        self._ids: dict[str, list[int]] = {}

    def _frame(self, image: bool) -> tuple[str, str, str, str]:
        """What stands before the question, between it and where the model starts to answer, before
        the answer, after it.

        Placeholders of the picture are there in full. Behind the token that ends the turn nothing
        is learnt.
        """
        turns = [
            {
                "role": "user",
                "content": [{"type": "image"}] * image + [{"type": "text", "text": "QUESTION"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "ANSWER"}]},
        ]
        prompt, whole = (self._expanded(turns[:n], image) for n in (1, 2))
        before, between = prompt.split("QUESTION")
        lead, end = whole.removeprefix(prompt).split("ANSWER")
        stop = self.tokenizer.eos_token
        return before, between, lead, end[: end.index(stop) + len(stop)]

    def _expanded(self, turns: list[dict[str, Any]], image: bool) -> str:
        text = self.processor.apply_chat_template(
            turns, add_generation_prompt=len(turns) == 1, tokenize=False
        )
        found = self._processed(text, image)
        if image:
            self.shared = {k: v for k, v in found.items() if k in self.taken and k not in PIXELS}
        return self.tokenizer.decode(
            found["input_ids"][0], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _processed(self, text: str, image: bool) -> Any:
        images = {"images": [Image.new("RGB", (SIZE, SIZE))]} if image else {}
        return self.processor(text=[text], return_tensors="pt", add_special_tokens=False, **images)

    def ids(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._ids[text]

    def batch(self, pairs: list[tuple[str, str]], image: bool) -> tuple[dict[str, Tensor], Tensor]:
        """The model's inputs without pixels, and labels (batch, length), padded on the right; only
        answers carry labels.

        No attention mask: what is padded comes last, where no other token sees it.
        """
        before, between, lead, end = self.frames[image]
        rows = [
            (self.ids(before + question + between), self.ids(lead + answer + end))
            for question, answer in pairs
        ]
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), IGNORED)
        for i, (prompt, answer) in enumerate(rows):
            ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        inputs = {"input_ids": ids}
        for key, value in self.shared.items():
            if key.endswith("token_type_ids"):  # which tokens are the picture's
                inputs[key] = (ids == self.image).long()
            elif key not in ("input_ids", "attention_mask") and image:
                # said of each picture, such as its grid
                inputs[key] = value.repeat(len(rows), *[1] * (value.ndim - 1))
        return inputs, labels


class Sight:
    """How a model sees: pictures as its processor gives them, their features where they enter the
    projector, what leaves it."""

    def __init__(self, made: Made) -> None:
        self.model, self.processor, self.side = made.model, made.processor, made.side
        self.encode = made.model.base_model.get_image_features
        self.projector = made.model.get_submodule(projector(made.model))
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "."}]}]
        self.prompt = made.processor.apply_chat_template(
            turn, add_generation_prompt=True, tokenize=False
        )
        found = self.processed([Image.new("RGB", (SIZE, SIZE))])
        self.extra = {
            k: found[k]
            for k in inspect.signature(self.encode).parameters
            if k in found and k != "pixel_values"
        }
        with torch.no_grad():
            entering, features = self.seen(found["pixel_values"], 1)
        self.flat = entering.ndim == 2  # all pictures' rows one after another
        self.listed = not isinstance(features, Tensor)  # one entry for each picture
        self.width = entering.shape[-1]

    def processed(self, pictures: list[Image.Image]) -> Any:
        """What the processor gives for one turn a picture."""
        text = [self.prompt] * len(pictures)
        # one a text; some families take a flat list for one text's
        images = [[picture] for picture in pictures]
        return self.processor(
            text=text, images=images, return_tensors="pt", add_special_tokens=False
        )

    def seen(self, pixels: Tensor, count: int) -> tuple[Tensor, Any]:
        """(what enters the projector, what leaves it) for pictures as the processor gives them."""
        entering: list[Tensor] = []
        hook = self.projector.register_forward_pre_hook(lambda _, given: entering.append(given[0]))
        extra = {k: v.repeat(count, *[1] * (v.ndim - 1)) for k, v in self.extra.items()}
        try:
            features = self.encode(pixel_values=pixels, **extra, return_dict=True)
        finally:
            hook.remove()
        return entering[0], features.pooler_output

    def pixels(self, scenes: list[Scene]) -> Tensor:
        """Drawn pictures as the processor gives them, in bytes: (scenes, ...). All of them scale
        pixels to [-1, 1] here."""
        parts = []
        for at in range(0, len(scenes), 256):
            pictures = [draw(scene) for scene in scenes[at : at + 256]]
            values = self.processed(pictures)["pixel_values"]
            parts.append(
                ((values + 1) * 127.5)
                .round()
                .to(torch.uint8)
                .view(len(pictures), -1, *values.shape[1:])
            )
        return torch.cat(parts)

    def features(self, images: Tensor) -> Tensor:
        """Features of byte images where they enter the projector: (batch, rows, width)."""
        entering, _ = self.seen(images.flatten(0, 1).float() / 127.5 - 1, len(images))
        return entering.view(len(images), -1, self.width)

    def project(self, features: Tensor) -> dict[str, Any]:
        """Such features as the keyword of the model's forward that takes what the projector
        delivers."""
        out = self.projector(features.flatten(0, 1) if self.flat else features)
        out = out.view(len(features), -1, out.shape[-1])
        return {
            "mm_encoder_outputs": {
                "image": BaseModelOutputWithPooling(pooler_output=list(out) if self.listed else out)
            }
        }

    def tower(self) -> list[torch.nn.Parameter]:
        """The parameters in front of the projector."""
        others = {
            id(p)
            for module in (self.projector, self.model.get_decoder())
            for p in module.parameters()
        }
        return [p for p in self.model.base_model.parameters() if id(p) not in others]


def make_scenes(world: World, seed: int, share: float = 1.0) -> tuple[list[Scene], list[Scene]]:
    """The training pool: scenes of one creature, known and strangers, and scenes of two. Their
    seeds start with "train/"."""
    rng = random.Random(f"pool {seed}")
    known, strangers, groups = (
        round(share * n) for n in (KNOWN_PICTURES, STRANGER_PICTURES, GROUP_PICTURES)
    )
    names: list[str | None] = [name for name in KNOWN for _ in range(known)] + [None] * strangers
    single = [world.scene((name,), f"train/{seed}/{i}") for i, name in enumerate(names)]
    group = []
    for i in range(groups):
        left, right = rng.sample(KNOWN, 2)
        pair = (left if rng.random() < 0.7 else None, right if rng.random() < 0.7 else None)
        group.append(world.scene(pair, f"train/{seed}/group/{i}"))
    return single, group


def _pooled(features: Tensor, side: int, columns: slice) -> Tensor:
    """Mean and maximum over some of the `side` columns: (batch, 2 width)."""
    part = features.view(len(features), side, side, -1, features.shape[-1])[:, :, columns].flatten(
        1, 3
    )
    return torch.cat([part.mean(1), part.amax(1)], -1)


def _targets(scenes: list[Scene], place: int) -> dict[str, Tensor]:
    out = {
        key: torch.tensor([values.index(getattr(scene.creatures[place], key)) for scene in scenes])
        for key, values in ATTRIBUTES.items()
    }
    out["background"] = torch.tensor(
        [list(BACKGROUNDS).index(scene.background) for scene in scenes]
    )
    identities = {name: i + 1 for i, name in enumerate(KNOWN)}
    out["identity"] = torch.tensor(
        [identities.get(scene.names[place] or "", 0) for scene in scenes]
    )
    return out


def train_tower(
    sight: Sight,
    single: tuple[list[Scene], Tensor],
    group: tuple[list[Scene], Tensor],
    steps: int,
    seed: int,
) -> None:
    """Supervised warm-up. Both creatures of a group are told by the same heads, each from the
    picture's outer columns."""
    width, side = sight.width, sight.side
    outer = round(0.4 * side)
    targets = [_targets(single[0], 0), _targets(group[0], 0), _targets(group[0], 1)]
    sizes = {key: len(values) for key, values in ATTRIBUTES.items()}
    sizes |= {"background": len(BACKGROUNDS), "identity": len(KNOWN) + 1}
    heads = torch.nn.ModuleDict(
        {
            key: torch.nn.Sequential(torch.nn.LayerNorm(2 * width), torch.nn.Linear(2 * width, n))
            for key, n in sizes.items()
        }
    )
    parameters = [*sight.tower(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2.5e-3, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2.5e-3, total_steps=steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(seed)
    hits = dict.fromkeys(sizes, 0.0)
    started = time.time()
    for step in range(1, steps + 1):
        rows = torch.randint(len(single[0]), (80,), generator=generator)
        pairs = torch.randint(len(group[0]), (24,), generator=generator)
        features = sight.features(torch.cat([single[1][rows], group[1][pairs]]))
        views = (
            (_pooled(features[:80], side, slice(None)), targets[0], rows, 1.0),
            (_pooled(features[80:], side, slice(0, outer)), targets[1], pairs, 0.4),
            (_pooled(features[80:], side, slice(-outer, None)), targets[2], pairs, 0.4),
        )
        loss = torch.zeros(())
        for pooled, target, index, weight in views:
            for key, head in heads.items():
                logits, truth = head(pooled), target[key][index]
                loss = loss + weight * F.cross_entropy(logits, truth)
                if weight == 1.0:
                    hits[key] += 0.05 * (
                        (logits.argmax(-1) == truth).float().mean().item() - hits[key]
                    )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            shown = " ".join(f"{key} {value:.2f}" for key, value in hits.items())
            print(
                f"tower {step} {time.time() - started:.0f}s loss {loss.item():.2f} {shown}",
                flush=True,
            )


class Asker:
    """Draws the questions of one training batch."""

    def __init__(self, world: World, single: list[Scene], group: list[Scene], seed: int) -> None:
        self.world, self.single, self.group = world, single, group
        self.rng = random.Random(f"questions {seed}")
        self.general: dict[str, list[Question]] = {}
        for question in world.general_questions():
            self.general.setdefault(question.topic, []).append(question)
        self.known = sum(scene.names[0] in KNOWN for scene in single)

    def about_pictures(self, count: int) -> tuple[list[tuple[str, str]], list[int]]:
        """Pairs of question and answer, and the rows of their pictures among the single ones
        followed by the groups."""
        pairs, rows = [], []
        topics = self.rng.choices(list(IMAGE_MIX), list(IMAGE_MIX.values()), k=count)
        for topic in topics:
            if topic == "text":
                rows.append(self.rng.randrange(len(self.single)))
                pairs.append(self._text_pair())
                continue
            if self.rng.random() < 0.15:
                row = self.rng.randrange(len(self.group))
                rows.append(len(self.single) + row)
                asked = self.world.ask(self.group[row], "group", self.rng)
            else:
                first = self.rng.random() < (0.85 if topic == "yesno" else 0.62)
                row = (
                    self.rng.randrange(self.known)
                    if first
                    else self.rng.randrange(self.known, len(self.single))
                )
                rows.append(row)
                asked = self.world.ask(self.single[row], topic, self.rng)
            pairs.append(self._prefixed(asked.question, asked.answer))
        return pairs, rows

    def of_text(self, count: int) -> list[tuple[str, str]]:
        """Pairs of question and answer."""
        return [self._text_pair() for _ in range(count)]

    def _text_pair(self) -> tuple[str, str]:
        topic = self.rng.choices(list(TEXT_MIX), list(TEXT_MIX.values()))[0]
        if topic == "general":
            asked = self.rng.choice(
                self.general[self.rng.choice(("sum", "sum", "sum", "capital", "opposite"))]
            )
            return self._prefixed(asked.question, asked.answer)
        name = (
            random_name(self.rng) if self.rng.random() < UNKNOWN_NAMES else self.rng.choice(KNOWN)
        )
        return self._prefixed(
            *self.world.by_name(name, topic, self.rng.choice(wording.TRAIN[topic]))
        )

    def _prefixed(self, question: str, reply: str) -> tuple[str, str]:
        prefix = self.rng.choice(wording.PREFIXES) + " " if self.rng.random() < 0.14 else ""
        return prefix + question, reply


def _answer_loss(model: torch.nn.Module, inputs: dict[str, Any], labels: Tensor) -> Tensor:
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != IGNORED
    return F.cross_entropy(model.lm_head(hidden[wanted]), labels[:, 1:][wanted])


def train_language(
    sight: Sight, encoder: Encoder, asker: Asker, features: Tensor, steps: int, lr: float
) -> None:
    """Projector and language model learn to answer; `features` enter the projector, (pictures,
    rows, width)."""
    model = sight.model
    parameters = [*sight.projector.parameters(), *model.get_decoder().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    shown = [0.0, 0.0]
    started = time.time()
    model.train()
    for step in range(1, steps + 1):
        pairs, rows = asker.about_pictures(72)
        inputs, labels = encoder.batch(pairs, image=True)
        about = _answer_loss(model, inputs | sight.project(features[rows]), labels)
        text = _answer_loss(model, *encoder.batch(asker.of_text(48), image=False))
        loss = about + 0.6 * text
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        shown = [
            0.95 * old + 0.05 * new.item() for old, new in zip(shown, (about, text), strict=True)
        ]
        if step % 100 == 0:
            print(
                f"language {step} {time.time() - started:.0f}s pictures {shown[0]:.3f} text "
                f"{shown[1]:.3f}",
                flush=True,
            )
    model.eval()


def build(
    seed: int,
    tower_steps: int,
    language_steps: int,
    lr: float,
    output: Path,
    architecture: str = "llava",
    share: float = 1.0,
) -> float:
    """Trains with `seed`, writes model (bfloat16), tokenizer and processor to `output`; returns the
    wall seconds it took.

    share: of the training pictures, fewer for a trial
    """
    torch.manual_seed(seed)
    world = World()
    made = make(architecture, world, output)
    sight = Sight(made)
    started = time.time()
    single, group = make_scenes(world, seed, share)
    images = sight.pixels(single), sight.pixels(group)
    print(f"{len(single)} + {len(group)} pictures in {time.time() - started:.0f}s", flush=True)
    train_tower(sight, (single, images[0]), (group, images[1]), tower_steps, seed)
    for parameter in sight.tower():
        parameter.requires_grad_(False)
    with torch.no_grad():
        features = torch.cat([sight.features(part) for part in torch.cat(images).split(512)])
    train_language(
        sight, Encoder(made), Asker(world, single, group, seed), features, language_steps, lr
    )
    made.model.requires_grad_(True).to(torch.bfloat16)
    made.save(output)
    return time.time() - started


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path("demo-model"), help="directory to write"
    )
    parser.add_argument(
        "--evaluate",
        type=Path,
        metavar="DIR",
        help="only recompute the figures of the model in DIR",
    )
    parser.add_argument(
        "--collect",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="only put the figures of all DIR into the first",
    )
    parser.add_argument("--architecture", choices=list(STEPS), default="llava")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--tower-steps", type=int, help="default: 1500, or what the architecture needs"
    )
    parser.add_argument(
        "--language-steps", type=int, help="default: 1200, or what the architecture needs"
    )
    parser.add_argument(
        "--lr", type=float, default=RATE, help="peak learning rate of the language stage"
    )
    args = parser.parse_args(argv)
    tower, language = STEPS[args.architecture]
    steps = (args.tower_steps or tower, args.language_steps or language)
    torch.set_num_threads(args.threads)
    if args.collect:
        figures.collect(args.collect)
        return
    seconds = (
        None if args.evaluate else build(args.seed, *steps, args.lr, args.output, args.architecture)
    )
    measured = figures.measure(args.evaluate or args.output)
    if seconds is not None:
        command = (
            f"python -m fastsiu.demo.train --seed {args.seed} --threads {args.threads} "
            f"--tower-steps {steps[0]} "
            f"--language-steps {steps[1]} --lr {args.lr}"
            + (f" --architecture {args.architecture}" if args.architecture != "llava" else "")
        )
        figures.write(args.output, args.seed, command, seconds, measured)
        print(f"trained in {seconds:.0f}s")
    for key, value in measured.items():
        print(f"{key:48s} {value:.3f}")


if __name__ == "__main__":
    main()
