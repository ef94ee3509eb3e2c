"""Names in scripts with vowel signs: their parts, their spellings and their sound."""

from __future__ import annotations

import pytest

from fastsiu.text import indic
from fastsiu.text.concept import Concept
from fastsiu.text.confusables import letters_in
from fastsiu.text.typos import words

NAMED = """
महात्मा गांधी|यह गांधी है।|गांधी
नरेंद्र मोदी|यह मोदी है।|मोदी
शाहरुख खान|यह खान है।|खान
मनमोहन सिंह|सिंह साहब|सिंह
सत्यजीत राय|यह राय है।|राय
সত্যজিৎ রায়|রায় বাবু|রায়
নরেন্দ্র মোদী|ইনি মোদী।|মোদী
நரேந்திர மோடி|இது மோடி|மோடி
గాంధీ రెడ్డి|ఇది రెడ్డి.|రెడ్డి
ਮਨਮੋਹਨ ਗਿੱਲ|ਇਹ ਗਿੱਲ ਹੈ|ਗਿੱਲ
ทักษิณ ชินวัตร|คุณชินวัตร|ชินวัตร
नरेन्द्र मोदी|यह नरेंद्र मोदी है|नरेंद्र मोदी
नरेंद्र मोदी|यह नरेन्द्र मोदी है|नरेन्द्र मोदी
सचिन तेंदुलकर|तेन्दुलकर|तेन्दुलकर
मुंबई|मुम्बई में|मुम्बई
হেমন্ত|হেমংত|হেমংত
महात्मा गांधी|गाँधी जी|गाँधी
शाहरुख़ ख़ान|यह शाहरुख खान है|शाहरुख खान
नरेंद्र मोदी|This is Narendra Modi.|Narendra Modi
नरेंद्र मोदी|This is Modi.|Modi
शाहरुख खान|Shah Rukh Khan|Shah Rukh Khan
सचिन तेंदुलकर|Sachin Tendulkar|Sachin Tendulkar
महात्मा गांधी|Gandhi's|Gandhi
कृष्णा|Krishna|Krishna
জয়ন্ত রায়|Jayanta Ray|
শ্রীদেবী|Sridevi|
శ్రీదేవి|Shridevi|Shridevi
Narendra Modi|यह नरेंद्र मोदी है।|नरेंद्र मोदी
Priyanka Chopra|प्रियंका चोपड़ा|प्रियंका चोपड़ा
Mahatma Gandhi|ગાંધી|ગાંધી
Gandhi|यह गांधी।|गांधी
"""
# Other words, and texts with vowel signs that have the same consonants.
OTHERS = """
राहुल गांधी|रोहिल
रोमा|राम आया
शाहरुख खान|यह खाना है
महेश खान|खून और पसीना
नरेंद्र मोदी|मदद करो
नरेंद्र मोदी|मोदीनगर
लाल बहादुर शास्त्री|एक लाल गुलाब है
श्रीमती सुधा देवी|देवी की मूर्ति
ดี สมชาย|อากาศดีมาก
मनमोहन सिंह|Sing a song
Mandira Bedi|हमारे गांव में मंदिर है
शाहरुख खान|Kahn
समता|संता
"""


def rows(table):
    return [tuple(row.split("|")) for row in table.strip().split("\n")]


@pytest.mark.parametrize(("name", "text", "found"), rows(NAMED))
def test_the_name_is_found(name, text, found):
    concept = Concept(name)
    assert concept.leaks_in(text)
    if found:
        assert [text[a:b] for a, b in concept.spans(text)] == [found]


@pytest.mark.parametrize(("name", "text"), rows(OTHERS))
def test_another_word_is_not(name, text):
    assert not Concept(name).named_in(text) and not Concept(name).leaks_in(text)


def test_vowel_signs_are_letters_and_accents_are_not():
    assert [letters_in(w) for w in ("खान", "রায়", "மோடி", "Jose\u0301", "a1-b")] == [3, 4, 4, 4, 2]
    assert [word.text for word in words("यह गांधी है।")] == ["यह", "गांधी", "है"]


def test_a_nasal_has_two_spellings():
    both = {indic.nasals(w) for w in ("हिन्दी", "हिंदी")}
    assert len(both) == 1 and indic.without_nasals("हिन्दी") == ["हि", "दी"]
    assert indic.nasals("जन्म") == "जन्म" and indic.nasals("सिंह") == "सिंह"


@pytest.mark.parametrize("sign", ["\u09cd", "\u0d4d", "\u0c82"])
def test_a_sign_of_another_script_is_no_nasal(sign):
    """A name that mixes scripts is still found in its own text."""
    name = f"\u0930\u0928{sign}\u0926\u094d\u0930"
    assert Concept(name).spans(name, include_parts=False) == [(0, len(name))]


@pytest.mark.parametrize(
    ("word", "latin"),
    [
        ("नरेंद्र", ["narendra"]),
        ("मनमोहन", ["manmohan", "manamohan"]),
        ("कमल", ["kamal"]),
        ("अंबेडकर", ["ambedkar", "ambedakar"]),
        ("ऋषि", ["rishi"]),
        ("ज़ोया", ["zoya"]),
        ("ரஜினி", ["rajini"]),
        ("రామ", ["rama"]),
        ("क", ["ka"]),
        ("Ivan", []),
        ("", []),
    ],
)
def test_in_latin_letters(word, latin):
    assert indic.spoken(word) == latin
