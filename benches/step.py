"""One optimisation step at LLaVA's proportions, beside a straightforward implementation with peft,
on a CPU.

    python benches/step.py                       16 and 64 samples; prints a table, appends to
                                                 benches/results/step.jsonl
    python benches/step.py --quick               a small model and 8 samples; appends nothing
    python benches/step.py --samples 16 --dry    without appending
    python benches/step.py --run                 40 steps of 16 out of 64 samples with all set-up,
                                                 beside the same done plainly
    python benches/step.py --real                LLaVA-1.5-7B's own size in bf16 on a GPU, 8 samples

The model is LLaVA-1.5's with everything divided by 16: 576 image tokens from a 336-pixel picture,
hidden 256, vocabulary 2000 (in both, V = 7.8 D), four language layers, three vision layers of width
64; LoRA of rank 16. Weights are random: time, memory and flops do not depend on them. A sample is
one question with its answer, 40 tokens behind the prefix, 20 of them supervised.

    straightforward   right-padded batches of whole samples; the vision tower, the logits and the
                      teacher (adapter off) in every step
    torchunlearn      its SIU trainer as its authors wrote it, where it can be imported. PyPI's
                      torchunlearn 0.1.0 has none:
                      pip install git+https://github.com/Harry24k/machine-unlearning-pytorch
    plain             ours without a shared prefix: image features and teacher cached, fused loss on
                      the supervised rows
    packed            the same with the prefix shared, in one of three ways
    key/value
    packed key/value
    as chosen         the same in the way that the package chooses

A run also counts what comes before its first step: our teacher pass and the check of the ways of
sharing. The straightforward one needs neither. torchunlearn copies the model; neither its seconds
nor its memory count that copy (`reference_mib` in the rows).

torchunlearn gets finished batches (its collator does not run), the same adapter, optimiser and
weights, and the settings that cost it the least time: nothing clipped, recorded or checkpointed. By
its design the copy, with an idle adapter, sees every batch in every step, and both softmaxes cover
all positions, image tokens included. Its loss is the same: means over the supervised positions of
the cross entropy and of the KL's terms that the vocabulary mask leaves, not normalised again (it
cuts probabilities off at 1e-12). It differs in what this bench does not measure: it searches for
K_S and K_V by token ids, and averages retained samples in a batch of their own.

All start from the same adapter and compute the same loss: value and gradient are compared first.
Rounds are interleaved. On a CPU

- time is CPU time of one thread (wall-clock time is in the rows)
- memory is the kernel's high-water mark in a fresh process, above what was resident before the
  step. Freed memory goes back at once in that process: else glibc keeps up to as much again,
  differently from process to process
- flops are counted by torch, attention under a causal flag at half

On a GPU time is wall-clock time between synchronisations, memory is torch's peak above what was
allocated before the step, and flops are those that torch counts, for attention too; it counts none
of what Triton kernels compute.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from loss import commit, device_name, resident
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

from fastsiu import TeacherCache, fused_dmk_ce
from fastsiu.model import adapter, prefix, sharing
from fastsiu.model.parts import parts_of
from fastsiu.model.turns import Encoded, Picture, collate
from fastsiu.model.vlm import VLM
from fastsiu.request import Recipe

try:
    import torchunlearn
    from torchunlearn.nn import SeqRobModel
    from torchunlearn.unlearn.trainers.seq import SIU

    LEFT_OUT = None
except ImportError as error:
    LEFT_OUT = (
        f"torchunlearn's SIU is left out ({error}): pip install "
        "git+https://github.com/Harry24k/machine-unlearning-pytorch"
    )

RESULTS = Path(__file__).parent / "results" / "step.jsonl"
SUFFIX, SUPERVISED, ALPHA, BETA = 40, 20, 0.9, 0.75
THEIRS, SIU_THERE = "straightforward", "torchunlearn"
SHARED = ("packed", "key/value", "packed key/value")
WAYS: dict[str, tuple[str, ...] | None] = (
    {"plain": ()} | {way: (way,) for way in SHARED} | {"as chosen": None}
)
OTHERS = (THEIRS,) if LEFT_OUT else (THEIRS, SIU_THERE)
NAME = range(20, 30)  # the concept's tokens, which the vocabulary mask leaves out


@dataclass(frozen=True)
class Size:
    """pixels of a square picture, width and depth of the language model."""

    pixels: int
    hidden: int
    layers: int

    @property
    def tokens(self) -> int:
        return (self.pixels // 14) ** 2


FULL, QUICK, REAL = Size(336, 256, 4), Size(112, 64, 2), Size(336, 4096, 32)


class Numbers:
    """A tokenizer whose words are ids."""

    pad_token, pad_token_id = "<pad>", 0

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


class Work:
    """One model with an adapter, `samples` turns about one picture, and a step of each contender on
    the same batch."""

    def __init__(
        self, size: Size, samples: int, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        torch.manual_seed(0)
        D, V, image = size.hidden, size.hidden * 32000 // 4096, 3
        heads = max(4, D // 128)
        text = LlamaConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=11008 * D // 4096,
            num_hidden_layers=size.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            pad_token_id=0,
        )
        seen = CLIPVisionConfig(
            hidden_size=D // 4,
            intermediate_size=D,
            num_hidden_layers=size.layers * 3 // 4,
            patch_size=14,
            num_attention_heads=heads // 2,
            image_size=size.pixels,
            projection_dim=D,
        )
        config = LlavaConfig(
            text_config=text,
            vision_config=seen,
            image_token_index=image,
            image_seq_length=size.tokens,
        )
        with torch.device(device):
            base = (
                AutoModelForImageTextToText.from_config(config, dtype=dtype)
                .eval()
                .requires_grad_(False)
            )
        self.vlm = VLM("bench", None, base, base, SimpleNamespace(tokenizer=Numbers()))
        self.pixels = torch.rand(1, 3, size.pixels, size.pixels).to(device, dtype)
        with torch.no_grad():
            features = base.model.get_image_features(self.pixels, return_dict=True)
        features = type(features)(pooler_output=features["pooler_output"])
        self.picture = Picture(None, features)  # type: ignore[arg-type]  # the features are there already
        self.turns = []
        for number in range(samples):
            tail = torch.randint(
                4, V, (SUFFIX,), generator=torch.Generator().manual_seed(number)
            ).tolist()
            ids = torch.tensor([[1, 5, *[image] * size.tokens, 6, *tail]], device=device)
            rows = torch.arange(ids.shape[1] - 1 - SUPERVISED, ids.shape[1] - 1, device=device)
            self.turns.append(
                Encoded(
                    {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                    rows,
                    ids[0, rows + 1],
                )
            )
        self.keep = torch.ones(V, dtype=torch.bool, device=device)
        self.keep[list(NAME)] = False
        adapter.attach(self.vlm, Recipe())
        # before the adapter moves: at its first cost it copies the model, adapter and all, as the
        # reference
        if not LEFT_OUT:
            wrapped = SeqRobModel(self.vlm.model, self.vlm.processor, modality="image_text")
            self.siu = SIU(wrapped, " ".join(map(str, NAME)), ce_weight=ALPHA, dmk_weight=BETA)
            with torch.no_grad():
                self.siu.calculate_cost(self.siu_batch(1))
        self.trained = [p for p in self.vlm.model.parameters() if p.requires_grad]
        for parameter in self.trained:  # a student that has moved: B is zero at first
            torch.nn.init.normal_(parameter, std=0.02)
        self.prepare()
        self.labels = torch.cat([turn.labels for turn in self.turns])

    def loss(self, contender: str) -> Tensor:
        if contender == SIU_THERE:
            return self.siu.calculate_cost(self.siu_batch())
        return self.theirs() if contender == THEIRS else self.ours(contender)

    def ours(self, contender: str) -> Tensor:
        ways = WAYS[contender]
        self.vlm.shares = self.found if ways is None else ways
        states = prefix.supervised_states(
            self.vlm, self.turns, [self.picture.features] * len(self.turns)
        )
        return fused_dmk_ce(
            states, self.vlm.head_weight, self.labels, self.teacher, alpha=ALPHA, beta=BETA
        )

    def prepare(self) -> None:
        """What a run does once: the teacher, adapter off, and the check of the ways of sharing."""
        features = [self.picture.features] * len(self.turns)
        self.found = sharing.plan_sharing(
            self.vlm, self.turns, [self.picture] * len(self.turns), print
        )
        with torch.no_grad(), adapter.teacher(self.vlm):
            hidden = prefix.supervised_states(self.vlm, self.turns, features, micro_batch=8)
        self.teacher = TeacherCache.from_hidden(hidden, self.vlm.head_weight, vocab_keep=self.keep)

    def batch(self, samples: int | None = None) -> dict[str, Tensor]:
        batch = collate([turn.inputs for turn in self.turns[:samples]], 0)
        return batch | {"pixel_values": self.pixels.expand(len(batch["input_ids"]), -1, -1, -1)}

    def siu_batch(self, samples: int | None = None) -> dict[str, dict[str, Tensor]]:
        """As its collator gives it: labels unshifted, -100 where there is no loss."""
        batch = self.batch(samples)
        labels = torch.full_like(batch["input_ids"], -100)
        for row, turn in zip(labels, self.turns, strict=False):
            row[turn.rows + 1] = turn.labels
        return {"Forget": batch | {"labels": labels}}

    def theirs(self) -> Tensor:
        """What one writes with transformers and peft: two forwards of the whole batch, and the
        formula on their logits."""
        batch, model = self.batch(), self.vlm.model
        with torch.no_grad(), model.disable_adapter():
            teacher = model(**batch, use_cache=False).logits
        student = model(**batch, use_cache=False).logits
        pick = lambda logits: (
            torch.cat([logits[i, turn.rows] for i, turn in enumerate(self.turns)])
            .float()
            .log_softmax(-1)
        )
        log_q, log_p = pick(student), pick(teacher)
        ce = torch.nn.functional.nll_loss(log_q, self.labels)
        kl = (log_p.exp() * (log_p - log_q) * self.keep).sum(-1).mean()
        return ALPHA * ce + BETA * kl

    def step(self, contender: str, optimiser: torch.optim.Optimizer) -> float:
        if contender == SIU_THERE:
            self.siu.setup(optimiser, clip_grad_norm=None).fit(
                [self.siu_batch()], n_epochs=1, record_type=None
            )
            self.vlm.model.eval()
            return self.siu.dict_record["Cost"]
        loss = self.loss(contender)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        return loss.item()

    def optimiser(self) -> torch.optim.Optimizer:
        # every round computes the same
        return torch.optim.AdamW(self.trained, lr=0.0, weight_decay=0.0)


def agreement(work: Work) -> dict[str, dict[str, float]]:
    """Flops, loss and adapter gradient of each contender, the latter two relative to the
    straightforward ones."""

    def found(contender: str) -> tuple[float, float, Tensor]:
        with counting() as counter:
            loss = work.loss(contender)
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, work.trained)])
        return float(counter.get_total_flops()), loss.item(), gradient

    allowed = sharing.TOLERANCE[work.vlm.head_weight.dtype]
    count, value, gradient = found(THEIRS)
    results = {THEIRS: {"flops": count, "loss": value, "loss_error": 0.0, "grad_error": 0.0}}
    for contender in (*OTHERS[1:], *WAYS):
        count, loss, other = found(contender)
        off = {
            "loss_error": abs(loss / value - 1),
            "grad_error": float((other - gradient).norm() / gradient.norm()),
        }
        if not max(off.values()) <= allowed:
            raise SystemExit(f"{contender} computes something else: {off}")
        results[contender] = {"flops": count, "loss": loss, **off}
    return results


def counting() -> FlopCounterMode:
    """Torch counts no attention on a CPU by itself."""

    def halved(count: float, causal: tuple[Any, ...]) -> float:
        return count / 2 if any(x is True for x in causal) else count

    def forward(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **_: Any) -> float:
        return halved(sdpa_flop_count(q, k, v), rest)

    def backward(
        g: Any, q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **_: Any
    ) -> float:
        return halved(sdpa_backward_flop_count(g, q, k, v), rest)

    aten = torch.ops.aten
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=attention)


def times(work: Work, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of one step, CPU and wall clock; every round visits every contender, in turning
    order."""
    optimisers = {c: work.optimiser() for c in (*OTHERS, *WAYS)}
    results = {c: {"cpu": [], "wall": []} for c in optimisers}
    wait = torch.cuda.synchronize if work.pixels.is_cuda else lambda: None
    for number in range(rounds):
        names = list(optimisers)
        for contender in names[number % len(names) :] + names[: number % len(names)]:
            wait()
            cpu, wall = time.process_time(), time.perf_counter()
            work.step(contender, optimisers[contender])
            wait()
            results[contender]["cpu"].append(time.process_time() - cpu)
            results[contender]["wall"].append(time.perf_counter() - wall)
    return results


def memory(contender: str, size: Size, samples: int) -> dict[str, Any]:
    """{"mib": peak extra memory of a step} in a process of its own, or {"mib_missing": why}."""
    job = json.dumps([contender, [size.pixels, size.hidden, size.layers], samples])
    # and the threshold no longer grows with what is freed
    returned = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    done = subprocess.run(
        [sys.executable, __file__, "--memory", job], capture_output=True, text=True, env=returned
    )
    lines = done.stdout.strip().splitlines()
    return (
        json.loads(lines[-1])
        if done.returncode == 0 and lines
        else {"mib_missing": done.stderr.strip()[-300:]}
    )


def peak(contender: str, size: Size, samples: int) -> dict[str, Any]:
    work = Work(size, samples)
    optimiser, turns, teacher, labels = work.optimiser(), work.turns, work.teacher, work.labels
    work.turns, work.labels, work.teacher = (
        turns[:2],
        labels[: 2 * SUPERVISED],
        teacher[: 2 * SUPERVISED],
    )
    work.step(contender, optimiser)  # a small step loads libraries and makes the optimiser's state
    work.turns, work.labels, work.teacher = turns, labels, teacher
    optimiser.zero_grad(set_to_none=True)
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        # the high-water mark starts again from the resident size
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        work.step(contender, optimiser)
        return {"mib": (resident("VmHWM") - before) / 2**10}
    except (OSError, AttributeError) as error:
        return {"mib_missing": f"This system has no high-water mark that can be reset ({error})."}


def gpu_memory(work: Work, contender: str) -> dict[str, Any]:
    """{"mib": peak extra memory of a step}: here no other contender's memory is in the way."""
    optimiser = work.optimiser()
    work.step(contender, optimiser)  # makes the optimiser's state
    optimiser.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work.step(contender, optimiser)
    optimiser.zero_grad(set_to_none=True)
    return {"mib": (torch.cuda.max_memory_allocated() - before) / 2**20}


def bench(
    size: Size,
    samples: int,
    rounds: int,
    with_memory: bool = True,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, Any]]:
    """One row a contender."""
    work = Work(size, samples, device, dtype)
    gpu, clock = work.pixels.is_cuda, "wall_seconds" if work.pixels.is_cuda else "cpu_seconds"
    errors = agreement(work)
    (part,) = parts_of(work.vlm, work.turns, [work.picture.features] * samples)
    work.vlm.shares = work.found
    chosen = part.cheapest(None)
    timing = times(work, rounds)
    rows = []
    reference = sum(p.numel() * p.element_size() for p in work.vlm.model.parameters()) / 2**20
    for contender in (*OTHERS, *WAYS):
        row = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "contender": contender,
            "samples": samples,
            "dtype": str(dtype).removeprefix("torch."),
            "prefix": part.length,
            "suffix": SUFFIX,
            "hidden": size.hidden,
            "layers": size.layers,
            "chosen": chosen if contender == "as chosen" else None,
            **errors[contender],
            **(
                {"torchunlearn": torchunlearn.__version__, "reference_mib": reference}
                if contender == SIU_THERE
                else {}
            ),
            "cpu_seconds": statistics.median(timing[contender]["cpu"]),
            "rounds": timing[contender]["cpu"],
            "wall_seconds": statistics.median(timing[contender]["wall"]),
            **(
                gpu_memory(work, contender)
                if gpu
                else memory(contender, size, samples)
                if with_memory
                else {}
            ),
        }
        first = rows[0] if rows else row
        row["seconds"], row["faster"] = row[clock], first[clock] / row[clock]
        row["fewer_flops"] = first["flops"] / row["flops"]
        row["of_memory"] = row["mib"] / first["mib"] if "mib" in row and "mib" in first else None
        rows.append(row)
    return rows


def run(size: Size, samples: int, batch: int, steps: int) -> list[dict[str, Any]]:
    """A whole run of each, from a model without teacher or check to its last step: time, loss
    curve, final adapter."""
    work, curves, adapters, rows = Work(size, samples), {}, {}, []
    start = [p.detach().clone() for p in work.trained]
    turns, labels = work.turns, work.labels
    for contender in (*OTHERS, "as chosen"):
        with torch.no_grad():
            for p, value in zip(work.trained, start, strict=True):
                p.copy_(value)
        work.turns, work.labels, work.found = turns, labels, ()
        optimiser = torch.optim.AdamW(work.trained, lr=2e-4, weight_decay=0.0)
        cpu, wall, curve = time.process_time(), time.perf_counter(), []
        if contender not in OTHERS:
            work.prepare()
        teacher = work.teacher
        for step in range(steps):
            chosen = [(step * batch + i) % samples for i in range(batch)]
            at = torch.tensor(
                [n for i in chosen for n in range(i * SUPERVISED, (i + 1) * SUPERVISED)]
            )
            work.turns, work.labels, work.teacher = (
                [turns[i] for i in chosen],
                labels[at],
                teacher[at],
            )
            curve.append(work.step(contender, optimiser))
        work.teacher = teacher
        curves[contender], adapters[contender] = (
            curve,
            torch.cat([p.detach().flatten() for p in work.trained]),
        )
        rows.append(
            {
                "kind": "run",
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "commit": commit(),
                "device": device_name("cpu"),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "contender": contender,
                "samples": samples,
                "batch": batch,
                "steps": steps,
                "hidden": size.hidden,
                "layers": size.layers,
                "cpu_seconds": time.process_time() - cpu,
                "wall_seconds": time.perf_counter() - wall,
                "losses": curve,
            }
        )
    moved = adapters[THEIRS] - torch.cat([x.flatten() for x in start])
    for row in rows:
        row |= {
            "faster": rows[0]["cpu_seconds"] / row["cpu_seconds"],
            "loss_error": max(
                abs(a / b - 1) for a, b in zip(row["losses"], curves[THEIRS], strict=True)
            ),
            "adapter_error": float(
                (adapters[row["contender"]] - adapters[THEIRS]).norm() / moved.norm()
            ),
        }
    return rows


def run_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| run | seconds | faster | first and last loss | losses off by | final adapter off by, "
        "of its way |"
    ]
    lines.append("|" + "---|" * 6)
    for r in rows:
        name = f"{r['steps']} steps of {r['batch']}, {r['contender']}"
        lines.append(
            f"| {name} | {r['cpu_seconds']:.3g} | {r['faster']:.1f}x | "
            f"{r['losses'][0]:.4f}, {r['losses'][-1]:.4f} | {r['loss_error']:.0e} | "
            f"{r['adapter_error']:.0e} |"
        )
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| step with samples | contender | seconds | faster | GFLOP | fewer | MiB | of theirs | "
        "gradient off by |"
    ]
    lines.append("|" + "---|" * 9)
    for r in rows:
        name = r["contender"] + (f" ({r['chosen']})" if r["chosen"] else "")
        mib, share = (
            ("-", "-") if r["of_memory"] is None else (f"{r['mib']:.0f}", f"{r['of_memory']:.0%}")
        )
        lines.append(
            f"| {r['samples']} | {name} | {r['seconds']:.3g} | {r['faster']:.1f}x | "
            f"{r['flops'] / 1e9:.3g} | "
            f"{r['fewer_flops']:.1f}x | {mib} | {share} | {r['grad_error']:.0e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small model, 8 samples; appends nothing"
    )
    parser.add_argument("--samples", nargs="+", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="append nothing")
    parser.add_argument("--run", action="store_true", help="a whole run instead of a step")
    parser.add_argument("--real", action="store_true", help="the real size, on a GPU")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if options.memory:
        contender, size, samples = json.loads(options.memory)
        print(json.dumps(peak(contender, Size(*size), samples)))
        return
    if LEFT_OUT:
        print(LEFT_OUT, flush=True)
    real = dict(device="cuda", dtype=torch.bfloat16) if options.real else {}
    if options.real and not torch.cuda.is_available():
        parser.error("--real needs a GPU, and there is none here")
    for samples in options.samples or (
        [8] if options.quick or options.real else [64] if options.run else [16, 64]
    ):
        if options.run:
            rows = run(QUICK, samples, 4, 6) if options.quick else run(FULL, samples, 16, 40)
            print(run_table(rows), flush=True)
        else:
            rows = bench(
                REAL if options.real else QUICK if options.quick else FULL,
                samples,
                options.rounds,
                **real,
            )
            print(table(rows), flush=True)
        if not options.quick and not options.dry:
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
