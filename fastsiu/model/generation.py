"""Which settings of a model's generation_config a greedy answer follows."""

from __future__ import annotations

import math
from typing import Any

from transformers import GenerationConfig

# What decides about a greedy answer here and in transformers' `generate`.
SIMPLE = frozenset(
    {"pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "repetition_penalty"}
)
# What only `generate` honours.
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
# What cannot change a greedy answer of a given longest length. Every other setting searches, stops
# by the clock or returns something else: `set_aside` removes it and names it.
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


def set_aside(base: Any, end: int | None) -> tuple[str, ...]:
    """Leaves in the model's generation_config what a greedy answer can honour. Returns the names of
    the other settings that could change an answer.

    end: the tokenizer's id of the end, for a configuration whose own id is no token
    """
    before, V = base.generation_config, base.get_output_embeddings().weight.shape[0]
    honoured = {
        name: value for name in SIMPLE | RULES if (value := getattr(before, name, None)) is not None
    }
    broken = {
        name
        for name, value in honoured.items()
        if name.endswith("_token_id") and not _are_tokens(value, V)
    }
    penalty = honoured.get("repetition_penalty", 1.0)
    if not (type(penalty) in (int, float) and 0 < penalty < math.inf):
        broken.add("repetition_penalty")
    written = set(settings_of(before))
    base.generation_config = GenerationConfig(
        **{name: value for name, value in honoured.items() if name not in broken}
    )
    if "eos_token_id" in broken:
        base.generation_config.eos_token_id = end
    return tuple(sorted((written - SIMPLE - RULES - HARMLESS) | broken))


def settings_of(config: GenerationConfig) -> list[str]:
    """The names of the settings that differ from transformers' defaults and switch something on."""
    return [
        name
        for name, value in config.to_diff_dict().items()
        if value is not None and value is not False and value != []
    ]


def _are_tokens(value: Any, V: int) -> bool:
    """Whether an id, or each of a list of one or more ids, is in a vocabulary of V tokens."""
    ids = value if isinstance(value, list) else [value]
    return bool(ids) and all(type(x) is int and 0 <= x < V for x in ids)
