"""A question about a picture and its answer as token ids: the chat template, the processor, and
where the tokens of the answer stand."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..request import BadInput
from .faults import first_line
from .processor import takes_suffix

Span = tuple[int, int]
MARK = "\ue000"  # an answer that no chat template, question or tokenizer knows
PROMPTS = 1024  # prompts about pictures that are kept as token ids
LEAD = "\n"  # after it a tokenizer begins anew, without the blank that some put before a text
PIXELS = (
    "pixel_values",
    "aspect_ratio_ids",
    "aspect_ratio_mask",
    "pixel_attention_mask",
    "labels",
    "image_sizes",
)


@dataclass
class Picture:
    """An image as the language model sees it.

    image:    the RGB picture. Once `features` is there only its size matters, which decides the
              number of image tokens.
    features: the output of `get_image_features`, reduced to what the language model reads
    real:     whether the features are the image's; False for a dream in features, which no
              projector can see again
    """

    image: Image.Image
    features: Any
    real: bool = True


@dataclass
class Encoded:
    """One chat turn as token ids, with the supervised positions of its answer.

    inputs:  the processor's tensors for a batch of one, without pixels
    rows:    [n] int64, positions whose hidden state predicts a supervised token (the token's
             position minus one)
    labels:  [n] int64, the supervised tokens: those of the answer and, where the answer is closed,
             those that end the turn
    offsets: n character spans of those tokens inside the answer; the span of the end token is empty
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    labels: Tensor
    offsets: list[Span] = field(default_factory=list)


class Turns:
    """Turns as a model's processor and chat template write them."""

    processor: Any

    @property
    def device(self) -> torch.device:
        """Where the token ids go."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @functools.cached_property
    def suffixed(self) -> bool:
        """Whether an answer goes in beside the question: a prefix language model, without a chat
        template."""
        return takes_suffix(self.processor)

    @functools.cached_property
    def _frames(self) -> dict[bool, tuple[str, str]]:
        """What `_frame` gave, with a picture and without."""
        return {}

    def render(self, question: str, with_image: bool, answer: str | None = None) -> str:
        """The text of a turn: up to where the answer starts or, with `answer`, the closed turn.

        A closed turn is the prompt, the answer and what ends an answer, in this order. So the model
        is trained in the very context in which it is asked: chat templates may write a closed turn
        with another beginning, for example without the empty thoughts of their prompt.

        For a prefix language model: the question or, with `answer`, what follows the question.
        """
        self.check_text(question)
        if self.suffixed:
            if answer is not None:
                return answer + self.tokenizer.eos_token
            return self.processor.image_token * with_image + question
        prompt = self._templated(question, with_image)
        if answer is None:
            return prompt
        gap, closing = self._frame(with_image)
        return prompt + gap + answer + closing

    def before_question(self) -> dict[str, Tensor]:
        """What stands before a question without a picture, as `tokenise` gives it; without a token
        where nothing does."""
        begun = self.render(MARK, False).split(MARK)[0]
        return self.tokenise(begun, None)

    def words_of(self, ids: Sequence[int]) -> str:
        """The text of tokens up to the first that no person writes."""
        said = itertools.takewhile(lambda i: i not in self._special_ids, ids)
        return str(self.tokenizer.decode(list(said))).strip()

    @functools.cached_property
    def _takes_words(self) -> bool:
        """Whether the processor takes a text without a picture. GOT-OCR2's does not; its tokenizer
        does."""
        try:
            self.processor(text=["Who?"], return_tensors="pt", add_special_tokens=False)
        except (TypeError, ValueError, AttributeError):
            return False
        return True

    def check_text(self, text: str) -> None:
        """Raises BadInput where the tokenizer would read a token that no person writes, such as the
        token of a picture or of the end. Also for half of a surrogate pair, which no tokenizer
        takes."""
        if match := self._marks.search(text):
            raise BadInput(
                f"{match[0]!r} stands in a question, a name or an answer, and the model's "
                "tokenizer reads no words there: write it in another way."
            )

    @functools.cached_property
    def _marks(self) -> re.Pattern[str]:
        tokens = {t for t in self._special if t.strip() and not t.isalnum()}
        return re.compile("|".join(["[\ud800-\udfff]", *map(re.escape, sorted(tokens))]))

    @functools.cached_property
    def _special(self) -> dict[str, int]:
        """The tokens that no person writes, with their ids. Those that have a name, such as that of
        the end, are only a part of them: Gemma's <end_of_turn> has none."""
        named = zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True)
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).items()
        return dict(named) | {token.content: i for i, token in added if token.special}

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self._special.values())

    def _templated(self, question: str, with_image: bool, answer: str | None = None) -> str:
        """A question, or a question with its answer, as the chat template writes it."""
        content: list[dict[str, str]] = [{"type": "image"}] * with_image + [
            {"type": "text", "text": question}
        ]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        try:
            text = self.processor.apply_chat_template(
                messages, add_generation_prompt=answer is None, tokenize=False
            )
        except Exception as error:  # any: a template is a stranger's program
            raise BadInput(
                f"The model's chat template fails ({first_line(error)}): it is given a question "
                "with or without a picture, and then the answer, each as a list of parts."
            ) from error
        return text if not self._first or text.startswith(self._first) else self._first + text

    @functools.cached_property
    def _first(self) -> str:
        """The text of the first token where templates (LLaVA 1.5's) leave it to the tokenizer,
        since `tokenise` adds none; else ""."""
        tokenizer = self.tokenizer
        adds = tokenizer.bos_token and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        return tokenizer.bos_token if adds else ""

    def _frame(self, with_image: bool) -> tuple[str, str]:
        """(blank text between a prompt and its answer, what ends an answer).

        The template is given an answer that it cannot know. Where the closed turn does not begin
        with the prompt, or has more than blanks between, the answer follows the prompt directly.
        """
        if with_image not in self._frames:
            prompt, whole = (self._templated(".", with_image, answer) for answer in (None, MARK))
            if whole.count(MARK) != 1:
                raise BadInput(
                    "The model's chat template does not keep the assistant's text as given: its "
                    "masks cannot be placed."
                )
            before, closing = whole.split(MARK)
            gap = before.removeprefix(prompt) if before.startswith(prompt) else ""
            if self.tokenizer.eos_token and not any(token in closing for token in self._special):
                closing = closing.rstrip() + self.tokenizer.eos_token
            self._frames[with_image] = ("" if gap.strip() else gap, closing)
        return self._frames[with_image]

    def tokenise(
        self, text: str, image: Image.Image | None, suffix: str | None = None
    ) -> dict[str, Tensor]:
        """The processor's tensors of integers, pixels left out, for a batch of one.

        text:   from `render`
        suffix: the answer, for a prefix language model
        """
        more: dict[str, Any] = {} if image is None else {"images": [image]}
        if suffix is not None:
            more["suffix"] = [suffix]
        if image is None and not self.suffixed and not self._takes_words:
            tensors = self.tokenizer([text], return_tensors="pt", add_special_tokens=False)
        elif self.suffixed and image is None:  # such a processor takes no text without a picture
            tensors = self.tokenizer(
                [f"{self.tokenizer.bos_token}{text}\n"],
                suffix and [f"{suffix}{self.tokenizer.eos_token}"],
                return_tensors="pt",
                add_special_tokens=False,
                return_token_type_ids=True,
            )
        else:
            # `render` has put the beginning-of-sequence token where the model has one.
            tensors = self.processor(
                text=[text], return_tensors="pt", add_special_tokens=False, **more
            )
        return {
            k: v.to(self.device)
            for k, v in tensors.items()
            if k not in PIXELS and isinstance(v, Tensor) and not v.is_floating_point()
        }

    def encode(
        self, question: str, answer: str, picture: Picture | None, closed: bool = True
    ) -> Encoded:
        """A whole turn with its supervised positions. Those that end the turn are among them only
        where the answer is `closed`.

        The ids of the turn begin with the ids of its prompt (`encode_prompt`), which is what the
        model is asked.

        Raises BadInput where the template changes the answer or the tokenizer reports no character
        offsets.
        """
        answer, pictured = answer.strip(), picture is not None
        self.check_text(answer)
        if not self.tokenizer.is_fast:
            raise BadInput(
                "The model's tokenizer reports no character offsets: use one with a fast "
                "(tokenizer.json) version."
            )
        image = None if picture is None else picture.image
        if self.suffixed:
            text = self.render(question, pictured, answer)
            inputs = self.tokenise(self.render(question, pictured), image, suffix=answer)
            plain = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, offsets, start = plain["input_ids"], plain["offset_mapping"], text.rfind(answer)
        else:
            prompt, (gap, closing) = self.render(question, pictured), self._frame(pictured)
            inputs, ids, offsets = self._continued(prompt, gap + answer + closing, image)
            start = len(prompt) + len(gap)
        first = next(i for i, (_, end) in enumerate(offsets) if end > start)
        # Only the image placeholder differs between the plain and the expanded text, and it stands
        # before the answer.
        tail = len(ids) - first
        if inputs["input_ids"][0, -tail:].tolist() != ids[first:]:
            raise BadInput(
                "The processor tokenises the answer differently from its tokenizer: masks cannot "
                "be placed."
            )
        stop = start + len(answer)
        after = [i for i in range(first, len(ids)) if offsets[i][0] >= stop or offsets[i][1] > stop]
        special = self._special_ids
        end = after[0] if after else len(ids)
        end = next((i + 1 for i in after if ids[i] in special), end) if closed else end
        shift = inputs["input_ids"].shape[1] - len(ids)
        positions = torch.arange(first, end, device=self.device) + shift
        ending = (len(answer), len(answer))
        spans = [
            (max(s - start, 0), min(e, stop) - start) if s < stop else ending
            for s, e in offsets[first:end]
        ]
        return Encoded(inputs, positions - 1, inputs["input_ids"][0, positions], spans)

    def encode_prompt(
        self, question: str, picture: Picture | None, begin: str = ""
    ) -> dict[str, Tensor]:
        """A turn up to where the answer starts, or up to the end of `begin`, the first words of the
        answer. The processor's tensors, without pixels."""
        image = None if picture is None else picture.image
        if self.suffixed:
            whole = self.tokenise(
                self.render(question, picture is not None), image, suffix=begin or None
            )
            # the processor ends an answer
            return {k: v[:, :-1] for k, v in whole.items()} if begin else whole
        prompt = self.render(question, picture is not None)
        if not begin:
            return self._prompt(prompt, image)
        return self._continued(prompt, self._frame(picture is not None)[0] + begin, image)[0]

    def _continued(
        self, prompt: str, rest: str, image: Image.Image | None
    ) -> tuple[dict[str, Tensor], list[int], list[Span]]:
        """A prompt and what follows it: (the processor's tensors, the ids of the plain text, their
        character spans).

        The first ids are the prompt's own. Where a tokenizer would join the prompt's end with what
        follows, as it does after a trailing blank, `rest` is tokenised apart.

        Raises BadInput where that cannot be done.
        """
        text = prompt + rest
        plain = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = plain["input_ids"], plain["offset_mapping"]
        begun = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        if ids[: len(begun["input_ids"])] == begun["input_ids"]:
            after = ids[len(begun["input_ids"]) :]
            return self._grown(prompt, rest, after, image), ids, offsets
        apart = self.tokenizer(LEAD + rest, add_special_tokens=False, return_offsets_mapping=True)
        lead = self.tokenizer(LEAD, add_special_tokens=False)["input_ids"]
        if apart["input_ids"][: len(lead)] != lead:
            raise BadInput(
                "The model's tokenizer joins the end of a prompt with the answer: its chat "
                "template would need to end in a line break or a special token."
            )
        after, shift = apart["input_ids"][len(lead) :], len(prompt) - len(LEAD)
        spans = [
            (start + shift, end + shift) for start, end in apart["offset_mapping"][len(lead) :]
        ]
        inputs = followed(self._prompt(prompt, image), torch.tensor(after, device=self.device))
        return inputs, begun["input_ids"] + after, begun["offset_mapping"] + spans

    def _grown(
        self, prompt: str, rest: str, after: Sequence[int], image: Image.Image | None
    ) -> dict[str, Tensor]:
        """`tokenise` of a prompt and what follows it.

        A processor works on the picture's pixels each time, which takes longer than all else. So
        the prompt's tensors are taken (`_prompt`), and the ids `after` are put behind them. The
        first turn about a picture of a size goes both ways: where they differ on this model, the
        processor gets every turn.
        """
        if image is None or not self._grows.get(image.size, True):
            return self.tokenise(prompt + rest, image)
        inputs = followed(self._prompt(prompt, image), torch.tensor(after, device=self.device))
        if image.size not in self._grows:
            whole = self.tokenise(prompt + rest, image)
            self._grows[image.size] = inputs.keys() == whole.keys() and all(
                torch.equal(inputs[key], whole[key]) for key in whole
            )
            return whole
        return inputs

    def _prompt(self, text: str, image: Image.Image | None) -> dict[str, Tensor]:
        """`tokenise`, once for the same text about pictures of one size."""
        if image is None:
            return self.tokenise(text, None)
        key = (text, image.size)
        if key not in self._prompts:
            if len(self._prompts) == PROMPTS:
                del self._prompts[next(iter(self._prompts))]  # the oldest
            self._prompts[key] = self.tokenise(text, image)
        return dict(self._prompts[key])

    @functools.cached_property
    def _prompts(self) -> dict[tuple[str, tuple[int, int]], dict[str, Tensor]]:
        """What `_prompt` keeps."""
        return {}

    @functools.cached_property
    def _grows(self) -> dict[tuple[int, int], bool]:
        """What `_grown` found, by the size of the picture."""
        return {}


def per_token(inputs: dict[str, Tensor], key: str) -> bool:
    """Whether inputs[key] has an entry for each token: its first dimensions are those of the
    ids."""
    return inputs[key].shape[:2] == inputs["input_ids"].shape


def followed(inputs: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """A prompt [1, T] with `tokens` [n] behind it. Beside each of them stands what stands beside
    the prompt's last token."""
    longer = {
        k: torch.cat([v, v[:, -1:].repeat_interleave(len(tokens), 1)], 1)
        for k, v in inputs.items()
        if per_token(inputs, k)
    }
    return inputs | longer | {"input_ids": torch.cat([inputs["input_ids"], tokens[None]], 1)}


def collate(batch: Sequence[dict[str, Tensor]], pad_id: int) -> dict[str, Any]:
    """Turns as one batch: right-pads what has the length of the token ids, and concatenates the
    rest (image grids and the like)."""
    longest = max(x["input_ids"].shape[1] for x in batch)
    out: dict[str, Any] = {}
    for key in batch[0]:
        if per_token(batch[0], key):
            fill = pad_id if key == "input_ids" else 0
            # what stands behind [1, T], such as the tiles that a token looks at
            after = [0, 0] * (batch[0][key].ndim - 2)
            rows = [
                nn.functional.pad(x[key], (*after, 0, longest - x[key].shape[1]), value=fill)
                for x in batch
            ]
            out[key] = torch.cat(rows)
        else:
            out[key] = torch.cat([x[key] for x in batch])
    return out
