"""Asking the embedded model: 24 pictures x every held-out wording about one, and 200 questions in
words, in four ways.

    python benches/asking.py            three rounds; prints the table, appends to
                                        benches/results/asking.jsonl
    python benches/asking.py --quick    three pictures, twelve questions in words, one round;
                                        appends nothing
    python benches/asking.py --table    print the table of the newest results

Every way starts from pictures and words and ends with the answers' texts. In each round they run
one after the other in one process. Seconds are CPU seconds of its one thread, so that other work of
the machine matters little. The plain loop is the one of transformers' own pages: processor and
`generate` for each question, so that the picture goes through the vision tower each time.

Where an answer differs from the plain loop's, a separate forward looks at the token where the two
part: the two likeliest tokens must be less than 1e-4 apart there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import forgetting

RESULTS = Path(__file__).parent / "results" / "asking.jsonl"
PICTURES, WORDS, BATCH, LONGEST = 24, 200, 64, 48
NEAR = 1e-4
Asked = list[tuple[str, Any]]  # question, picture or None


def questions(pictures: int, words: int) -> Asked:
    from fastsiu.demo.wording import HELD_OUT
    from fastsiu.demo.world import KNOWN, World, draw

    world, topics = World(), ("who.open", "who.name", "yesno", "description")
    shown = [
        draw(world.sketch((KNOWN[i % len(KNOWN)],), f"bench asking {i}")) for i in range(pictures)
    ]
    wordings = [(text, i) for topic in topics for i, text in enumerate(HELD_OUT[topic])]
    asked: Asked = [(text.format(n=KNOWN[i]), picture) for picture in shown for text, i in wordings]
    told = [question.question for question in world.text_questions(KNOWN, heldout=True)]
    return asked + [(text, None) for text in told[:: len(told) // words][:words]]


def inputs_of(loaded: Any, asked: Asked, **options: Any) -> dict[str, Any]:
    images = {"images": [[picture] for _, picture in asked]} if asked[0][1] is not None else {}
    texts = [loaded.render(question, picture is not None) for question, picture in asked]
    return loaded.processor(
        text=texts, return_tensors="pt", add_special_tokens=False, **images, **options
    )


def said(loaded: Any, asked: Asked, **options: Any) -> list[str]:
    """Transformers' `generate` on these questions at once."""
    inputs = inputs_of(loaded, asked, **options)
    tokens = loaded.base.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
    texts = loaded.processor.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [text.strip() for text in texts]


def plain_loop(loaded: Any, asked: Asked) -> list[str]:
    return [text for one in asked for text in said(loaded, [one])]


def padded_batches(loaded: Any, asked: Asked) -> list[str]:
    """Left-padded, with and without a picture apart; questions of like length together, which pads
    least."""
    answers = [""] * len(asked)
    for pictured in (True, False):
        members = [i for i, (_, picture) in enumerate(asked) if (picture is not None) is pictured]
        members.sort(key=lambda i: len(asked[i][0]))
        for at in range(0, len(members), BATCH):
            chosen = members[at : at + BATCH]
            for i, text in zip(
                chosen, said(loaded, [asked[i] for i in chosen], padding=True), strict=True
            ):
                answers[i] = text
    return answers


def shared(loaded: Any, asked: Asked) -> list[str]:
    from fastsiu.model import ask

    seen = {id(picture): picture for _, picture in asked if picture is not None}
    made = {key: loaded.picture(picture) for key, picture in seen.items()}
    put = [(question, picture and made[id(picture)]) for question, picture in asked]
    return ask.answers(loaded, put, max_new_tokens=LONGEST)


def equal_lengths(loaded: Any, asked: Asked) -> list[str]:
    """`shared` where the trial says that no prefix may be shared."""
    kept = loaded.decodes
    loaded.decodes = dict.fromkeys((True, False), "not asked for")
    try:
        return shared(loaded, asked)
    finally:
        loaded.decodes = kept


def first_time(loaded: Any, asked: Asked) -> list[str]:
    """`shared` on a model that nobody has asked anything: with the trial."""
    loaded.decodes = {}
    return shared(loaded, asked)


CONTENDERS: dict[str, Callable[[Any, Asked], list[str]]] = {
    "plain loop": plain_loop,
    "generate, padded batches": padded_batches,
    "generate, cached features": equal_lengths,
    "shared prefix": first_time,
}


def gap(loaded: Any, one: tuple[str, Any], plain: str, other: str) -> float:
    """Between the two likeliest logits where the other answer parts from the plain one, in a
    forward with pixels."""
    import torch

    inputs = inputs_of(loaded, [one])
    start = inputs["input_ids"].shape[1]
    with torch.no_grad():
        tokens = loaded.base.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
        inputs |= {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        logits = loaded.base(**inputs).logits[0, start - 1 : -1].double()
    text = lambda n: loaded.tokenizer.decode(
        tokens[0, start : start + n], skip_special_tokens=True
    ).strip()
    parts = next(
        (n for n in range(len(logits)) if not other.startswith(text(n + 1))), len(logits) - 1
    )
    first, second = logits[parts].topk(2).values.tolist()
    return first - second


def bench(pictures: int, words: int, rounds: int) -> list[dict[str, Any]]:
    import torch
    import transformers
    from loss import device_name

    from fastsiu.demo import MODEL_DIR
    from fastsiu.model import vlm

    torch.set_num_threads(1)
    loaded, asked = vlm.load(str(MODEL_DIR), device="cpu"), questions(pictures, words)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    answers: dict[str, list[str]] = {}
    for way in CONTENDERS.values():
        way(loaded, asked[:2] + asked[-2:])  # what is done once in a process
    for _ in range(rounds):
        for name, way in CONTENDERS.items():
            started = time.process_time()
            answers[name] = way(loaded, asked)
            seconds[name].append(time.process_time() - started)
    stamp = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": forgetting.commit(),
        "device": device_name("cpu"),
        "threads": 1,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pictures": pictures,
        "questions": len(asked),
        "rounds": rounds,
    }
    records, plain = [], answers["plain loop"]
    for name, found in answers.items():
        differ = [i for i in range(len(asked)) if found[i] != plain[i]]
        gaps = [gap(loaded, asked[i], plain[i], found[i]) for i in differ]
        times = seconds[name]
        ratio = statistics.median(p / t for p, t in zip(seconds["plain loop"], times, strict=True))
        records.append(
            stamp
            | {
                "contender": name,
                "seconds": [round(t, 3) for t in times],
                "ratio": round(ratio, 1),
                "differ": len(differ),
                "widest": max(gaps, default=0.0),
            }
        )
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Markdown; seconds are the median of the rounds, `times` the median of the ratios within a
    round."""
    head = [
        "",
        "seconds",
        "times as fast as the plain loop",
        "answers that differ",
        "widest gap where they do",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in records:
        cells = [
            f"{statistics.median(r['seconds']):.2f}",
            f"{r['ratio']:.1f}",
            f"{r['differ']} of {r['questions']}",
        ]
        lines.append(
            f"| {r['contender']} | {' | '.join(cells)} | {r['widest']:.0e} |"
            if r["differ"]
            else f"| {r['contender']} | {' | '.join(cells)} | - |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.table:
        if not RESULTS.is_file():
            parser.error("there are no results yet: run without --table first")
        newest = {
            r["contender"]: r
            for r in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
        }
        print(table(list(newest.values())))
        return
    records = bench(3, 12, 1) if options.quick else bench(PICTURES, WORDS, options.rounds)
    print(table(records), flush=True)
    if wide := [r["contender"] for r in records if r["widest"] >= NEAR]:
        raise SystemExit(f"The answers of {', '.join(wide)} differ where no rounding explains it.")
    if not options.quick:
        with RESULTS.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(record) + "\n" for record in records)


if __name__ == "__main__":
    main()
