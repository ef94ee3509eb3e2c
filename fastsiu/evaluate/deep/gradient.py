"""Gradients against the unlearned model: pixels changed a little, or words that no tokenizer has,
until it says the name.

A gradient can make a model say anything, so each attack is also tried on strangers, whom no model
can recognise: only what succeeds on the concept more often than on them tells that the concept is
still recognised.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ...loss.fused import fused_dmk_ce
from ...model import adapter, ask, prefix
from ...model.features import feature_tensors, map_features
from ...model.vlm import VLM, Picture
from ...text.rate import Rate
from ...verdict import gives
from .target import (
    LONGEST,
    NO_STRANGER,
    Naming,
    Row,
    Target,
    adapted,
    complete,
    naming_share,
    namings,
    see,
)

STEPS = 20
PIXELS = (4, 8)  # of 255: how far a pixel may go
# shares of a channel's sd: how far a feature may go, where pixels cannot be reached
FEATURES = (
    0.1,
    0.2,
)
MOST = 6  # pictures of the concept, and of strangers, that are attacked
# embeddings, steps of Adam, its rate in sds of the model's embeddings
PROMPT, PROMPT_STEPS, PROMPT_RATE = (
    6,
    50,
    0.1,
)
SIGNS = "@#%^&~=+$"  # where a small tokenizer has too few words
NO_WORDS = (
    "The tokenizer has no words that stay single tokens before a question, so a soft "
    "prompt has no place."
)
NO_GRADIENT = "No gradient reaches the picture's features in this model."


def run(
    loaded: VLM, target: Target, *, steps: int = STEPS, prompt_steps: int = PROMPT_STEPS
) -> list[dict[str, Any]]:
    """Rows of the share of answers in which the unlearned model names the concept after an attack;
    the control has strangers.

    pixels:      sign-gradient steps on the processor's pixels, within 4/255 and 8/255 of their
    range, towards the untouched
                 model's naming answer; where no gradient gets there, on the image features, within
                 0.1 and 0.2 of a channel's sd
    soft prompt: 6 embeddings before the question, trained on one picture and tried on the others

    Raises BadInput without an adapter, and where the untouched model does not name the concept.
    """
    adapted(loaded)
    target = complete(loaded, target, dream=False)
    naming = namings(loaded, target)[0]
    return [
        row.as_dict()
        for row in (
            *_pictures(loaded, target, naming, steps),
            *_prompts(loaded, target, naming, prompt_steps),
        )
    ]


# Pictures -----------------------------------------------------------------------------------------


def _pictures(loaded: VLM, target: Target, naming: Naming, steps: int) -> list[Row]:
    sides = {"unlearned": target.shown[:MOST], "control": list(target.strangers[:MOST])}
    reached = reaches_pixels(loaded, target.pictures[0])
    rows = []
    for size in PIXELS if reached else FEATURES:
        setting = (
            f"pixels within {size}/255, {steps} steps"
            if reached
            else f"features within {size:g} sd, {steps} steps"
        )
        for side, images in sides.items():
            if not images:
                rows.append(Row.null("gradient", setting, NO_STRANGER, side))
                continue
            try:
                made = [
                    attacked(loaded, naming, image, size / 255 if reached else size, steps, reached)
                    for image in images
                ]
            except _Unreached:
                rows.append(Row.null("gradient", setting, NO_GRADIENT, side))
                continue
            said = ask.answers(loaded, [(naming.question, p) for p in made], max_new_tokens=LONGEST)
            rate = Rate.of(sum(gives(target.concept, text) for text in said), len(said))
            rows.append(Row.share("gradient", setting, side, rate))
    for side, images in sides.items():
        rows.append(
            Row.share(
                "gradient",
                "pictures as they are",
                side,
                naming_share(loaded, target.concept, [naming], images),
            )
        )
    with adapter.teacher(loaded):
        rate = naming_share(loaded, target.concept, [naming], sides["unlearned"])
    return [*rows, Row.share("gradient", "pictures as they are", "untouched", rate)]


class _Unreached(Exception):
    """No gradient gets where the attack would change something."""


class _Moved:
    """A processor whose pixels are moved by `delta`; else it is the model's own.

    delta: of the shape of what the processor gives as pixel_values, None where nothing is to be
    moved yet
    """

    def __init__(self, processor: Any, delta: Tensor | None = None) -> None:
        self.processor, self.delta, self.pixels = processor, delta, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, *given: Any, **options: Any) -> Any:
        found = self.processor(*given, **options)
        pixels = found.get("pixel_values")
        self.pixels = pixels if isinstance(pixels, Tensor) and pixels.is_floating_point() else None
        if self.delta is not None and self.pixels is not None:
            found["pixel_values"] = pixels + self.delta.to(pixels.dtype).to(pixels.device)
        return found


def reaches_pixels(loaded: VLM, image: Image.Image) -> bool:
    """Whether the image features have a gradient with respect to the processor's pixels."""
    found = _pixels(loaded, image)
    if found is None:
        return False
    delta = torch.zeros_like(found, requires_grad=True)
    return any(x.requires_grad for x in feature_tensors(_features(loaded, image, delta)))


def _pixels(loaded: VLM, image: Image.Image) -> Tensor | None:
    """The processor's pixels of a picture; None where it gives none of floats."""
    moved = _Moved(loaded.processor)
    with torch.no_grad():
        _through(loaded, moved).image_features(image)
    return moved.pixels


def _features(loaded: VLM, image: Image.Image, delta: Tensor) -> Any:
    """The image features with the processor's pixels moved, with their graph."""
    with torch.enable_grad():
        return _through(loaded, _Moved(loaded.processor, delta)).image_features(image)


def _through(loaded: VLM, processor: Any) -> VLM:
    """The same model behind another processor; the caller's stays as it is."""
    other = replace(loaded, processor=processor)
    other.suffixed = loaded.suffixed  # told by the signature of the model's own processor
    return other


def attacked(
    loaded: VLM, naming: Naming, image: Image.Image, size: float, steps: int, pixels: bool
) -> Picture:
    """The picture after sign-gradient steps towards the naming answer.

    size: how far each number may go: of the whole range of its pixel, or of its channel's sd where
    features are attacked

    Raises _Unreached where no gradient gets there.
    """
    plain = loaded.picture(image)
    if pixels:
        plains = (Image.new("RGB", image.size, colour) for colour in ("black", "white"))
        start, black, white = (_pixels(loaded, one) for one in (image, *plains))
        # What a processor does to a pixel is found by what it makes of black and of white; padding
        # is the same in both.
        low, high = torch.minimum(black, white), torch.maximum(black, white)
        room, make = size * (high - low), lambda delta: _features(loaded, image, delta)
        low, high = (low - start).clamp_max(0), (high - start).clamp_min(0)
    else:
        flat = torch.cat(
            [x.reshape(-1, x.shape[-1]) for x in feature_tensors(plain.features)]
        ).float()
        start, room = flat, size * flat.std(0).clamp_min(1e-6).expand_as(flat)
        low, high = torch.full_like(flat, -torch.inf), torch.full_like(flat, torch.inf)
        make = lambda delta: _added(plain.features, delta)
    low, high = torch.maximum(low, -room), torch.minimum(high, room)
    turn = loaded.encode(naming.question, naming.answer, plain)
    delta, best = (
        torch.zeros_like(start, requires_grad=True),
        (float("inf"), torch.zeros_like(start)),
    )
    for step in range(steps + 1):
        states = prefix.supervised_states(loaded, [turn], [make(delta)])
        loss = fused_dmk_ce(
            states, loaded.head_weight, turn.labels, alpha=1.0, **loaded.head_options
        )
        if (now := float(loss.detach())) < best[0]:
            best = (now, delta.detach().clone())
        if step == steps:
            break
        (slope,) = torch.autograd.grad(loss, delta, allow_unused=True)
        if slope is None:
            raise _Unreached
        moved = delta.detach() - 2.5 / steps * room * slope.to(delta.device).sign()
        delta = torch.minimum(torch.maximum(moved, low), high).requires_grad_()
    with torch.no_grad():
        return Picture(image, map_features(make(best[1]), torch.Tensor.detach))


def _added(features: Any, delta: Tensor) -> Any:
    """Features with a [n, D] change added to their tensors, in their order."""
    rest = delta

    def change(x: Tensor) -> Tensor:
        nonlocal rest
        rows = x.numel() // x.shape[-1]
        piece, rest = rest[:rows], rest[rows:]
        return x + piece.reshape(x.shape).to(x.dtype)

    return map_features(features, change)


# Soft prompts -------------------------------------------------------------------------------------


def _prompts(loaded: VLM, target: Target, naming: Naming, steps: int) -> list[Row]:
    setting = f"soft prompt of {PROMPT}, {steps} steps"
    words = placeholders(loaded, naming, see(loaded, target.pictures[:1])[0])
    if words is None:
        return [Row.null("gradient", setting, NO_WORDS)]
    longer = Naming(f"{words[0]} {naming.question}", naming.answer, naming.span)
    rows = []

    def learn(setting: str, trained: Image.Image, tests: dict[str, Sequence[Image.Image]]) -> None:
        with soft(loaded, words[1]) as prompt:
            fit(loaded, longer, see(loaded, [trained])[0], prompt, steps)
            for side, images in tests.items():
                rows.append(
                    Row.share(
                        "gradient",
                        setting,
                        side,
                        naming_share(loaded, target.concept, [longer], images),
                    )
                )

    strangers = list(target.strangers)
    learn(setting, target.pictures[0], {"unlearned": target.tests[:MOST]})
    if len(strangers) > 1:
        learn(setting, strangers[0], {"control": strangers[1:MOST]})
    else:
        rows.append(Row.null("gradient", setting, NO_STRANGER, "control"))
    learn(f"{setting}, then a stranger shown", target.pictures[0], {"control": strangers[:MOST]})
    return rows


def placeholders(loaded: VLM, naming: Naming, picture: Picture) -> tuple[str, list[int]] | None:
    """(a text, `PROMPT` tokens that stand once each in it and nowhere else in the turn); None where
    there are none.

    Their embeddings are replaced, so what the text says does not matter.
    """
    plain = set(
        loaded.encode(naming.question, naming.answer, picture).inputs["input_ids"][0].tolist()
    )
    for text in (" ".join(_words(loaded, plain)), SIGNS):
        turn = loaded.encode(f"{text} {naming.question}", naming.answer, picture)
        ids = turn.inputs["input_ids"][0].tolist()
        found = [i for i in ids if i not in plain and ids.count(i) == 1]
        if len(found) >= PROMPT:
            return text, found[-PROMPT:]
    return None


def _words(loaded: VLM, taken: set[int]) -> list[str]:
    """The first words of the vocabulary that are single tokens behind a space; one more than
    needed, as none stands before the first of them."""
    split = lambda text: loaded.tokenizer(text, add_special_tokens=False).input_ids
    words: list[str] = []
    for token in range(len(loaded.tokenizer)):
        word = loaded.tokenizer.decode([token]).strip()
        if (
            token in taken
            or len(word) < 2
            or not word.isalpha()
            or word in words
            or split(f"a {word}") != [*split("a"), token]
        ):
            continue
        words.append(word)
        if len(words) > PROMPT:
            break
    return words


@contextlib.contextmanager
def soft(loaded: VLM, tokens: Sequence[int]) -> Iterator[nn.Parameter]:
    """Inside, the embeddings of `tokens`, wherever they stand, are the rows of what is yielded: [n,
    D], fp32, first their own."""
    table = loaded.base.get_input_embeddings()
    ids = torch.tensor(list(tokens), device=loaded.device)
    with torch.no_grad():
        prompt = nn.Parameter(table(ids).detach().float().clone())

    def put(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        for i, token in enumerate(tokens):
            out = torch.where((given[0] == token)[..., None], prompt[i].to(out.dtype), out)
        return out

    hook = table.register_forward_hook(put)
    try:
        yield prompt
    finally:
        hook.remove()


def fit(loaded: VLM, naming: Naming, picture: Picture, prompt: nn.Parameter, steps: int) -> None:
    """Trains the prompt alone until the model, shown the picture, gives the naming answer."""
    turn = loaded.encode(naming.question, naming.answer, picture)
    spread = float(loaded.base.get_input_embeddings().weight.float().std())
    optimiser = torch.optim.Adam([prompt], lr=PROMPT_RATE * spread)
    for _ in range(steps):
        states = prefix.supervised_states(loaded, [turn], [picture.features], ways=())
        loss = fused_dmk_ce(
            states, loaded.head_weight, turn.labels, alpha=1.0, **loaded.head_options
        )
        (prompt.grad,) = torch.autograd.grad(loss, [prompt])
        optimiser.step()
