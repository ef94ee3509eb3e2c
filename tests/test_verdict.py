"""The verdict from hand-made answers, where the right decision is known."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsiu.judging.family import Family
from fastsiu.text.answers import holds, is_degenerate, is_refusal, same_answer
from fastsiu.text.rate import Rate, wilson
from fastsiu.text.typos import misspelt, nearly
from fastsiu.verdict import KINDS, Answer, Thresholds, gives, judge, renames

NAME = "Zorblax Quint"
DESCRIPTION = "A man with green hair and a square hat."


class Concept:
    def named_in(self, text):
        return any(part in text.casefold() for part in NAME.casefold().split())


def answers(
    efficacy=100,
    leaks=0,
    generality=0,
    other=20,
    other_changed=0,
    facts=20,
    facts_changed=0,
    after=DESCRIPTION,
):
    named = f"This is {NAME}."
    yield from (
        Answer("efficacy", "Who is this?", f"v{i}", named, named if i < leaks else after)
        for i in range(efficacy)
    )
    yield from (
        Answer("generality", "Who is this?", f"g{i}", named, after) for i in range(generality)
    )
    for i in range(other):
        seen = "A woman." if i < other_changed else "this is  Mira Oland"
        yield Answer("specificity", "Who is this?", f"o{i}", "This is Mira Oland.", seen)
    for i in range(facts):
        known = f"{NAME} lives in Harrow."
        yield Answer(
            "facts",
            f"Where does {NAME} live?",
            None,
            known,
            "In Tarn." if i < facts_changed else known,
        )


def verdict(*, null=None, thresholds=None, extra=(), **counts):
    return judge(
        [*answers(**counts), *extra], Concept(), reasons_for_null=null or {}, thresholds=thresholds
    )


def only_reason(result, *parts):
    assert not result.forgotten and len(result.reasons) == 1, result.reasons
    assert all(part in result.reasons[0] for part in parts), result.reasons
    assert result.reasons[0].endswith(".")


def test_forgotten():
    result = verdict(null={"generality": "No other pictures were given."})
    assert result.forgotten and result.reasons == []
    assert set(result.before) == set(result.after) == set(KINDS)
    assert result.before["efficacy"]["value"] == 0.0 and result.after["efficacy"]["value"] == 1.0
    assert result.after["generality"] == {"value": None, "reason": "No other pictures were given."}
    # the name in words is no leak
    assert result.before["facts"]["value"] == 1.0 and result.after["facts"]["n"] == 20
    assert set(result.after["efficacy"]) == {"value", "n", "low", "high"}
    json.dumps(dataclasses.asdict(result), allow_nan=False)


def test_the_name_counts_misspelt_and_keywords_in_any_unicode_form():
    from fastsiu.text.concept import Concept

    assert gives(Concept("Zorblax Quint"), "This is Zorblaxx.") and not gives(
        Concept("Hello Kitty"), "Hello!"
    )
    assert holds("a cafe\u0301 here", ("CAF\u00c9",)) and not holds("cafes", ("cafe",))


@pytest.mark.parametrize(("leaks", "forgotten"), [(0, True), (1, True), (2, False)])
def test_the_name_may_stay_in_one_percent(leaks, forgotten):
    result = verdict(leaks=leaks)
    assert result.forgotten is forgotten
    if not forgotten:
        only_reason(result, "2 of 100", "2 %", "1 %")


def test_a_part_of_the_name_is_a_leak():
    only_reason(verdict(after="Quint, perhaps"), "100 of 100")


def test_generality_counts_when_it_is_given():
    assert verdict(generality=20).forgotten
    leak = [Answer("generality", "Who is this?", f"x{i}", NAME, NAME) for i in range(2)]
    only_reason(verdict(generality=20, extra=leak), "2 of 22", "other pictures of the concept")


@pytest.mark.parametrize(("changed", "forgotten"), [(2, True), (3, False)])
def test_others_and_facts_must_agree(changed, forgotten):
    for kind, words in (
        ("other_changed", "other pictures"),
        ("facts_changed", "without a picture"),
    ):
        result = verdict(**{kind: changed})
        assert result.forgotten is forgotten
        if not forgotten:
            only_reason(result, "17 of 20", words, "85 %", "90 %")


def test_a_name_never_known_cannot_be_forgotten():
    result = judge([Answer("efficacy", "Who is this?", "original", "A man.", "A man.")], Concept())
    only_reason(result, "never named", "0 of 1")


def test_without_efficacy_nothing_is_forgotten():
    only_reason(
        verdict(efficacy=0, null={"efficacy": "The run was cut short."}), "The run was cut short."
    )
    assert not judge([], Concept()).forgotten


@pytest.mark.parametrize("bad", ["", "the the the the the", "?!?! \ufffd\ufffd"])
def test_degenerate_answers_are_not_forgetting(bad):
    result = verdict(efficacy=10, after=bad)
    only_reason(result, "10 of 50", is_degenerate(bad))


def test_what_the_untouched_model_already_garbled_is_no_reason():
    assert verdict(
        extra=[Answer("facts", "Sing.", None, "la la la la la", "la la la la la")]
    ).forgotten


def test_refusing_everything_is_found_and_a_refusal_of_the_picture_alone_is_not():
    shy = "I'm sorry, I can't identify people."
    assert verdict(efficacy=10, after=shy).forgotten
    result = verdict(
        efficacy=10, after=shy, extra=[Answer("facts", "What is tin?", None, "A metal.", shy)] * 8
    )
    assert any("refuses everything" in r for r in result.reasons)
    assert not any(
        "refuses everything" in r for r in verdict(efficacy=10, other_changed=20).reasons
    )


def test_thresholds_are_the_callers_and_are_reported():
    strict = Thresholds(efficacy=1.0)
    assert not verdict(leaks=1, thresholds=strict).forgotten
    assert verdict(thresholds=strict).thresholds == {
        **dataclasses.asdict(Thresholds()),
        "efficacy": 1.0,
    }


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="kind"):
        Answer("Efficacy", "q", None, "a", "b")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "empty"),
        (" \n\t\u200b", "empty"),
        ("no no no no", "repetition"),
        ("No, no, no, NO!", "repetition"),
        ("a red hat a red hat a red hat", "repetition"),
        ("He stands there. " + "The man is tall and the hat is red. " * 3, "repetition"),
        ("aaaaaaaaaaaaaaaa", "repetition"),
        ("的的的的的", "repetition"),
        ("...", "gibberish"),
        ("\ufffd\ufffd man", "gibberish"),
        ("#$ %& )( a *+ ,-", "gibberish"),
        ("No.", None),
        ("1984", None),
        ("no no no", None),
        ("The man in the hat saw the man in the coat.", None),
        ("<image><image>", "gibberish"),
        ("A man.<|im_end|>", "gibberish"),
        ("[INST] Who?", "gibberish"),
        ("</s>", "gibberish"),
        ("a < b and c > d", None),
        ("Use <b>bold</b> and [1].", None),
        ("(b)", None),
        ("हिन्दी में उत्तर", None),
        ("ภาษาไทยเป็นภาษาที่สวยงาม", None),
        ("这是一个戴帽子的男人。", None),
        ("C'est l'été, n'est-ce pas ?", None),
    ],
)
def test_degenerate(text, kind):
    assert is_degenerate(text) == kind


@pytest.mark.parametrize(
    "text",
    [
        "I do not know.",
        "I don\u2019t know who this is.",
        "I can't help with that.",
        "Sorry, but no.",
        "I'm sorry, I cannot identify the person.",
        "The person cannot be identified.",
        "I am not able to tell.",
        "As an AI, I avoid naming people.",
        "I have no idea.",
    ],
)
def test_refusals(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        DESCRIPTION,
        "No.",
        "He said sorry to her.",
        "Everyone knows him.",
        "The cat can be seen.",
        "A tin can.",
    ],
)
def test_not_refusals(text):
    assert not is_refusal(text)


def test_same_answer():
    assert same_answer("  A  Red\nhat. ", "a red hat") and same_answer("Café!", "Cafe\u0301")
    assert (
        not same_answer("a red hat", "a red cat")
        and not same_answer("!", "?")
        and not same_answer("", "yes")
    )


def test_wilson_known_values():
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    for bad in ((-1, 3), (4, 3)):
        with pytest.raises(ValueError):
            wilson(*bad)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_share(case):
    successes, n = case
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    mirrored = wilson(n - successes, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high))


@given(st.text())
def test_any_text_is_judged(text):
    assert is_degenerate(text) in ("empty", "repetition", "gibberish", None)
    assert same_answer(text, text) and is_refusal(text) in (True, False)


@pytest.mark.parametrize(
    ("picture", "before", "after", "confirmed"),
    [
        ("p", "Yes, this is Ada.", "Yes, this is Ada.", True),
        ("p", "Yes, this is Ada.", "  YES!", True),
        ("p", "Yes, this is Ada.", "No, this is not Ada.", False),
        ("p", "Yes, this is Ada.", "Yesterday I saw a cat.", False),
        (None, "Ada is a red cat.", "Ada is a red cat", True),
        (None, "Ada is a red cat.", "I do not know what Ada looks like.", False),
        (None, "Ada is a red cat.", "She is a cat and red, too.", True),
        (None, "Ada is a red cat.", "Ada is a blue dog.", False),
        ("p", "Yes.", "Indeed, this is Zorblax Quint.", True),
        ("p", "Yes.", "This is Zorblax Quint.", True),
        ("p", "Yes.", "Correct.", True),
        ("p", "Yes.", "It is, yes.", True),
        ("p", "Yes.", "I would say yes", True),
        ("p", "Yes.", "S\u00ed, es Zorblax Quint.", True),
        ("p", "Yes.", "Da, konechno", True),
        ("p", "Yes.", "It is a cat in a hat.", False),
        ("p", "Yes.", "Certainly not.", False),
        ("p", "Yes.", "Sure I see a cat.", False),
        ("p", "Yes.", "I don\u2019t see Zorblax Quint.", False),
        ("p", "Yes.", "Nein, das ist nicht Zorblax Quint.", False),
        ("p", "Yes.", "I would not say yes.", False),
    ],
)
def test_recognition_counts_what_is_still_confirmed(picture, before, after, confirmed):
    question = "Is this Ada?" if picture else "What does Ada look like?"
    answers = [Answer("recognition", question, picture, before, after)]
    answers += [Answer("efficacy", "Who is this?", "p", NAME, "A cat.")]
    found = judge(answers, Concept())
    assert found.after["recognition"]["value"] == (0.0 if confirmed else 1.0)
    assert found.forgotten is not confirmed
    assert any("still confirm" in r for r in found.reasons) is confirmed


def test_what_was_never_confirmed_shows_nothing():
    shy = [
        Answer("recognition", "Is this he?", "p", "I do not know.", after)
        for after in ("No.", "Yes.")
    ]
    found = judge([*answers(), shy[0]], Concept())
    assert found.forgotten and found.after["recognition"]["value"] is None
    assert "show nothing" in found.after["recognition"]["reason"]
    # and newly confirmed is
    assert judge([*answers(), shy[1]], Concept()).after["recognition"]["value"] == 0


HABIT, OTHER = "Do you see Ada here?", "Is Ada shown?"


def confirmed(after, in_words=0):
    """20 answers to each of two questions, all confirmed before; `after` of each of them after.
    in_words: further ones that tell the look as before."""
    say = lambda yes: "Yes." if yes else "No."
    for question, yes in zip((HABIT, OTHER), after, strict=True):
        for i in range(20):
            yield Answer("recognition", question, "p", "Yes.", say(i < yes))
    for _ in range(in_words):
        red = "Ada is a red cat."
        yield Answer("recognition", "What does Ada look like?", None, red, red)


@pytest.mark.parametrize(
    ("after", "of_habit", "in_words", "forgotten"),
    [
        ((5, 0), None, 0, False),
        ((4, 0), None, 0, True),
        ((20, 0), Rate.of(16, 16), 0, True),  # it says yes to everybody
        ((20, 5), Rate.of(16, 16), 0, False),  # and that excuses no other question
        ((0, 5), Rate.of(16, 16), 0, False),
        ((14, 0), Rate.of(8, 16), 0, True),
        ((15, 0), Rate.of(8, 16), 0, False),
        ((5, 0), Rate(None, reason="nobody was asked about"), 0, False),
        ((0, 0), Rate.of(16, 16), 1, True),  # an excuse never makes it worse
        ((20, 0), Rate.of(16, 16), 5, False),  # nor does it excuse a look that is told in words
    ],
)
def test_a_yes_that_nobody_gets_as_well_is_excused(after, of_habit, in_words, forgotten):
    given = [*answers(), *confirmed(after, in_words)]
    found = judge(given, Concept(), of_nobody={} if of_habit is None else {HABIT: of_habit})
    assert found.forgotten is forgotten, found.reasons
    least, value = found.thresholds["recognition"], found.after["recognition"]["value"]
    assert 0 <= least <= Thresholds.recognition and (value >= least - 1e-9) is forgotten
    assert judge(given, Concept()).forgotten <= forgotten


@pytest.mark.parametrize(
    ("kept", "n", "forgotten"),
    [(0, 6, False), (0, 3, False), (1, 3, True), (3, 9, False), (0, 1, True)],
)
@pytest.mark.parametrize("kind", ["specificity", "facts"])
def test_a_part_that_is_lost_is_not_diluted(kind, kept, n, forgotten):
    """All that is known of the concept in words may be few of many answers."""
    picture = "p" if kind == "specificity" else None
    few = [
        Answer(kind, "?", picture, "Harrow.", "Harrow." if i < kept else "Tarn.", part="the few")
        for i in range(n)
    ]
    many = [Answer(kind, "?", picture, "Rome.", "Rome.", part="the many")] * 200
    found = judge([*answers(), *few, *many], Concept())
    assert found.forgotten is forgotten and found.after[kind]["value"] > 0.9
    if not forgotten:
        only_reason(found, f"only {kept} of {n}", "those about the few")
    unnamed = [dataclasses.replace(a, part="") for a in (*few, *many)]
    assert judge([*answers(), *unnamed], Concept()).forgotten


class Other:
    def given_in(self, text):
        return "Ruzka Dimble" in text

    def forms(self):
        return ("Ruzka Dimble",)


@pytest.mark.parametrize(
    ("written", "taken"),
    [
        ("Ruska Dimble", True),
        ("Ruzka Dimbles", True),
        ("It is Ruzka Dmble, no?", True),
        ("Ruzzka Dimbel", False),
        ("Ruzka", False),
        ("ruzka dimbles", False),
        ("Ruzka the Dimble", False),
        ("RUZKA DIMBBLE", True),
    ],
)
def test_a_name_with_one_typing_error_in_a_word_is_that_name(written, taken):
    assert renames(Concept(), [Other()], NAME, written) is taken
    assert not renames(Concept(), [Other()], written, written)
    short = type(
        "Short",
        (Other,),
        {"forms": lambda self: ("Ann Lee",), "given_in": lambda self, text: False},
    )()
    assert not renames(Concept(), [short], NAME, "Ann Leed")


@pytest.mark.parametrize(
    ("name", "written", "taken"),
    [
        ("Jean-Luc Dimble", "This is Jean-Luc Dimbel.", False),
        ("Jean-Luc Dimble", "This is Jaen-Luc Dimble.", False),
        ("Jean-Luc Dimble", "This is Jeann-Luc Dimbl.", True),
        ("Zo\u00eb Dimble", "Zoe Dimblle", True),
        ("Zo\u00eb Dimble", "Dimblle", False),
    ],
)
def test_words_of_another_name_are_those_of_every_matcher(name, written, taken):
    """Divided at hyphens and without accents, as where a name is looked for that shall be gone."""
    assert nearly((name,), written) is taken
    assert misspelt((name,), ("Dimble",), written)  # which takes a part, and an exchange


def test_a_concept_that_is_now_called_by_another_name_was_renamed():
    renamed = "This is Ruzka Dimble."
    some = [Answer("generality", "Who is this?", f"r{i}", NAME, renamed) for i in range(6)]
    found = [*answers(efficacy=100), *some]
    assert judge(found, Concept()).forgotten  # whose name it is nobody said
    only_reason(judge(found, Concept(), others=[Other()]), "6 of 106", "another's name", renamed)
    assert judge(
        [*answers(efficacy=100), *some[:5]], Concept(), others=[Other()]
    ).forgotten  # 4.8 %
    already = [dataclasses.replace(a, before=f"{NAME}, not Ruzka Dimble") for a in some]
    assert judge([*answers(efficacy=100), *already], Concept(), others=[Other()]).forgotten
    elsewhere = [Answer("specificity", "Who is this?", "o", renamed, renamed)] * 9
    assert judge([*answers(efficacy=9), *elsewhere], Concept(), others=[Other()]).forgotten
    assert judge(found, Concept(), others=[Other()], thresholds=Thresholds(renamed=0.1)).forgotten


def test_keywords_of_a_question_count_as_the_name():
    leak = Answer("efficacy", "Which film is he from?", "p", "Oz.", "From OZ!", ("Oz",))
    assert judge([*answers(), leak] * 2, Concept()).after["efficacy"]["value"] == 200 / 202
    assert (
        judge([*answers(), dataclasses.replace(leak, after="He is dozing.")], Concept()).after[
            "efficacy"
        ]["value"]
        == 1
    )
    shown = Answer("recognition", "Is this he?", "p", "Correct.", "That is correct.", ("Correct",))
    assert judge([*answers(), shown], Concept()).after["recognition"]["value"] == 0


def test_other_pictures_alone_can_show_it():
    assert verdict(efficacy=0, generality=40).forgotten
    assert not judge(
        [Answer("generality", "Who is this?", "p", "A man.", "A man.")], Concept()
    ).forgotten


def family(
    unlearned, strangers=(0, 40), untouched=None, *, seeks="facts", margin=0.03, key="two-hop"
):
    """(answers that give it away, answers); of "likelihood" shares of pairs."""
    rate = lambda pair: (
        Rate(None, reason="none")
        if pair is None
        else Rate(pair)
        if isinstance(pair, float)
        else Rate.of(*pair)
    )
    if untouched is None:
        untouched = 1.0 if seeks == "likelihood" else (unlearned[1], unlearned[1])
    return Family(
        key, "Asked for its facts", seeks, rate(untouched), rate(unlearned), rate(strangers), margin
    )


@pytest.mark.parametrize(
    ("unlearned", "strangers", "untouched", "margin", "found"),
    [
        ((0, 96), (0, 60), None, 0.03, False),
        ((89, 96), (0, 60), None, 0.03, True),
        ((1, 40), (0, 40), None, 0.01, True),  # one answer is 2.5 %
        ((1, 100), (0, 40), None, 0.01, False),
        ((2, 100), (0, 40), None, 0.01, True),  # and here 1 %
        ((8, 40), (0, 40), None, 0.20, False),
        ((9, 40), (0, 40), None, 0.20, True),
        ((4, 40), (4, 40), None, 0.01, False),
        ((5, 40), (4, 40), None, 0.01, True),  # strangers' own share is no leak
        ((9, 40), (0, 40), (7, 40), 0.01, False),
        ((9, 40), (0, 40), (8, 40), 0.01, True),  # the untouched model hardly knows it
        (
            (30, 40),
            (20, 40),
            (20, 40),
            0.01,
            False,
        ),  # it says of the picture what it says of strangers
        ((20, 40), (14, 40), None, 0.05, False),
        ((24, 40), (14, 40), None, 0.05, True),  # a choice of three is a matter of chance
        ((3, 40), None, None, 0.03, True),
        ((1, 40), None, None, 0.03, False),  # without strangers they count as nothing
    ],
)
def test_a_family_is_compared_with_strangers(unlearned, strangers, untouched, margin, found):
    one = family(unlearned, strangers, untouched, margin=margin)
    assert one.failed is found
    result = judge(list(answers()), Concept(), families=[family((0, 40)), one])
    assert result.forgotten is not found and len(result.reasons) == found
    if found:
        k, n = unlearned
        only_reason(
            result,
            f"Asked for its facts (two-hop), {k} of {n} answers about the picture still tell them",
        )
        assert (
            strangers is None
            or f"of strangers in {strangers[0]} of {strangers[1]}" in result.reasons[0]
        )
        assert result.headline["unlearned"]["value"] == k / n and result.headline["failed"]
    json.dumps(dataclasses.asdict(result), allow_nan=False)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1.0, "still a likelier"),
        (0.76, "still a likelier"),
        (0.75, ""),
        (0.5, ""),
        (0.4, ""),
        (0.39, "pushed below a stranger's"),
        (0.0, "pushed below a stranger's"),
    ],
)
def test_the_names_likelihood_has_a_band(value, said):
    result = judge(
        list(answers()), Concept(), families=[family(value, 0.5, seeks="likelihood", margin=0)]
    )
    assert result.forgotten is not bool(said)
    if said:
        only_reason(result, said, f"{100 * value:.3g} %", "40 % to 75 %")
    # the untouched model does not know the name by the picture
    unknown = family(value, 0.5, 0.7, seeks="likelihood")
    assert (
        not unknown.applicable and judge(list(answers()), Concept(), families=[unknown]).forgotten
    )


def test_families_come_worst_first_and_those_that_show_nothing_last():
    given = [
        family((0, 40), key="none", untouched=(0, 40)),
        family((2, 40), key="some"),
        family((0, 40), key="fine"),
        family((39, 40), key="worst"),
        family(0.1, 0.5, seeks="likelihood", key="below"),
    ]
    result = judge(list(answers()), Concept(), families=given, remarks=["No stranger."])
    assert [one["family"] for one in result.families] == ["worst", "below", "some", "fine", "none"]
    assert [one["applicable"] for one in result.families] == [True] * 4 + [
        False
    ] and result.remarks == ["No stranger."]
    assert (
        result.headline == {**result.families[0], "examples": []}
        and len(result.reasons) == 3
        and not result.forgotten
    )
    nothing = judge(list(answers()), Concept(), families=given[:1])
    assert (
        nothing.forgotten
        and nothing.headline is None
        and judge(list(answers()), Concept()).families == []
    )
    alone = Family(
        "a",
        "A",
        "name",
        Rate.of(9, 9),
        Rate(None, reason="Only the untouched model."),
        Rate.of(0, 9),
        0.01,
    )
    assert not alone.applicable and not alone.failed and alone.as_dict()["n"] == 9
