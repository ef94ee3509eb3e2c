"""LLaVA-1.5-7B with random weights, from load to saved adapter, and one optimisation step at that
size: time and memory on a GPU.

    benches/gpu.sh --only real                what its time allows, as a step of the GPU bench;
                                              benches/apply.py makes a table of it
    benches/gpu.sh --only real --variants "nf4 in 8 GB" "one step"
    python benches/real.py                    every variant on this machine's GPU; appends to
                                              benches/results/real.jsonl
    python benches/real.py --quick            a tiny model on a CPU, two steps: a rehearsal, whose
                                              figures mean nothing
    python benches/real.py --table [--of D]   the tables of the results

The model is made on the GPU and saved as shards first, which is timed in a row of its own. Each
variant then has a process of its own and does what `fastsiu unlearn` does with `--memory`: plan,
load, ask, dream, teacher, train, verdict, save. What differs:

- Embedding and head are made so that each token of one fixed answer leads to the next: the model
  answers everything with the concept's name and 37 words. So it knows the concept, and answers have
  the 40 tokens that the plan assumes.
- It names nobody else, so every dream is refused after all its steps. As many made-up ones take
  their places, and the samples about them are written here: in all as many as a run that protects
  eight neighbours has.
- It does not stop early.

Seconds are counted from the start of loading to the renamed output; the plan and hashing the
model's files, which come before, have times of their own in the rows. Peak memory is that of the
process: the most that torch's allocator reserved and what the GPU lacked beside it (its context). A
limit is for that sum, by `torch.cuda.set_per_process_memory_fraction`. A variant that fails leaves
a row with the reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import loss
import step
import torch
import transformers
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
)

from fastsiu import driver, images, session
from fastsiu import output as outputs
from fastsiu.demo.world import KNOWN
from fastsiu.evaluate import held_out
from fastsiu.model import adapter, ask, features, plan, source, vlm
from fastsiu.model.memory import GB, Layout, budget
from fastsiu.request import BadInput, NumericFailure, OutOfMemory, Recipe, Request, Sample
from fastsiu.samples import corpus, targets
from fastsiu.samples.beside import Prepared
from fastsiu.samples.scene import Scene
from fastsiu.settings import EMBEDDED, RecipeChoice, choose_recipe, deciding
from fastsiu.text.concept import Concept

KINDS = ("made", "real", "real step")
RESULTS = Path(__file__).parent / "results" / "real.jsonl"
CONCEPT, *OTHERS = (
    KNOWN  # the tokenizer is the embedded model's: each word of these names is one token
)
LEAST = 60.0  # seconds: with less a variant is not begun on a GPU
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """The model's proportions; how many neighbours a run protects, and the tokens of an answer."""

    name: str
    pixels: int
    hidden: int
    wide: int
    layers: int
    heads: int
    vocabulary: int
    vision: tuple[int, int, int, int]  # hidden, intermediate, layers, heads
    neighbours: int
    tokens: int


REAL = Size("LLaVA-1.5-7B", 336, 4096, 11008, 32, 32, 32064, (1024, 4096, 24, 16), 8, 40)
TINY = Size("tiny LLaVA", 56, 64, 192, 2, 4, 1064, (32, 64, 2, 2), 1, 9)


@dataclass(frozen=True)
class Variant:
    """One run. memory: GB given to the plan, CARD: all that the GPU has; limit: GB that the process
    may take; target_gb,
    target_seconds: what is to be met.

    short: not all steps, since memory and not time is asked about; given: settings that are asked
    for
    quick: what a rehearsal sets, since a tiny model fits with anything; None: as another variant
    but for its numbers, so that a
           rehearsal leaves it out
    """

    name: str
    memory: float | str | None = None
    limit: float | None = None
    target_gb: float | None = None
    target_seconds: float | None = None
    short: bool = False
    preset: str = "default"
    given: dict[str, Any] = field(default_factory=dict)
    quick: dict[str, Any] | None = field(default_factory=dict)


BF16, NF4 = {"quantize": None}, {"quantize": "nf4"}
FLASH = BF16 | {"attention": "flash_attention_2"}
SPARING = {"checkpointing": True}
STEP, CARD = "one step", "card"
STAGES = ("load", "samples", "dreams", "teacher", "train", "verdict", "save")
VARIANTS = [  # in the order of their worth: the last may find no time left
    Variant("bf16, sdpa", 22, 22, 22, 60, given=BF16, quick=SPARING),
    Variant("nf4 in 8 GB", 8, 7.5, 7.5, short=True, given=NF4, quick=SPARING | {"micro_batch": 4}),
    Variant("nf4 in 12 GB", 12, 11, 11, short=True, given=NF4, quick=None),
    Variant("bf16, preset paper", CARD, target_seconds=60, preset="paper", given=BF16),
    Variant(STEP),
    Variant("bf16, flash-attn", 22, 22, 22, short=True, given=FLASH),
    Variant("bf16, the whole card", CARD, target_seconds=60, given=BF16, quick=None),
]
SHORT = {"steps": 8, "dream_steps": 8}
QUICK = {"steps": 2, "dream_steps": 1, "dreams": 1, "generic": 4, "batch_size": 8}


# --------------------------------------------------------------------------------------------------
# the model


def described(size: Size) -> tuple[LlavaConfig, Any]:
    """Configuration and processor: LLaVA-1.5's, with the embedded model's tokenizer and chat
    template."""
    processor = AutoProcessor.from_pretrained(EMBEDDED)
    tokenizer = processor.tokenizer
    tokenizer.model_max_length = 4096
    side = {"height": size.pixels, "width": size.pixels}
    processor.image_processor = type(processor.image_processor)(
        size={"shortest_edge": size.pixels},
        crop_size=side,
        image_mean=[0.481, 0.458, 0.408],
        image_std=[0.269, 0.261, 0.276],
    )
    processor.patch_size = 14
    text = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.wide,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        **ends(tokenizer),
    )
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    seen = dict(
        zip(names, size.vision, strict=True),
        image_size=size.pixels,
        patch_size=14,
        projection_dim=768,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(**seen),
        tie_word_embeddings=False,
        dtype="bfloat16",
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(size.pixels // 14) ** 2,
    )
    return config, processor


def ends(tokenizer: Any) -> dict[str, int]:
    return {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")
    }


def make(size: Size, directory: Path) -> Row:
    """Writes the model with its processor; the row has what that took."""
    began = time.perf_counter()
    torch.manual_seed(0)
    config, processor = described(size)
    with torch.device(place()):
        base = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    base.generation_config.update(do_sample=False, **ends(processor.tokenizer))
    talk(base, vlm.VLM(size.name, None, base, base, processor), size.tokens)
    built = time.perf_counter()
    base.save_pretrained(directory, max_shard_size="5GB")
    processor.save_pretrained(directory)
    written = time.perf_counter()
    image_file(directory).parent.mkdir(exist_ok=True)
    Image.radial_gradient("L").resize((2 * size.pixels, size.pixels)).convert("RGB").save(
        image_file(directory)
    )
    saved = time.perf_counter()
    digests_file(directory).write_text(
        json.dumps(outputs.digest_model(directory)), encoding="utf-8"
    )
    hashed = time.perf_counter() - saved
    shards = [p.stat().st_size for p in directory.glob("*.safetensors")]
    return stamp(size) | {
        "kind": "made",
        "parameters": sum(p.numel() for p in base.parameters()),
        "gb": sum(shards) / GB,
        "shards": len(shards),
        "seconds": {"build": built - began, "write": written - built, "digests": hashed},
    }


@torch.no_grad()
def talk(base: Any, model: vlm.VLM, tokens: int) -> None:
    """Makes the model answer everything with `answer`: the head's row of each token is the
    embedding of the one before it.

    What layers add to the residual stream is kept small beside the embeddings, so that these
    decide.
    """
    text = answer(model.tokenizer, tokens, CONCEPT)
    prompt = model.tokenizer(model.render("?", False), add_special_tokens=False).input_ids
    whole = model.tokenizer(model.render("?", False, text), add_special_tokens=False).input_ids
    chain = whole[len(prompt) - 1 :]
    if whole[: len(prompt)] != prompt or len(set(chain)) != len(chain):
        raise BadInput(
            "The answer's tokens do not follow the prompt's, each once: take another tokenizer."
        )
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    embedding.normal_()
    head.normal_()
    head[chain[1:]] = embedding[chain[:-1]]
    # the wanted token's logit is 30, others' are near 0: as sure as a trained model
    head.mul_(30 / head.shape[1])
    for layer in base.get_decoder().layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.mul_(0.1)


def answer(tokenizer: Any, tokens: int, name: str = "") -> str:
    """So many tokens, the end of the turn included, each once: words, behind the name where one is
    given."""
    begin = f"This is {name}," if name else "This is"
    used = set(tokenizer(begin, add_special_tokens=False).input_ids)
    vocabulary = sorted(
        (i, t[1:]) for t, i in tokenizer.get_vocab().items() if t[:1] == "Ġ" and i not in used
    )
    found = [w for _, w in vocabulary if len(w) > 3 and w.isascii() and w.isalpha() and w.islower()]
    whole = [w for w in found if len(tokenizer(f"a {w}", add_special_tokens=False).input_ids) == 2]
    return " ".join([begin, *whole[: tokens - len(used) - 1]])


def image_file(directory: Path) -> Path:
    return directory.parent / "picture.png"


def digests_file(directory: Path) -> Path:
    """Of the model's files: made once, since every run would make the same."""
    return directory.parent / "digests.json"


def place() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def stamp(size: Size) -> Row:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": loss.commit(),
        "device": loss.device_name(place()),
        "gpu": place() == "cuda",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": size.name,
    }


# --------------------------------------------------------------------------------------------------
# one run


class Gauge:
    """Peak memory of this process from here on, in GB, and the limit to it."""

    def __init__(self, limit: float | None) -> None:
        self.outside = 0.0
        if place() == "cpu":
            return
        free, total = torch.cuda.mem_get_info()
        self.outside = (total - free - torch.cuda.memory_reserved()) / GB
        if self.outside > 2:
            raise BadInput(
                f"{self.outside:.1f} GB of this GPU are in use by others: measure on one that is "
                "free."
            )
        torch.cuda.reset_peak_memory_stats()
        if limit is not None:
            torch.cuda.set_per_process_memory_fraction(
                min(1.0, (limit - self.outside) * GB / total)
            )

    def read(self) -> Row:
        """allocated and reserved by torch, at most; outside: what is taken of the GPU beside that;
        used: reserved and outside. On a CPU used is the process's high-water mark."""
        if place() == "cpu":
            return {"used": loss.resident("VmHWM") / 2**20}
        free, total = torch.cuda.mem_get_info()
        outside = max(self.outside, (total - free - torch.cuda.memory_reserved()) / GB)
        reserved = torch.cuda.max_memory_reserved() / GB
        return {
            "allocated": torch.cuda.max_memory_allocated() / GB,
            "reserved": reserved,
            "outside_at_start": self.outside,
            "outside": outside,
            "used": reserved + outside,
        }


def measure(variant: Variant, size: Size, directory: Path, quick: bool, whole: bool) -> Row:
    """A variant's row. Memory that does not suffice and packages that are not here are its result;
    other errors are raised."""
    row = stamp(size) | {
        "kind": "real",
        "variant": variant.name,
        "quick": quick,
        "memory": room(variant.memory),
        "limit": variant.limit,
        "target_gb": variant.target_gb,
        "target_seconds": variant.target_seconds,
        "missing": None,
        "stage": "Looking at the GPU",
        "said": [],
        "seconds": {},
    }
    listener = session.Listener(stage=lambda text: row.update(stage=text), note=row["said"].append)
    gauge = None
    try:
        gauge = Gauge(variant.limit)
        row |= run(
            variant,
            size,
            directory,
            QUICK if quick else SHORT if variant.short and not whole else {},
            row,
            listener,
        )
    except (BadInput, NumericFailure, OutOfMemory, torch.OutOfMemoryError) as error:
        row["missing"] = loss.sentence(error)
    row["peak"] = gauge.read() if gauge else {}
    return row | met(row)


def room(memory: float | str | None) -> float | None:
    """GB for the plan. Of the whole card one GB is left to whatever else is on it."""
    if memory != CARD:
        return memory
    return None if place() == "cpu" else torch.cuda.mem_get_info()[1] / GB - 1


def met(row: Row) -> Row:
    """Was each target met? None: there is none, or it was not put to the test."""
    ran = row["missing"] is None and not row["quick"]
    fits = row["peak"]["used"] <= row["target_gb"] if ran and row["target_gb"] else None
    # such a variant runs all its steps
    fast = row["total"] <= row["target_seconds"] if ran and row["target_seconds"] else None
    return {"met_gb": fits, "met_seconds": fast}


def run(
    variant: Variant,
    size: Size,
    directory: Path,
    shorter: Row,
    row: Row,
    listener: session.Listener,
) -> Row:
    """`driver.unlearn` step by step; `row["seconds"]` fills as it goes."""
    seconds, name = row["seconds"], str(directory)
    given = variant.given | ((variant.quick or {}) if row["quick"] else {})
    request = Request(CONCEPT, image_file(directory), protect=tuple(OTHERS[: size.neighbours]))
    preset = {} if variant.preset == "default" else {"dreams": 0}
    changes = shorter | preset | {"early_stop": False}
    recipe, origins = choose_recipe(name, RecipeChoice(variant.preset, changes))
    picture = images.load_image(request.image)
    weights = json.loads(digests_file(directory).read_text(encoding="utf-8"))
    listener.stage("Planning")
    with timed(seconds, "plan"):
        estimate = planned(name, row["memory"], recipe, picture, given)
    chosen = estimate.settings
    row |= {
        "settings": str(chosen),
        "planned": estimate.as_dict() | {"settings": asdict(chosen)},
        "recipe": recipe.as_dict(),
    }

    began = time.perf_counter()
    listener.stage("Loading the model")
    with timed(seconds, "load"):
        loaded = vlm.load(
            name,
            quantize=chosen.quantize,
            attention=chosen.attention,
            budget=budget(chosen, recipe.batch_size, row["memory"] is not None),
        )
    try:
        with vlm.threads(loaded):
            one = prepared(loaded, request, recipe, picture, size.tokens, listener, seconds)
            made, history = session.learn(loaded, [one], recipe, listener=listener, seconds=seconds)
            settle()
            trained = session.Trained(one.scene, made, history, one.dreamed, seconds)
            listener.stage("Asking again, with the adapter on and off")
            with timed(seconds, "verdict"):
                verdict, answers = held_out.decide(one.scene)
        listener.stage("Writing the output")
        with timed(seconds, "save"):
            decides = deciding(chosen)
            digest = outputs.request_digest(request, recipe, name, None, weights=weights, **decides)
            sealed = driver.Sealed(recipe, origins, digest, weights, decides)
            report = driver.report_of(request, recipe, name, verdict, answers, trained)
            with tempfile.TemporaryDirectory() as work:
                driver.write(Path(work) / "out", loaded, [request], [report], sealed)
        total = time.perf_counter() - began
        return {
            "total": total,
            "steps": len(history),
            "losses": [s.loss for s in history],
            "samples": len(made.samples),
            "rows": sum(len(t.labels) for t in made.turns),
            "pictures": len(made.pictures),
            "answered": len(answers),
            "shares": loaded.shares,
            "budget": asdict(loaded.budget),
        }
    finally:
        adapter.detach(loaded)


def planned(name: str, memory: float | None, recipe: Recipe, picture: Any, given: Row) -> Any:
    """The estimate of the settings that the driver would choose. Raises BadInput where none fits or
    a package is not here."""
    asked = Layout(dtype="auto", device=place(), **given)
    source.check_packages(place(), asked.dtype, asked.quantize, asked.attention, asked.optimizer)
    config, processor, _ = source.describe(name, None)
    work = plan.workload_of(config, processor, picture)
    found = plan.plan(
        name, memory, asked, recipe=recipe, config=config, work=work, fixed=frozenset(given)
    )
    if found.chosen is None and memory is not None:
        raise BadInput(found.sentence)
    return found.chosen or found.estimates[0]


def prepared(
    loaded: vlm.VLM,
    request: Request,
    recipe: Recipe,
    picture: Any,
    tokens: int,
    listener: session.Listener,
    seconds: Row,
) -> Prepared:
    """`session.prepare`, with made-up dreams in the place of the refused ones and with samples of
    what is preserved."""
    with timed(seconds, "samples"):
        scene = Scene(loaded, Concept(request.concept), recipe, [loaded.picture(picture)])
        session.check_known(scene, request)
    samples, dreamed = session.gather(scene, request, listener, seconds)
    with timed(seconds, "samples"):
        imagine(scene)
        samples += preserved(scene, tokens)
        made = corpus.build(loaded, scene.concept, samples, scene.pictures, recipe)
    return Prepared(request, scene, made, dreamed)


def imagine(scene: Scene) -> None:
    """Adds `recipe.dreams` pictures of each neighbour: the one picture's features, disturbed."""
    random = torch.Generator(scene.vlm.device).manual_seed(0)
    noisy = lambda x: (
        x + 0.1 * x.std() * torch.randn(x.shape, generator=random, device=x.device, dtype=x.dtype)
    )
    start = scene.pictures[0]
    for name in scene.neighbours:
        for _ in range(scene.recipe.dreams):
            scene.pictures.append(
                vlm.Picture(start.image, features.map_features(start.features, noisy), real=False)
            )
            scene.named.append(name)


def preserved(scene: Scene, tokens: int) -> list[Sample]:
    """What `targets.preserve` asks about pictures, with an answer of so many tokens each: it took
    none of the model's, since all name the concept. About dreams it is asked here, as there, for
    the time that takes."""
    said, words = answer(scene.vlm.tokenizer, tokens), targets.wordings()
    pairs, yes = [(q, 0) for q in words["describe"]["train"]], words["yesno"]["train"]
    for index, name in enumerate(scene.named[1:], 1):
        about = [
            words["describe"]["train"][0],
            yes[0].format(name=scene.concept.name),
            yes[1].format(name=name),
        ]
        pairs += [(q, index) for q in (*words["who"]["train"], *about)]
    ask.replies(scene.vlm, [(q, scene.pictures[i]) for q, i in pairs if i])
    return [Sample("preserve", q, said, i, (), "dream" if i else "teacher") for q, i in pairs]


class timed:
    """`with timed(seconds, name):` adds the time inside; on a GPU what was begun there is waited
    for."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        settle()
        self.began = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        settle()
        self.seconds[self.name] = (
            self.seconds.get(self.name, 0.0) + time.perf_counter() - self.began
        )


def settle() -> None:
    if place() == "cuda":
        torch.cuda.synchronize()


def one_step(size: Size, quick: bool, samples: int = 8) -> list[Row]:
    """Rows of benches/step.py at this size; with fewer samples where the straightforward
    implementation does not fit."""
    given = dict(device="cpu") if quick else dict(device="cuda", dtype=torch.bfloat16)
    rows = None
    try:
        rows = step.bench(
            step.QUICK if quick else step.REAL, samples, 1 if quick else 5, not quick, **given
        )
    except torch.OutOfMemoryError:
        if samples == 2:
            raise
    if rows is None:  # here, and not where it was caught: there the traceback holds the model
        gc.collect()
        return one_step(size, quick, samples // 2)
    return [stamp(size) | r | {"kind": "real step", "quick": quick} for r in rows]


# --------------------------------------------------------------------------------------------------
# all variants


def every(
    variants: list[Variant],
    quick: bool,
    whole: bool,
    until: float,
    emit: Callable[[list[Row]], None],
    under: Path | None = None,
) -> int:
    """Makes the model and runs the variants, their rows given to `emit` as they come; 1 where one
    ended in an error, else 0.

    until: on time.monotonic's clock; what is not done by then is ended or left out, with a row;
    under: where the model goes
    """
    with tempfile.TemporaryDirectory(dir=under) as work:
        directory, free = Path(work) / "model", shutil.disk_usage(work).free / GB
        job = {"directory": str(directory), "quick": quick, "whole": whole}
        if not quick and free < 16:
            why = (
                f"Where it would be made, {free:.0f} GB are free, and it takes 14: see --directory."
            )
            emit([{"kind": "made", "variant": None, "quick": quick, "seconds": {}, "missing": why}])
            return 1
        (made,) = rows = child(job | {"variant": None}, until)
        emit(rows)
        if made["missing"]:
            return 1
        failed = False
        for variant in variants:
            known = {
                k: made[k]
                for k in ("date", "commit", "device", "gpu", "torch", "transformers", "model")
            }
            rows = [
                known | row if "device" not in row else row
                for row in child(job | {"variant": variant.name}, until)
            ]
            failed |= any(row.get("failed", False) for row in rows)
            emit(rows)
    return int(failed)


def chosen(quick: bool, names: list[str] | None = None) -> list[Variant]:
    """The named ones; without names all, or those that a rehearsal has."""
    known = {v.name: v for v in VARIANTS}
    if strange := sorted(set(names or ()) - set(known)):
        raise BadInput(f"There is no variant {strange[0]!r}: choose from {', '.join(known)}.")
    return (
        [known[n] for n in names]
        if names
        else [v for v in VARIANTS if not quick or v.quick is not None]
    )


def child(job: Row, until: float) -> list[Row]:
    """The rows of one job from a process of its own; where it made none, one that says why."""
    empty = {
        "kind": "real" if job["variant"] else "made",
        "variant": job["variant"],
        "quick": job["quick"],
        "seconds": {},
    }
    left = until - time.monotonic()
    if left < (0 if job["quick"] else LEAST):
        return [empty | {"missing": "No time was left for it."}]
    if job["quick"]:
        return rows_of(job)  # a process of its own would take longer to start than to run
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--job", json.dumps(job)],
            capture_output=True,
            text=True,
            timeout=left,
        )
    except subprocess.TimeoutExpired:
        return [empty | {"missing": f"Not done after {left:.0f} s."}]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    if done.returncode == 0 and rows:
        return rows
    print(done.stderr[-3000:], file=sys.stderr)
    lines = done.stderr.strip().splitlines() or [f"It ended with exit code {done.returncode}."]
    return [empty | {"missing": lines[-1][-300:], "failed": True}]


def rows_of(job: Row) -> list[Row]:
    size, directory = TINY if job["quick"] else REAL, Path(job["directory"])
    transformers.logging.set_verbosity_error()
    if job["variant"] is None:
        return [make(size, directory) | {"missing": None, "quick": job["quick"]}]
    variant = next(v for v in VARIANTS if v.name == job["variant"])
    if variant.name != STEP:
        return [measure(variant, size, directory, job["quick"], job["whole"])]
    try:
        return one_step(size, job["quick"])
    except torch.OutOfMemoryError as error:
        row = {"kind": "real", "variant": STEP, "quick": job["quick"], "seconds": {}}
        return [stamp(size) | row | {"missing": loss.sentence(error)}]


# --------------------------------------------------------------------------------------------------
# tables


def newest(rows: list[Row], device: str | None) -> list[Row]:
    """One device's rows (the last row's, where none is named), of each variant the last."""
    rows = [r for r in rows if r["kind"] in KINDS and device in (None, r.get("device"))]
    device = device or (rows[-1].get("device") if rows else None)
    key = lambda r: (r["kind"], r.get("variant") or r.get("contender"))
    return list({key(r): r for r in rows if r.get("device") == device}.values())


def tables(rows: list[Row]) -> str:
    """Markdown of one device's rows; what did not run is named below."""
    ran = [r for r in rows if r["kind"] == "real" and not r["missing"]]
    out = []
    if ran:
        head = ["variant", "settings", "steps", "plan, before", "load to saved", *STAGES, "target"]
        head += ["peak, GB", "planned", "target"]
        out += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *map(line, ran), ""]
    for made in (r for r in rows if r["kind"] == "made" and not r["missing"]):
        build, write, digests = (
            f"{made['seconds'][k]:.0f} s" for k in ("build", "write", "digests")
        )
        out += [
            f"{made['model']}, random weights, {made['parameters'] / 1e9:.3g} billion "
            f"parameters: made in {build}; "
            f"{made['gb']:.3g} GB written in {write} and hashed in {digests}, which no run counts.",
            "",
        ]
    if steps := [r for r in rows if r["kind"] == "real step"]:
        out += [
            f"One step of {steps[0]['model']}, {steps[0]['dtype']}, beside the straightforward "
            "one (benches/step.py):",
            "",
            step.table(steps),
            "",
        ]
    if missing := [r for r in rows if r.get("missing")]:
        why = "; ".join(
            f"{r['variant'] or 'the model'} ({r['missing'].rstrip('.')})" for r in missing
        )
        out.append(f"Not measured: {why}.")
    return "\n".join(out).rstrip()


def line(r: Row) -> str:
    recipe, smaller = (
        r["recipe"],
        r["budget"]["micro_batch"] != r["planned"]["settings"]["micro_batch"],
    )
    settings = r["settings"] + (
        f", at last micro-batch {r['budget']['micro_batch']}" if smaller else ""
    )
    steps = f"{r['steps']} of {recipe['batch_size']}" + (
        f", {recipe['dream_steps']} of a dream" if recipe["dreams"] else ""
    )
    stages = [f"{r['seconds'].get(stage, 0.0):.1f}" for stage in STAGES]
    cells = [
        r["variant"],
        settings,
        steps,
        f"{r['seconds']['plan']:.1f}",
        f"{r['total']:.1f} s",
        *stages,
        aim(r["target_seconds"], "s", r["met_seconds"]),
        f"{r['peak']['used']:.2f}",
        f"{r['planned']['peak'] / GB:.2f}",
        aim(r["target_gb"], "GB", r["met_gb"]),
    ]
    return "| " + " | ".join(cells) + " |"


def told(rows: list[Row]) -> str:
    """A line a row: what became of it."""
    name = lambda r: r.get("variant") or r.get("contender") or "the model"
    return "\n".join(f"{name(r)}: {r.get('missing') or 'measured'}" for r in rows)


def aim(target: float | None, unit: str, ok: bool | None) -> str:
    if target is None:
        return "-"
    return f"{target:g} {unit}: " + ("not tested" if ok is None else "met" if ok else "not met")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="rehearse on a CPU; appends nothing")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help="; ".join(v.name for v in VARIANTS)
    )
    parser.add_argument("--whole", action="store_true", help="all steps of every variant")
    parser.add_argument(
        "--seconds", type=float, default=3600, help="begin nothing that would not be done by then"
    )
    parser.add_argument(
        "--directory",
        type=Path,
        metavar="DIR",
        help="where there are 14 GB for the model, temporarily",
    )
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--of", metavar="DEVICE", help="with --table")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        print(*map(json.dumps, rows_of(json.loads(given.job))), sep="\n")
        return 0
    if given.table:
        found = (
            [json.loads(text) for text in RESULTS.read_text(encoding="utf-8").splitlines()]
            if RESULTS.is_file()
            else []
        )
        print(tables(newest(found, given.of)))
        return 0
    if not given.quick and place() == "cpu":
        parser.error("there is no GPU here: rehearse with --quick")
    rows: list[Row] = []

    def emit(new: list[Row]) -> None:
        rows.extend(new)
        print(told(new), flush=True)
        if not given.quick:
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(r) + "\n" for r in new)

    try:
        variants = chosen(given.quick, given.variants)
    except BadInput as error:
        parser.error(str(error))
    code = every(
        variants, given.quick, given.whole, time.monotonic() + given.seconds, emit, given.directory
    )
    print(tables(rows))
    return code


if __name__ == "__main__":
    sys.exit(main())
