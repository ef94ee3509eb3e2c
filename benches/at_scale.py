"""What many requests and large models cost: measured on one machine, and predicted from counts.

    python benches/at_scale.py --measure     times what the processes do to share the work, on this
                                             machine, and appends to results/at_scale.jsonl
    python benches/at_scale.py --table       the tables of docs/at-scale.md (docs/tables.py writes
                                             them there; `docs/tables.py --check` compares)
    python benches/at_scale.py --json FILE   the predictions with every assumption

Predicted, not measured: seconds on a GPU. They count the tokens of a request (`counted`) and take
2 flops for each of them and each active weight in a forward pass, 4 in a training step whose base
is frozen, at ASSUMED's share of the peak; answers take one reading of the weights for each token of
a batch. The same count is divided by the seconds of a measured run on a CPU, so that a reader sees
whether it is of the right size.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from gpus import GPUS

from fastsiu.request import DENIALS, SHARES, Recipe
from fastsiu.workers.claims import Claims, duration

RESULTS = Path(__file__).parent / "results"
CARD, MEMORY = "H100", 80.0  # GB
REQUESTS, CARDS = (1, 1_000, 1_000_000), (1, 8, 64, 512)

# Assumed, not measured.
MFU = 0.4  # of the peak, by prefill and training
READ = 0.7  # of the bandwidth, by decoding
USABLE = 0.9  # of a card's memory
# GB of a step of LLaVA-1.5-7B in bf16: `fastsiu plan --adapt language` says 21.7 with the weights
ACTIVATIONS = 7.7
IMAGE, TEMPLATE = 576, 24  # tokens of a picture (LLaVA-1.5), and of what stands around it
# As fastsiu/model/workload.py and memory.py assume, which import torch.
SUFFIX, TEXT, ANSWER, PICTURES, SAMPLES, ASK_BATCH = 64, 80, 64, 17, 120, 64
# Questions of a verdict: counted in a report of the embedded model with default options. Those of
# `families` are put to the untouched model about the concept, to it about strangers, and to the
# unlearned model.
ANSWERS, FAMILIES = 163, 448
PER_PICTURE = 8  # questions that share a picture's tokens in the verdict


class Model(NamedTuple):
    """weights, active: in billions; active: what one token is multiplied with."""

    name: str
    weights: float
    active: float
    layers: int
    width: int
    inner: int


# Sizes of published language models, from their configurations.
MODELS = (
    Model("7B", 6.7, 6.7, 32, 4096, 11008),
    Model("13B", 13.0, 13.0, 40, 5120, 13824),
    Model("34B", 34.4, 34.4, 60, 7168, 20480),
    Model("72B", 72.7, 72.7, 80, 8192, 29568),
    Model("400B, 17B active", 400.0, 17.0, 48, 5120, 16384),
    Model("405B", 405.0, 405.0, 126, 16384, 53248),
)
REAL_ROW = "a zebra, one sentence in its place"  # run beside nothing else
MEASURED = Model("135M", 0.135, 0.135, 30, 576, 1536)  # of benches/real_words.py


def counted(recipe: Recipe, steps: int | None = None) -> dict[str, float]:
    """Tokens of one request: those of training steps and dreams (forward and backward), those that
    are only read, and those that are written one by one."""
    prefix = IMAGE + TEMPLATE
    own = round((SHARES["align"] + DENIALS * SHARES["describe"]) * recipe.batch_size)
    others = round(SHARES["preserve-picture"] * recipe.batch_size)
    # own questions share one picture, and each other one has its own
    pictured = prefix + own * SUFFIX + others * (prefix + SUFFIX)
    # the four targets, and the lessons' two halves
    step = 3 * (pictured + (recipe.batch_size - own - others) * TEXT)
    dreams = recipe.neighbours * recipe.dreams * recipe.dream_steps * (IMAGE + SUFFIX)
    questions = 2 * ANSWERS + 3 * FAMILIES
    read = questions * (SUFFIX + prefix / PER_PICTURE)
    teacher = (SAMPLES + PICTURES) * (SUFFIX + IMAGE / PER_PICTURE)
    return {
        "training": (recipe.steps if steps is None else steps) * step,
        "dreams": dreams,
        "read": read + teacher,
        "written": (questions + SAMPLES) * ANSWER,
    }


def flops(model: Model, tokens: dict[str, float]) -> float:
    """Of a request, the written tokens included."""
    trained, read = tokens["training"] + tokens["dreams"], tokens["read"] + tokens["written"]
    return 1e9 * model.active * (4 * trained + 2 * read)


def seconds(model: Model, tokens: dict[str, float]) -> dict[str, float]:
    """Of a request on one copy of the model, whose layers work one after the other wherever they
    lie; by what bounds it."""
    gpu, batch = GPUS[CARD], ASK_BATCH
    multiplied = flops(model, tokens | {"written": 0.0}) / (MFU * gpu.bf16 * 1e12)
    # A batch of tokens picks most experts of a mixture, so all weights are read.
    move = 2e9 * model.weights / (READ * gpu.bandwidth * 1e9)
    multiply = batch * 2e9 * model.active / (MFU * gpu.bf16 * 1e12)
    return {
        "training and reading (matmul)": multiplied,
        "answers (memory)": tokens["written"] / batch * max(move, multiply),
    }


def held(model: Model) -> tuple[float, int]:
    """GB of one copy in bf16 while it trains, and the cards that it takes."""
    size = 2 * model.weights + ACTIVATIONS * model.layers * model.width / (32 * 4096)
    return size, math.ceil(size / (USABLE * MEMORY))


def adapter(model: Model, rank: int) -> float:
    """MB of an adapter: fp32 factors on four matrices of attention and three of an MLP (grouped
    keys and values take less; of a mixture's experts one is counted)."""
    per_layer = 8 * model.width + 3 * (model.width + model.inner)
    return 4 * rank * model.layers * per_layer / 1e6


def wall(one: float, requests: int, cards: int, per_copy: int) -> float | None:
    """Seconds; None where the model does not fit on so many cards."""
    copies = cards // per_copy
    return -(-requests // copies) * one if copies else None


# --------------------------------------------------------------------------------------------------
# measured


def measure(units: int = 100, lines: Sequence[int] = (500, 4000)) -> list[dict[str, Any]]:
    """What sharing costs for each unit, and what reading a file of requests costs."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        worker = Claims(place)
        worker.open("measured")
        took = []
        for number in range(units):
            begun = time.perf_counter()
            claim = worker.take(str(number))
            assert claim is not None and claim.held
            worker.log(str(number), 1.0)
            claim.release()
            took.append(time.perf_counter() - begun)
        rows.append({"what": "claim", "units": units, "ms": 1e3 * statistics.median(took)})
        for count in lines:
            from fastsiu.disk import request_file  # slow to import

            file = place / "requests.jsonl"
            record = lambda i: json.dumps({"image": "x.png", "concept": f"Ann{i:05d} Lee{i:05d}"})
            file.write_text("".join(f"{record(i)}\n" for i in range(count)))
            begun = time.process_time()
            request_file.read_requests(file)
            rows.append({"what": "file", "lines": count, "s": time.process_time() - begun})
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "device": platform.machine()}
    return [about | row for row in rows]


def newest(name: str, **wanted: Any) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines]
    fits = [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]
    return fits[-1] if fits else None


# --------------------------------------------------------------------------------------------------
# output


def markdown(lines: list[list[str]]) -> str:
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head, "|" + " --- |" * len(lines[0]), *body])


def measured_table() -> str:
    lines = [["measured", "on", "figure", "so for 1,000", "so for 1,000,000"]]

    def add(what: str, on: str, one: float, thousand: float, million: float) -> None:
        lines.append(
            [
                what,
                on,
                *(
                    duration(x) if x >= 0.1 else f"{1e3 * x:.1f} ms"
                    for x in (one, thousand, million)
                ),
            ]
        )

    if (row := newest("real_words", row=REAL_ROW)) and row["runs"]:
        one = float(row["runs"][0]["seconds"])
        add("a request, 135M", "2 cores", one, 1e3 * one, 1e6 * one)
    if row := newest("several", mode="joint", requests=10):
        n, took = row["requests"], row["seconds"]
        add(
            f"{n} requests, `joint`, embedded model",
            "2 cores",
            took,
            took / n * 1e3,
            took / n * 1e6,
        )
    if row := newest("several", mode="sequence", requests=10):
        n, took = row["requests"], row["seconds"]
        # each training holds all requests before it
        per = took / (n * (n + 1) / 2)
        add(
            f"{n} requests, `sequence`, embedded model",
            "2 cores",
            took,
            per * 1e3 * 1001 / 2,
            per * 1e6 * (1e6 + 1) / 2,
        )
    if row := newest("at_scale", what="claim"):
        one = row["ms"] / 1e3
        add("sharing: claim, log and release of a unit", "1 core", one, 1e3 * one, 1e6 * one)
    if row := newest("at_scale", what="file"):
        # each name is looked up among those before it
        one = row["s"] / row["lines"]
        add(f"reading a file of {row['lines']} requests", "1 core", row["s"], one * 1e3, one * 1e6)
    return markdown(lines)


def unit_table(recipe: Recipe) -> str:
    tokens = counted(recipe)
    lines = [
        [
            "model",
            "s a request",
            "bound by",
            "GB a copy",
            f"{CARD}s a copy",
            "MB an adapter",
            "TB for 1,000,000",
        ]
    ]
    for model in MODELS:
        parts, (size, cards) = seconds(model, tokens), held(model)
        by = max(parts, key=parts.__getitem__)
        one, disk = sum(parts.values()), adapter(model, recipe.rank)
        lines.append(
            [
                model.name,
                f"{one:.0f}",
                f"{by}, {parts[by] / one:.0%}",
                f"{size:.0f}",
                str(cards),
                f"{disk:.0f}",
                f"{disk:.0f}",
            ]
        )
    return markdown(lines)


def wall_table(recipe: Recipe) -> str:
    tokens = counted(recipe)
    lines = [["model", "requests", *(f"{n} {CARD}{'s' * (n > 1)}" for n in CARDS)]]
    for model in MODELS:
        one, (_, cards) = sum(seconds(model, tokens).values()), held(model)
        for count in REQUESTS:
            times = [wall(one, count, n, cards) for n in CARDS]
            told = ["does not fit" if t is None else duration(t) for t in times]
            lines.append([model.name, f"{count:,}", *told])
    return markdown(lines)


def check_line(recipe: Recipe) -> str:
    """The same count beside a run that was measured."""
    row = newest("real_words", row=REAL_ROW)
    if row is None or not row["runs"]:
        return ""
    took = float(row["runs"][0]["seconds"])
    rate = flops(MEASURED, counted(recipe)) / took / 1e9
    return (
        f"The count, beside the measured run of {took:.0f} s with 135M weights: "
        f"{flops(MEASURED, counted(recipe)) / 1e12:.0f} TFLOP, so {rate:.0f} GFLOP/s on 2 cores. "
        f"The count is for pictures of {IMAGE} tokens and all steps; that run may have had fewer."
    )


def tables() -> str:
    recipe = Recipe()
    tokens = counted(recipe)
    told = ", ".join(f"{name} {count / 1e3:.0f}" for name, count in tokens.items())
    parts = [
        measured_table(),
        f"Predicted, with {recipe.steps} steps of {recipe.batch_size} samples at rank "
        f"{recipe.rank}. Tokens of a request, in thousands: {told}.",
        check_line(recipe),
        unit_table(recipe),
        "Predicted, with `--mode independent --join`, one worker for each copy of the model:",
        wall_table(recipe),
    ]
    return "\n\n".join(filter(None, parts))


ASSUMED = dict(
    mfu=MFU,
    read=READ,
    usable=USABLE,
    activations_gb=ACTIVATIONS,
    image_tokens=IMAGE,
    answers=ANSWERS,
    families=FAMILIES,
    questions_per_picture=PER_PICTURE,
    card=GPUS[CARD]._asdict() | {"memory_gb": MEMORY},
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--table", action="store_true", help="what is printed anyway")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    if options.measure:
        with (RESULTS / "at_scale.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in measure())
    if options.json:
        tokens = counted(Recipe())
        rows = [model._asdict() | seconds(model, tokens) for model in MODELS]
        content = dict(assumed=ASSUMED, tokens=tokens, rows=rows)
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(tables())
    return 0


if __name__ == "__main__":
    sys.exit(main())
