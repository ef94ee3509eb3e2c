"""Trains a tiny model of the fictional world from nothing: `python -m fastsiu.demo.train
[--architecture NAME] [--output DIR]`.

There are three stages. The vision tower learns, with heads that are thrown away, to tell attributes
and identities. The features of every training picture are computed once. Projector and language
model learn to answer from them. The result is the same for the same seed and number of threads.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsiu.demo import figures
from fastsiu.demo.architectures import ARCHITECTURES, make
from fastsiu.demo.curriculum import Asker, make_sketches
from fastsiu.demo.inputs import IGNORED, Encoder, Sight
from fastsiu.demo.world import ATTRIBUTES, BACKGROUNDS, KNOWN, Sketch, World

# Steps of the tower, and of the language stage.
STEPS = {"llava": (1500, 1200)} | dict.fromkeys(ARCHITECTURES, (450, 450))
RATE = 3e-3  # peak learning rate of the language stage


def _pooled(features: Tensor, side: int, columns: slice) -> Tensor:
    """Mean and maximum over some of the `side` columns: (batch, 2 width)."""
    part = features.view(len(features), side, side, -1, features.shape[-1])[:, :, columns].flatten(
        1, 3
    )
    return torch.cat([part.mean(1), part.amax(1)], -1)


def _targets(sketches: list[Sketch], place: int) -> dict[str, Tensor]:
    out = {
        key: torch.tensor(
            [values.index(getattr(sketch.creatures[place], key)) for sketch in sketches]
        )
        for key, values in ATTRIBUTES.items()
    }
    out["background"] = torch.tensor(
        [list(BACKGROUNDS).index(sketch.background) for sketch in sketches]
    )
    identities = {name: i + 1 for i, name in enumerate(KNOWN)}
    out["identity"] = torch.tensor(
        [identities.get(sketch.names[place] or "", 0) for sketch in sketches]
    )
    return out


def train_tower(
    sight: Sight,
    single: tuple[list[Sketch], Tensor],
    group: tuple[list[Sketch], Tensor],
    steps: int,
    seed: int,
) -> None:
    """Supervised warm-up of the vision tower. The same heads tell both creatures of a group, each
    from the picture's outer columns on its side.

    single, group: sketches of one creature and of two, each with their pixels (`Sight.pixels`)
    """
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


def _answer_loss(model: Any, inputs: dict[str, Any], labels: Tensor) -> Tensor:
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != IGNORED
    return F.cross_entropy(model.lm_head(hidden[wanted]), labels[:, 1:][wanted])


def train_language(
    sight: Sight, encoder: Encoder, asker: Asker, features: Tensor, steps: int, lr: float
) -> None:
    """Projector and language model learn to answer. features: what enters the projector, (pictures,
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
    """Trains with `seed` and writes model (bfloat16), tokenizer and processor to `output`. Returns
    the wall seconds of the training.

    lr:    peak learning rate of the language stage
    share: of the training pictures; less than 1 for a trial
    """
    torch.manual_seed(seed)
    world = World()
    made = make(architecture, world, output)
    sight = Sight(made)
    started = time.time()
    single, group = make_sketches(world, seed, share)
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
            f"--tower-steps {steps[0]} --language-steps {steps[1]} --lr {args.lr}"
            + (f" --architecture {args.architecture}" if args.architecture != "llava" else "")
        )
        figures.write(args.output, args.seed, command, seconds, measured)
        print(f"trained in {seconds:.0f}s")
    for key, value in measured.items():
        print(f"{key:48s} {value:.3f}")


if __name__ == "__main__":
    main()
