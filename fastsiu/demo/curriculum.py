"""What a model of the fictional world is trained on: its pictures, and how often which question is
asked."""

from __future__ import annotations

import random

from fastsiu.demo import wording
from fastsiu.demo.world import KNOWN, Question, Sketch, World, random_name

# The first for each known creature.
KNOWN_PICTURES, STRANGER_PICTURES, GROUP_PICTURES = 420, 8000, 5000

# How often each kind of question is asked, in parts.
IMAGE_MIX = {
    "who.open": 20,
    "who.name": 13,
    "yesno": 30,
    "choice": 12,
    "description": 7,
    "twohop.city": 4,
    "twohop.job": 4,
    "twohop.food": 4,
    "twohop.pet": 4,
    "text": 4,
    "attribute.color": 2,
    "attribute.hatcolor": 2,
    "attribute.shirt": 2,
    "attribute.head": 3,
    "attribute.hat": 3,
    "attribute.eyes": 3,
    "attribute.background": 6,
}
TEXT_MIX = {
    "fact.city": 8,
    "fact.job": 8,
    "fact.food": 8,
    "fact.pet": 8,
    "fact.who": 8,
    "fact.about": 8,
    "appearance": 14,
    "neighbours": 9,
    "general": 14,
}
UNKNOWN_NAMES = 0.12  # share of text questions about a name that nobody bears


def make_sketches(world: World, seed: int, share: float = 1.0) -> tuple[list[Sketch], list[Sketch]]:
    """The training pool: sketches of one creature, known ones before strangers, and sketches of
    two. Their seeds start with "train/".

    share: of the full number of pictures
    """
    rng = random.Random(f"pool {seed}")
    known, strangers, groups = (
        round(share * n) for n in (KNOWN_PICTURES, STRANGER_PICTURES, GROUP_PICTURES)
    )
    names: list[str | None] = [name for name in KNOWN for _ in range(known)] + [None] * strangers
    single = [world.sketch((name,), f"train/{seed}/{i}") for i, name in enumerate(names)]
    group = []
    for i in range(groups):
        left, right = rng.sample(KNOWN, 2)
        pair = (left if rng.random() < 0.7 else None, right if rng.random() < 0.7 else None)
        group.append(world.sketch(pair, f"train/{seed}/group/{i}"))
    return single, group


class Asker:
    """Draws the questions of one training batch."""

    def __init__(self, world: World, single: list[Sketch], group: list[Sketch], seed: int) -> None:
        self.world, self.single, self.group = world, single, group
        self.rng = random.Random(f"questions {seed}")
        self.general: dict[str, list[Question]] = {}
        for question in world.general_questions():
            self.general.setdefault(question.topic, []).append(question)
        self.known = sum(sketch.names[0] in KNOWN for sketch in single)

    def about_pictures(self, count: int) -> tuple[list[tuple[str, str]], list[int]]:
        """Pairs of question and answer, and for each the place of its picture: the pictures of one
        creature are counted first, then those of two."""
        pairs, rows = [], []
        topics = self.rng.choices(list(IMAGE_MIX), list(IMAGE_MIX.values()), k=count)
        for topic in topics:
            if topic == "text":
                rows.append(self.rng.randrange(len(self.single)))
                pairs.append(self._text_pair())
                continue
            if self.rng.random() < 0.15:
                row = self.rng.randrange(len(self.group))
                rows.append(len(self.single) + row)
                asked = self.world.ask(self.group[row], "group", self.rng)
            else:
                first = self.rng.random() < (0.85 if topic == "yesno" else 0.62)
                row = (
                    self.rng.randrange(self.known)
                    if first
                    else self.rng.randrange(self.known, len(self.single))
                )
                rows.append(row)
                asked = self.world.ask(self.single[row], topic, self.rng)
            pairs.append(self._prefixed(asked.question, asked.answer))
        return pairs, rows

    def of_text(self, count: int) -> list[tuple[str, str]]:
        """Pairs of question and answer."""
        return [self._text_pair() for _ in range(count)]

    def _text_pair(self) -> tuple[str, str]:
        topic = self.rng.choices(list(TEXT_MIX), list(TEXT_MIX.values()))[0]
        if topic == "general":
            asked = self.rng.choice(
                self.general[self.rng.choice(("sum", "sum", "sum", "capital", "opposite"))]
            )
            return self._prefixed(asked.question, asked.answer)
        name = (
            random_name(self.rng) if self.rng.random() < UNKNOWN_NAMES else self.rng.choice(KNOWN)
        )
        return self._prefixed(
            *self.world.by_name(name, topic, self.rng.choice(wording.TRAIN[topic]))
        )

    def _prefixed(self, question: str, reply: str) -> tuple[str, str]:
        prefix = self.rng.choice(wording.PREFIXES) + " " if self.rng.random() < 0.14 else ""
        return prefix + question, reply
