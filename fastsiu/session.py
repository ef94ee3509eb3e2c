"""A loaded model and what it is to forget: samples, teacher, training.

`forget` does all of it for one request. It leaves the adapter on, so that the caller can look at
what was learned and then take the adapter off. `prepare` and `learn` are its two halves, for
several requests on one model.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

from peft import LoraConfig
from PIL.Image import Image

from . import images, objectives, train
from .model import adapter, placement, sharing
from .model.features import map_features
from .model.vlm import VLM
from .objectives import Objective, siu
from .pictures.transforms import variants
from .request import CHANGES, KEEPS, BadInput, Recipe, Request, Sample
from .samples import alternatives, border, corpus, dreams, generic, kinds, lessons, spaces, targets
from .samples.beside import Prepared, lessons_beside, samples_beside
from .samples.corpus import Corpus
from .samples.neighbours import neighbours
from .samples.scene import Scene
from .step import directions
from .step.anchor import Anchor
from .step.look import Look, Probe
from .step.rehearsal import Rehearsal
from .text.concept import Concept, ambiguous, concept_of

# Temperature of the lessons that keep something. At 1 the tails drift; at 4 the KL looks so much at
# the tails that fine looks and look-alikes suffer.
KEPT_AT = 2.0
MIXED = (
    "The model's processor does not show each colour of the picture by itself, so neighbours were "
    "dreamed as features: those that look like the concept are held less well."
)
LOOK_EVERY = 8  # steps between two looks for a listener


@dataclass
class Listener:
    """Where progress goes. A field that is left as it is does nothing.

    stage:   gets the name of what begins now
    step:    gets one optimisation step, and how many there are at most
    look:    gets the number of a step and what the model is like after it, every `LOOK_EVERY`
             steps. A look takes time and changes nothing; None: none is taken
    note:    gets a sentence that should stay on the screen
    loading: entered while a model is loaded; gives whether transformers may draw its own bars
             (download, weights) on stderr
    """

    stage: Callable[[str], None] = lambda text: None
    step: Callable[[train.Step, int], None] = lambda step, ceiling: None
    note: Callable[[str], None] = lambda text: None
    loading: Callable[[], AbstractContextManager[bool]] = lambda: nullcontext(False)
    look: Callable[[int, Look], None] | None = None


@dataclass
class Trained:
    """How the adapter that is on the model was trained; seconds: the wall seconds of each stage."""

    scene: Scene
    corpus: Corpus
    history: list[train.Step]
    dreamed: list[dict[str, Any]]
    seconds: dict[str, float]

    def told(self) -> dict[str, Any]:
        """What a report says of the training, ready for JSON."""
        keep, mask = self.corpus.keep, self.corpus.mask
        return {
            "training": [asdict(step) for step in self.history],
            "dreams": self.dreamed,
            "seconds": {stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
            "masks": {
                "tokens_masked": int(sum((~kept).sum() for kept in keep)),
                "tokens": sum(map(len, keep)),
                "vocabulary_masked": len(mask.masked),
                "spared": sorted(mask.spared.values()),
            },
        }


def forget(
    loaded: VLM,
    request: Request,
    recipe: Recipe,
    picture: Image,
    *,
    objective: Objective = siu,
    listener: Listener | None = None,
    seconds: dict[str, float] | None = None,
) -> Trained:
    """Samples, teacher and training on a loaded model. The adapter is on afterwards.

    picture: the training picture, RGB
    seconds: gets the wall seconds of each stage

    Raises BadInput where the model does not recognise the concept, NumericFailure and OutOfMemory
    as `train.fit` does.
    """
    listener, seconds = listener or Listener(), seconds if seconds is not None else {}
    prepared = prepare(loaded, request, recipe, picture, listener=listener, seconds=seconds)
    samples, history = learn(
        loaded, [prepared], recipe, objective=objective, listener=listener, seconds=seconds
    )
    return Trained(prepared.scene, samples, history, prepared.dreamed, seconds)


def prepare(
    loaded: VLM,
    request: Request,
    recipe: Recipe,
    picture: Image,
    *,
    listener: Listener,
    seconds: dict[str, float],
    others: Sequence[Concept] = (),
) -> Prepared:
    """The samples of one request in the untouched model's words. An adapter that is on is switched
    off meanwhile.

    others: further concepts that the same model is to forget, or has forgotten: none of them is
            protected, and no sample that keeps something names them

    Raises BadInput where the model does not recognise the concept.
    """
    placement.check_trains(loaded.placed)
    with adapter.teacher(loaded):
        scene = introduce(loaded, request, recipe, picture, others)
        check_known(scene, request)
        if scene.kind.note:
            listener.note(scene.kind.note)
        if warning := ambiguous(scene.concept):
            listener.note(warning)
        samples, dreamed = gather(scene, request, listener, seconds)
        encoded = corpus.build(loaded, scene.concept, samples, scene.pictures, recipe)
        prepared = Prepared(request, scene, encoded, dreamed)
        if recipe.strangers:
            listener.stage("Learning from strangers")
            with timed(seconds, "strangers"):
                _add_lessons(prepared, listener)
    return prepared


def introduce(
    loaded: VLM, request: Request, recipe: Recipe, picture: Image, others: Sequence[Concept] = ()
) -> Scene:
    """The scene of a request before anything is gathered: the picture as the untouched model sees
    it, and what kind of concept it shows."""
    scene = Scene(
        loaded, concept_of(request), recipe, [loaded.picture(picture)], others=list(others)
    )
    scene.kind = kinds.kind_of(loaded, scene.concept, scene.pictures[0], request.kind)
    return scene


def _add_lessons(prepared: Prepared, listener: Listener) -> None:
    scene = prepared.scene
    taught = lessons.build(scene)
    scene.notes += taught.notes
    for note in taught.notes:
        listener.note(note)
    if taught.samples:
        prepared.lessons = corpus.build(
            scene.vlm, scene.concept, taught.samples, taught.pictures, scene.recipe
        )
        prepared.lessons_named = taught.named


def learn(
    loaded: VLM,
    prepared: Sequence[Prepared],
    recipe: Recipe,
    *,
    listener: Listener,
    seconds: dict[str, float],
    objective: Objective = siu,
) -> tuple[Corpus, list[train.Step]]:
    """Trains a fresh adapter on all of `prepared` and leaves it on; takes off one that is on
    already. Returns the samples of the four targets, and the steps.

    The adapter is fresh, even where one that is on forgets something already. Each training bends a
    little of what no sample holds, and no later training bends it back. This was measured with ten
    requests, each of which went on with the adapter of the one before. Every training had the
    samples of all requests, and still the last adapter lost 13 points of others' naming
    (benches/several.py at commit 9a96c9b).
    """
    recipe = recipe.for_requests(len(prepared))
    listener.stage("Running the teacher")
    with timed(seconds, "teacher"):
        samples, taught = run_teacher(loaded, prepared, recipe, listener.note)
    held = directions.FREE
    if recipe.directions and taught:
        listener.stage("Finding what the adapter may read")
        with timed(seconds, "directions"):
            held = directions.find(loaded, [lessons for lessons, _ in taught], recipe)
    listener.stage("Training")
    with timed(seconds, "train"):
        probe = Probe([one.scene for one in prepared], samples)
        # A method that is compared with ours trains as its authors have it.
        rehearsal = Rehearsal.of(loaded, recipe, probe.asked) if objective is siu else None
        kept = [samples, *(lessons for lessons, _ in taught)]
        anchor = Anchor.of(loaded, recipe, kept) if objective is siu else None
        for aid in (rehearsal, anchor):
            if aid and aid.note:
                listener.note(aid.note)
        on_step = lambda step: listener.step(step, recipe.steps)
        shown = listener.look

        def watch(step: int) -> bool:
            if shown is not None and step % LOOK_EVERY == 0:
                shown(step, probe.whole())
            return False

        try:
            history = train.fit(
                loaded,
                samples,
                objective,
                recipe,
                probe,
                on_step,
                say=listener.note,
                watch=None if shown is None else watch,
                lessons=taught,
                aids=train.Aids(probe, held, rehearsal, anchor),
            )
        finally:
            loaded.model.eval()
    return samples, history


def run_teacher(
    loaded: VLM,
    prepared: Sequence[Prepared],
    recipe: Recipe,
    note: Callable[[str], None],
    lora: LoraConfig | None = None,
) -> tuple[Corpus, list[tuple[Corpus, Objective]]]:
    """Puts a fresh adapter on and runs the teacher, with the adapter off, over all samples of
    `prepared`. Returns the samples of the four targets, and the lessons as `train.fit` takes them.

    note: gets a sentence for each way of sharing prefixes that is not exact on the model
    lora: the adapter; the recipe's when left out
    """
    samples = corpus.join([samples_beside(one, prepared) for one in prepared])
    adapter.detach(loaded)
    adapter.attach(loaded, recipe, lora)
    sharing.plan_sharing(loaded, samples.turns, samples.shown(), note)
    corpus.run_teacher(loaded, samples, recipe)
    return samples, _taught(loaded, prepared, recipe)


def _taught(
    loaded: VLM, prepared: Sequence[Prepared], recipe: Recipe
) -> list[tuple[Corpus, Objective]]:
    """All requests' lessons, each half with its teacher and its objective: those that change
    something, and those that keep. What they hold waits on the CPU; on a GPU the rows and pictures
    of one batch come back at a time (`step.batches.forward`)."""
    own = [lessons_beside(one, prepared) for one in prepared]
    given = [part for part in own if part is not None]
    if not given:
        return []
    plain, joined = recipe.with_overrides(vocab_mask=False, renormalize=False), corpus.join(given)
    waiting = [
        replace(p, features=map_features(p.features, lambda x: x.to("cpu")))
        for p in joined.pictures
    ]
    halves: list[tuple[Corpus, Objective]] = []
    for facets, temperature, objective in (
        (CHANGES, recipe.temperature, objectives.strangers),
        (KEEPS, min(KEPT_AT, recipe.temperature), objectives.kept),
    ):
        chosen = [i for i, sample in enumerate(joined.samples) if sample.facet in facets]
        if not chosen:  # a model that answers with gibberish alone gives none
            continue
        half = joined.pick(chosen)
        teacher = corpus.run_teacher(loaded, half, plain, temperature=temperature)
        half.teacher = teacher.to("cpu", loaded.head_weight, loaded.head_bias)
        half.pictures = waiting
        halves.append((half, objective))
    return halves


def check_known(scene: Scene, request: Request) -> None:
    """Raises BadInput unless the untouched model names the concept in the picture: there would be
    nothing to forget."""
    said = who_is_it(scene)
    if not any(scene.concept.named_in(answer) for _, answer in said):
        raise BadInput(
            f"The model does not name {request.concept} in {request.image} (it says "
            f"{said[0][1]!r}): give a picture and a name that it recognises."
        )


def who_is_it(scene: Scene) -> list[tuple[str, str]]:
    """The questions who or what the picture shows, each with the model's answer."""
    words = scene.words["who"]
    questions = words["train"] + words["held_out"]
    return list(zip(questions, scene.ask(questions, 0), strict=True))


def gather(
    scene: Scene, request: Request, listener: Listener, seconds: dict[str, float]
) -> tuple[list[Sample], list[dict[str, Any]]]:
    """The samples of the four targets and the user's own; and by neighbour how many dreams were
    accepted. Fills in the scene."""
    own = corpus.read_data(request.data, request.image) if request.data else []
    listener.stage("Finding the names to protect")
    with timed(seconds, "samples"):
        protect(scene, request)
    listener.stage(f"Dreaming {len(scene.neighbours)} neighbours")
    with timed(seconds, "dreams"):
        transforms = variants(scene.pictures[0].image, scene.recipe.seed)[1:]
        scene.views = scene.see([view for _, view in transforms])
        if scene.recipe.strangers:
            scene.border = border.border(scene)
        dreamed = _dream(scene)
    given = images.beside(request)
    for note in given.notes:
        listener.note(note)
    scene.notes += given.notes
    retained = [scene.vlm.picture(image) for _, image in given.rest]
    if not retained:
        retained = generic.generic(scene, scene.recipe.seed, scene.recipe.generic)
    scene.pictures += retained
    scene.named += [None] * len(retained)
    listener.stage("Asking the teacher for the samples")
    told = len(scene.notes)
    with timed(seconds, "samples"):
        samples = [sample for facet in targets.TARGETS for sample in facet(scene)]
    for note in scene.notes[told:]:
        listener.note(note)
    # A sample of the user's own takes the place of ours with the same question about the same
    # picture.
    taken = {(s.question, s.picture) for s in own}
    return [s for s in samples if (s.question, s.picture) not in taken] + own, dreamed


def protect(scene: Scene, request: Request) -> None:
    """Fills in the tokens of the name and the names to protect. Raises BadInput where a name is to
    be forgotten and protected."""
    for name in request.protect:
        if scene.forgotten_in(name, include_parts=False):
            raise BadInput(
                f"{name} cannot be forgotten and protected at once: leave it out of --protect."
            )
    scene.masked = scene.tokens_of(scene.concept)
    scene.neighbours = list(request.protect) or _neighbours(scene)


def _neighbours(scene: Scene) -> list[str]:
    """Names to protect: of persons those that the teacher gives in words; of other kinds those that
    it weighs for the picture come first."""
    limit = scene.recipe.neighbours
    seen = [] if scene.kind.name == kinds.DEFAULT else alternatives.alternatives(scene, limit)
    if len(seen) >= limit:
        return seen
    return list(dict.fromkeys([*seen, *neighbours(scene, limit)]))[:limit]


def _dream(scene: Scene) -> list[dict[str, Any]]:
    """Adds the accepted dreams to the scene; returns by neighbour how many were accepted. Dreams in
    features are none where a part in front of them is trained: it never sees them."""
    recipe = scene.recipe
    if not scene.neighbours or not recipe.dreams:
        return []
    in_pixels = recipe.dream_in == "pixels"
    starts = [*scene.pictures[:1], *scene.views]  # a view may have another size
    if in_pixels and spaces.lenses_for(scene.vlm, starts) is None:
        in_pixels = False
        scene.notes.append(MIXED)
    if recipe.in_front and not in_pixels:
        return []
    tried: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    for dream in dreams.dream(scene):
        tried[dream.name] += 1
        if dream.picture is not None:
            accepted[dream.name] += 1
            scene.pictures.append(dream.picture)
            scene.named.append(dream.name)
    return [
        {"name": name, "accepted": accepted[name], "of": tried[name] or scene.recipe.dreams}
        for name in scene.neighbours
    ]


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the wall seconds of its body to `seconds[name]`."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
