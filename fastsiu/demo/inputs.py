"""How a model of the fictional world takes text and pictures while it is trained: as its processor
and its chat template give them, but with each picture's features computed once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fastsiu.demo.architectures import Made
from fastsiu.demo.world import SIZE, Sketch, draw
from fastsiu.model.adapter import projector
from fastsiu.model.turns import PIXELS

IGNORED = -100  # label of a token that is not learnt


class Encoder:
    """Turns question and answer into the tensors that processor and chat template give, and
    remembers the tokens of each text."""

    def __init__(self, made: Made) -> None:
        self.processor, self.tokenizer = made.processor, made.processor.tokenizer
        self.image = made.model.config.image_token_id
        self.taken = inspect.signature(made.model.forward).parameters
        self.shared: dict[str, Tensor] = {}  # inputs besides the tokens that each picture needs
        self.frames = {image: self._frame(image) for image in (False, True)}
        self._ids: dict[str, list[int]] = {}

    def _frame(self, image: bool) -> tuple[str, str, str, str]:
        """The template's text before the question; from there to where the model starts to answer;
        from there to the answer; after the answer, up to the token that ends the turn.

        Placeholders of the picture are there in full.
        """
        turns: list[dict[str, Any]] = [
            {
                "role": "user",
                "content": [{"type": "image"}] * image + [{"type": "text", "text": "QUESTION"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "ANSWER"}]},
        ]
        prompt, whole = (self._expanded(turns[:n], image) for n in (1, 2))
        before, between = prompt.split("QUESTION")
        lead, end = whole.removeprefix(prompt).split("ANSWER")
        stop = self.tokenizer.eos_token
        return before, between, lead, end[: end.index(stop) + len(stop)]

    def _expanded(self, turns: list[dict[str, Any]], image: bool) -> str:
        text = self.processor.apply_chat_template(
            turns, add_generation_prompt=len(turns) == 1, tokenize=False
        )
        found = self._processed(text, image)
        if image:
            self.shared = {k: v for k, v in found.items() if k in self.taken and k not in PIXELS}
        return self.tokenizer.decode(
            found["input_ids"][0], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _processed(self, text: str, image: bool) -> Any:
        images = {"images": [Image.new("RGB", (SIZE, SIZE))]} if image else {}
        return self.processor(text=[text], return_tensors="pt", add_special_tokens=False, **images)

    def ids(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._ids[text]

    def batch(self, pairs: list[tuple[str, str]], image: bool) -> tuple[dict[str, Tensor], Tensor]:
        """The model's inputs without pixels, and the labels (batch, length) int64. Both are padded
        on the right; labels are `IGNORED` outside of the answers.

        There is no attention mask: padding comes last, where no other token sees it.
        """
        before, between, lead, end = self.frames[image]
        rows = [
            (self.ids(before + question + between), self.ids(lead + answer + end))
            for question, answer in pairs
        ]
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), IGNORED)
        for i, (prompt, answer) in enumerate(rows):
            ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        inputs = {"input_ids": ids}
        for key, value in self.shared.items():
            if key.endswith("token_type_ids"):  # which tokens are the picture's
                inputs[key] = (ids == self.image).long()
            elif key not in ("input_ids", "attention_mask") and image:
                # what belongs to each picture, such as its grid
                inputs[key] = value.repeat(len(rows), *[1] * (value.ndim - 1))
        return inputs, labels


class Sight:
    """How a model sees: what its processor makes of pictures, what enters the projector, and what
    leaves it."""

    def __init__(self, made: Made) -> None:
        self.model, self.processor, self.side = made.model, made.processor, made.side
        self.encode: Callable[..., Any] = made.model.base_model.get_image_features
        name = projector(made.model)
        if name is None:
            raise ValueError("The model has no projector of a known name.")
        self.projector: torch.nn.Module = made.model.get_submodule(name)
        turn: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "."}]}
        ]
        self.prompt = made.processor.apply_chat_template(
            turn, add_generation_prompt=True, tokenize=False
        )
        found = self.processed([Image.new("RGB", (SIZE, SIZE))])
        self.extra = {
            k: found[k]
            for k in inspect.signature(self.encode).parameters
            if k in found and k != "pixel_values"
        }
        with torch.no_grad():
            entering, features = self.seen(found["pixel_values"], 1)
        self.flat = entering.ndim == 2  # all pictures' rows one after another
        self.listed = not isinstance(features, Tensor)  # one entry for each picture
        self.width = entering.shape[-1]

    def processed(self, pictures: list[Image.Image]) -> Any:
        """What the processor gives for turns with one picture each."""
        text = [self.prompt] * len(pictures)
        # A list for each text: some families take a flat list for the pictures of one text.
        images = [[picture] for picture in pictures]
        return self.processor(
            text=text, images=images, return_tensors="pt", add_special_tokens=False
        )

    def seen(self, pixels: Tensor, count: int) -> tuple[Tensor, Any]:
        """(what enters the projector, what leaves it) for pictures as the processor gives them."""
        entering: list[Tensor] = []
        hook = self.projector.register_forward_pre_hook(lambda _, given: entering.append(given[0]))
        extra = {k: v.repeat(count, *[1] * (v.ndim - 1)) for k, v in self.extra.items()}
        try:
            features = self.encode(pixel_values=pixels, **extra, return_dict=True)
        finally:
            hook.remove()
        return entering[0], features.pooler_output

    def pixels(self, sketches: list[Sketch]) -> Tensor:
        """The processor's pixels of drawn pictures, in bytes: (sketches, patches or 1, ...) uint8.
        The processors of all families scale pixels to [-1, 1] here."""
        parts = []
        for at in range(0, len(sketches), 256):
            pictures = [draw(sketch) for sketch in sketches[at : at + 256]]
            values = self.processed(pictures)["pixel_values"]
            parts.append(
                ((values + 1) * 127.5)
                .round()
                .to(torch.uint8)
                .view(len(pictures), -1, *values.shape[1:])
            )
        return torch.cat(parts)

    def features(self, images: Tensor) -> Tensor:
        """What enters the projector, for images in bytes (`pixels`): (batch, rows, width)."""
        entering, _ = self.seen(images.flatten(0, 1).float() / 127.5 - 1, len(images))
        return entering.view(len(images), -1, self.width)

    def project(self, features: Tensor) -> dict[str, Any]:
        """What leaves the projector for such features, as a keyword of the model's forward."""
        out = self.projector(features.flatten(0, 1) if self.flat else features)
        out = out.view(len(features), -1, out.shape[-1])
        delivered = list(out) if self.listed else out
        return {
            "mm_encoder_outputs": {
                "image": BaseModelOutputWithPooling(
                    pooler_output=delivered  # type: ignore[arg-type]  # some families take a list
                )
            }
        }

    def tower(self) -> list[torch.nn.Parameter]:
        """The parameters in front of the projector."""
        others = {
            id(p)
            for module in (self.projector, self.model.get_decoder())
            for p in module.parameters()
        }
        return [p for p in self.model.base_model.parameters() if id(p) not in others]
