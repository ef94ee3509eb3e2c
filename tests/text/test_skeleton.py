"""Names in Latin letters as Japanese, Korean and Russian write them, and words that are none."""

import time

import pytest

from fastsiu.text.concept import Concept
from fastsiu.text.skeleton import sounds_in

NAMED = """
Natalie Portman|これはナタリー・ポートマンです。
Natalie Portman|나탈리 포트만은 배우입니다.
Natalie Portman|Это Натали Портман.
Natalie Portman|Я видел фильм с Натали Портман.
Brad Pitt|ブラッド・ピットという俳優
Brad Pitt|Вместе с Брэдом Питтом
Kate Winslet|ケイト・ウィンスレット
Kate Winslet|케이트 윈슬렛입니다
Robert De Niro|ロバート・デ・ニーロ
Robert De Niro|로버트 드 니로
Clint Eastwood|クリント イーストウッド
Clint Eastwood|클린트 이스트우드
Grumbold Tark|グランボルドタークがいます
Grumbold Tark|Это Грамбольд Тарк
"""

OTHERS = """
Natalie Portman|ナタリーさん
Natalie Portman|パソコンとテレビがあります。
Natalie Portman|나는 파란 모자를 봅니다
Brad Pitt|ブラッドの横にピット
Brad Pitt|брат и пёс. Брат ест. Пётр спит.
Kate Winslet|Кто на этой картинке? Я не знаю.
Will Smith|ウール・セーター
Bo Li|ビール
"""


def rows(table):
    return [row.split("|") for row in table.strip().split("\n")]


@pytest.mark.parametrize(("name", "text"), rows(NAMED))
def test_a_name_in_another_script_is_given_by_its_consonants(name, text):
    assert Concept(name).leaks_in(text)


@pytest.mark.parametrize(("name", "text"), rows(OTHERS))
def test_a_part_or_another_word_is_not_the_name(name, text):
    assert not Concept(name).leaks_in(text)


def test_only_latin_names_have_a_skeleton():
    assert not sounds_in(("Иван", "Петров"), "イワン・ペトロフ")


@pytest.mark.parametrize(
    "text", ["クル" * 30_000, "クル・" * 20_000, "가나 " * 20_000, "Лала" * 20_000]
)
def test_a_long_text_is_read_in_a_time_like_its_length(text):
    begun = time.process_time()
    for name in ("Lalala Lalala", "Kurt Kruger", "Rrrrrr Rrrrrr"):
        sounds_in(tuple(name.split()), text)
    assert time.process_time() - begun < 30
