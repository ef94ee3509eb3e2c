"""The program's own sentences and settings, word for word: what a redacted report may tell."""

from __future__ import annotations

import re
from typing import Any

from ..evaluate.attacks import not_asked, table
from ..judging.family import GIVEN_AWAY
from .words import LIMITS

LEFT_OUT = "A sentence was left out here: it may hold a name or an answer."
STORED = ("bfloat16", "float16", "float32", "int8", "nf4")  # forms that a merged model is asked in
FAMILIES = table()["family"]

# What attacks from inside (`evaluate.deep`) call their settings; # is a number.
SETTINGS = (
    "logit lens, layer # of #, name first",
    "logit lens, layer # of #, mean rank of #",
    "linear probe, layer # of #",
    *(
        f"which concept: rank by KL of {kind}"
        for kind in ("facts in words", "looks in words", "names in pictures")
    ),
    *(
        f"which picture: AUC by {kind}"
        for kind in ("KL to the untouched model", "log p of its own answers")
    ),
    "before any step",
    *(
        f"# {pictures}, rate #, {steps}{of}"
        for pictures in ("picture", "pictures")
        for steps in ("# step", "# steps", "steps to #%")
        for of in ("", ": unseen face, same name", ": unseen face, unseen name")
    ),
    *(f"trained on {kind}, rate #, # steps" for kind in ("pictures of others", "facts in words")),
    *(
        f"{weights}, {kind}"
        for kind in ("naming", "two-hop")
        for weights in (
            "adapter taken off",
            "adapter x #",
            "merged, bf16",
            "merged, int8",
            "merged, nf4",
            "merged, int4",
        )
    ),
    "pixels within #/#, # steps",
    "features within # sd, # steps",
    "pictures as they are",
    "soft prompt of #, # steps",
    "soft prompt of #, # steps, then a stranger shown",
)

# Answers that an audit compares with the report's.
REPORTED = (
    "answers of the untouched model",
    "answers that have nothing to do with the look",
    "answers that unlearning changed",
)

# The program's own sentences: # is a number, ... where a name or an answer is quoted, which is left
# out.
SENTENCES = (
    *LIMITS,
    "The adapter changes what is in front of the language model, where many servers leave "
    "adapters out: merge it before it is served.",
    *not_asked(),
    "No picture was found in which the untouched model recognises nobody.",
    "No picture of anyone else was given, and no dream of one was accepted.",
    "The untouched model tells no fact of the one in the picture that it does not tell of others.",
    "There is only one picture of the concept, so there is none to tell the training picture from.",
    "There are only two pictures of the concept, so none can stand in for the training picture.",
    "No name of anyone else is known, so there is nothing to rank among.",
    "All known names start with the same token, so the first token tells nothing.",
    "No gradient reaches the picture's features in this model.",
    "Not in # steps.",
    "# workers stopped while they were at it, as a process killed for its memory does: run it "
    "alone, with less memory.",
    "No picture could be made in which the untouched model recognises nobody: strangers count as 0 "
    "%.",
    "The untouched model told nothing of it in words that it does not say of others, so no fact "
    "could be looked for.",
    "Fewer than # pictures were found in which the untouched model recognises nobody, so how "
    "likely the name is was not compared.",
    "Fewer than # names of others are known, so the true one would often come first by chance.",
    "The untouched model gave the name in no answer that it could be scored in.",
    "No answer was scored.",
    "Only the untouched model was asked.",
    *(
        f"Nothing here can try this attack yet: {key}."
        for key in ("probe", "mia", "relearn", "weights")
    ),
    "The name was pushed below a stranger's, which tells who was unlearned: it is the likelier "
    "answer about the picture in only # % of pairs (# % to # % is allowed).",
    "The name is still a likelier answer about the picture than about a stranger's: in # % of "
    "pairs (# % to # % is allowed).",
    *(
        f"{one['asked']} ({key}), # of # answers about the picture still "
        f"{GIVEN_AWAY[one['seeks']][0]}; {compared}"
        for key, one in FAMILIES.items()
        if one["seeks"] in GIVEN_AWAY
        for compared in (
            "there was no stranger to compare with (at most # % is allowed).",
            *(
                f"the untouched model {GIVEN_AWAY[one['seeks']][1]} of strangers in # of # (at "
                f"most {points} allowed)."
                for points in ("# point more is", "# points more are")
            ),
        )
    ),
    "Nothing was asked about the training picture, so nothing is shown to be forgotten: No answers "
    "of this kind were collected.",
    "Nothing was asked about the training picture, so nothing is shown to be forgotten: ...",
    "The untouched model never named the concept in the training picture (# of # answers), so "
    "there was nothing to forget: check the picture and the spelling of the name.",
    "The name or a part of it is still in # of # answers about the training picture and its "
    "variants (# %; at most # % is allowed).",
    "The name or a part of it is still in # of # answers about other pictures of the concept (# %; "
    "at most # % is allowed).",
    "# of # answers to questions with the name still confirm what it looks like (# %; at most # % "
    "is allowed).",
    *(
        f"{start} agree with the untouched model (# %; {least}){end}."
        for what, parts in (
            (
                "answers about other pictures",
                ("look-alikes", "the concept beside others", "pictures of ..."),
            ),
            (
                "answers without a picture",
                ("facts of the concept", "facts of others", "general knowledge"),
            ),
        )
        for start, ends in (
            (f"Only # of # {what}", ("",)),
            (
                f"Of {what} a part is lost: only # of #",
                [f", those about {part}" for part in parts],
            ),
        )
        for end in ends
        for least in (
            "at least # % is required",
            "noise alone keeps #, so at least # % is required",
        )
    ),
    "# of # answers became empty, repetition or gibberish (at most # allowed), first ...",
    "The model refuses everything: all # answers about the training picture are refusals, and "
    "refusals of other questions rose from # % to # % (at most # % more allowed).",
    "The untouched model never named the concept in its pictures (# of # answers), so there was "
    "nothing to forget: check the picture and the spelling of the name.",
    "# of # answers about the concept's pictures give another's name instead (# %; at most # % is "
    "allowed), first ...",
    "No answers of this kind were collected.",
    "One picture cannot show it: give more pictures of the concept with --images DIR.",
    "No picture of anything else was given: give some with --retain DIR.",
    "No picture of anything else was given (--retain DIR), so what is kept in pictures was "
    "measured on drawn shapes.",
    "No picture of anything else was given: give some with --others DIR.",
    "The training picture was not given: give it with --image.",
    "The training picture was not given.",
    "No picture of anyone else was given: give some with --others DIR.",
    "No picture of a look-alike was given: give some with --lookalikes DIR.",
    "No picture of the concept beside others was given: give some with --groups DIR.",
    "One picture cannot show it: no other pictures of the concept were given.",
    "No question whose answer is the name was put to a picture of the concept.",
    "No question with the name was put to a picture of the concept.",
    "No picture without the concept was given.",
    "No invented name was asked about.",
    "No picture of that kind was given.",
    "No picture of the concept beside others was given, or the untouched model names nobody there.",
    "No name of anyone else was given, so a renaming cannot be told from a description.",
    "The untouched model was not at hand to score these answers, or they hold no token.",
    "The control pictures show nobody.",
    "It compares two models on the same picture.",
    "No question of this kind was asked.",
    "Nothing was asked.",
    "No judge was asked.",
    "The judge graded no answer.",
    "There was no answer to grade.",
    "No answer has # words.",
    "Only the untouched model was asked: give an adapter, or the untouched model of a merged one.",
    "The intervals take the answers as independent; those about one picture are not quite, so they "
    "are wider in truth.",
    "No picture of anyone else was asked about: a model that answers every picture the same would "
    "not be noticed.",
    "No question without a picture was asked: a model that refuses or denies everything would not "
    "be noticed.",
    "No name of anyone else was given: a concept that is now called by another's name would not be "
    "noticed.",
    "No question with the name was asked: a model that still confirms it would not be noticed.",
    "Whom the other pictures show was not said: they are compared with the untouched model only.",
    "No picture of the concept beside others was given.",
    "The untouched model names the concept in none of them.",
    "The suite has no other concept: add one to concepts.",
    "The suite has no picture of a look-alike: name a concept of it in .../concept.json.",
    "The suite has no group picture of it: put some into .../groups.",
    "It was not asked.",
    "... is a word like any other: it counts ...; --as-word counts it everywhere, --as-name only "
    "as a name.",
    "The model's generation_config sets ...: answers were made without that.",
    "This model was merged by fastsiu, so it is not the untouched one: give that with --base.",
    "Nothing says for which weights the adapter was made, so that was checked by its shapes only.",
    "Only these weights were changed: the untouched model and its copies know what they knew.",
    "The adapter is the sum of # adapters that were trained apart: none of them has seen what the "
    "others change.",
    "Each of the adapters was added # times.",
    "The adapter was trained on the model in nf4, and merged into the weights that were not "
    "quantised.",
    "The adapter was trained on the model in int8, and merged into the weights that were not "
    "quantised.",
    "--quantize nf4 needs bitsandbytes, which is not installed: pip install 'fastsiu[quant]'.",
    "--quantize int8 needs bitsandbytes, which is not installed: pip install 'fastsiu[quant]'.",
    "The name is still in # of # answers about pictures of the concept beside others (# %; at most "
    "# % is allowed).",
    "The untouched model confirms none of the questions with the name, so they show nothing.",
    "The untouched model confirms questions with the name about pictures of nobody, too (in # of # "
    "answers), so as large a share of the answers to them is excused.",
    "# of # answers about the concept's pictures were cut before they ended, so a name at their "
    "end is not seen: raise --max-new-tokens.",
    "The answers about the concept's pictures are no sentences of the untouched model: their "
    "perplexity under it is # (at most # is allowed).",
    "Only # answers about the concept's pictures were judged: of all such answers # % or more are "
    "free of the name, which is all that so few can show.",
    "No --control was given: the never-seen control is the concept's own pictures, cut into # "
    "patches and shuffled, which keep its colours.",
    "Not seen by the model, so protected in text only: ...",
    "# answers about dreamed or retained pictures named the concept and were not trained on.",
    "No picture and no dream of anything else was trained on: other concepts' recognition may "
    "suffer.",
    "The weights are merged: what looks inside needs the adapter, with which the untouched model "
    "is at hand as well.",
    "Only # pictures of strangers could be made of the picture or dreamed: what the concept is "
    "answered with rests on few.",
    "No picture of a stranger could be drawn, so nothing about two in one picture was trained.",
    "The model does not tell two in a picture apart, so nothing about pairs of names was trained.",
    "The model's processor does not show each colour of the picture by itself, so neighbours were "
    "dreamed as features: those that look like the concept are held less well.",
    "Specificity was measured on the retained pictures, which were trained on in other wordings.",
    *(
        f"# {pictures} of {option} left out: copies of the training picture or of others that are "
        "given."
        for pictures in ("picture", "pictures")
        for option in ("--images", "--retain")
    ),
    "The model does not name ... in its picture (it says ...): give a picture and a name that it "
    "recognises.",
    "The adapter is not in effect: # of # answers in which the untouched model gives the name are "
    "still its own, word for word.",
    "Another model or another revision answers, or unlearning has damaged all else: only # of # "
    "answers that have nothing to do with the look are the untouched model's (at least # % is "
    "required).",
    "The untouched model is not the one that was unlearned: only # of # of its answers are those "
    "in the report (at least # % is required).",
    *(
        "Another revision or another model is served, or the same one quantised: only # of # "
        f"{what} are those in the report (at least # % is required)."
        for what in REPORTED[:2]
    ),
    f"Another result of unlearning answers: only # of # {REPORTED[2]} are those in the report (at "
    "least # % is required).",
    *(
        f"# of # {what} are those in the report: the others were turned by rounding, or by another "
        "revision."
        for what in REPORTED
    ),
    "The report says forgotten, and what is deployed has not forgotten.",
    "Another revision of the base is served: the server says ..., and the adapter was made for "
    "....",
    "A server takes no begun answer and scores no given name: begun-name, begun-fact and rank were "
    "not asked.",
    "The server gives no log-probabilities, so how likely the name is was not compared.",
    "Only one of the two models tells log-probabilities here, so how likely the name is was not "
    "compared.",
    "How likely the name is was read from the # likeliest tokens that the server tells.",
    "The untouched model was asked on this machine: rounding alone may turn some answers of a "
    "server that computes in another dtype.",
    "No --adapter was given, so what the deployed model was to answer is not known: its answers "
    "were compared with the untouched model's alone.",
    "What a server answers at another time, or under another name, was not asked.",
    "The licence of ... could not be fetched (...): add it before you pass the model on.",
    "The server does not say which revision it serves.",
    "The server says of one of the two models alone which revision it serves.",
    "The report of --adapter holds no answers, as one that is redacted: what was promised was not "
    "compared. With --base instead of --untouched the adapter itself is asked.",
    "The untouched model gives the name in no answer.",
    "No question was asked that has nothing to do with the look.",
    "No report says what the model was to answer.",
    "The report holds no answer to compare with.",
    "Answers were made by transformers' generate, one length at a time: ...",
    "Answers of the untouched model alone were made by transformers' generate, so that rounding "
    "may tell them from those of the unlearned model: ...",
    "Answers of the unlearned model alone were made by transformers' generate, so that rounding "
    "may tell them from those of the untouched model: ...",
    "Every token of ... is common elsewhere, so only the positions of the name are masked, not the "
    "vocabulary.",
)
# "In FORM: " before a sentence about a merged model.
_WHERE = re.compile(rf"((?:In|Not verified in) (?:{'|'.join(STORED)}): )(.*)", re.DOTALL)
_NUMBER = r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?"


def sentence(text: Any) -> str:
    """The program's own sentence without its quotations; `LEFT_OUT` for any other text."""
    text = str(text)
    if where := _WHERE.fullmatch(text):
        return where[1] + sentence(where[2])
    for pattern in _PATTERNS:
        if match := pattern.fullmatch(text):
            ends = [
                0,
                *(end for group in range(1, pattern.groups + 1) for end in match.span(group)),
                len(text),
            ]
            return "(left out)".join(text[i:j] for i, j in zip(ends[::2], ends[1::2], strict=True))
    return LEFT_OUT


def is_setting(text: str) -> bool:
    """Is it the setting of an attack from inside?"""
    return any(pattern.fullmatch(text) for pattern in _SETTINGS)


def _pattern(known: str) -> re.Pattern[str]:
    return re.compile(
        "(.*)".join(map(re.escape, known.split("..."))).replace(r"\#", _NUMBER), re.DOTALL
    )


_PATTERNS = [_pattern(known) for known in SENTENCES]
_SETTINGS = [_pattern(known) for known in SETTINGS]
