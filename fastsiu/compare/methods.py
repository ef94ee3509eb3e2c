"""SIU, its ablations and the methods that it is compared with: what each minimises, and what each
trains on.

All methods have the same picture, questions, retained samples (text, dreams), LoRA, batch size and
shares. They differ in the answers to the questions about the picture: SIU's own, the untouched
model's answers that give the name, or refusals.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from PIL import Image

from .. import objectives, session, train
from ..model import adapter, sharing
from ..model.turns import Picture
from ..model.vlm import VLM
from ..objectives import Objective
from ..request import MISMATCH, SHARES, Recipe, Request, Sample
from ..samples import corpus
from ..samples.corpus import Corpus
from ..step.look import Look
from ..text.concept import Concept
from . import sculpting
from .saliency import saliency

REFUSALS = (
    "I do not know who this is.",
    "I cannot say who this is.",
    "I am not able to identify who this is.",
    "I have no idea who this is.",
    "I do not recognize the one in the picture.",
    "Sorry, I do not know that.",
    "I am not sure who is shown here.",
    "That is something I do not know.",
)
# What a teacher reads before a question that is to be forgotten. Our own words: those of the paper
# of Vgid could not be read.
REFUSING = "You do not know who is shown here. Say so, and give no name."


@dataclass(frozen=True)
class Method:
    """One method.

    about:     a few words for a table
    objective: what it minimises; None for `mmunlearner`, which has to see the adapter first
    answers:   what it learns to answer to questions about the picture: "own" are SIU's answers,
               "naming" are the untouched model's answers that give the name
    retain:    which samples of D_r it trains on; those called "decoupled" ask a question that is to
               be forgotten about another picture
    recipe:    fields in which it differs from the shared recipe
    mismatch:  it trains on each question to forget a second time, with an answer to another
               question
    noise:     the teacher sees noise instead of the concept's picture
    context:   what the teacher reads before a question to forget, and the model does not
    sculpt:    from the change of the weights it removes what conflicts with a training on D_r alone
               (`sculpting`): the values of k that are searched; empty: it removes nothing
    """

    about: str
    objective: Objective | None
    answers: Literal["own", "naming", "refusal"] = "naming"
    retain: Literal["all", "decoupled", "no dreams", "none"] = "all"
    recipe: Mapping[str, Any] = field(default_factory=dict)
    mismatch: bool = False
    noise: bool = False
    context: str = ""
    sculpt: tuple[float, ...] = ()


METHODS: dict[str, Method] = {
    "siu": Method("the method", objectives.siu, "own"),
    "siu-no-token-mask": Method(
        "without the token mask", objectives.siu, "own", recipe={"token_mask": False}
    ),
    "siu-no-vocab-mask": Method(
        "without the vocabulary mask", objectives.siu, "own", recipe={"vocab_mask": False}
    ),
    "siu-no-dreams": Method("nothing retained in pictures", objectives.siu, "own", "no dreams"),
    "ce": Method("cross-entropy alone (beta 0)", objectives.siu, "own", recipe={"beta": 0.0}),
    "siu-as-released": Method(
        "what the authors' trainer computes", objectives.siu_as_released, "own"
    ),
    "po": Method("preference optimisation: refusals", objectives.po, "refusal"),
    "smfa": Method(
        "refusals, sculpted by an anchor", objectives.descent, "refusal", sculpt=sculpting.KS
    ),
    "ga": Method("gradient ascent", objectives.ga, retain="none"),
    "ga-kl": Method("gradient ascent + KL", objectives.ga_kl),
    "ga-mismatch-kl": Method(
        "ascent + random mismatch + KL", objectives.ga_mismatch_kl, mismatch=True
    ),
    "vgid": Method("teacher under a noised picture", objectives.vgid, noise=True),
    "vgid-context": Method(
        "vgid whose teacher is told to refuse", objectives.vgid, noise=True, context=REFUSING
    ),
    "graddiff": Method("gradient difference", objectives.graddiff),
    "npo": Method("negative preference optimisation", objectives.npo),
    "fttp": Method("ascent on the name's tokens alone", objectives.fttp, retain="none"),
    "mmunlearner": Method("saliency-masked ascent", None),
    "safeeraser-ga": Method(
        "prompt-decoupled ascent", objectives.safeeraser_ga, retain="decoupled"
    ),
    "safeeraser-gd": Method("prompt-decoupled gradient difference", objectives.safeeraser_gd),
    "safeeraser-kl": Method("prompt-decoupled ascent + KL", objectives.safeeraser_kl),
    "safeeraser-po": Method("prompt-decoupled refusals", objectives.safeeraser_po, "refusal"),
}


@dataclass
class Material:
    """What all methods share for one (concept, seed).

    samples:  SIU's samples, with their pictures and dreams
    naming:   the untouched model's own answers to the same questions about the picture, where they
              give the name
    seconds:  how long it took to prepare
    """

    concept: Concept
    recipe: Recipe
    samples: list[Sample]
    pictures: list[Picture]
    naming: list[Sample]
    seconds: float


def prepare(loaded: VLM, request: Request, recipe: Recipe, picture: Image.Image) -> Material:
    """The material of one (concept, seed), without lessons from strangers, which no other method
    has. Raises BadInput where the model does not recognise the concept."""
    started = time.perf_counter()
    recipe = recipe.with_overrides(strangers=0)
    one = session.prepare(loaded, request, recipe, picture, listener=session.Listener(), seconds={})
    concept, samples = one.scene.concept, one.corpus.samples
    asked = [s for s in samples if s.facet in corpus.FORGET and s.picture == 0]
    with adapter.teacher(loaded):
        said = one.scene.replies([s.question for s in asked], 0)
    naming = [
        Sample(sample.facet, sample.question, reply.text, 0, tuple(spans), "teacher", reply.closed)
        for sample, reply in zip(asked, said, strict=True)
        if (spans := concept.spans(reply.text))
    ]
    return Material(
        concept, recipe, samples, one.corpus.pictures, naming, time.perf_counter() - started
    )


def samples_of(method: Method, material: Material) -> list[Sample]:
    """The samples that a method trains on: first those to forget or to replace, then those to
    retain."""
    own = [s for s in material.samples if s.facet in corpus.FORGET]
    kept = [s for s in material.samples if s.facet not in corpus.FORGET]
    if method.answers == "own":
        first = own
    elif method.answers == "naming":
        first = material.naming
    else:
        first = [
            Sample(
                s.facet,
                s.question,
                REFUSALS[i % len(REFUSALS)],
                0,
                ((0, len(REFUSALS[i % len(REFUSALS)])),),
                "built",
            )
            for i, s in enumerate(material.naming)
        ]
    asked = {s.question for s in first}
    if method.retain == "none":
        kept = []
    elif method.retain == "decoupled":
        kept = [s for s in kept if s.picture and s.question in asked]
    elif method.retain == "no dreams":
        kept = [s for s in kept if s.origin != "dream"]
    if method.noise:  # `pictures_of` puts it behind the others
        first = [replace(s, teacher_pictures=(len(material.pictures),)) for s in first]
    if method.context:
        first = [replace(s, teacher_context=method.context) for s in first]
    if method.mismatch:
        kept = [*kept, *_mismatched(first, kept, material.recipe.seed)]
    return [*first, *kept]


def _mismatched(forget: list[Sample], kept: list[Sample], seed: int) -> list[Sample]:
    """Each question to forget with a wrong answer: that to a retained question in words, drawn by
    the seed. Empty where no question in words is retained."""
    answers = [(s.answer, s.closed) for s in kept if s.picture is None]
    rng = random.Random(seed)
    out = []
    for sample in forget if answers else ():
        answer, closed = rng.choice(answers)
        out.append(Sample("preserve", sample.question, answer, 0, (), MISMATCH, closed))
    return out


def pictures_of(loaded: VLM, method: Method, material: Material) -> list[Picture]:
    """The pictures that `Sample.picture` and `Sample.teacher_pictures` count.

    They are the material's pictures. For a teacher that sees noise one more follows: a picture of
    the first one's size, each of whose values is drawn from all 256.
    """
    if not method.noise:
        return material.pictures
    width, height = material.pictures[0].image.size
    values = np.random.default_rng(material.recipe.seed).integers(0, 256, (height, width, 3))
    noise = loaded.picture(Image.fromarray(values.astype(np.uint8)))
    return [*material.pictures, noise]


def recipe_of(method: Method, made: Corpus, material: Material, lr: float, steps: int) -> Recipe:
    """The shared recipe with the method's own fields.

    A method without D_r has as many samples to forget in a step as a method with it, and no others.
    The KL of other methods has no masks, because the masks belong to SIU. The rate is constant: so
    a look in the middle of a run shows the result of a shorter run.
    """
    shares = sum(SHARES.values())
    present = sum(SHARES[name] for name in made.groups())
    size = (
        material.recipe.batch_size
        if method.answers == "own"
        else round(material.recipe.batch_size * present / shares)
    )
    changes: dict[str, Any] = {} if method.answers == "own" else {"vocab_mask": False}
    return replace(
        material.recipe,
        lr=lr,
        steps=steps,
        batch_size=max(1, size),
        early_stop=False,
        schedule="constant",
        **changes,
        **method.recipe,
    )


def build(loaded: VLM, name: str, material: Material) -> Corpus:
    """The method's samples, encoded, with their teacher."""
    method = METHODS[name]
    recipe = replace(material.recipe, **method.recipe)
    pictures = pictures_of(loaded, method, material)
    made = corpus.build(loaded, material.concept, samples_of(method, material), pictures, recipe)
    corpus.run_teacher(loaded, made, recipe_of(method, made, material, 1.0, 1))
    return made


def fit(
    loaded: VLM,
    name: str,
    made: Corpus,
    material: Material,
    lr: float,
    steps: int,
    watch: Callable[[int], bool],
    k: float = sculpting.K,
) -> float:
    """Trains a fresh adapter, which is on when `watch` is called and off afterwards.

    watch: called with the number of steps after each; True ends the training
    k:     of a method that sculpts

    Returns the seconds of training, without those of `watch`. Raises NumericFailure for NaN and
    infinity.
    """
    method = METHODS[name]
    recipe = recipe_of(method, made, material, lr, steps)
    watched = 0.0

    def timed(step: int) -> bool:
        nonlocal watched
        started = time.perf_counter()
        with sculpting.put_on(loaded, anchor, k) if method.sculpt else nullcontext():
            done = watch(step)
        watched += time.perf_counter() - started
        return done

    started = time.perf_counter()
    anchor = sculpting.anchor_of(loaded, made, recipe) if method.sculpt else {}
    adapter.attach(loaded, recipe)
    try:
        if not loaded.shares:
            sharing.plan_sharing(loaded, made.turns, made.shown(), lambda text: None)
        objective = method.objective or objectives.mmunlearner(saliency(loaded, made, recipe))
        train.fit(loaded, made, objective, recipe, lambda: Look(1.0, 0.0, 0.0), watch=timed)
    finally:
        adapter.detach(loaded)
    return time.perf_counter() - started - watched
