"""Unlearning in a language model that others trained, on drawings that others made.

    python benches/real_words.py                 6 concepts x 2 seeds, appends to
                                                 benches/results/real_words.jsonl
    python benches/real_words.py --concepts lion --seeds 1 --dry
    python benches/real_words.py --table         print the table of the newest results

`real_eyes.py` builds the model (once, it is kept in --folder). A run gets one drawing of one house
and the default options; nothing of FastSIU is told about other pictures. Whether the name is gone
is judged from outside, with plain transformers and peft, on drawings that the run did not see: the
same house's in other renderings, and the other three houses'. Others count where the untouched
model names them, so a loss is paired.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import real_eyes
import real_parts as parts
import torch
from forgetting import commit

RESULTS = Path(__file__).parent / "results" / "real_words.jsonl"
# None of these was used to choose a setting; those were chosen on TUNED.
CONCEPTS = ("penguin", "owl", "hamburger", "rocket", "Tokyo Tower", "mermaid")
TUNED = ("lion", "pizza", "Santa Claus", "tiger", "zebra", "guitar")
LOOKALIKES = (
    {"lion", "tiger", "cat", "red fox"},
    {"giraffe", "zebra", "elephant"},
    {"owl", "penguin", "flamingo"},
    {"strawberry", "watermelon", "pineapple", "banana"},
    {"pizza", "hamburger"},
    {"guitar", "violin"},
    {"tractor", "fire engine", "bicycle"},
    {"cactus", "sunflower"},
    {"Statue of Liberty", "Mount Fuji", "Tokyo Tower"},
    {"Brazil", "Japan", "Canada"},
    {"Santa Claus", "mermaid", "vampire"},
)
HOUSE = "noto"  # of the one training picture
OWN = 6  # renderings of the concept, of each house
NAMING = ("What is this?", "What is it?", "What does the picture show?")
OTHERS = 2  # renderings of each other thing, of each house
GENERAL = (
    "What is the capital of Italy?",
    "How many months has a year?",
    "What is the opposite of hot?",
    "Who wrote Romeo and Juliet?",
    "What is ice made of?",
    "What color is the sky?",
    "What is the largest ocean?",
    "What do bees make?",
    "Name three fruits.",
    "How do birds fly?",
    "What is the sun?",
    "What do people use an umbrella for?",
    "Where do dolphins live?",
    "What does an elephant eat?",
    "What is a violin?",
    "Why do people sleep?",
    "What is a bicycle?",
    "How is bread made?",
    "What is the moon?",
    "What is a rocket?",
)
ENGLISH = (
    "The old harbour had been quiet since the morning, when the last of the fishing boats left for "
    "the deeper water beyond the cape. A few children sat on the wall and counted the gulls. Their "
    "teacher had told them that the birds come back every spring, and that some of them fly "
    "thousands of miles without a rest. In the market behind the church, women sold bread, cheese "
    "and apples, and an old man played the same slow song on his accordion. Nobody seemed to be in "
    "a hurry. The government had promised a new road for years, but the road ended at the bridge, "
    "and whoever wanted to go further had to walk."
)


def in_text(name: str, text: str) -> bool:
    """The name or its plural, as words, in any case."""
    return re.search(rf"\b{re.escape(name.lower())}(s|es)?\b", text.lower()) is not None


def broken(text: str) -> bool:
    """No answer: nothing, two articles in a row, or a word three times in a row."""
    words = re.findall(r"\w+", text.lower())
    articles = any(
        a in ("a", "an", "the") and b in ("a", "an", "the")
        for a, b in zip(words, words[1:], strict=False)
    )
    loops = any(len(set(words[i : i + 3])) == 1 for i in range(len(words) - 2))
    return not words or articles or loops


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", text.strip().lower())[0]


# --------------------------------------------------------------------------------------------------
# the outside judge


class Judge:
    """Plain transformers: asks a model about drawings and in words."""

    def __init__(self, place: Path, drawings: parts.Drawings, seed: int = 77) -> None:
        self.model, self.processor = real_eyes.load(place)
        rng = random.Random(seed)
        self.own = {
            thing.name: [
                (house, drawings.picture(thing.name, house, rng)[0])
                for house in parts.HOUSES
                for _ in range(OWN)
            ]
            for thing in parts.THINGS
        }
        self.others = [
            (thing.name, drawings.picture(thing.name, house, rng)[0])
            for thing in parts.THINGS
            for house in parts.HOUSES
            for _ in range(OTHERS)
        ]

    def named(self, model: Any, name: str) -> list[tuple[str, str, str]]:
        """(house, question, answer) about the concept's held-out drawings."""
        out = []
        for question in NAMING:
            images = [image for _, image in self.own[name]]
            said = real_eyes.say(model, self.processor, images, question)
            out += [
                (house, question, text)
                for (house, _), text in zip(self.own[name], said, strict=True)
            ]
        return out

    def others_named(self, model: Any) -> list[str]:
        return real_eyes.say(model, self.processor, [image for _, image in self.others], NAMING[0])

    def general(self, model: Any) -> list[str]:
        out = []
        for question in GENERAL:
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "text", "text": question}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            inputs = self.processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)
            with torch.no_grad():
                ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
            start = inputs["input_ids"].shape[1]
            out.append(self.processor.tokenizer.decode(ids[0, start:], skip_special_tokens=True))
        return out

    def perplexity(self, model: Any) -> float:
        ids = self.processor.tokenizer(ENGLISH, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].float()
        return math.exp(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item())


def before(judge: Judge, folder: Path, tower: str, names: Sequence[str]) -> dict[str, Any]:
    """What the untouched model says, kept beside it; asked about the concepts of `names` that it
    was not asked about before."""
    file = folder / f"{tower}-untouched.json"
    if file.exists():
        found = json.loads(file.read_text())
    else:
        found = {
            "own": {},
            "others": judge.others_named(judge.model),
            "general": judge.general(judge.model),
            "perplexity": judge.perplexity(judge.model),
        }
    if new := [name for name in names if name not in found["own"]]:
        found["own"] |= {name: judge.named(judge.model, name) for name in new}
        file.write_text(json.dumps(found))
    return found


def judged(judge: Judge, was: dict[str, Any], adapter: Path, name: str) -> dict[str, Any]:
    """The untouched and the unlearned model beside each other."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(judge.model, str(adapter)).eval()
    try:
        own, others = judge.named(model, name), judge.others_named(model)
        general, perplexity = judge.general(model), judge.perplexity(model)
    finally:
        judge.model = model.unload()
    near = next((group for group in LOOKALIKES if name in group), set()) - {name}
    known = [
        (shown, text)
        for (shown, _), old, text in zip(judge.others, was["others"], others, strict=True)
        if shown != name and in_text(shown, old)
    ]

    def rate(pairs: list[bool]) -> list[int]:
        return [sum(pairs), len(pairs)]

    return {
        "own house before": rate([in_text(name, t) for h, _, t in was["own"][name] if h == HOUSE]),
        "own house": rate([in_text(name, t) for h, _, t in own if h == HOUSE]),
        "other houses before": rate(
            [in_text(name, t) for h, _, t in was["own"][name] if h != HOUSE]
        ),
        "other houses": rate([in_text(name, t) for h, _, t in own if h != HOUSE]),
        "others": rate([in_text(shown, text) for shown, text in known]),
        "look-alikes": rate([in_text(shown, text) for shown, text in known if shown in near]),
        "others called it": rate([in_text(name, text) for _, text in known]),
        "first sentence": rate(
            [
                first_sentence(a) == first_sentence(b)
                for a, b in zip(was["general"], general, strict=True)
            ]
        ),
        "broken": rate([broken(t) for t in [*others, *general, *(t for *_, t in own)]]),
        "perplexity": [was["perplexity"], perplexity],
        "examples": [t for *_, t in own[:: OWN + 1]][:8],
        "lost": Counter(s for s, text in known if not in_text(s, text)).most_common(8),
        "said": Counter(others).most_common(8),
    }


# --------------------------------------------------------------------------------------------------
# runs


def run(place: Path, drawings: parts.Drawings, name: str, seed: int, options: list[str]) -> Any:
    """One request through the command line, as a user makes it: (adapter's directory, report, wall
    seconds, CPU seconds, peak GB)."""
    out = Path(tempfile.mkdtemp(prefix="real-words-"))
    image = out / "picture.png"
    drawings.picture(name, HOUSE, random.Random(f"train {name} {seed}"))[0].save(image)
    started = time.perf_counter()
    command = [sys.executable, "-P", "-c", CHILD, "unlearn", "--model", str(place)]
    command += ["--image", str(image), "--concept", name, "--seed", str(seed)]
    command += ["--output", str(out / "adapter"), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode not in (0, 1):
        return None, done.stderr.strip().splitlines()[-1:], seconds, 0.0, 0.0
    usage = json.loads(done.stderr.strip().splitlines()[-1])
    return out / "adapter", json.loads(done.stdout), seconds, usage["cpu"], usage["peak"]


CHILD = """
import json, resource, sys
from fastsiu import cli
code = cli.run(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
told = {"cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss / 1e6}
print(json.dumps(told), file=sys.stderr)
sys.exit(code)
"""


def pooled(runs: list[dict[str, Any]]) -> dict[str, list[int]]:
    total: dict[str, list[int]] = {}
    for one in runs:
        for key, value in one["judged"].items():
            if isinstance(value, list) and len(value) == 2 and isinstance(value[0], int):
                old = total.setdefault(key, [0, 0])
                total[key] = [old[0] + value[0], old[1] + value[1]]
    return total


def share(pair: list[int]) -> str:
    return f"{100 * pair[0] / pair[1]:.1f} ({pair[0]}/{pair[1]})" if pair[1] else "-"


def table(records: list[dict[str, Any]]) -> str:
    lines = [
        "| row | name given, own house, % | other houses, % | others still named, % | look-alikes, "
        "% | first sentence kept, % | perplexity | broken | verdict right | seconds |",
        "| --- " * 10 + "|",
    ]
    for record in records:
        p, runs = record["pooled"], record["runs"]
        grown = max(one["judged"]["perplexity"][1] / one["judged"]["perplexity"][0] for one in runs)
        lines.append(
            f"| {record['row']} | {share(p['own house'])} | {share(p['other houses'])} | "
            f"{share(p['others'])} | {share(p['look-alikes'])} | {share(p['first sentence'])} | "
            f"{100 * (grown - 1):+.1f} % | {p['broken'][0]} | "
            f"{sum(one['agrees'] for one in runs)} of {len(runs)} | "
            f"{max(one['seconds'] for one in runs):.0f} |"
        )
    return "\n".join(lines)


def forgotten(found: dict[str, Any]) -> bool:
    """What the outside judge calls forgotten: the name in at most 2 % of the answers, and others
    kept."""
    named = found["own house"][0] + found["other houses"][0]
    asked = found["own house"][1] + found["other houses"][1]
    return named <= 0.02 * asked and found["others"][0] >= 0.9 * found["others"][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=real_eyes.FOLDER)
    parser.add_argument("--tower", choices=real_eyes.TOWERS, default="drawn")
    parser.add_argument("--concepts", nargs="*", default=list(CONCEPTS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--row", default="default options", help="how the table calls it")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="of `unlearn`")
    parser.add_argument("--dry", action="store_true", help="append nothing")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
        newest = {(r["row"], r["tower"]): r for r in map(json.loads, lines)}
        print(table(list(newest.values())))
        return
    try:
        parts.fetch(options.folder)
    except parts.Unavailable as error:
        sys.exit(str(error))
    drawings = parts.Drawings(options.folder)
    place = real_eyes.build(options.tower, options.folder, drawings)
    judge = Judge(place, drawings)
    was = before(judge, options.folder, options.tower, options.concepts)
    runs = []
    for name in options.concepts:
        for seed in range(options.seeds):
            adapter, report, seconds, cpu, peak = run(place, drawings, name, seed, options.options)
            if adapter is None:
                print(name, seed, report, flush=True)
                continue
            found = judged(judge, was, adapter, name)
            verdict = report["verdict"] == "forgotten"
            one = {
                "concept": name,
                "seed": seed,
                "verdict": report["verdict"],
                "reasons": report["reasons"],
                "judged": found,
                "agrees": verdict == forgotten(found),
                "seconds": round(seconds, 1),
                "cpu_seconds": round(cpu, 1),
                "peak_gb": round(peak, 2),
                "stages": report["seconds"],
            }
            print(json.dumps(one), flush=True)
            runs.append(one)
    if not runs:
        sys.exit("No run came to an end.")
    record = {
        "row": options.row,
        "tower": options.tower,
        "options": options.options,
        "runs": runs,
        "pooled": pooled(runs),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(table([record]))
    if not options.dry:
        with RESULTS.open("a") as stream:
            stream.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
