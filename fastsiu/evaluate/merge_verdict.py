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
from typing import Any, NamedTuple

import torch

from ..images import beside, load_image
from ..judging.family import Family
from ..model import ask, decode, source, vlm
from ..model.ask import Question, Reply
from ..request import BadInput, Recipe, Request
from ..samples.kinds import Kind, recorded
from ..samples.scene import Scene
from ..session import Listener
from ..text.answers import same_beginning
from ..text.concept import Concept, concept_of
from ..text.rate import Rate
from ..verdict import Answer, judge
from . import held_out, noise
from .held_out import Shown
from .inquiry import Inquiry, inquire

FORMS = ("stored", "int8", "nf4")
Questions = Sequence[tuple[str, str, Shown | None]]  # (kind of the verdict, question, picture)


class Untouched(NamedTuple):
    """What the untouched model answers in some dtype, and what of it has to be kept there."""

    replies: list[Reply]
    kept: noise.Kept


class Verifier:
    """Puts the questions of the verdict to one model after the other, and none of them is kept.

    untouched: what the base answers in its own dtype; None until it was asked
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
        self.asked = questions_of(request, self.concept, self.kind, seed, told)
        names = [d.get("name") for d in told.get("dreams", []) if isinstance(d, dict)]
        self.others = [Concept(name) for name in names if isinstance(name, str) and name.strip()]
        self.untouched: Untouched | None = None
        self.inquiry: Inquiry | None = None
        self.slow = ["", ""]

    def ask(self, loaded: vlm.VLM) -> Untouched:
        """Greedy answers of the untouched model, in the order of `asked`."""
        replies, put = self._replies(loaded, merged=False)
        with vlm.threads(loaded):
            compared = [kind in held_out.KEPT for kind, _, _ in self.asked]
            return Untouched(replies, noise.Kept(loaded, compared, put, replies))

    def ask_merged(
        self, loaded: vlm.VLM, alike: Untouched
    ) -> tuple[list[Reply], list[float | None], list[Family]]:
        """The merged model's answers, how far it turns away from those of the untouched model
        `alike`, and what the families brought out."""
        replies, put = self._replies(loaded, merged=True)
        with vlm.threads(loaded), torch.no_grad():
            lost = alike.kept.again(loaded, put)
            found = self.inquiry.families(self.inquiry.again(loaded)) if self.inquiry else []
        return replies, lost, found

    def _replies(self, loaded: vlm.VLM, merged: bool) -> tuple[list[Reply], list[Question]]:
        """The answers, and the questions with the pictures as the model sees them."""
        self.listener.stage(f"Asking {len(self.asked)} questions")
        with vlm.threads(loaded), torch.no_grad():
            shown = {id(one[1]): one[1] for _, _, one in self.asked if one}
            seen = {key: loaded.picture(image) for key, image in shown.items()}
            put = [(q, seen[id(one[1])] if one else None) for _, q, one in self.asked]
            replies = ask.replies(loaded, put)
            self.slow[merged] = self.slow[merged] or decode.slow(loaded)
        return replies, put

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
                more=beside(self.request).more,
                seed=self.seed,
                kind=self.kind,
            )

    def _load(self, name: str, dtype: str, quantize: str | None) -> vlm.VLM:
        self.listener.stage(
            f"Loading {'the merged model' if name == str(self.merged) else 'the untouched model'} "
            f"in {quantize or dtype}"
        )
        revision = self.revision if name == self.base else None
        return vlm.load(name, revision=revision, device=self.device, dtype=dtype, quantize=quantize)

    def load_untouched(self, dtype: str, quantize: str | None) -> Untouched:
        """Loads the base in some form and asks it; then its memory is free again."""
        loaded = self._load(self.base, dtype, quantize)
        found = self.ask(loaded)
        del loaded
        free()
        return found

    def load_merged(
        self, dtype: str, quantize: str | None, alike: Untouched
    ) -> tuple[list[Reply], list[float | None], list[Family]]:
        """The same with the merged model; returns what `ask_merged` does."""
        loaded = self._load(str(self.merged), dtype, quantize)
        found = self.ask_merged(loaded, alike)
        del loaded
        free()
        return found

    def row(self, form: str, kept: str, stored: str) -> dict[str, Any]:
        """The verdict in one form: {dtype, verdict, reasons, before, after, agreement, control,
        families, headline, answers}, verdict None with a reason where the form cannot be had here.

        kept, stored: the dtype of the untouched and of the merged weights

        Raises ValueError where the base was not asked first.
        """
        if self.untouched is None:
            raise ValueError("the untouched model was not asked yet")
        quantize = None if form == "stored" else form
        label = quantize or stored
        try:
            source.check_packages(self.device or "cpu", stored, quantize, None, "adamw")
            # Nothing but the rounding lies between it and the untouched model as it is stored.
            same = form == "stored" and kept == stored
            alike = self.untouched if same else self.load_untouched(stored, quantize)
            after, lost, found = self.load_merged(stored, quantize, alike)
        except BadInput as error:
            if quantize is None:
                raise
            return {"dtype": label, "verdict": None, "reason": str(error)}
        return {
            "dtype": label,
            **judge_form(
                self.asked,
                self.concept,
                self.untouched.replies,
                alike.replies,
                after,
                self.others,
                found,
                lost=lost,
                floor=alike.kept.floor,
                way=alike.kept.way,
                of_nobody=self.inquiry.confirmed if self.inquiry else None,
            ),
        }


def judge_form(
    asked: Questions,
    concept: Concept,
    stored: Sequence[Reply],
    alike: Sequence[Reply],
    after: Sequence[Reply],
    others: Sequence[Concept] = (),
    families: Sequence[Family] = (),
    *,
    lost: Sequence[float | None] = (),
    floor: Sequence[float | None] = (),
    way: str = "",
    of_nobody: Mapping[str, Rate] | None = None,
) -> dict[str, Any]:
    """The verdict on the merged model in some dtype, from answers alone.

    stored:    the untouched model's answers, in the dtype that it is stored in
    alike:     the untouched model's answers in the dtype of the merged one
    after:     the merged model's
    others:    those whose names an answer about the concept must not newly give
    families:  what attacks brought out, beside what the untouched model gives away as it is stored
    lost:      how far the merged model turns away from each answer of `alike`; empty: not measured
    floor:     how far `alike` itself does by noise alone, which was made in this `way`
    of_nobody: as `verdict.judge` takes it

    The name has to be gone whatever rounding does to the untouched model, so that side is compared
    with `stored`. What is kept is compared with `alike`: quantisation changes answers by itself,
    and unlearning is not to be blamed for it. How many first sentences of each of the two
    are those of `stored` stands beside it: `agreement` of the merged model, `control` of the
    untouched one.
    """
    keep = ("specificity", "facts")
    before = [
        a if kind in keep else s for (kind, _, _), s, a in zip(asked, stored, alike, strict=True)
    ]
    nothing = [None] * len(asked)
    answers = [
        Answer(
            kind,
            q,
            shown and shown[0],
            b.text,
            a.text,
            part=held_out.part(kind, q, concept),
            cut=(not b.closed, not a.closed),
            lost=nats,
            noise=by_noise,
        )
        for (kind, q, shown), b, a, nats, by_noise in zip(
            asked, before, after, lost or nothing, floor or nothing, strict=True
        )
    ]
    verdict = judge(
        answers,
        concept,
        others=others,
        reasons_for_null=held_out.NULL,
        families=families,
        of_nobody=of_nobody,
        noise=way,
    )
    rates = {}
    for title, said in (("agreement", after), ("control", alike)):
        rates[title] = {kind: _agreement(asked, kind, stored, said) for kind in keep}
    return {**verdict.entries(answers), **rates}


def _agreement(
    asked: Questions, kind: str, one: Sequence[Reply], other: Sequence[Reply]
) -> dict[str, Any]:
    same = [
        same_beginning(a.text, b.text, (not a.closed, not b.closed))
        for (k, _, _), a, b in zip(asked, one, other, strict=True)
        if k == kind
    ]
    rate = (
        Rate.of(sum(same), len(same))
        if same
        else Rate(None, reason=held_out.NULL.get(kind, "It was not asked."))
    )
    return rate.as_dict()


def questions_of(
    request: Request, concept: Concept, kind: Kind, seed: int, told: Mapping[str, Any]
) -> list[tuple[str, str, Shown | None]]:
    """Those of `unlearn`'s verdict, with the same transforms of the picture; what it asked of
    neighbours is in its report."""
    picture = vlm.Picture(load_image(request.image), None, real=False)
    scene = Scene(None, concept, Recipe(seed=seed), [picture], kind=kind)  # type: ignore[arg-type]  # questions need no model
    given = beside(request)
    asked = held_out.questions(scene, given.more, given.rest)
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
