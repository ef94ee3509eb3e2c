"""Any image-text model of transformers: loaded, asked for hidden states without logits, its image
features taken once.

Nothing here knows a model family. Text goes through the processor and the chat template, image
features come from the model's own `get_image_features` and enter by a keyword of its forward
(`ENTRIES`), and what happens between the head's product and the logits is found by measuring
(`probe_head`), because configurations name transforms that the model's own forward ignores.
docs/adding-a-family.md says what is asked of a model, in the order in which it is checked.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging as transformers_logging

from ..loss.rows import no_logits
from ..request import BadInput, NumericFailure
from . import source
from .features import READ, crossed, features_entry, join_features, read_key
from .processor import NO_CODE, refuse_own_code, takes_suffix

Span = tuple[int, int]
FAULTS = (
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
    NameError,
    AssertionError,
    ImportError,
    ArithmeticError,
    RuntimeError,
)
MARK = "\ue000"  # an answer that no chat template, question or tokenizer knows
LEAD = "\n"  # after it a tokenizer begins anew, without the blank that some put before a text
# Of a model's generation_config. SIMPLE: what decides about a greedy answer here and in `generate`;
# RULES: what only `generate` honours; HARMLESS: what cannot change a greedy answer of a given
# longest length. The rest searches, stops by the clock or returns something else: it is set aside,
# and told.
SIMPLE = frozenset(
    {"pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "repetition_penalty"}
)
RULES = frozenset(
    {
        "no_repeat_ngram_size",
        "bad_words_ids",
        "suppress_tokens",
        "begin_suppress_tokens",
        "sequence_bias",
        "min_length",
        "min_new_tokens",
        "encoder_repetition_penalty",
        "encoder_no_repeat_ngram_size",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "exponential_decay_length_penalty",
        "remove_invalid_values",
        "renormalize_logits",
    }
)
HARMLESS = frozenset(
    {
        "transformers_version",
        "_from_model_config",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "top_h",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "num_beams",
        "early_stopping",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "use_cache",
        "compile_config",
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "disable_compile",
        "return_dict_in_generate",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
    }
)
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

    image:    the RGB picture; only its size matters once `features` is there (it decides the number
    of image tokens)
    features: what `get_image_features` returned, reduced to what the language model reads
    real:     the features are the image's; False for a dream, which no projector can see again
    """

    image: Image.Image
    features: Any
    real: bool = True


@dataclass
class Encoded:
    """One chat turn as token ids, with the supervised positions of its answer.

    inputs:  the processor's tensors for a batch of one, without pixels
    rows:    [n] int64, positions whose hidden state predicts a supervised token (token position
    minus one)
    labels:  [n] int64, the supervised tokens: the answer's and, of a closed answer, those that end
    the turn
    offsets: n character spans of those tokens inside the answer; the end token's is empty
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    labels: Tensor
    offsets: list[Span] = field(default_factory=list)


@dataclass(frozen=True)
class Budget:
    """How much is done at once; nothing of it changes a result but for rounding, and `optimizer` a
    little.

    micro_batch:   samples in one forward of a step, None: all at once; dream_batch: the same for
    dreams
    ask_batch:     questions in one forward that trains nothing
    checkpointing: layers keep their inputs only and are computed again in the backward pass
    optimizer:     adamw, adamw8bit or paged_adamw8bit
    sparing:       prefixes are shared in the way that takes the least memory, also where another
    takes less time
    """

    micro_batch: int | None = None
    dream_batch: int | None = None
    ask_batch: int = 64
    checkpointing: bool = False
    optimizer: str = "adamw"
    sparing: bool = False


@dataclass
class VLM:
    """A loaded model. `model` is what gets called (a PEFT wrapper once an adapter is attached),
    `base` what was loaded.

    revision: the commit that a hub model was loaded from, whatever branch or tag was asked for; a
    directory has none
    shares:   the ways of sharing a prefix that were found exact on this model
    (`sharing.plan_sharing`); none are before that
    decodes:  for prompts with a picture (True) and without: "" where answers may grow on a shared
    prefix, else why not, as
              `decode.why_not` found; empty before that
    aside:    settings of the model's generation_config that were set aside
    """

    name: str
    revision: str | None
    model: nn.Module
    base: Any
    processor: Any
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    shares: tuple[str, ...] = ()
    decodes: dict[bool, str] = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)
    aside: tuple[str, ...] = ()
    _frames: dict[bool, tuple[str, str]] = field(default_factory=dict, init=False, repr=False)

    @functools.cached_property
    def entry(self) -> str:
        """The keyword of the model's forward that takes image features. Raises BadInput where it
        has none."""
        return features_entry(self.base)

    @functools.cached_property
    def suffixed(self) -> bool:
        """Whether an answer goes in beside the question: a prefix language model, without a chat
        template."""
        return takes_suffix(self.processor)

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    @property
    def head_weight(self) -> Tensor:
        """[V, D], the output embedding."""
        return self.base.get_output_embeddings().weight

    @property
    def head_bias(self) -> Tensor | None:
        return self.base.get_output_embeddings().bias

    @property
    def head_options(self) -> dict[str, Any]:
        """What the loss has to know of the head (keywords of `fused_dmk_ce` and
        `TeacherCache.from_hidden`)."""
        return {
            "head_bias": self.head_bias,
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
        }

    def render(self, question: str, with_image: bool, answer: str | None = None) -> str:
        """The text of a turn: up to where the answer starts or, with `answer`, the closed turn.

        A closed turn is the prompt, the answer and what ends an answer, in this order: so the model
        is trained in the very context in which it is asked. Chat templates may write a closed turn
        with another beginning, such as one without the empty thoughts of their prompt.

        Of a prefix language model: the question or, with `answer`, what follows it.
        """
        self.check_text(question)
        if self.suffixed:
            return (
                self.processor.image_token * with_image + question
                if answer is None
                else answer + self.tokenizer.eos_token
            )
        prompt = self._templated(question, with_image)
        if answer is None:
            return prompt
        gap, closing = self._frame(with_image)
        return prompt + gap + answer + closing

    @functools.cached_property
    def _takes_words(self) -> bool:
        """Whether the processor takes a text without a picture; GOT-OCR2's does not, and its
        tokenizer does."""
        try:
            self.processor(text=["Who?"], return_tensors="pt", add_special_tokens=False)
        except (TypeError, ValueError, AttributeError):
            return False
        return True

    def check_text(self, text: str) -> None:
        """Raises BadInput for a text in which the tokenizer would read a token that no person
        writes, such as that of a picture or of the end, and for half of a surrogate pair, which no
        tokenizer takes."""
        if found := self._marks.search(text):
            raise BadInput(
                f"{found[0]!r} stands in a question, a name or an answer, and the model's "
                "tokenizer reads no words "
                "there: write it in another way."
            )

    @functools.cached_property
    def _marks(self) -> re.Pattern[str]:
        tokens = {t for t in self.tokenizer.all_special_tokens if t.strip() and not t.isalnum()}
        return re.compile("|".join(["[\ud800-\udfff]", *map(re.escape, sorted(tokens))]))

    def _templated(self, question: str, with_image: bool, answer: str | None = None) -> str:
        """What the chat template makes of a question or of a question with its answer."""
        content = [{"type": "image"}] * with_image + [{"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        try:
            text = self.processor.apply_chat_template(
                messages, add_generation_prompt=answer is None, tokenize=False
            )
        except Exception as error:  # any: a template is a stranger's program
            said = source.first_line(error)
            raise BadInput(
                f"The model's chat template fails ({said}): it is given a question with or "
                "without a picture, and "
                "then the answer, each as a list of parts."
            ) from error
        return text if not self._first or text.startswith(self._first) else self._first + text

    @functools.cached_property
    def _first(self) -> str:
        """The first token's text, where templates (LLaVA 1.5's) leave it to the tokenizer;
        `tokenise` adds none."""
        tokenizer = self.tokenizer
        adds = tokenizer.bos_token and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        return tokenizer.bos_token if adds else ""

    def _frame(self, with_image: bool) -> tuple[str, str]:
        """(blank text between a prompt and its answer, what ends an answer).

        Found with an answer that no template knows. Where the closed turn does not begin as the
        prompt does, or has more than blanks between, the answer follows the prompt directly.
        """
        if with_image not in self._frames:
            prompt, whole = (self._templated(".", with_image, answer) for answer in (None, MARK))
            if whole.count(MARK) != 1:
                raise BadInput(
                    "The model's chat template does not keep the assistant's text as given: its "
                    "masks cannot be "
                    "placed."
                )
            before, closing = whole.split(MARK)
            gap = before.removeprefix(prompt) if before.startswith(prompt) else ""
            if self.tokenizer.eos_token and not any(
                token in closing for token in self.tokenizer.all_special_tokens
            ):
                closing = closing.rstrip() + self.tokenizer.eos_token
            self._frames[with_image] = ("" if gap.strip() else gap, closing)
        return self._frames[with_image]

    def tokenise(
        self, text: str, image: Image.Image | None, suffix: str | None = None
    ) -> dict[str, Tensor]:
        """The processor's tensors (batch of one) for rendered text, pixels left out; suffix: a
        prefix model's answer."""
        images = {} if image is None else {"images": [image]}
        if suffix is not None:
            images["suffix"] = [suffix]
        if image is None and not self.suffixed and not self._takes_words:
            found = self.tokenizer([text], return_tensors="pt", add_special_tokens=False)
        elif self.suffixed and image is None:  # such a processor takes no text without a picture
            found = self.tokenizer(
                [f"{self.tokenizer.bos_token}{text}\n"],
                suffix and [f"{suffix}{self.tokenizer.eos_token}"],
                return_tensors="pt",
                add_special_tokens=False,
                return_token_type_ids=True,
            )
        else:
            # `render` has put the beginning-of-sequence token where the model has one.
            found = self.processor(
                text=[text], return_tensors="pt", add_special_tokens=False, **images
            )
        wanted = {
            k: v
            for k, v in found.items()
            if k not in PIXELS and isinstance(v, Tensor) and not v.is_floating_point()
        }
        return {k: v.to(self.device) for k, v in wanted.items()}

    def encode(
        self, question: str, answer: str, picture: Picture | None, closed: bool = True
    ) -> Encoded:
        """A whole turn with its supervised positions; those that end the turn only where the answer
        is `closed`.

        The ids of the turn begin with the ids of its prompt (`encode_prompt`), which are what is
        asked.

        Raises BadInput where the template changes the answer or the tokenizer reports no character
        offsets.
        """
        answer, shown = answer.strip(), picture is not None
        self.check_text(answer)
        if not self.tokenizer.is_fast:
            raise BadInput(
                "The model's tokenizer reports no character offsets: use one with a fast "
                "(tokenizer.json) version."
            )
        image = None if picture is None else picture.image
        if self.suffixed:
            text = self.render(question, shown, answer)
            inputs = self.tokenise(self.render(question, shown), image, suffix=answer)
            plain = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, offsets, start = plain["input_ids"], plain["offset_mapping"], text.rfind(answer)
        else:
            prompt, (gap, closing) = self.render(question, shown), self._frame(shown)
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
        special = set(self.tokenizer.all_special_ids)
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
        answer."""
        image = None if picture is None else picture.image
        if self.suffixed:
            whole = self.tokenise(
                self.render(question, picture is not None), image, suffix=begin or None
            )
            # the processor ends an answer
            return {k: v[:, :-1] for k, v in whole.items()} if begin else whole
        prompt = self.render(question, picture is not None)
        if not begin:
            return self.tokenise(prompt, image)
        return self._continued(prompt, self._frame(picture is not None)[0] + begin, image)[0]

    def _continued(
        self, prompt: str, rest: str, image: Image.Image | None
    ) -> tuple[dict[str, Tensor], list[int], list[Span]]:
        """(the processor's tensors, ids and their character spans of the plain text) of a prompt
        and what follows it.

        The first ids are the prompt's own. Where a tokenizer would join the prompt's end with what
        follows, as it does after a trailing blank, the rest is tokenised apart.

        Raises BadInput where that cannot be done.
        """
        text = prompt + rest
        plain = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = plain["input_ids"], plain["offset_mapping"]
        begun = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        if ids[: len(begun["input_ids"])] == begun["input_ids"]:
            return self.tokenise(text, image), ids, offsets
        apart = self.tokenizer(LEAD + rest, add_special_tokens=False, return_offsets_mapping=True)
        lead = self.tokenizer(LEAD, add_special_tokens=False)["input_ids"]
        if apart["input_ids"][: len(lead)] != lead:
            raise BadInput(
                "The model's tokenizer joins the end of a prompt with the answer: its chat "
                "template would need to "
                "end in a line break or a special token."
            )
        after, shift = apart["input_ids"][len(lead) :], len(prompt) - len(LEAD)
        spans = [
            (start + shift, end + shift) for start, end in apart["offset_mapping"][len(lead) :]
        ]
        inputs = followed(self.tokenise(prompt, image), torch.tensor(after, device=self.device))
        return inputs, begun["input_ids"] + after, begun["offset_mapping"] + spans

    def image_features(self, image: Image.Image) -> Any:
        """What the vision tower and the projector make of one image, reduced to what the language
        model reads.

        Records a graph where the projector trains; wrap in `torch.no_grad()` otherwise.
        """
        text = self.render(".", True)
        try:
            found = self.processor(
                text=[text], images=[image], return_tensors="pt", add_special_tokens=False
            )
        except Exception as error:  # any: its settings are a stranger's
            said = source.first_line(error)
            raise BadInput(
                "The model's processor does not take its chat template's text with a picture "
                f"({said}): restore its "
                "settings, or save a template that marks where the picture is."
            ) from error
        # what fails here is the device's fault
        found, dtype = (
            found.to(self.device),
            next(self.base.parameters()).dtype,
        )
        found = {
            k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in found.items()
        }
        if self.entry == "cross_attention_states":
            return BaseModelOutputWithPooling(pooler_output=crossed(self.base, found))
        encoder = self.base.base_model.get_image_features
        wanted = {k: found[k] for k in inspect.signature(encoder).parameters if k in found}
        features = encoder(**wanted, return_dict=True)
        if not isinstance(features, dict):
            raise BadInput(
                f"The model's get_image_features gives a {type(features).__name__}: it would "
                "need to give an output "
                f"with one of {', '.join(READ)}."
            )
        # some families drag those of every vision layer along
        unread = {
            "hidden_states",
            "attentions",
        }
        if read_key(features) == "pooler_output":
            unread.add("last_hidden_state")
        for key in unread & set(features):
            features[key] = None
        return features

    def picture(self, image: Image.Image) -> Picture:
        with torch.no_grad():
            return Picture(image, self.image_features(image))

    def hidden(self, batch: Sequence[dict[str, Tensor]], features: Sequence[Any] = ()) -> Tensor:
        """The states that feed the head, [B, T, D], for right-padded turns; one entry of `features`
        per turn with a picture."""
        return self.run(collate(batch, self.tokenizer.pad_token_id), features, use_cache=False)[0]

    def run(
        self, inputs: dict[str, Any], features: Sequence[Any] = (), **options: Any
    ) -> tuple[Tensor, Any]:
        """(the states that feed the head, [B, T, D], the model's output) for prepared inputs; no
        logits exist.

        features: those of the pictures, in the order of the rows; options: further keywords of the
        model's forward
        """
        inputs = {**inputs, **self.entering(features)}
        with no_logits(self.base) as kept:
            output = self.model(**inputs, **options)
        return kept["hidden"], output

    def entering(self, features: Sequence[Any]) -> dict[str, Any]:
        """The image features of a batch's turns as a keyword of the model's forward."""
        if not features:
            return {}
        joined = join_features(features)
        return {
            self.entry: {"image": joined}
            if self.entry == "mm_encoder_outputs"
            else joined["pooler_output"]
        }

    def prompts(self, inputs: dict[str, Any], features: Sequence[Any]) -> dict[str, Any]:
        """The inputs of a batch of prompts for `generate`."""
        if not features or self.entry == "mm_encoder_outputs":
            return {**inputs, **self.entering(features)}
        # Layers that look across cache what they are given, and `generate` would give it to them
        # again with every token: all but the last token of the prompt go first.
        begun = {
            k: v[:, :-1] if v.shape[:2] == inputs["input_ids"].shape else v
            for k, v in inputs.items()
        }
        return {
            **inputs,
            "past_key_values": self.run(begun, features, use_cache=True)[1].past_key_values,
        }

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> [n, V] fp32 logits, for a handful of rows."""
        x = hidden.float() @ self.head_weight.float().T
        return self.transformed(x if self.head_bias is None else x + self.head_bias.float())

    def transformed(self, x: Tensor) -> Tensor:
        """What the head gives, as the model's own forward goes on with it."""
        x = self.logit_scale * x
        return (
            x
            if self.logit_softcap is None
            else self.logit_softcap * torch.tanh(x / self.logit_softcap)
        )


def encoder(vlm: VLM) -> Callable[..., Encoded]:
    """`vlm.encode`, which makes the same words about pictures of one size once: they are one
    object, and `prefix` makes use of that."""
    known: dict[tuple, Encoded] = {}

    def made(question: str, answer: str, picture: Picture | None, closed: bool = True) -> Encoded:
        key = (question, answer, closed, None if picture is None else picture.image.size)
        if key not in known:
            known[key] = vlm.encode(question, answer, picture, closed)
        return known[key]

    return made


def followed(inputs: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """A prompt [1, T] with these tokens [n] behind it, and beside each what stands beside its last
    one."""
    T = inputs["input_ids"].shape
    by_token = {k: v for k, v in inputs.items() if v.shape[:2] == T}
    longer = {
        k: torch.cat([v, v[:, -1:].repeat_interleave(len(tokens), 1)], 1)
        for k, v in by_token.items()
    }
    return inputs | longer | {"input_ids": torch.cat([inputs["input_ids"], tokens[None]], 1)}


def collate(batch: Sequence[dict[str, Tensor]], pad_id: int) -> dict[str, Any]:
    """Right-pads what has the length of the token ids and concatenates the rest (image grids and
    the like)."""
    longest = max(x["input_ids"].shape[1] for x in batch)
    out: dict[str, Any] = {}
    for key in batch[0]:
        if batch[0][key].shape[:2] == batch[0]["input_ids"].shape:
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


@torch.no_grad()
def probe_head(model: Any, inputs: dict[str, Tensor]) -> tuple[float, float | None]:
    """What the model does to head(hidden): (scale, softcap), found by comparing numbers.

    inputs: a few tokens without a picture, the first that the model's forward is given
    Raises BadInput for anything but z = c tanh(s x / c) or z = s x, and where the forward fails.
    """
    with no_logits(model) as kept:
        first_forward(model, inputs)
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise BadInput(
            f"The model's output head is a {type(head).__name__}, not a plain linear layer: "
            "give a model whose head is neither quantised nor adapted."
        )
    x = head(kept["hidden"]).float()
    z = first_forward(model, inputs).logits.float()
    tolerance = (1e-4 if head.weight.dtype == torch.float32 else 4e-3) * float(z.abs().max()) + 1e-6
    for cap in (None, *named_caps(model.config)):
        # what the cap has not flattened
        free = z.abs() < 0.99 * cap if cap else torch.ones_like(z, dtype=torch.bool)
        u = z[free] if cap is None else cap * torch.atanh(z[free] / cap)
        scale = float((x[free] * u).sum() / x[free].square().sum()) if free.any() else 0.0
        scale = 1.0 if abs(scale - 1) < 1e-3 else scale
        fitted = scale * x if cap is None else cap * torch.tanh(scale * x / cap)
        if float((fitted - z).abs().max()) <= tolerance:
            return scale, cap
    raise BadInput(
        "The model transforms its logits after the head by more than a scale and a softcap: not "
        "supported."
    )


def first_forward(model: Any, inputs: dict[str, Tensor]) -> Any:
    """The model's output. Raises BadInput where its code fails."""
    with told_as_the_models_fault(model, "without a"):
        return model(**inputs, use_cache=False)


@contextlib.contextmanager
def told_as_the_models_fault(model: Any, pictured: str) -> Iterator[None]:
    """Errors of a model's own forward inside as BadInput: one release of transformers can break one
    model, and so can one wrong number in a model's files. A lack of memory is neither."""
    try:
        yield
    except BadInput:
        raise
    except FAULTS as error:
        if out_of_memory(error) or isinstance(error, torch.AcceleratorError):
            raise
        version, said = transformers.__version__, source.first_line(error)
        minor = ".".join(version.split(".")[:2])
        raise BadInput(
            f"{type(model).__name__} fails in transformers {version} on a question {pictured} "
            f"picture ({type(error).__name__}: {said}): restore the model's files, try an "
            "earlier release, "
            f"pip install 'transformers<{minor}', or give another model."
        ) from error


def named_caps(config: Any) -> list[float]:
    """Every number of a configuration whose name speaks of a cap; which of them is the logits' is
    not believed but measured."""
    found = [
        v
        for part in (config, config.get_text_config())
        for k, v in vars(part).items()
        if "cap" in k
    ]
    return sorted({float(v) for v in found if isinstance(v, int | float) and v > 0})


def load(
    name: str,
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
    attention: str | None = None,
    budget: Budget | None = None,
    bars: bool = False,
) -> VLM:
    """Loads a hub id or a directory, weight by weight straight to its device; code that comes with
    a model is never run.

    dtype:     "auto": as stored on an accelerator, fp32 on a CPU
    quantize:  "nf4" or "int8" for the language model's linear layers; all else (head, embeddings,
    vision tower) as in `dtype`
    attention: "sdpa", "flash_attention_2" or "eager"; the model's own choice when left out
    bars:      transformers may draw its progress on stderr: bytes of a download, weights loaded

    Raises BadInput for a missing directory, a directory without model or processor, a model that
    takes no pictures or whose language model cannot be given image features, a model whose forward
    fails on plain text, and for options that cannot be honoured here.
    """
    source.check_directory(name)
    source.check_options(dtype, quantize, attention, budget.optimizer if budget else "adamw")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    place = source.check_device(device)
    budget = budget or Budget()
    source.check_packages(place.type, dtype, quantize, attention, budget.optimizer)
    for package in ("transformers", "bitsandbytes"):
        logging.getLogger(package).setLevel(logging.ERROR)
    with progress_bars(bars):
        base, processor, revision = _read(name, revision, place, dtype, quantize, attention)
    base.eval()
    for module in base.modules():
        # bitsandbytes on a CPU with AVX512-BF16: the first forward of such a layer in eval mode
        # would put its weight into a layout for inference, through which no gradient reaches the
        # layers before it, and nothing says so.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    features_entry(base)
    if budget.checkpointing:
        checkpoint_layers(base)
    base.requires_grad_(False)
    check_finite(base, name)
    vlm = VLM(name, revision, base, base, processor, budget=budget)
    vlm.aside = set_aside(base, vlm.tokenizer.eos_token_id)
    if vlm.tokenizer.pad_token_id is None:
        vlm.tokenizer.pad_token = vlm.tokenizer.eos_token
    # what no turn can be made of is told before anything else
    vlm.encode("Who is this?", "Nobody.", None)
    vlm.logit_scale, vlm.logit_softcap = probe_head(base, vlm.encode_prompt("Who is this?", None))
    try_picture(vlm)
    return vlm


@torch.no_grad()
def try_picture(vlm: VLM) -> None:
    """Shows the model a grey picture. Raises BadInput where its tower or its forward fails: files
    that contradict each other, such as another number of image tokens in the processor's settings.
    """
    with told_as_the_models_fault(vlm.base, "with a"):
        picture = vlm.picture(Image.new("RGB", (224, 224), (127, 127, 127)))
        vlm.run(vlm.encode_prompt("Who is this?", picture), [picture.features], use_cache=False)


def check_finite(module: nn.Module, name: str) -> None:
    """Raises NumericFailure, which names the tensor, for NaN or infinity in any weight of
    `name`."""
    for key, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            low, high = torch.aminmax(tensor.detach())  # NaN goes through both; no copy is made
            if not (math.isfinite(low) and math.isfinite(high)):
                raise NumericFailure(
                    f"{key} of {name} holds NaN or infinite numbers: give undamaged weights."
                )


def set_aside(base: Any, end: int | None) -> tuple[str, ...]:
    """Leaves in the model's generation_config what a greedy answer can honour; the names of what
    else was set and could change one.

    end: the tokenizer's id of the end, for a configuration whose own is none
    """
    before, V = base.generation_config, base.get_output_embeddings().weight.shape[0]
    kept = {k: getattr(before, k) for k in SIMPLE | RULES if getattr(before, k, None) is not None}
    is_id = lambda x: type(x) is int and 0 <= x < V
    broken = {
        k
        for k, v in kept.items()
        if k.endswith("_token_id") and not all(map(is_id, v if isinstance(v, list) else [v]))
    }
    penalty = kept.get("repetition_penalty", 1.0)
    if not (type(penalty) in (int, float) and 0 < penalty < math.inf):
        broken.add("repetition_penalty")
    told = {
        k for k, v in before.to_diff_dict().items() if v is not None and v is not False and v != []
    }
    base.generation_config = GenerationConfig(**{k: v for k, v in kept.items() if k not in broken})
    if "eos_token_id" in broken:
        base.generation_config.eos_token_id = end
    return tuple(sorted((told - SIMPLE - RULES - HARMLESS) | broken))


def _read(
    name: str,
    revision: str | None,
    place: torch.device,
    dtype: str,
    quantize: str | None,
    attention: str | None,
) -> tuple[Any, Any, str | None]:
    """(model, processor, commit)."""
    config, processor, revision = source.describe(name, revision)
    wanted = source.DTYPES[source.dtype_name(config, dtype, place.type)]
    extra: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if quantize is not None:
        extra["quantization_config"] = source.quantisation(config, quantize, wanted)
    try:
        base, info = AutoModelForImageTextToText.from_pretrained(
            name,
            revision=revision,
            dtype=wanted,
            device_map={"": place},
            output_loading_info=True,
            use_safetensors=True,
            **NO_CODE,
            **extra,
        )
    except Exception as error:  # any: it is others' code on a stranger's files; the reason is told
        if out_of_memory(error) or isinstance(error, torch.AcceleratorError):
            raise
        refuse_own_code(name, error)
        said = source.first_line(error)
        raise BadInput(
            f"{name} cannot be loaded as an image-text model ({said}): check the files."
        ) from error
    if missing := sorted(info["missing_keys"]):  # transformers makes up random ones
        raise BadInput(
            f"{name} lacks {len(missing)} of its weights, {missing[0]} among them: check the files."
        )
    return base, processor, revision


@contextlib.contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Transformers' own switch, and the hub's, for the time being."""
    before = transformers_logging.is_progress_bar_enabled()
    switch = {
        True: transformers_logging.enable_progress_bar,
        False: transformers_logging.disable_progress_bar,
    }
    switch[shown]()
    try:
        yield
    finally:
        switch[before]()


def out_of_memory(error: BaseException) -> bool:
    """A GPU's allocator has an exception of its own; a CPU's raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | RuntimeError) and (
        isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    )


SMALL = 20_000_000  # parameters


@contextlib.contextmanager
def threads(vlm: VLM) -> Iterator[None]:
    """Inside, a small model on a CPU computes on one thread: a second gains it little, and where
    other processes want the cores, OpenMP's threads wait for each other: the embedded model's demo
    then took more than 7 minutes instead of 1."""
    before = torch.get_num_threads()
    if vlm.device.type == "cpu" and sum(p.numel() for p in vlm.base.parameters()) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def checkpoint_layers(base: Any) -> None:
    """From now on layers keep their inputs only, in training mode, and are computed again in the
    backward pass."""
    # Named anew in transformers 5; both do the same.
    enable = (
        getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    )
    if not base.supports_gradient_checkpointing:
        raise BadInput(
            f"{type(base).__name__} has no activation checkpointing: train with a smaller micro "
            "batch instead."
        )
    enable()
