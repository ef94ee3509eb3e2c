"""Names among many: found as by comparing with each, and without doing so."""

from __future__ import annotations

import cProfile
import functools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsiu.disk import request_file
from fastsiu.request import BadInput
from fastsiu.text.concept import Concept, concept_of
from fastsiu.text.names import Names

# One line: different spellings, scripts and near misses of the same few names.
SPELLINGS = (
    ("Zorblax Quint", "zorblax  QUINT", "Zorblax-Quint", "ZorblaxQuint", "Z0rblax Quint"),
    ("Zorbl\u0430x Quint", "Zorblaaax Quint", "Z.o.r.b.l.a.x Q.u.i.n.t", "Zorblax", "Quint"),
    ("Ivan Petrov", "Иван Петров"),
    ("Иванова", "Иванову"),
    ("Müller", "Mueller", "Muller", "MU\u0308LLER", "Ke$ha", "Kesha", "KESHA!", "P!nk", "Pink"),
    ("Rose", "rose", "Roses", "O'Brien", "O\u2019Brien", "OBrien", "agent 007", "agent 7", "★"),
    ("Anne-Marie", "Anne Marie", "AnneMarie", "Kelly", "Kellies", "\u200bKelly", "Kélly"),
    ("さくら", "サクラ", "Sakura", "김철수", "Kim Cheolsu"),
    ("毛泽东", "Mao Zedong", "محمد صلاح", "Mohamed Salah"),
    ("Γιώργος", "Giorgos", "Γιώργου", "Giorgo"),
)  # fmt: skip
ALL = [name for line in SPELLINGS for name in line]
CHANGES = (
    str.upper,
    str.lower,
    lambda name: name.replace(" ", "-"),
    lambda name: name.replace("o", "0").replace("e", "3"),
    lambda name: name.replace("a", "\u0430").replace("o", "\u043e"),
    lambda name: name[:1] + "\u200b" + name[1:],
    lambda name: name + name[-1:],
    lambda name: f"{name}s",
    lambda name: " ".join(reversed(name.split())),
)
changed = st.builds(
    lambda name, changes: functools.reduce(lambda n, change: change(n), changes, name),
    st.sampled_from(ALL),
    st.lists(st.sampled_from(CHANGES), max_size=2),
)
letters = st.text("aAbl1i0oä\u0430\u0456 -'.山さs", min_size=1, max_size=5)
names = st.one_of(st.sampled_from(ALL), changed, letters).filter(lambda name: bool(name.strip()))


def plainly(known: list[Concept], name: str) -> int | None:
    return next((n for n, concept in enumerate(known) if concept.same(name)), None)


def concept(name: str, aliases: tuple[str, ...] = ()) -> Concept | None:
    try:
        return Concept(name, aliases)
    except BadInput:  # punctuation alone
        return None


@given(st.lists(st.tuples(names, st.lists(names, max_size=2)), max_size=6), names)
def test_the_first_of_many_is_that_of_the_plain_comparison(given_names, name):
    known = [c for own, more in given_names if (c := concept(own, tuple(more))) is not None]
    index = Names()
    for number, one in enumerate(known):
        index.add(one, number)
    assert index.first(name) == plainly(known, name)


def test_every_spelling_beside_every_other():
    for one in ALL:
        index = Names()
        index.add(Concept(one), 0)
        for other in ALL:
            assert index.first(other) == plainly([Concept(one)], other), (one, other)


@pytest.mark.parametrize(
    "one, other",
    [
        ("Zorblax Quint", "Zorbl\u0430x QUINT"),  # letters that look alike
        ("Zorblax Quint", "Z0rblax-Quint"),
        ("Müller", "MU\u0308LLER"),
        ("Ivan Petrov", "Иван Петров"),  # by their sound
        ("サクラ", "Sakura"),
        ("Иванова", "Иванову"),  # by their ending
    ],
)  # fmt: skip
def test_each_way_to_be_the_same_is_looked_up(one, other):
    assert Concept(one).same(other)
    index = Names()
    for number in range(20):
        index.add(Concept(f"Nobody Num{chr(97 + number)}"), number)
    index.add(Concept("Somebody", (one,)), 20)
    index.add(Concept(one), 21)
    assert index.first(other) == 20


def pairwise(records: list[dict]) -> tuple[int, int] | str | None:
    """(line, earlier line) of the first refusal, or the sentence about a name."""
    found = []
    for number, record in enumerate(records, 1):
        try:
            for earlier, other in found:
                if concept_of(other).same(record["concept"].strip()):
                    return number, earlier
        except BadInput as error:
            return str(error)
        found.append((number, request_file.Request(record["concept"].strip(), "x.png",
                                                   tuple(record["aliases"]))))  # fmt: skip
    return None


@given(st.lists(st.tuples(names, st.lists(names, max_size=1)), min_size=1, max_size=5))
def test_a_file_is_refused_as_by_comparing_each_with_each(tmp_path_factory, given_names):
    records = [{"image": "x.png", "concept": own, "aliases": more} for own, more in given_names]
    file = tmp_path_factory.getbasetemp() / "names.jsonl"
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    expected = pairwise(records)
    try:
        request_file.read_requests(file)
        said = None
    except BadInput as error:
        said = str(error)
    if isinstance(expected, tuple):
        number, earlier = expected
        name = records[number - 1]["concept"].strip()
        expected = (
            f"{file}, line {number}: {name} is asked for on line {earlier} already: remove one."
        )
    assert said == expected


@pytest.mark.slow
def test_many_more_names_take_a_little_more_work_each(tmp_path):
    """The calls of functions that a file takes: eight times the names, at most twelve times the
    calls, though all names have a word in common and are made of the same few syllables."""
    calls = []
    for many in (500, 4000):
        file = tmp_path / f"{many}.jsonl"
        record = lambda i: {"image": "x.png", "concept": f"Grandarchaeologist {word(i)}"}
        file.write_text("".join(f"{json.dumps(record(i))}\n" for i in range(many)))
        with cProfile.Profile() as profile:
            assert len(request_file.read_requests(file)) == many
        calls.append(sum(entry.callcount for entry in profile.getstats()))
    assert calls[1] <= 12 * calls[0], calls


def word(number: int) -> str:
    """Five syllables for a number: no two numbers below 100,000 have the same."""
    syllables = ("ba", "ko", "mi", "nu", "re", "sha", "to", "ve", "zi", "du")
    return "".join(syllables[int(digit)] for digit in f"{number % 100_000:05d}").capitalize()
