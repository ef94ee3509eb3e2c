"""A loaded model and what it is to forget: samples, teacher, training.

`forget` is the whole of it for one request and leaves the adapter on, so that the caller can look
before it is taken off; `prepare` and `learn` are its two halves, for several requests on one model.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from . import images as pictures_in
from . import objectives, train
from .model import adapter, sharing
from .model.features import map_features
from .model.vlm import VLM
from .objectives import Objective, siu
from .request import CHANGES, KEEPS, BadInput, Recipe, Request, Sample
from .samples import border, corpus, dreams, strangers, targets
from .text.concept import Concept, ambiguous, concept_of

# Temperature of what stays. At 1 the tails drift; at 4 the KL looks so much at the tails that fine
# looks and look-alikes suffer.
KEPT_AT = 2.0


@dataclass
class Listener:
    """Where progress goes. Every field may be left as it is: then nothing is said.

    stage: what is being done now;  step: one optimisation step and their ceiling;  note: a sentence
    that should stay
    loading: entered while a model is loaded, gives whether transformers may draw its own bars
    (download, weights) on stderr
    """

    stage: Callable[[str], None] = lambda text: None
    step: Callable[[train.Step, int], None] = lambda step, ceiling: None
    note: Callable[[str], None] = lambda text: None
    loading: Callable[[], AbstractContextManager[bool]] = lambda: nullcontext(False)


@dataclass
class Prepared:
    """One request before it is trained: its scene, its samples with their masks, what became of the
    dreams, and its lessons (target 5) where the recipe has any."""

    request: Request
    scene: targets.Scene
    corpus: corpus.Corpus
    dreamed: list[dict[str, Any]]
    lessons: corpus.Corpus | None = None
    lessons_named: list[str | None] = field(default_factory=list)


@dataclass
class Trained:
    """What `forget` made: the adapter is on the model, and this is how it came to be."""

    scene: targets.Scene
    corpus: corpus.Corpus
    history: list[train.Step]
    dreamed: list[dict[str, Any]]
    seconds: dict[str, float]


def forget(
    loaded: VLM,
    request: Request,
    recipe: Recipe,
    picture: Any,
    *,
    objective: Objective = siu,
    listener: Listener | None = None,
    seconds: dict[str, float] | None = None,
) -> Trained:
    """Samples, teacher and training on a loaded model; `picture` is the RGB image. The adapter is
    on afterwards."""
    listener, seconds = listener or Listener(), seconds if seconds is not None else {}
    one = prepare(loaded, request, recipe, picture, listener=listener, seconds=seconds)
    made, history = learn(
        loaded, [one], recipe, objective=objective, listener=listener, seconds=seconds
    )
    return Trained(one.scene, made, history, one.dreamed, seconds)


def prepare(
    loaded: VLM,
    request: Request,
    recipe: Recipe,
    picture: Any,
    *,
    listener: Listener,
    seconds: dict[str, float],
    others: Sequence[Concept] = (),
) -> Prepared:
    """The samples of one request in the untouched model's words: an adapter that is on is switched
    off meanwhile.

    others: what the same model is to forget, or has forgotten: it is neither protected nor named in
    what is kept

    Raises BadInput where the model does not recognise the concept.
    """
    with adapter.teacher(loaded):
        scene = targets.Scene(
            loaded, concept_of(request), recipe, [loaded.picture(picture)], others=list(others)
        )
        check_known(scene, request)
        if told := ambiguous(scene.concept):
            listener.note(told)
        samples, dreamed = gather(scene, request, listener, seconds)
        made = corpus.build(loaded, scene.concept, samples, scene.pictures, recipe)
        taught, named = None, []
        if recipe.strangers:
            listener.stage("Learning from strangers")
            with timed(seconds, "strangers"):
                found = strangers.lessons(scene)
                scene.notes += found.notes
                for note in found.notes:
                    listener.note(note)
                if found.samples:
                    taught = corpus.build(
                        loaded, scene.concept, found.samples, found.pictures, recipe
                    )
                    named = found.named
    return Prepared(request, scene, made, dreamed, taught, named)


def learn(
    loaded: VLM,
    prepared: Sequence[Prepared],
    recipe: Recipe,
    *,
    listener: Listener,
    seconds: dict[str, float],
    objective: Objective = siu,
) -> tuple[corpus.Corpus, list[train.Step]]:
    """Trains a fresh adapter on all of `prepared`, which is on afterwards; one that is on is taken
    off.

    Never an adapter that forgets something already: each training bends what nothing holds a
    little, and no later one bends it back. Trained on, though with all of this in every training,
    the last of ten lost 13 points of others' naming (benches/several.py at commit 9a96c9b).
    """
    # a ceiling: all names gone and all else held ends it
    recipe = recipe.with_overrides(steps=recipe.steps * len(prepared))
    listener.stage("Running the teacher")
    with timed(seconds, "teacher"):
        made = corpus.join(
            [
                _still_true(one, [other for other in prepared if other is not one])
                for one in prepared
            ]
        )
        adapter.detach(loaded)
        adapter.attach(loaded, recipe)
        sharing.plan_sharing(loaded, made.turns, made.shown(), listener.note)
        corpus.run_teacher(loaded, made, recipe)
        lessons = _taught(loaded, prepared, recipe)
    listener.stage("Training")
    with timed(seconds, "train"):
        probe = train.probe_for([one.scene for one in prepared], made)
        on_step = lambda step: listener.step(step, recipe.steps)
        try:
            history = train.fit(
                loaded, made, objective, recipe, probe, on_step, say=listener.note, lessons=lessons
            )
        finally:
            loaded.model.eval()
    return made, history


def _still_true(one: Prepared, others: Sequence[Prepared]) -> corpus.Corpus:
    """Its samples without those that would keep the looks of what the others are to forget: in
    pictures, and in words."""
    gone = [other.scene.concept for other in others]
    named = lambda text: any(concept.named_in(text) for concept in gone)
    denied = {
        s.question
        for other in others
        for s in other.corpus.samples
        if s.picture is None and s.facet == "describe"
    }
    dreamed = {i for i, name in enumerate(one.scene.named) if name and named(name)}
    seen = lambda s: s.facet == "preserve" and s.picture is not None
    about = lambda s: s.picture in dreamed or named(s.question) or named(s.answer)
    said = lambda s: s.facet == "preserve" and s.picture is None and s.question in denied
    return one.corpus.pick(
        [i for i, s in enumerate(one.corpus.samples) if not (seen(s) and about(s)) and not said(s)]
    )


def _taught(
    loaded: VLM, prepared: Sequence[Prepared], recipe: Recipe
) -> list[tuple[corpus.Corpus, Objective]]:
    """All lessons with their teacher and their objective: what changes, and what stays."""
    some = [
        one for one in (_lessons_still_true(one, prepared) for one in prepared) if one is not None
    ]
    if not some:
        return []
    plain, joined = recipe.with_overrides(vocab_mask=False, renormalize=False), corpus.join(some)
    out: list[tuple[corpus.Corpus, Objective]] = []
    both = (
        (CHANGES, recipe.temperature, objectives.strangers),
        (KEEPS, min(KEPT_AT, recipe.temperature), objectives.kept),
    )
    for facets, temperature, objective in both:
        chosen = [i for i, sample in enumerate(joined.samples) if sample.facet in facets]
        if chosen:  # of a model that answers nothing but gibberish there may be none
            out.append((joined.pick(chosen), objective))
            corpus.run_teacher(loaded, out[-1][0], plain, temperature=temperature)
    waiting = [
        replace(p, features=map_features(p.features, lambda x: x.to("cpu")))
        for p in joined.pictures
    ]
    for (
        part,
        _,
    ) in out:  # on a GPU the rows and pictures of one batch come back at a time (`train.forward`)
        part.teacher, part.pictures = (
            part.teacher.to("cpu", loaded.head_weight, loaded.head_bias),
            waiting,
        )
    return out


def _lessons_still_true(one: Prepared, prepared: Sequence[Prepared]) -> corpus.Corpus | None:
    """Its lessons without those that would keep the looks of what the other requests are to
    forget."""
    if one.lessons is None:
        return None
    gone = [other.scene.concept for other in prepared if other is not one]
    named = lambda text: any(concept.named_in(text) for concept in gone)
    dreamed = {i for i, name in enumerate(one.lessons_named) if name and named(name)}

    def keeps_the_forgotten(sample: Sample) -> bool:
        if sample.facet in CHANGES:
            return sample.picture in dreamed
        return sample.picture in dreamed or named(sample.answer)

    return one.lessons.pick(
        [i for i, s in enumerate(one.lessons.samples) if not keeps_the_forgotten(s)]
    )


def check_known(scene: targets.Scene, request: Request) -> None:
    """Raises BadInput unless the untouched model names the concept in the picture: there would be
    nothing to forget."""
    words = targets.wordings()["who"]
    said = scene.ask(words["train"] + words["held_out"], 0)
    if not any(scene.concept.named_in(answer) for answer in said):
        raise BadInput(
            f"The model does not name {request.concept} in {request.image} (it says {said[0]!r}): "
            "give a picture and a name that it recognises."
        )


def gather(
    scene: targets.Scene, request: Request, listener: Listener, seconds: dict[str, float]
) -> tuple[list[Sample], list[dict[str, Any]]]:
    """The samples of the four targets, and what became of the dreams."""
    own = corpus.read_data(request.data, request.image) if request.data else []
    for name in request.protect:
        if scene.forgotten_in(name, include_parts=False):
            raise BadInput(
                f"{name} cannot be forgotten and protected at once: leave it out of --protect."
            )
    listener.stage("Finding the names to protect")
    with timed(seconds, "samples"):
        first = corpus.vocabulary_mask(
            scene.concept, scene.vlm.tokenizer, scene.vlm.head_weight.shape[0]
        )
        scene.masked = frozenset(first.masked)
        scene.neighbours = list(request.protect) or targets.neighbours(scene)
    listener.stage(f"Dreaming {len(scene.neighbours)} neighbours")
    with timed(seconds, "dreams"):
        transforms = pictures_in.variants(scene.pictures[0].image, scene.recipe.seed)[1:]
        scene.views = [scene.vlm.picture(view) for _, view in transforms]
        if scene.recipe.strangers:
            scene.border = border.border(scene)
        dreamed = _dream(scene)
    for path in pictures_in.list_images(request.retain) if request.retain else ():
        scene.pictures.append(scene.vlm.picture(pictures_in.load_image(path)))
        scene.named.append(None)
    listener.stage("Asking the teacher for the samples")
    with timed(seconds, "samples"):
        samples = [sample for facet in targets.TARGETS for sample in facet(scene)]
    # A sample of the user's own takes the place of the built one with the same question about the
    # same picture.
    taken = {(s.question, s.picture) for s in own}
    return [s for s in samples if (s.question, s.picture) not in taken] + own, dreamed


def _dream(scene: targets.Scene) -> list[dict[str, Any]]:
    """Adds accepted dreams to the scene. A name that the teacher itself proposed but cannot see is
    not protected further."""
    if not scene.neighbours or not scene.recipe.dreams:
        return []
    made = dreams.dream(scene)
    accepted = [one for one in made if one.picture is not None]
    for one in accepted:
        scene.pictures.append(one.picture)
        scene.named.append(one.name)
    wanted, got = (Counter(one.name for one in some) for some in (made, accepted))
    return [
        {"name": n, "accepted": got[n], "of": wanted[n] or scene.recipe.dreams}
        for n in scene.neighbours
    ]


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
