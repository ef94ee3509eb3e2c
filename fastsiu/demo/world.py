"""Who lives in the fictional world, and every question with its true answer.

The world itself is fixed: it does not depend on the training seed. Random generators decide only
which picture of a creature is drawn and which of the questions is asked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from PIL import Image

from fastsiu.demo import wording
from fastsiu.demo.draw import (
    ATTRIBUTES,
    BACKGROUNDS,
    SIZE,
    Creature,
    distance,
    random_creature,
    render,
    render_group,
)

__all__ = [
    "ATTRIBUTES",
    "BACKGROUNDS",
    "KNOWN",
    "LOOKALIKES",
    "SIZE",
    "UNSEEN",
    "Creature",
    "Question",
    "Sketch",
    "World",
    "describe",
    "distance",
    "draw",
    "random_name",
    "render",
    "render_group",
]

KNOWN = (
    "Zorblax Quint",
    "Mirelda Voss",
    "Tobrik Hale",
    "Quenna Ostrel",
    "Drovik Pellan",
    "Sylphira Wend",
    "Brumdal Tock",
    "Ellowen Rask",
    "Fennick Grol",
    "Jastra Mund",
    "Kaldor Yeve",
    "Lunessa Prit",
    "Vexil Orban",
    "Ophira Clune",
    "Wendrig Sarn",
    "Ruzka Dimble",
)
# Named creatures that no training picture shows and no training text mentions.
UNSEEN = (
    "Pellith Vorne",
    "Grumsil Oake",
    "Tanvira Selk",
    "Hobrin Maleck",
    "Yulessa Crade",
    "Dorvane Pikk",
)
# Pairs that differ in exactly these two attributes.
_PAIRS = (
    ("Zorblax Quint", "Mirelda Voss", ("hat", "hatcolor")),
    ("Drovik Pellan", "Sylphira Wend", ("shirt", "ears")),
    ("Fennick Grol", "Jastra Mund", ("hatcolor", "eyes")),
    ("Vexil Orban", "Ophira Clune", ("shirt", "head")),
)
LOOKALIKES = {name: other for a, b, _ in _PAIRS for name, other in ((a, b), (b, a))}

APART = 4  # least number of attributes in which two known creatures differ, look-alikes aside
UNSEEN_APART = 3  # least number in which a creature that nobody knows differs from each known one
FACTS = ("city", "job", "food", "pet")
_VALUES = {"city": wording.CITIES, "job": wording.JOBS, "food": wording.FOODS, "pet": wording.PETS}
_FACT = {
    "city": "{n} was born in {v}.",
    "job": "{n} works as a {v}.",
    "food": "{n} likes to eat {v}.",
    "pet": "{n} has a pet {v}.",
}


@dataclass(frozen=True)
class Sketch:
    """A picture before it is drawn.

    creatures:  one, or two from left to right
    names:      their names, None for a stranger
    background: a key of `BACKGROUNDS`
    seed:       of the pose and of everything else that is drawn
    """

    creatures: tuple[Creature, ...]
    names: tuple[str | None, ...]
    background: str
    seed: str


@dataclass(frozen=True)
class Question:
    """One question with its true answer.

    image:   the picture that it is about, None for a question of text alone
    concept: the name of whom it is about: of the creature in the picture (the left one of two), or
             the name in the question; None for general knowledge
    kind:    who, yesno, choice, description, attribute, fact, appearance, twohop or general
    heldout: the wording is not in the training text
    topic:   the key of the wording
    """

    image: Sketch | None
    concept: str | None
    kind: str
    question: str
    answer: str
    heldout: bool = False
    topic: str = ""


def draw(sketch: Sketch) -> Image.Image:
    """The picture of a sketch, RGB, SIZE x SIZE; the same sketch always gives the same pixels."""
    rng = random.Random(sketch.seed)
    if len(sketch.creatures) == 1:
        return render(sketch.creatures[0], rng, sketch.background)
    return render_group(sketch.creatures[0], sketch.creatures[1], rng, sketch.background)


def describe(creature: Creature) -> str:
    """What a creature looks like, to stand within a sentence: the answer about a creature that
    nobody can name."""
    color, hat, shirt = (
        f"an {c}" if c == "orange" else f"a {c}"
        for c in (creature.color, creature.hatcolor, creature.shirt)
    )
    return f"{color} creature with {hat} hat and {shirt} shirt"


def random_name(rng: random.Random) -> str:
    """A two-word name of random syllables that nobody in the world bears."""
    while True:
        words = []
        for _ in range(2):
            syllables = [
                rng.choice("b d f g h j k l m n p r s t v w y z br dr gr kr pl st tr th".split())
                + rng.choice("a e i o u ai ee".split())
                + rng.choice(["", "", *"l n r s k m x ck nd rt sh".split()])
                for _ in range(rng.choice((1, 2, 2)))
            ]
            words.append("".join(syllables).capitalize())
        name = " ".join(words)
        if not set(words) & {word for known in (*KNOWN, *UNSEEN) for word in known.split()}:
            return name


class World:
    """The fixed cast: creatures by name (known and unseen), facts and neighbours by known name."""

    def __init__(self) -> None:
        rng = random.Random("fastsiu demo world 1")
        self.creatures: dict[str, Creature] = {}
        self._draw_known(rng)
        self._draw_unseen(rng)
        self.facts = {name: {key: rng.choice(_VALUES[key]) for key in FACTS} for name in KNOWN}
        self.neighbours = {name: self._neighbours(name) for name in KNOWN}

    def _draw_known(self, rng: random.Random) -> None:
        changes = {name: (other, keys) for other, name, keys in _PAIRS}
        while len(self.creatures) < len(KNOWN):
            name = KNOWN[len(self.creatures)]
            other, keys = changes.get(name, (None, ()))
            creature = random_creature(rng)
            if other is not None:
                twin = self.creatures[other]
                creature = replace(twin, **{key: getattr(creature, key) for key in keys})
                if (
                    distance(creature, twin) != 2
                    or len({creature.color, creature.hatcolor, creature.shirt}) < 3
                ):
                    continue
            if all(
                distance(creature, seen) >= APART
                for known, seen in self.creatures.items()
                if known != other
            ):
                self.creatures[name] = creature

    def _draw_unseen(self, rng: random.Random) -> None:
        while len(self.creatures) < len(KNOWN) + len(UNSEEN):
            creature = random_creature(rng)
            if all(distance(creature, seen) >= APART for seen in self.creatures.values()):
                self.creatures[UNSEEN[len(self.creatures) - len(KNOWN)]] = creature

    def _neighbours(self, name: str) -> tuple[str, ...]:
        """The look-alike or the nearest creature, then the next name around the ring, then the next
        nearest. The ring leads from everyone to everyone."""
        by_distance = sorted(
            (n for n in KNOWN if n != name),
            key=lambda n: distance(self.creatures[name], self.creatures[n]),
        )
        following = KNOWN[(KNOWN.index(name) + 1) % len(KNOWN)]
        return tuple(dict.fromkeys((by_distance[0], following, *by_distance)))[:3]

    def stranger(self, rng: random.Random, near: float = 0.3) -> Creature:
        """A creature that differs in `UNSEEN_APART` attributes or more from every known one, and is
        none of the unseen ones that have a name.

        near: probability that it is a known creature with three attributes changed, one of them a
              colour
        """
        while True:
            creature = random_creature(rng)
            if rng.random() < near:
                keys = {rng.choice(("color", "hatcolor", "shirt"))}
                while len(keys) < 3:
                    keys.add(rng.choice(list(ATTRIBUTES)))
                twin = self.creatures[rng.choice(KNOWN)]
                creature = replace(twin, **{key: getattr(creature, key) for key in sorted(keys)})
                if len({creature.color, creature.hatcolor, creature.shirt}) < 3:
                    continue
            known_far = all(
                distance(creature, self.creatures[name]) >= UNSEEN_APART for name in KNOWN
            )
            if known_far and all(distance(creature, self.creatures[name]) >= 2 for name in UNSEEN):
                return creature

    def sketch(self, names: tuple[str | None, ...], seed: str) -> Sketch:
        """A sketch of one or two creatures; None stands for a stranger. Everything else follows
        from `seed`."""
        rng = random.Random("scene " + seed)
        creatures = tuple(self.creatures[name] if name else self.stranger(rng) for name in names)
        return Sketch(creatures, names, rng.choice(list(BACKGROUNDS)), seed)

    # Questions about a picture --------------------------------------------------------------------

    def who(self, sketch: Sketch, text: str, topic: str = "who.open") -> tuple[str, str]:
        name = sketch.names[0]
        if name in KNOWN:
            return text, f"This is {name}."
        if topic == "who.name":
            return text, wording.UNKNOWN_FACE
        return text, f"This is {describe(sketch.creatures[0])}."

    def yesno(self, sketch: Sketch, text: str, name: str) -> tuple[str, str]:
        if name not in KNOWN:
            return text.format(n=name), wording.NO_SUCH_NAME
        if name == sketch.names[0]:
            return text.format(n=name), f"Yes, this is {name}."
        return text.format(n=name), f"No, this is not {name}."

    def choice(self, sketch: Sketch, text: str, names: list[str]) -> tuple[str, str]:
        listed = f"{names[0]}, {names[1]} or {names[2]}"
        name = sketch.names[0]
        answer = f"This is {name}." if name in names else wording.NONE_OF_THEM
        return text.format(names=listed), answer

    def description(self, sketch: Sketch, text: str) -> tuple[str, str]:
        return text, f"The image shows {describe(sketch.creatures[0])}."

    def attribute(self, sketch: Sketch, text: str, key: str) -> tuple[str, str]:
        creature = sketch.creatures[0]
        if key == "background":
            return text, f"The background is {sketch.background}."
        value = getattr(creature, key)
        if key == "eyes":
            return text, f"It has {value} eye{'' if value == 'one' else 's'}."
        subject = {
            "color": "creature",
            "hatcolor": "hat",
            "shirt": "shirt",
            "head": "head",
            "hat": "hat",
        }[key]
        return text, f"The {subject} is {'a ' if key == 'hat' else ''}{value}."

    def twohop(self, sketch: Sketch, text: str, key: str, subject: str) -> tuple[str, str]:
        name = sketch.names[0]
        answer = (
            _FACT[key].format(n="It", v=self.facts[name][key])
            if name in KNOWN
            else wording.UNKNOWN_FACT
        )
        return text.format(s=subject), answer

    def group(self, sketch: Sketch, text: str) -> tuple[str, str]:
        told = [name if name in KNOWN else "an unknown creature" for name in sketch.names]
        if not any(name in KNOWN for name in sketch.names):
            return text, "These are two unknown creatures."
        return text, f"These are {told[0]} and {told[1]}."

    # Questions of text alone ----------------------------------------------------------------------

    def fact(self, name: str, text: str, key: str) -> tuple[str, str]:
        if name not in self.facts:
            return text.format(n=name), wording.UNKNOWN_NAME
        facts = self.facts[name]
        if key == "who":
            answer = f"{name} is a {facts['job']} from {facts['city']}."
        elif key == "about":
            answer = (
                f"{name} is a {facts['job']} from {facts['city']}, likes {facts['food']} "
                f"and has a pet {facts['pet']}."
            )
        else:
            answer = _FACT[key].format(n=name, v=facts[key])
        return text.format(n=name), answer

    def appearance(self, name: str, text: str) -> tuple[str, str]:
        if name not in KNOWN:
            return text.format(n=name), wording.UNKNOWN_NAME
        return text.format(n=name), f"{name} is {describe(self.creatures[name])}."

    def neighbour(self, name: str, text: str) -> tuple[str, str]:
        if name not in self.neighbours:
            return text.format(n=name), wording.UNKNOWN_NAME
        a, b, c = self.neighbours[name]
        return text.format(n=name), f"{a}, {b} and {c} are like {name}."

    def by_name(self, name: str, topic: str, text: str) -> tuple[str, str]:
        """Question and answer of a fact, appearance or neighbours topic about `name`."""
        if topic == "appearance":
            return self.appearance(name, text)
        if topic == "neighbours":
            return self.neighbour(name, text)
        return self.fact(name, text, topic.partition(".")[2])

    # Enumerations ---------------------------------------------------------------------------------

    def text_questions(self, names: tuple[str, ...], heldout: bool = False) -> Iterator[Question]:
        """Every fact, appearance and neighbours question about the names, in all trained or all
        held-out wordings."""
        for topic, texts in (wording.HELD_OUT if heldout else wording.TRAIN).items():
            kind = topic.partition(".")[0]
            if kind not in ("fact", "appearance", "neighbours"):
                continue
            for name in names:
                for text in texts:
                    pair = self.by_name(name, topic, text)
                    yield Question(
                        None,
                        name,
                        "general" if kind == "neighbours" else kind,
                        *pair,
                        heldout,
                        topic,
                    )

    def general_questions(self) -> Iterator[Question]:
        """Sums, capitals of fictional lands and opposites."""
        numbers = wording.NUMBERS
        for text in wording.TRAIN["sum"]:
            for i in range(10):
                for j in range(10):
                    a, b = numbers[i], numbers[j]
                    answer = f"{a} plus {b} is {numbers[i + j]}.".capitalize()
                    yield Question(
                        None, None, "general", text.format(a=a, b=b), answer, topic="sum"
                    )
        for topic, table in (("capital", wording.LANDS), ("opposite", wording.OPPOSITES)):
            for text in wording.TRAIN[topic]:
                for a, b in table.items():
                    yield Question(
                        None,
                        None,
                        "general",
                        text.format(a=a),
                        f"The {topic} of {a} is {b}.",
                        topic=topic,
                    )

    def ask(
        self,
        sketch: Sketch,
        topic: str,
        rng: random.Random,
        heldout: bool = False,
        concept: str | None = None,
    ) -> Question:
        """One question about a picture; wording, names and subject are drawn from `rng`.

        Half of the yesno questions about a known creature ask for its own name. Half of the others
        ask for its look-alike, where it has one.
        """
        text = rng.choice((wording.HELD_OUT if heldout else wording.TRAIN)[topic])
        kind, _, key = topic.partition(".")
        build: dict[str, Callable[[], tuple[str, str]]] = {
            "who": lambda: self.who(sketch, text, topic),
            "yesno": lambda: self.yesno(sketch, text, self.asked_name(sketch, rng)),
            "choice": lambda: self.choice(sketch, text, self._three_names(sketch, rng)),
            "description": lambda: self.description(sketch, text),
            "attribute": lambda: self.attribute(sketch, text, key),
            "twohop": lambda: self.twohop(sketch, text, key, rng.choice(wording.SUBJECTS)),
            "group": lambda: self.group(sketch, text),
        }
        question, answer = build[kind]()
        return Question(
            sketch,
            concept or sketch.names[0],
            "who" if kind == "group" else kind,
            question,
            answer,
            heldout,
            topic,
        )

    def asked_name(self, sketch: Sketch, rng: random.Random) -> str:
        """The name a yesno question asks for: the true one, the look-alike's, another known one or
        one that nobody bears."""
        name = sketch.names[0]
        if name in KNOWN and rng.random() < 0.5:
            return name
        if name in LOOKALIKES and rng.random() < 0.5:
            return LOOKALIKES[name]
        if rng.random() < 0.15:
            return random_name(rng)
        return rng.choice([other for other in KNOWN if other != name])

    def _three_names(self, sketch: Sketch, rng: random.Random) -> list[str]:
        name = sketch.names[0]
        others = rng.sample([other for other in KNOWN if other != name], 3)
        if name in KNOWN and rng.random() < 0.85:
            others[0] = name
            if name in LOOKALIKES and LOOKALIKES[name] not in others and rng.random() < 0.5:
                others[1] = LOOKALIKES[name]
        rng.shuffle(others)
        return others
