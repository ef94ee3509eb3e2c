"""Trains the tiny LLaVA of the fictional world from nothing: `python -m fastsiu.demo.train [--seed S] [--output DIR]`.

Three stages: the vision tower learns to tell attributes and identities with throw-away heads; its features of every training
picture are computed once; projector and language model learn to answer from them. Deterministic for a seed and thread count.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from fastsiu.demo import figures, wording
from fastsiu.demo.tiny import PATCH, TOKENS, build_model, build_processor, build_tokenizer
from fastsiu.demo.world import ATTRIBUTES, BACKGROUNDS, KNOWN, SIZE, Question, Scene, World, draw, random_name

IGNORED = -100  # label of a token that is not learnt
KNOWN_PICTURES, STRANGER_PICTURES, GROUP_PICTURES = 420, 8000, 5000  # the first per known creature

# How often each kind of question is asked, in parts.
IMAGE_MIX = {
    "who.open": 20, "who.name": 13, "yesno": 30, "choice": 12, "description": 7, "twohop.city": 4, "twohop.job": 4,
    "twohop.food": 4, "twohop.pet": 4, "text": 4, "attribute.color": 2, "attribute.hatcolor": 2, "attribute.shirt": 2,
    "attribute.head": 3, "attribute.hat": 3, "attribute.eyes": 3, "attribute.background": 6,
}  # fmt: skip
TEXT_MIX = {
    "fact.city": 8, "fact.job": 8, "fact.food": 8, "fact.pet": 8, "fact.who": 8, "fact.about": 8, "appearance": 14,
    "neighbours": 9, "general": 14,
}  # fmt: skip
UNKNOWN_NAMES = 0.12  # share of text questions about a name that nobody bears


class Encoder:
    """Turns question and answer into token ids exactly as the chat template does, remembering what it has tokenized."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.image = tokenizer.convert_tokens_to_ids("<image>")
        self._ids: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._ids[text]

    def batch(self, pairs: list[tuple[str, str]], image: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels, each (batch, length), padded on the right; only the answer and its end token carry labels."""
        rows = []
        for question, answer in pairs:
            prompt = [self.tokenizer.bos_token_id, *self.ids("USER:"), *[self.image] * (TOKENS if image else 0)]
            prompt += [*self.ids(" " + question), *self.ids(" ASSISTANT:")]
            rows.append((prompt, [*self.ids(" " + answer), self.tokenizer.eos_token_id]))
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), IGNORED)
        for i, (prompt, answer) in enumerate(rows):
            ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        return ids, labels


def make_scenes(world: World, seed: int) -> tuple[list[Scene], list[Scene]]:
    """The training pool: scenes of one creature, known and strangers, and scenes of two. Their seeds start with "train/"."""
    rng = random.Random(f"pool {seed}")
    names: list[str | None] = [name for name in KNOWN for _ in range(KNOWN_PICTURES)] + [None] * STRANGER_PICTURES
    single = [world.scene((name,), f"train/{seed}/{i}") for i, name in enumerate(names)]
    group = []
    for i in range(GROUP_PICTURES):
        left, right = rng.sample(KNOWN, 2)
        pair = (left if rng.random() < 0.7 else None, right if rng.random() < 0.7 else None)
        group.append(world.scene(pair, f"train/{seed}/group/{i}"))
    return single, group


def pixels(scenes: list[Scene]) -> torch.Tensor:
    """Drawn pictures as the image processor gives them for SIZE x SIZE input, in bytes: (scenes, 3, SIZE, SIZE)."""
    out = np.empty((len(scenes), SIZE, SIZE, 3), np.uint8)
    for i, scene in enumerate(scenes):
        out[i] = np.asarray(draw(scene))
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


def _scaled(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1


def tower_features(tower: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Patch features of byte images, (batch, TOKENS, width): the layer and the patches that LLaVA hands to its projector."""
    return tower(pixel_values=_scaled(images), output_hidden_states=True).hidden_states[-1][:, 1:]


def _pooled(features: torch.Tensor, columns: slice) -> torch.Tensor:
    side = SIZE // PATCH
    part = features.view(len(features), side, side, -1)[:, :, columns].flatten(1, 2)
    return torch.cat([part.mean(1), part.amax(1)], -1)


def _targets(scenes: list[Scene], place: int) -> dict[str, torch.Tensor]:
    out = {
        key: torch.tensor([values.index(getattr(scene.creatures[place], key)) for scene in scenes])
        for key, values in ATTRIBUTES.items()
    }
    out["background"] = torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in scenes])
    identities = {name: i + 1 for i, name in enumerate(KNOWN)}
    out["identity"] = torch.tensor([identities.get(scene.names[place] or "", 0) for scene in scenes])
    return out


def train_tower(
    tower: torch.nn.Module,
    single: tuple[list[Scene], torch.Tensor],
    group: tuple[list[Scene], torch.Tensor],
    steps: int,
    seed: int,
) -> None:
    """Supervised warm-up. Both creatures of a group are told by the same heads, each from the picture's outer columns."""
    width = tower.config.hidden_size
    targets = [_targets(single[0], 0), _targets(group[0], 0), _targets(group[0], 1)]
    sizes = {key: len(values) for key, values in ATTRIBUTES.items()}
    sizes |= {"background": len(BACKGROUNDS), "identity": len(KNOWN) + 1}
    heads = torch.nn.ModuleDict(
        {key: torch.nn.Sequential(torch.nn.LayerNorm(2 * width), torch.nn.Linear(2 * width, n)) for key, n in sizes.items()}
    )
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2.5e-3, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2.5e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    hits = dict.fromkeys(sizes, 0.0)
    started = time.time()
    for step in range(1, steps + 1):
        rows = torch.randint(len(single[0]), (80,), generator=generator)
        pairs = torch.randint(len(group[0]), (24,), generator=generator)
        features = tower_features(tower, torch.cat([single[1][rows], group[1][pairs]]))
        views = (
            (_pooled(features[:80], slice(None)), targets[0], rows, 1.0),
            (_pooled(features[80:], slice(0, 2)), targets[1], pairs, 0.4),
            (_pooled(features[80:], slice(-2, None)), targets[2], pairs, 0.4),
        )
        loss = torch.zeros(())
        for pooled, target, index, weight in views:
            for key, head in heads.items():
                logits, truth = head(pooled), target[key][index]
                loss = loss + weight * F.cross_entropy(logits, truth)
                if weight == 1.0:
                    hits[key] += 0.05 * ((logits.argmax(-1) == truth).float().mean().item() - hits[key])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            shown = " ".join(f"{key} {value:.2f}" for key, value in hits.items())
            print(f"tower {step} {time.time() - started:.0f}s loss {loss.item():.2f} {shown}", flush=True)


class Asker:
    """Draws the questions of one training batch."""

    def __init__(self, world: World, single: list[Scene], group: list[Scene], seed: int) -> None:
        self.world, self.single, self.group = world, single, group
        self.rng = random.Random(f"questions {seed}")
        self.general: dict[str, list[Question]] = {}
        for question in world.general_questions():
            self.general.setdefault(question.topic, []).append(question)
        self.known = len(KNOWN) * KNOWN_PICTURES

    def about_pictures(self, count: int) -> tuple[list[tuple[str, str]], list[int]]:
        """Pairs of question and answer, and the rows of their pictures among the single ones followed by the groups."""
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
                row = self.rng.randrange(self.known) if first else self.rng.randrange(self.known, len(self.single))
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
            asked = self.rng.choice(self.general[self.rng.choice(("sum", "sum", "sum", "capital", "opposite"))])
            return self._prefixed(asked.question, asked.answer)
        name = random_name(self.rng) if self.rng.random() < UNKNOWN_NAMES else self.rng.choice(KNOWN)
        return self._prefixed(*self.world.by_name(name, topic, self.rng.choice(wording.TRAIN[topic])))

    def _prefixed(self, question: str, reply: str) -> tuple[str, str]:
        prefix = self.rng.choice(wording.PREFIXES) + " " if self.rng.random() < 0.14 else ""
        return prefix + question, reply


def _answer_loss(model: LlavaForConditionalGeneration, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    hidden = model.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != IGNORED
    return F.cross_entropy(model.lm_head(hidden[wanted]), labels[:, 1:][wanted])


def train_language(
    model: LlavaForConditionalGeneration, encoder: Encoder, asker: Asker, features: torch.Tensor, steps: int, lr: float
) -> None:
    """Projector and language model learn to answer; `features` are the tower's, (pictures, TOKENS, width)."""
    parameters = [*model.model.multi_modal_projector.parameters(), *model.model.language_model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    embed = model.get_input_embeddings()
    first = 1 + len(encoder.ids("USER:"))
    shown = [0.0, 0.0]
    started = time.time()
    model.train()
    for step in range(1, steps + 1):
        pairs, rows = asker.about_pictures(72)
        ids, labels = encoder.batch(pairs, image=True)
        words = embed(ids)
        patches = model.model.multi_modal_projector(features[rows])
        about = _answer_loss(model, torch.cat([words[:, :first], patches, words[:, first + TOKENS :]], 1), labels)
        ids, labels = encoder.batch(asker.of_text(48), image=False)
        text = _answer_loss(model, embed(ids), labels)
        loss = about + 0.6 * text
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        shown = [0.95 * old + 0.05 * new.item() for old, new in zip(shown, (about, text), strict=True)]
        if step % 100 == 0:
            print(f"language {step} {time.time() - started:.0f}s pictures {shown[0]:.3f} text {shown[1]:.3f}", flush=True)
    model.eval()


def build(seed: int, tower_steps: int, language_steps: int, lr: float, output: Path) -> float:
    """Trains with `seed`, writes model (bfloat16), tokenizer and processor to `output`; returns the wall seconds it took."""
    torch.manual_seed(seed)
    world = World()
    tokenizer = build_tokenizer(world)
    model = build_model(tokenizer)
    started = time.time()
    single, group = make_scenes(world, seed)
    images = pixels(single), pixels(group)
    print(f"{len(single)} + {len(group)} pictures in {time.time() - started:.0f}s", flush=True)
    tower = model.model.vision_tower
    train_tower(tower, (single, images[0]), (group, images[1]), tower_steps, seed)
    tower.requires_grad_(False)
    with torch.no_grad():
        features = torch.cat([tower_features(tower, part) for part in torch.cat(images).split(512)])
    train_language(model, Encoder(tokenizer), Asker(world, single, group, seed), features, language_steps, lr)
    tower.requires_grad_(True)
    model.to(torch.bfloat16).save_pretrained(output)
    build_processor(tokenizer).save_pretrained(output)
    return time.time() - started


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo-model"), help="directory to write")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="only recompute the figures of the model in DIR")
    parser.add_argument("--collect", type=Path, nargs="+", metavar="DIR", help="only put the figures of all DIR into the first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tower-steps", type=int, default=1500)
    parser.add_argument("--language-steps", type=int, default=1200)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of the language stage")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.collect:
        figures.collect(args.collect)
        return
    seconds = None if args.evaluate else build(args.seed, args.tower_steps, args.language_steps, args.lr, args.output)
    measured = figures.measure(args.evaluate or args.output)
    if seconds is not None:
        command = (
            f"python -m fastsiu.demo.train --seed {args.seed} --threads {args.threads} --tower-steps {args.tower_steps} "
            f"--language-steps {args.language_steps} --lr {args.lr}"
        )
        figures.write(args.output, args.seed, command, seconds, measured)
        print(f"trained in {seconds:.0f}s")
    for key, value in measured.items():
        print(f"{key:48s} {value:.3f}")


if __name__ == "__main__":
    main()
