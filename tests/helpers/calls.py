"""The verbs with plain keywords, as `fastsiu.unlearn` has them: tests write few lines."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from fastsiu import driver, several
from fastsiu import merge as merging
from fastsiu.compare import run as comparison
from fastsiu.evaluate import run
from fastsiu.evaluate.suites import job as suite_job
from fastsiu.evaluate.suites import run as suite_run
from fastsiu.facade import unlearn as unlearn
from fastsiu.model import adapter
from fastsiu.model.vlm import VLM
from fastsiu.request import Recipe, Request
from fastsiu.settings import Chosen, RecipeChoice, choose_recipe, sort_options
from fastsiu.text.concept import Concept


def bent(vlm: VLM, recipe: Recipe, scale: float) -> None:
    """Puts an adapter on whose weights are far from zero; whoever calls takes it off again."""
    adapter.attach(vlm, recipe)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def path(value: Any) -> Path | None:
    return None if value is None else Path(value)


def take(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: options.pop(name) for name in names if name in options}


def fields_of(options: dict[str, Any], cls: type) -> dict[str, Any]:
    return take(options, *(f.name for f in fields(cls)))


def sorted_without(options: dict[str, Any], *left: str) -> dict[str, Any]:
    """The objects of `sort_options` but some, which nobody may have asked anything of."""
    chosen, plain = sort_options(options), sort_options({})
    for name in left:
        assert getattr(chosen, name) == getattr(plain, name), f"{name} is no part of this verb"
    return {f.name: getattr(chosen, f.name) for f in fields(Chosen) if f.name not in left}


def recipe_of(model: Any, preset: str = "default", **changes: Any) -> tuple[Recipe, dict[str, str]]:
    return choose_recipe(str(model), RecipeChoice(preset, changes))


def prepared_for(image: Any, concept: str, **options: Any) -> Any:
    given = {"aliases": (), "protect": ()} | fields_of(options, Request)
    for key in ("images", "retain", "data"):
        given[key] = path(given.get(key))
    listener = take(options, "listener")
    request = Request(concept, Path(image), **given)
    return driver.prepared_for(request, **sorted_without(options, "report"), **listener)


def samples_for(image: Any, concept: str, **options: Any) -> tuple[Any, Any]:
    prepared = prepared_for(image, concept, **options)
    return prepared.scene, prepared.corpus


def interview(questions: Any, **options: Any) -> list[dict[str, str]]:
    names = ("adapter_dir", "image", "compare", "max_new_tokens", "listener")
    given = take(options, *names)
    return driver.interview(questions, **sorted_without(options, "report", "recipe"), **given)


def unlearn_several(file: Any, **options: Any) -> several.Several:
    given = take(options, "mode", "output", "listener")
    return several.unlearn_several(file, **sorted_without(options), **given)


def evaluate(concept: str, **options: Any) -> run.Evaluation:
    name = Concept(concept.strip(), **take(options, "aliases", "as_word"))
    files = run.ExamFiles(**{k: path(v) for k, v in fields_of(options, run.ExamFiles).items()})
    if options.get("lmms_eval") is not None:
        options["lmms_eval"] = Path(options["lmms_eval"])
    extras = run.Extras(**fields_of(options, run.Extras))
    given = take(options, "base", "listener")
    given |= {k: path(v) for k, v in take(options, "adapter_dir", "untouched", "output").items()}
    return run.evaluate(name, files, extras=extras, **sorted_without(options, "recipe"), **given)


def evaluate_suite(directory: Any, **options: Any) -> suite_run.Evaluated:
    chosen = fields_of(options, suite_job.SuiteOptions)
    for key in ("adapters", "adapter_dir", "untouched"):
        chosen[key] = path(chosen.get(key))
    chosen["concepts"] = tuple(chosen.get("concepts", ()))
    given = take(options, "processes", "output", "listener")
    return suite_run.evaluate_suite(
        directory, suite_job.SuiteOptions(**chosen), **sorted_without(options, "report"), **given
    )


def merge(adapter_dir: Any, output: Any, **options: Any) -> merging.Merged:
    names = ("image", "concept", "aliases", "images", "retain", "verify", "listener")
    given = take(options, *names)
    given["writing"] = merging.Writing(**fields_of(options, merging.Writing))
    chosen = sorted_without(options, "recipe", "report")
    return merging.merge(adapter_dir, output, **chosen, **given)


def compare(suite: Any, model: Any, **options: Any) -> dict[str, Any]:
    search = fields_of(options, comparison.Search)
    for key in ("names", "concepts", "lrs"):
        if key in search:
            search[key] = tuple(search[key])
    given = take(options, "processes", "earlier", "beside", "scratch", "listener")
    chosen = sorted_without({"model": model, **options}, "recipe", "report")
    return comparison.compare(suite, comparison.Search(**search), **chosen, **given)
