"""Puts the attacks to a model: first to the untouched one, about the concept and about strangers,
then to the unlearned one.

    inquiry = inquire(vlm, concept, image, ...)   the untouched model
    after = inquiry.again(vlm)                    the unlearned model, as it is loaded
    inquiry.families(after)                       pure
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from statistics import fmean
from typing import NamedTuple

from PIL import Image

from ..judging.family import Family
from ..model import ask
from ..model.served import Served
from ..model.turns import Picture
from ..model.vlm import encoder
from ..samples import generic
from ..samples.kinds import PERSON, Kind
from ..samples.nobody import shows_nobody
from ..text.answers import words
from ..text.articles import agreed
from ..text.concept import Concept
from ..text.rate import Rate
from ..verdict import Answer, confirms, gives
from . import attack_results, attacks
from .asked_pictures import Shown, conditions, conditions_of, groups, groups_of, strangers, views
from .attacks import Attack

LONGEST = 48  # tokens of an answer
OTHERS = 6  # neighbours that are asked about, to learn what is told of everybody
NAMES = 11  # neighbours whose names are ranked beside the concept's
FEWEST = 4  # of those names: with fewer the true name comes first by chance too often
FEWEST_STRANGERS = 3  # with fewer it is not known how far apart they lie among themselves
# A stranger's picture is one about which the name's log-probability is below this.
LIKELY = math.log(0.01)
SHAPES = 8  # drawn pictures of nothing in particular, where strangers are confirmed
FRAMES = 4  # naming questions in whose answers names are scored
NOTHING_TOLD = (
    "The untouched model told nothing of it in words that it does not say of others, so no fact "
    "could be looked for."
)
NO_NAMES = (
    f"Fewer than {FEWEST} names of others are known, so the true one would often come first by "
    "chance."
)
FEW_STRANGERS = (
    f"Fewer than {FEWEST_STRANGERS} pictures were found in which the untouched model recognises "
    "nobody, so how likely the name is was not compared."
)
NO_FRAME = "The untouched model gave the name in no answer that it could be scored in."
# The families that the verdict asks.
VERDICT = tuple(key for key in attacks.table()["family"] if key != "pictures")
# Those of them that text alone can ask and answer: no begun answer, no score of given words.
BY_TEXT = tuple(
    key for key in VERDICT if key not in ("rank", "likelihood") and not key.startswith("begun-")
)


class Frame(NamedTuple):
    """A naming question and the untouched model's own answer to it up to the name."""

    question: str
    start: str


class Scores(NamedTuple):
    """Log-probabilities of names, nats.

    own:     [pictures x frames][names] about the concept's pictures, the concept's name first
    strange: [strangers x frames] of the concept's name about strangers' pictures
    """

    own: list[list[float]]
    strange: list[float]


class After(NamedTuple):
    """What a model answered and how likely names were to it, in the order of an `Inquiry`."""

    said: list[str]
    scores: Scores


@dataclass(frozen=True)
class Inquiry:
    """Everything that is asked, with the untouched model's answers.

    own:       pictures of the concept, by sheet ("one", "group", "condition")
    strange:   pictures of strangers, by sheet
    asked:     (question, index of the picture) about the concept
    said:      the untouched model's answers to `asked`
    aside:     (question, index of the picture) about strangers
    strangely: the untouched model's answers to `aside`
    ranked:    the concept's name, then others'; the concept's alone where too few are known
    scores:    how likely the names are to the untouched model
    first:     how often the untouched model ranks the concept's name first about strangers
    confirmed: by question of the verdict with the name, how often it confirms it about nobody
    told:      by template, the words that tell a fact of the concept
    """

    concept: Concept
    neighbours: tuple[str, ...]
    seed: int
    own: Mapping[str, list[Shown]]
    strange: Mapping[str, list[Shown]]
    asked: list[tuple[Attack, int]]
    said: list[str]
    aside: list[tuple[Attack, int]]
    strangely: list[str]
    frames: list[Frame]
    ranked: list[str]
    scores: Scores
    first: Rate
    confirmed: Mapping[str, Rate]
    told: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def remarks(self) -> list[str]:
        """What could not be compared, looked for or scored."""
        yes = sum(round((rate.value or 0.0) * rate.n) for rate in self.confirmed.values())
        asked = sum(rate.n for rate in self.confirmed.values())
        habit = (
            "The untouched model confirms questions with the name about pictures of nobody, too "
            f"(in {yes} of {asked} answers), so as large a share of the answers to them is excused."
        )
        holds = {
            habit: yes > 0,
            attack_results.NOBODY: not self.strange["one"],
            NOTHING_TOLD: not self.told,
            NO_FRAME: not self.frames,
            NO_NAMES: bool(self.frames) and len(self.ranked) <= FEWEST,
            FEW_STRANGERS: 0 < len(self.strange["one"]) < FEWEST_STRANGERS,
        }
        return [sentence for sentence, there in holds.items() if there]

    def again(self, vlm: ask.Model) -> After:
        """Asks another model, or the same one with its adapter on, everything about the concept."""
        own, strange = _see(vlm, self.own), _see(vlm, {"one": self.strange["one"]})
        return After(
            _put(vlm, self.asked, own),
            _scores(vlm, self.frames, self.ranked, own["one"], strange["one"]),
        )

    def families(self, after: After | None) -> list[Family]:
        """The result of each family. after: None where there is only the untouched model."""
        shown = [(attack, self.own[attack.sheet][index][0]) for attack, index in self.asked]
        said = None if after is None else after.said
        nothing = Rate(None, reason=attack_results.UNTOUCHED_ALONE)
        found = list(
            attack_results.families(
                self.concept, shown, self.said, said, [a for a, _ in self.aside], self.strangely
            )
        )
        if len(self.ranked) > FEWEST:
            now = nothing if after is None else attack_results.first(after.scores.own)
            found.append(
                attack_results.scored(
                    "rank", attack_results.first(self.scores.own), now, self.first
                )
            )
        if self.frames and len(self.strange["one"]) >= FEWEST_STRANGERS:
            before = _apart(self.scores, len(self.frames))
            now = nothing if after is None else _apart(after.scores, len(self.frames))
            found.append(attack_results.scored("likelihood", before, now, Rate(0.5, before.n)))
        return found


def inquire(
    vlm: ask.Model,
    concept: Concept,
    image: Image.Image,
    *,
    neighbours: Sequence[str] = (),
    more: Sequence[Shown] = (),
    grouped: Sequence[Shown] = (),
    given: Sequence[Shown] = (),
    families: Sequence[str] = VERDICT,
    seed: int = 0,
    kind: Kind = PERSON,
    share: float = 1.0,
) -> Inquiry:
    """Asks the untouched model everything. That is the model as it is: an adapter has to be off.
    A served model can be asked the families of `BY_TEXT` alone.

    neighbours: names of others that the model knows
    more:       further pictures of the concept alone
    grouped:    pictures of the concept beside others
    given:      pictures of anybody whom the model has never seen
    families:   keys of attacks.toml
    kind:       of the concept: its wordings are asked
    share:      of the answers that a family usually gets
    """
    wanted = "rank" in families or "likelihood" in families
    frames = _frames(vlm, concept, vlm.picture(image), kind) if wanted else []
    nobody = _unlikely(
        vlm,
        concept,
        frames,
        strangers(vlm, image, concept, [Concept(n) for n in neighbours], seed, given, kind),
    )
    own = {
        "one": views(image, more, seed),
        "group": [*groups(image), *grouped],
        "condition": conditions(image, seed),
    }
    strange = {"one": nobody, "group": groups_of(nobody), "condition": conditions_of(nobody)}
    seen, unseen = _see(vlm, own), _see(vlm, strange)

    told = _told(vlm, concept, neighbours, seen["one"], kind)
    filled_in = attacks.names_for(concept, neighbours, kind)
    plain = attacks.questions(concept, filled_in, told, families, seed, kind)
    count = lambda sheets: {sheet: len(shown) for sheet, shown in sheets.items()}
    asked = attacks.spread(plain, count(own), share)
    said = _put(vlm, asked, seen)
    starts = attack_results.begun(
        [(a, text) for (a, _), text in zip(asked, said, strict=True)], concept
    )
    more_asked = attacks.spread(
        [a for a in starts if a.family in families], {"one": len(own["one"])}, share
    )
    asked, said = asked + more_asked, said + _put(vlm, more_asked, seen)
    every = list(dict.fromkeys(a for a, _ in asked))
    aside = attacks.spread(every, count(strange), share)
    strangely = _put(vlm, aside, unseen)

    beside = [name for name in dict.fromkeys(neighbours) if not concept.named_in(name)][:NAMES]
    ranked = [concept.name, *(beside if len(beside) >= FEWEST and frames else [])]
    scores = _scores(vlm, frames, ranked, seen["one"], unseen["one"])
    elsewhere = _scores(vlm, frames, ranked, unseen["one"], []).own if len(ranked) > 1 else []
    first = (
        attack_results.first(elsewhere) if elsewhere else Rate(None, reason=attack_results.NOBODY)
    )
    return Inquiry(
        concept,
        tuple(neighbours),
        seed,
        own,
        strange,
        asked,
        said,
        aside,
        strangely,
        frames,
        ranked,
        scores,
        first,
        _confirmed(vlm, concept, kind, unseen["one"], image, seed),
        told,
    )


def _confirmed(
    vlm: ask.Model,
    concept: Concept,
    kind: Kind,
    unseen: Sequence[Picture],
    like: Image.Image,
    seed: int,
) -> dict[str, Rate]:
    """By question of the verdict with the name, how often the model says yes to it about strangers;
    or about drawn shapes, where it does so less often. A stranger is made of the concept's picture:
    a yes may come from what is still recognised in it. A yes to shapes is a habit. Questions to
    which it never says yes are left out.

    like: a picture of the size that the shapes get
    """
    questions = [kind.fill(q, name=concept.name) for q in kind.words["yesno"]["held_out"]]

    def confirmed(pictures: Sequence[Picture]) -> dict[str, Rate]:
        said = ask.answers(
            vlm, [(q, picture) for q in questions for picture in pictures], max_new_tokens=LONGEST
        )
        found = {}
        for n, question in enumerate(questions):
            own = said[n * len(pictures) : (n + 1) * len(pictures)]
            answers = [Answer("recognition", question, "nobody", text, text) for text in own]
            if yes := sum(confirms(a, a.after, concept) for a in answers):
                found[question] = Rate.of(yes, len(answers))
        return found

    made = confirmed(unseen)
    if not made:
        return {}
    rng = random.Random(f"confirmed {seed}")
    drawings = [vlm.picture(generic.shapes(like.size, rng)) for _ in range(SHAPES)]
    nobody = shows_nobody(
        vlm, drawings, kind.words["who"]["held_out"], lambda text: gives(concept, text)
    )
    drawn = confirmed(list(compress(drawings, nobody)))
    share = lambda rate: rate.value or 0.0
    return {q: min(rate, drawn[q], key=share) for q, rate in made.items() if q in drawn}


def _told(
    vlm: ask.Model, concept: Concept, neighbours: Sequence[str], seen: Sequence[Picture], kind: Kind
) -> dict[str, frozenset[str]]:
    """By template, what the model tells of the concept in words, does not tell of most others, and
    does not see in the pictures."""
    describe = [*kind.words["describe"]["train"], *kind.words["describe"]["held_out"]]
    looks = ask.answers(
        vlm, [(q, picture) for q in describe for picture in seen], max_new_tokens=LONGEST
    )
    visible = frozenset(
        word for look in looks if not concept.named_in(look) for word in words(look)
    )
    unknown = kind.words["invented"]["names"]
    invented = next(name for name in unknown if not concept.named_in(name))
    names = [concept.name, *list(neighbours)[:OTHERS], invented]
    asked = [attacks.fact_questions(name, kind) for name in names]
    said = iter(
        ask.answers(vlm, [(q, None) for one in asked for _, q in one], max_new_tokens=LONGEST)
    )
    told = [{template: next(said) for template, _ in one} for one in asked]
    return attacks.facts(concept, told[0], told[1:], visible)


def _see(vlm: ask.Model, pictures: Mapping[str, Sequence[Shown]]) -> dict[str, list[Picture]]:
    return {sheet: [vlm.picture(image) for _, image in shown] for sheet, shown in pictures.items()}


def _put(
    vlm: ask.Model, asked: Sequence[tuple[Attack, int]], seen: Mapping[str, Sequence[Picture]]
) -> list[str]:
    pairs = [(attack.question, seen[attack.sheet][index]) for attack, index in asked]
    return ask.answers(
        vlm, pairs, begin=[attack.begin for attack, _ in asked], max_new_tokens=LONGEST
    )


def _frames(vlm: ask.Model, concept: Concept, picture: Picture, kind: Kind) -> list[Frame]:
    """Naming questions that the model answers with the name, with its own words up to there: those
    with the commonest words first."""
    naming = attacks.table(kind.name)["family"]["naming"]["questions"]
    asked = [*kind.words["who"]["held_out"], *naming]
    said = ask.answers(vlm, [(q, picture) for q in asked], max_new_tokens=LONGEST)
    found = []
    for question, answer in zip(asked, said, strict=True):
        spans = concept.spans(answer, include_parts=False) or concept.spans(answer)
        if spans and not concept.named_in(answer[: spans[0][0]]):
            found.append(Frame(question, answer[: spans[0][0]]))
    common = Counter(frame.start for frame in found)
    return sorted(found, key=lambda frame: -common[frame.start])[:FRAMES]


def _scores(
    vlm: ask.Model,
    frames: Sequence[Frame],
    names: Sequence[str],
    own: Sequence[Picture],
    strange: Sequence[Picture],
) -> Scores:
    if isinstance(vlm, Served):
        if frames:
            raise ValueError("a served model scores no given words: ask it families of BY_TEXT")
        return Scores([], [])
    rows = [(frame, name, picture) for picture in own for frame in frames for name in names]
    rows += [(frame, names[0], picture) for picture in strange for frame in frames]
    shown = [picture for _, _, picture in rows]
    encode = encoder(vlm)
    starts = [agreed(frame.start, name) for frame, name, _ in rows]
    turns = [
        encode(frame.question, begun + name, picture, False)
        for (frame, name, picture), begun in zip(rows, starts, strict=True)
    ]
    values = []
    for (_, name, _), begun, turn, score in zip(
        rows, starts, turns, ask.label_scores(vlm, turns, shown), strict=True
    ):
        start = len(begun) - (len(begun + name) - len((begun + name).strip()))
        inside = [i for i, (a, b) in enumerate(turn.offsets) if a < start + len(name) and b > start]
        values.append(float(score.log_p[inside].sum()))
    count = len(own) * len(frames) * len(names)
    return Scores([values[i : i + len(names)] for i in range(0, count, len(names))], values[count:])


def _unlikely(
    vlm: ask.Model, concept: Concept, frames: Sequence[Frame], nobody: Sequence[Shown]
) -> list[Shown]:
    """The strangers to whom the name is an unlikely answer."""
    scores = _scores(vlm, frames, [concept.name], [], _see(vlm, {"one": nobody})["one"]).strange
    each = [scores[i : i + len(frames)] for i in range(0, len(scores), max(1, len(frames)))]
    return (
        [one for one, values in zip(nobody, each, strict=True) if fmean(values) < LIKELY]
        if frames
        else list(nobody)
    )


def _apart(scores: Scores, frames: int) -> Rate:
    """How well the name's log-probability tells the concept's pictures from strangers': the area
    under the ROC curve of its mean over the frames, one value for each picture."""
    own = _means([row[0] for row in scores.own], frames)
    strange = _means(scores.strange, frames)
    return Rate(attack_results.auc(own, strange), len(own) * len(strange))


def _means(values: Sequence[float], size: int) -> list[float]:
    """The mean of each run of `size` values."""
    return [fmean(values[i : i + size]) for i in range(0, len(values), size)]
