"""The verdict on a merged model, asked as it is loaded from disk, in its own dtype and quantised.

What forgets in its own dtype need not do so in 8 or 4 bits: quantising rounds weights, and with
them what unlearning changed. So the same questions go to the merged model quantised. That is
another model than the adapter on a quantised base, which rounds the base alone and adds the adapter
unrounded. One model is in memory at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .evaluate import held_out
from .evaluate.held_out import Shown
from .evaluate.inquiry import Inquiry, inquire
from .family import Family
from .images import load_directory, load_image
from .model import ask, decode, source, vlm
from .request import BadInput, Recipe, Request
from .samples.kinds import Kind, recorded
from .samples.targets import Scene
from .session import Listener
from .text.answers import same_answer
from .text.concept import Concept, concept_of
from .text.rate import Rate
from .verdict import Answer, judge

FORMS = ("stored", "int8", "nf4")
Asked = Sequence[tuple[str, str, Shown | None]]  # (kind of the verdict, question, picture)


class Verifier:
    """Puts the questions of the verdict to one model after the other, and none of them is kept.

    untouched: what the base answers in its own dtype
    inquiry:   what tries to get the name or the facts back, with the base's answers to it
    slow:      why `generate` answered (`decode.slow`), for the untouched model and for the merged
    one
    """

    def __init__(
        self,
        base: str,
        revision: str | None,
        merged: Path,
        request: Request,
        seed: int,
        told: Mapping[str, Any],
        device: str | None,
        listener: Listener,
    ) -> None:
        self.base, self.revision, self.merged, self.device, self.listener = (
            base,
            revision,
            merged,
            device,
            listener,
        )
        self.request, self.seed = request, seed
        self.concept = concept_of(request)
        self.kind = recorded(self.concept, request.kind, told)
        self.asked = _questions(request, self.concept, self.kind, seed, told)
        names = [d.get("name") for d in told.get("dreams", []) if isinstance(d, dict)]
        self.others = [Concept(name) for name in names if isinstance(name, str) and name.strip()]
        self.untouched: list[str] = []
        self.inquiry: Inquiry | None = None
        self.slow = ["", ""]

    def ask(self, loaded: vlm.VLM, merged: bool = False) -> list[str]:
        """Greedy answers, in the order of `asked`."""
        self.listener.stage(f"Asking {len(self.asked)} questions")
        with vlm.threads(loaded), torch.no_grad():
            seen = {
                id(shown[1]): loaded.picture(shown[1])
                for shown in {id(s): s for _, _, s in self.asked if s}.values()
            }
            said = ask.answers(
                loaded, [(q, seen[id(shown[1])] if shown else None) for _, q, shown in self.asked]
            )
            self.slow[merged] = self.slow[merged] or decode.slow(loaded)
            return said

    def first(self, loaded: vlm.VLM) -> None:
        """Asks the base, as it is stored."""
        self.untouched = self.ask(loaded)
        image = load_image(self.request.image)
        with vlm.threads(loaded), torch.no_grad():
            self.inquiry = inquire(
                loaded,
                self.concept,
                image,
                neighbours=[other.name for other in self.others],
                more=load_directory(self.request.images),
                seed=self.seed,
                kind=self.kind,
            )

    def load_and_ask(
        self, name: str, dtype: str, quantize: str | None
    ) -> tuple[list[str], list[Family]]:
        """The answers, and of the merged model what the families brought out."""
        self.listener.stage(
            f"Loading {'the merged model' if name == str(self.merged) else 'the untouched model'} "
            f"in {quantize or dtype}"
        )
        revision = self.revision if name == self.base else None
        loaded = vlm.load(
            name, revision=revision, device=self.device, dtype=dtype, quantize=quantize
        )
        merged = name == str(self.merged)
        said, found = self.ask(loaded, merged=merged), []
        if merged and self.inquiry:
            with vlm.threads(loaded), torch.no_grad():
                found = self.inquiry.families(self.inquiry.again(loaded))
        del loaded
        free()
        return said, found

    def row(self, form: str, kept: str, stored: str) -> dict[str, Any]:
        """The verdict in one form: {dtype, verdict, reasons, before, after, agreement, control,
        families, headline, answers}, verdict None with a reason where the form cannot be had here.

        kept, stored: the dtype of the untouched and of the merged weights
        """
        quantize = None if form == "stored" else form
        label = quantize or stored
        try:
            source.check_packages(self.device or "cpu", stored, quantize, None, "adamw")
            # Nothing but the rounding lies between it and the untouched model as it is stored.
            same = form == "stored" and kept == stored
            alike = self.untouched if same else self.load_and_ask(self.base, stored, quantize)[0]
            after, found = self.load_and_ask(str(self.merged), stored, quantize)
        except BadInput as error:
            if quantize is None:
                raise
            return {"dtype": label, "verdict": None, "reason": str(error)}
        return {
            "dtype": label,
            **judge_form(
                self.asked, self.concept, self.untouched, alike, after, self.others, found
            ),
        }


def judge_form(
    asked: Asked,
    concept: Concept,
    stored: Sequence[str],
    alike: Sequence[str],
    after: Sequence[str],
    others: Sequence[Concept] = (),
    families: Sequence[Family] = (),
) -> dict[str, Any]:
    """The verdict on the merged model in some dtype, from answers alone.

    stored:   the untouched model's answers, in the dtype that it is stored in
    alike:    the untouched model's answers in the dtype of the merged one
    after:    the merged model's
    others:   those whose names an answer about the concept must not newly give
    families: what attacks brought out, beside what the untouched model gives away as it is stored

    The name has to be gone whatever rounding does to the untouched model, so that side is compared
    with `stored`. What is kept is compared with `alike`: quantisation changes answers by itself,
    and unlearning is not to be blamed for it. How far each of the two agrees with `stored` stands
    beside it: `agreement` of the merged model, `control` of the untouched one.
    """
    keep = ("specificity", "facts")
    before = [
        a if kind in keep else s for (kind, _, _), s, a in zip(asked, stored, alike, strict=True)
    ]
    answers = [
        Answer(kind, q, shown and shown[0], b, a, part=held_out.part(kind, q, concept))
        for (kind, q, shown), b, a in zip(asked, before, after, strict=True)
    ]
    verdict = judge(
        answers, concept, others=others, reasons_for_null=held_out.NULL, families=families
    )
    rates = {}
    for title, said in (("agreement", after), ("control", alike)):
        rates[title] = {kind: _agreement(asked, kind, stored, said) for kind in keep}
    return {
        "verdict": "forgotten" if verdict.forgotten else "not forgotten",
        "reasons": verdict.reasons,
        "before": verdict.before,
        "after": verdict.after,
        "thresholds": verdict.thresholds,
        **rates,
        "families": verdict.families,
        "headline": verdict.headline,
        "answers": [answer.as_dict() for answer in answers],
    }


def _agreement(asked: Asked, kind: str, one: Sequence[str], other: Sequence[str]) -> dict[str, Any]:
    same = [
        same_answer(a, b) for (k, _, _), a, b in zip(asked, one, other, strict=True) if k == kind
    ]
    rate = (
        Rate.of(sum(same), len(same))
        if same
        else Rate(None, reason=held_out.NULL.get(kind, "It was not asked."))
    )
    return rate.as_dict()


def _questions(
    request: Request, concept: Concept, kind: Kind, seed: int, told: Mapping[str, Any]
) -> list[tuple[str, str, Shown | None]]:
    """Those of `unlearn`'s verdict, with the same transforms of the picture; what it asked of
    neighbours is in its report."""
    picture = vlm.Picture(load_image(request.image), None, real=False)
    scene = Scene(None, concept, Recipe(seed=seed), [picture], kind=kind)  # type: ignore[arg-type]  # questions need no model
    asked = held_out.questions(
        scene, load_directory(request.images), load_directory(request.retain)
    )
    had = {(kind, question) for kind, question, _ in asked}
    facts = [
        a for a in told.get("answers", []) if a.get("kind") == "facts" and a.get("picture") is None
    ]
    texts = [a["question"] for a in facts if "question" in a]
    return asked + [
        ("facts", text, None) for text in dict.fromkeys(texts) if ("facts", text) not in had
    ]


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
