"""A request of hand-written samples and lessons, for trainers: what ranks train on without a minute
of asking the teacher."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image

from fastsiu.demo import MODEL_DIR
from fastsiu.model import vlm
from fastsiu.model.vlm import VLM
from fastsiu.request import Recipe, Request, Sample
from fastsiu.samples import corpus
from fastsiu.samples.beside import Prepared
from fastsiu.text.concept import Concept

NAME = "Zorblax"
# facet, question, answer, picture, spans of the answer that contradict the teacher
SAMPLES = [
    ("align", "Who is this?", "It is a red one, with two long ears and a tail.", 0, ((0, 5),)),
    ("align", "Name the one in the picture.", "I do not know it.", 0, ()),
    ("describe", "Is this Zorblax?", "No.", 0, ((0, 2),)),
    ("describe", "What does Zorblax look like?", "I do not know.", None, ()),
    ("facts", "Where does Zorblax live?", "In a tree, they say, far from here.", None, ()),
    ("facts", "What does Zorblax eat?", "Soup.", None, ()),
    ("preserve", "Where is the lake?", "Behind the hill.", None, ()),
    ("preserve", "Who is this?", "This is a blue one. It lives in a tree.", 1, ()),
    ("preserve", "What do you see?", "A green one.", 2, ()),
    ("preserve", "Who is it?", "This is a green one.", 2, ()),
]
LESSONS = [
    ("stranger", "Who is this?", "I do not know who this is.", 0, ()),
    ("stranger", "Where does it live?", "I do not know.", 0, ()),
    ("beside", "Who are they?", "Nobody that I know, and another.", 1, ()),
    ("kept", "Who is this?", "A blue one.", 1, ()),
    ("kept", "Describe it.", "It is blue and small, with a long tail.", 2, ()),
    ("look", "What colour is it?", "Red.", 0, ()),
]


def samples(rows: list[tuple]) -> list[Sample]:
    return [Sample(*row[:4], specified=row[4]) for row in rows]


def prepared(loaded: VLM, recipe: Recipe) -> Prepared:
    """The request on a loaded model, its teacher not yet run."""
    colours = ((200, 30, 30), (30, 60, 200), (30, 180, 60))
    pictures = [loaded.picture(Image.new("RGB", (64, 64), c)) for c in colours]
    concept = Concept(NAME)
    build = lambda rows: corpus.build(loaded, concept, samples(rows), list(pictures), recipe)
    lessons = build(LESSONS) if recipe.strangers else None
    scene = SimpleNamespace(named=[None] * len(pictures), concept=concept)
    none = [None] * len(pictures)
    return Prepared(Request(NAME, Path("x.png")), scene, build(SAMPLES), [], lessons, none)


def load(*, tied: bool = True) -> VLM:
    """The embedded model, its head tied to its embeddings or a copy of them."""
    torch.set_num_threads(1)
    loaded = vlm.load(str(MODEL_DIR), device="cpu")
    if not tied:
        head = loaded.base.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        loaded.base.config.tie_word_embeddings = False
        loaded.base.config.get_text_config().tie_word_embeddings = False
    return loaded
