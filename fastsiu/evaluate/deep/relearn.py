"""Training the unlearned model again: how few steps bring the name back, and does harmless training
bring it back?

Without a control a number of steps says nothing, since a model learns any name from any picture in
some steps. So a face that no model has seen is taught the same name, and a name that no model
knows, with the same steps, the same rate and the same seed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from ...images import variants
from ...loss.fused import fused_dmk_ce
from ...model import adapter, ask, prefix
from ...model.vlm import VLM, Encoded, Picture
from ...request import BadInput
from ...samples.targets import wordings
from ...text.answers import is_degenerate
from ...text.concept import Concept
from .target import (
    LONGEST,
    NO_OTHER,
    NO_STRANGER,
    Naming,
    Row,
    Shown,
    Target,
    adapted,
    complete,
    naming_share,
    namings,
    see,
)

STEPS = (1, 2, 3, 5, 8, 12, 20)
BENIGN = 30  # steps of training on anything else
BATCH = 16  # samples in one of those steps
RECOVERED = 0.5  # share of naming answers from which on a name has come back
RATE, RANK = 2e-4, 16  # of AdamW and of the fresh adapter
SECOND = "again"  # PEFT's name of the fresh adapter
VIEWS = 4  # held-out views that are asked about where there are no other pictures


def run(
    loaded: VLM,
    target: Target,
    *,
    shots: Sequence[int] = (),
    lr: float = RATE,
    rank: int = RANK,
    benign: int = BENIGN,
) -> list[dict[str, Any]]:
    """Rows of the share of naming answers after each of `STEPS` steps, of the steps to 50 %, and
    after harmless training.

    shots:  numbers of pictures that are trained on, 1 to 5; those for which there are too few
    pictures are null. None given: one,
            and as many as there are of both faces
    lr:     AdamW's rate, the same for the concept and for the controls;  benign: steps of harmless
    training, 0 for none

    A fresh LoRA is trained on top of the unlearned model: nothing of the caller's model changes.
    Raises BadInput without an adapter, for other numbers of pictures, and where the untouched model
    does not name the concept.
    """
    adapted(loaded)
    if bad := [k for k in shots if not 1 <= k <= 5]:
        raise BadInput(f"Relearning from {bad[0]} pictures cannot be tried: choose 1 to 5.")
    target = complete(loaded, target)
    shots = shots or tuple(
        dict.fromkeys((1, max(1, min(5, len(target.pictures), 1 + len(target.same_stranger)))))
    )
    asked = namings(loaded, target)
    taught = _first(loaded, target, asked)
    rows = [
        Row.share(
            "relearn",
            "before any step",
            "unlearned",
            naming_share(loaded, target.concept, asked, target.tests),
        )
    ]
    with adapter.teacher(loaded):
        rows.append(
            Row.share(
                "relearn",
                "before any step",
                "untouched",
                naming_share(loaded, target.concept, asked, target.tests),
            )
        )
    for shot in shots:
        for lesson in _lessons(target, taught, shot):
            rows += _relearn(loaded, lesson, asked, shot, lr, rank, target.seed)
    if benign:
        rows += _harmless(loaded, target, asked, lr, rank, benign)
    return [row.as_dict() for row in rows]


@dataclass(frozen=True)
class Lesson:
    """Whom what is taught: pictures to learn from, pictures to be asked about, the name, and the
    answer that holds it."""

    who: str
    side: str
    naming: Naming
    concept: Concept
    train: Sequence[Shown]
    test: Sequence[Shown]
    reason: str = ""


def _first(loaded: VLM, target: Target, asked: Sequence[Naming]) -> Naming:
    """The training wording whose answer is taught: the untouched model's own where it names the
    concept."""
    question = wordings()["who"]["train"][0]
    with adapter.teacher(loaded):
        (answer,) = ask.answers(
            loaded, [(question, see(loaded, target.pictures[:1])[0])], max_new_tokens=LONGEST
        )
    spans = target.concept.spans(answer, include_parts=False)
    return Naming(question, answer, spans[0]) if spans else asked[0]


def _lessons(target: Target, taught: Naming, shot: int) -> Iterator[Lesson]:
    """The concept, an unseen face under the same name, and an unseen face under a name that no
    model knows.

    All three are asked about other pictures where there are some of both faces, else all three
    about views of the ones taught.
    """
    own, face = list(target.pictures), [*target.strangers[:1], *target.same_stranger]
    known = [target.concept, *map(Concept, target.others)]
    invented = next(
        n for n in wordings()["invented"]["names"] if not any(one.same(n) for one in known)
    )
    others = len(own) > shot and len(face) > shot and len(target.same_stranger) > 0
    # The last pictures are taught: the first is the one of the unlearning, and an attacker has
    # others of the concept.
    own_train, own_test = (
        (own[-shot:], own[:-shot]) if others else (own[:shot], _views(own[:shot], target.seed))
    )
    face_train, face_test = (
        (face[-shot:], face[:-shot]) if others else (face[:shot], _views(face[:shot], target.seed))
    )
    few = "" if len(own) >= shot else f"There are {len(own)} pictures of the concept."
    strange = (
        NO_STRANGER
        if not face
        else ""
        if len(face) >= shot
        else f"There are {len(face)} pictures of one stranger."
    )
    yield Lesson("", "unlearned", taught, target.concept, own_train, own_test, few)
    yield Lesson(
        ": unseen face, same name",
        "control",
        taught,
        target.concept,
        face_train,
        face_test,
        strange,
    )
    other = Concept(invented)
    yield Lesson(
        ": unseen face, unseen name",
        "control",
        taught.of(invented),
        other,
        face_train,
        face_test,
        strange,
    )


def _views(pictures: Sequence[Shown], seed: int) -> list[Shown]:
    """Held-out views of the pictures that are taught."""
    made = [[view for _, view in variants(p, seed, held_out=True)[1 : 1 + VIEWS]] for p in pictures]
    return [view for views in made for view in views]


def _relearn(
    loaded: VLM, lesson: Lesson, asked: Sequence[Naming], shot: int, lr: float, rank: int, seed: int
) -> list[Row]:
    many = f"{shot} picture{'s' * (shot > 1)}, rate {lr:g}"
    steps_to = f"{many}, steps to {RECOVERED:.0%}{lesson.who}"
    if lesson.reason:
        return [Row.null("relearn", steps_to, lesson.reason, lesson.side)]
    rows, reached = [], None
    pictures = see(loaded, lesson.train)
    turns = [loaded.encode(lesson.naming.question, lesson.naming.answer, p) for p in pictures]
    with fresh(loaded, rank, seed):
        for step in taught(loaded, turns, pictures, lr, STEPS):
            rate = naming_share(loaded, lesson.concept, asked, lesson.test)
            rows.append(
                Row.share(
                    "relearn",
                    f"{many}, {step} step{'s' * (step > 1)}{lesson.who}",
                    lesson.side,
                    rate,
                )
            )
            if reached is None and rate.value is not None and rate.value >= RECOVERED:
                reached = step
    never = None if reached else f"Not in {STEPS[-1]} steps."
    rows.append(Row("relearn", steps_to, lesson.side, reached, rows[-1].n, reason=never))
    return rows


def _harmless(
    loaded: VLM, target: Target, asked: Sequence[Naming], lr: float, rank: int, steps: int
) -> list[Row]:
    """The name after training on what has nothing to do with it, in the untouched model's
    answers."""
    words = wordings()
    pictures = see(loaded, [shown for _, shown in target.other_pictures])
    facts = [q.format(name=n) for n in target.others for q in words["facts"]["held_out"]] + words[
        "general"
    ]["held_out"]
    kinds: dict[str, list[tuple[str, Picture | None]]] = {
        "pictures of others": [(q, p) for p in pictures for q in words["who"]["train"][:2]],
        "facts in words": [(q, None) for q in facts],
    }
    rows = []
    for kind, questions in kinds.items():
        setting = f"trained on {kind}, rate {lr:g}, {steps} steps"
        with adapter.teacher(loaded):
            said = ask.replies(loaded, questions, max_new_tokens=LONGEST)
        kept = [
            (q, reply, p)
            for (q, p), reply in zip(questions, said, strict=True)
            if is_degenerate(reply.text) is None and not target.concept.named_in(reply.text)
        ]
        if not kept:
            rows.append(Row.null("relearn", setting, NO_OTHER))
            continue
        turns = [loaded.encode(q, reply.text, p, reply.closed) for q, reply, p in kept]
        with fresh(loaded, rank, target.seed):
            for _ in taught(loaded, turns, [p for _, _, p in kept], lr, (steps,), target.seed):
                for side, shown in (("unlearned", target.tests), ("control", target.strangers)):
                    rows.append(
                        Row.share(
                            "relearn",
                            setting,
                            side,
                            naming_share(loaded, target.concept, asked, shown),
                        )
                    )
    return rows


@contextlib.contextmanager
def fresh(loaded: VLM, rank: int = RANK, seed: int = 0) -> Iterator[None]:
    """Inside, a second LoRA on the same layers, at first without effect, is on top of the adapter
    and is all that trains.

    The model, its adapter, what requires a gradient and torch's random state are as they were
    afterwards.
    """
    model = loaded.model
    if not isinstance(model, PeftModel):
        raise BadInput("There is no adapter on the model to train on top of: put it on.")
    flags, active, first = (
        [(p, p.requires_grad) for p in model.parameters()],
        list(model.active_adapters),
        "default",
    )
    where = model.peft_config[first]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        bias="none",
        target_modules=where.target_modules,
        exclude_modules=where.exclude_modules,
    )
    try:
        with torch.random.fork_rng(devices=[loaded.device] if loaded.device.type == "cuda" else []):
            torch.manual_seed(seed)
            model.add_adapter(SECOND, config)
        model.base_model.set_adapter([*active, SECOND])
        for name, p in model.named_parameters():
            p.requires_grad_(f".{SECOND}." in name)
        model.eval()
        yield
    finally:
        if SECOND in model.peft_config:
            model.base_model.set_adapter(active)
            model.delete_adapter(SECOND)
            model.base_model.set_adapter(active)
        for p, flag in flags:
            p.requires_grad_(flag)


def taught(
    loaded: VLM,
    turns: Sequence[Encoded],
    pictures: Sequence[Picture | None],
    lr: float,
    steps: Sequence[int],
    seed: int = 0,
) -> Iterator[int]:
    """Trains what requires a gradient by cross-entropy; yields after each of `steps`, the model in
    evaluation mode.

    At most `BATCH` of the turns are in a step, drawn with the seed; all of them where there are no
    more.
    """
    optimiser = torch.optim.AdamW(
        [p for p in loaded.model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0
    )
    generator = torch.Generator().manual_seed(seed)
    features = [None if p is None else p.features for p in pictures]
    for step in range(1, max(steps) + 1):
        chosen = list(range(len(turns)))
        if len(turns) > BATCH:
            chosen = torch.randperm(len(turns), generator=generator)[:BATCH].tolist()
        loaded.model.train(loaded.budget.checkpointing)  # layers checkpoint in training mode only
        optimiser.zero_grad()
        states = prefix.supervised_states(
            loaded,
            [turns[i] for i in chosen],
            [features[i] for i in chosen],
            micro_batch=loaded.budget.micro_batch,
        )
        labels = torch.cat([turns[i].labels for i in chosen])
        fused_dmk_ce(
            states, loaded.head_weight, labels, alpha=1.0, **loaded.head_options
        ).backward()
        optimiser.step()
        loaded.model.eval()
        if step in steps:
            yield step
