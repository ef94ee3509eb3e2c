"""Every JSON file that is read from outside: what cannot be used is a BadInput of one sentence."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from fastsiu import manifest, settings
from fastsiu.disk import request_file
from fastsiu.evaluate import eval_files
from fastsiu.evaluate.directories import read_questions
from fastsiu.evaluate.observe import Likelihood, Naming, Observations
from fastsiu.model import adapter_files
from fastsiu.model.ask import Reply
from fastsiu.request import BadInput, Recipe
from fastsiu.samples import corpus
from fastsiu.settings import RecipeChoice
from fastsiu.text.concept import Concept

FOLDER = tempfile.TemporaryDirectory(prefix="fastsiu-fuzz-")
PLACE = Path(FOLDER.name)
PICTURE = PLACE / "picture.png"
Image.new("RGB", (8, 8)).save(PICTURE)
save_file(
    {"base_model.model.q_proj.lora_A.weight": torch.zeros(8, 4)}, PLACE / adapter_files.ADAPTER
)
OBSERVED = Observations(
    (Reply("Ann", True),),
    (Naming(0, "Ann", [-1.0], [True], [0]),),
    (Likelihood(-1.0, 1, -1.0, 1),),
    99,
)


class Sentence(Exception):
    """A BadInput whose message is one line."""


ALLOWED = (Sentence,)


def _told(name: str, reader: Callable[[Path], object]) -> Callable[[bytes], None]:
    def target(data: bytes) -> None:
        path = PLACE / name
        path.write_bytes(data)
        try:
            reader(path)
        except BadInput as error:
            assert "\n" not in str(error) and str(error).endswith("."), str(error)
            raise Sentence from error

    return target


def _samples(path: Path) -> None:
    for sample in corpus.read_data(path, PICTURE):
        assert sample.picture in (None, 0) and sample.answer == sample.answer.strip() != ""
        assert all(0 <= start < end <= len(sample.answer) for start, end in sample.specified)
        sample.answer.encode()


def _requests(path: Path) -> None:
    for _, request in request_file.read_requests(path):
        Concept(request.concept, request.aliases)


def _recipe(path: Path) -> None:
    recipe, _ = settings.choose_recipe(str(path.parent), RecipeChoice("default", {}))
    assert (
        isinstance(recipe.steps, int)
        and 0 < recipe.steps <= 100_000
        and isinstance(recipe.early_stop, bool)
    )


def _manifest(path: Path) -> None:
    sealed = adapter_files.manifest_of(path.parent)
    adapter_files.made_for(sealed)
    manifest.changed(path.parent, manifest.read(path.parent))


TARGETS = {
    "samples": _told("samples.jsonl", _samples),
    "conversations": _told("samples.json", _samples),
    "requests": _told("requests.jsonl", _requests),
    "questions": _told("questions.jsonl", lambda path: read_questions(path, Concept("Ann Lee"))),
    "recipe": _told("fastsiu.json", _recipe),
    "manifest": _told("manifest.json", _manifest),
    "report": _told("report.json", lambda path: manifest.read_report(path.parent)),
    "untouched": _told("untouched.json", eval_files.read_untouched),
    "adapter": _told(
        "adapter_config.json", lambda path: adapter_files.check_directory(path.parent)
    ),
}


@cache
def seeds(name: str) -> list[bytes]:
    lines = lambda *records: "\n".join(json.dumps(record) for record in records).encode()
    said = [
        {"from": "human", "value": "<image>\nWho is this?"},
        {"from": "gpt", "value": "Ann Lee, Ann."},
    ]
    sealed = {"bytes": 3, "sha256": "0" * 64}
    return {
        "samples": [
            lines(
                {
                    "question": "Who?",
                    "answer": " Ann. ",
                    "picture": 0,
                    "specified": ["Ann", [1, 3]],
                    "facet": "align",
                },
                {
                    "question": "Where?",
                    "answer": "There",
                    "closed": False,
                    "image": "picture.png",
                    "id": 1,
                },
            )
        ],
        "conversations": [
            json.dumps(
                [
                    {
                        "id": "1",
                        "image": "picture.png",
                        "conversations": said,
                        "target": 1,
                        "target_phrase": "Ann",
                    }
                ]
            ).encode()
        ],
        "requests": [
            lines(
                {
                    "image": "picture.png",
                    "concept": "Ann Lee",
                    "aliases": ["A. Lee"],
                    "protect": ["Bob"],
                },
                {"image": "picture.png", "concept": "Bob", "data": "x.jsonl"},
            )
        ],
        "questions": [
            lines(
                {"question": "Who is this?", "kind": "name"},
                {"question": "Is it {name}?", "kind": "yesno"},
                {"question": "Where was {name} born?", "kind": "fact", "keywords": ["Rome"]},
            )
        ],
        "recipe": [json.dumps({"recipe": Recipe().as_dict()}).encode()],
        "manifest": [
            json.dumps(
                {
                    "request": "00",
                    "files": {"samples.json": sealed},
                    "seeds": {"recipe": 1},
                    "settings": {},
                    "model": {"id": "a", "revision": None, "sha256": {"m.safetensors": "00"}},
                }
            ).encode()
        ],
        "report": [
            json.dumps(
                {
                    "verdict": "forgotten",
                    "reasons": ["a"],
                    "caveats": [],
                    "rows": {},
                    "answers": [{}],
                }
            ).encode()
        ],
        "untouched": [
            json.dumps(
                {
                    "format": eval_files.FORMAT,
                    "digest": "00",
                    "others": ["Bob"],
                    **OBSERVED.as_dict(),
                }
            ).encode()
        ],
        "adapter": [
            json.dumps(
                {
                    "peft_type": "LORA",
                    "r": 8,
                    "lora_alpha": 16.0,
                    "target_modules": ["q_proj"],
                    "bias": "none",
                    "rank_pattern": {"v": 2},
                    "alpha_pattern": {"v": 2.5},
                    "init_lora_weights": True,
                }
            ).encode()
        ],
    }[name]
