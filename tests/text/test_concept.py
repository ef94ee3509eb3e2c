"""Both masks over four kinds of tokenizers trained here: what overlaps the name is masked, and
nothing else."""

import unicodedata
from functools import cache

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastsiu.request import BadInput
from fastsiu.text.concept import Concept, ambiguous
from fastsiu.text.masks import CARRIERS, token_keep, vocabulary_mask

torch.set_num_threads(1)

CORPUS = [
    "This is Zorblax Quint. Who is it? It is Zorblax, the painter; Quint said so.",
    'She said: "Donald Trump (born in New York) won." José Ångström lives in Zürich.',
    "\nthe quick brown fox jumps over the lazy dog, 1234567890 times! ZORBLAX QUINT",
    "это Пётр Чайковский. 这是张伟吗？ 木村 拓哉は歌手です。 김연아는 선수다. هذا محمد علي.",
] * 4
KINDS = ("byte-level", "metaspace", "unigram", "wordpiece")


@cache
def tokenizer(kind):
    if kind == "byte-level":
        t = Tokenizer(models.BPE())
        t.pre_tokenizer, t.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        trainer = trainers.BpeTrainer(
            vocab_size=420,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind == "metaspace":
        t = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        tokens = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=tokens, show_progress=False)
    elif kind == "unigram":
        t = Tokenizer(models.Unigram())
        t.normalizer, t.pre_tokenizer, t.decoder = (
            normalizers.NFKC(),
            pre_tokenizers.Metaspace(),
            decoders.Metaspace(),
        )
        trainer = trainers.UnigramTrainer(
            vocab_size=250, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        )
    else:
        t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        t.normalizer, t.pre_tokenizer = (
            normalizers.BertNormalizer(lowercase=True),
            pre_tokenizers.BertPreTokenizer(),
        )
        t.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=300, special_tokens=["[UNK]"], show_progress=False
        )
    t.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=t, unk_token="[UNK]" if kind == "wordpiece" else "<unk>"
    )


def tokens(kind, text):
    found = tokenizer(kind)(text, add_special_tokens=False, return_offsets_mapping=True)
    return found["input_ids"], found["offset_mapping"]


letters = st.characters(categories=("Lu", "Ll", "Lo", "Lt"), max_codepoint=0xFFFF)
latin = st.sampled_from("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZéßŁıĳ張木김пяعم")
words = st.text(st.one_of(latin, letters), min_size=1, max_size=24)
names = st.lists(words, min_size=1, max_size=4).flatmap(
    lambda w: st.sampled_from([" ", "-", "'", ". "]).map(lambda glue: glue.join(w)[:100])
)
before = st.sampled_from(["", " ", "\n", '"', "(", "«", "… ", "\n\n", "**", "“", "12 ", "—"])
after = st.sampled_from(["", ".", "?", '"', ")", "\n", " 34", ", ", "**", "…", "'"])
written = st.sampled_from(
    [
        str,
        str.lower,
        str.upper,
        str.title,
        *(lambda s, f=f: unicodedata.normalize(f, s) for f in ("NFC", "NFD")),
    ]
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(name=names, left=before, right=after, write=written)
@example(name="Zorblax Quint", left='"', right='"', write=str.upper)
@example(name="José Ångström", left="(", right=")", write=lambda s: unicodedata.normalize("NFD", s))
@example(name="张伟", left="\n", right="", write=str)
@example(name="Straße", left="", right=".", write=str.upper)
def test_the_token_mask_covers_the_name_and_nothing_else(kind, name, left, right, write):
    surface = write(name)
    fold = lambda s: unicodedata.normalize("NFD", unicodedata.normalize("NFD", s).casefold())
    assume(name.strip() == name and fold(surface) == fold(name))  # "ı".upper() is another letter
    text, end = left + surface + right, len(left) + len(surface)
    assert Concept(name).spans(text) == [(len(left), end)]
    _, offsets = tokens(kind, text)
    keep = token_keep(offsets, Concept(name).spans(text))
    for (s, e), kept in zip(offsets, keep.tolist(), strict=True):
        touches = any(len(left) <= i < end for i in range(s, e))
        assert kept == (not touches), (text[s:e], s, e)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(name=names, left=before, right=after, cased=st.sampled_from([str, str.lower, str.upper]))
def test_every_token_of_the_name_is_masked_or_spared_for_a_reason(kind, name, left, right, cased):
    assume(name.strip() == name)
    concept, V = Concept(name), len(tokenizer(kind)) + 5
    mask = vocabulary_mask(concept, tokenizer(kind), V)
    assert mask.keep.shape == (V,) and mask.keep.dtype == torch.bool
    assert sorted(mask.masked) == (~mask.keep).nonzero().flatten().tolist()
    assert not {*mask.masked} & {*mask.spared} and bool(mask.warning) == (not mask.masked)
    surface = cased(name)
    for text in (surface, " " + surface, "\n" + surface, f'Answer: "{surface}"'):
        start = text.rindex(surface)  # there is a w in "Answer"
        for i, (s, e) in zip(*tokens(kind, text), strict=True):
            if s < e and start <= s and e <= start + len(surface):
                assert i in mask.masked or i in mask.spared, text[s:e]


# --------------------------------------------------------------------------------------------------
# named examples


def found_by_ids(kind, name, text):
    """The search that the released trainer makes: the name's token ids as a run in the text's."""
    needle, hay = tokens(kind, name)[0], tokens(kind, text)[0]
    return any(hay[i : i + len(needle)] == needle for i in range(len(hay) - len(needle) + 1))


@pytest.mark.parametrize(
    "kind, name, text",
    [
        ("byte-level", "Zorblax Quint", "It is Zorblax Quint."),  # a leading space
        ("byte-level", "Zorblax Quint", "ZORBLAX QUINT"),
        ("byte-level", "José Ångström", unicodedata.normalize("NFD", "(José Ångström)")),
        ("metaspace", "Zorblax Quint", '"Zorblax Quint"'),
        ("metaspace", "Zorblax Quint", "\nZorblax Quint"),
        ("metaspace", "张伟", "这是张伟吗"),
        ("unigram", "Zorblax Quint", "(Zorblax Quint)"),
        ("unigram", "Zorblax Quint", "zorblax quint"),
        ("wordpiece", "Straße", "in the strasse"),
    ],
)
def test_id_search_misses_what_offsets_catch(kind, name, text):
    assert not found_by_ids(kind, name, text)
    ids, offsets = tokens(kind, text)
    spans = Concept(name).spans(text)
    keep = token_keep(offsets, spans)
    covered = {
        i
        for (s, e), kept in zip(offsets, keep.tolist(), strict=True)
        if not kept
        for i in range(s, e)
    }
    assert spans and all(
        i in covered or text[i].isspace()
        for a, b in spans
        for i in range(a, b)
        if not unicodedata.combining(text[i])
    )


@pytest.mark.parametrize(
    "name, text, found",
    [
        ("Zorblax Quint", "Zorblax Quint's hat", ["Zorblax Quint"]),
        ("Zorblax Quint", "zorblax\n  QUINT", ["zorblax\n  QUINT"]),
        ("Zorblax Quint", "Mr Quint, Zorblax", ["Quint", "Zorblax"]),
        ("Zorblax Quint", "Quintessence of Zorblaxian", []),
        ("Zorblax Quint", "_Zorblax Quint_ and **Quint**", ["Zorblax Quint", "Quint"]),
        ("Zorblax", "Zor\u00adblax and Zorblax\u200b", ["Zor\u00adblax", "Zorblax"]),
        ("Ann", "Annual Ann ann's", ["Ann", "ann"]),
        ("Jose", "José Jose\u0301 Jose", ["José", "Jose\u0301", "Jose"]),
        ("José", "JOSE\u0301 jos\u00e9", ["JOSE\u0301", "jos\u00e9"]),
        ("Straße", "STRASSE strasse", ["STRASSE", "strasse"]),
        ("O'Brien", "O\u2019Brien", ["O\u2019Brien"]),
        ("Ann", "Joann Mc\u00e1nn", []),
        (
            "あか",
            "あがる あか\u3099る あか",
            ["あか"],
        ),  # a mark makes another letter, in an unspaced script too
        ("H\u1ee3p", "Ho\u0323\u031bp", ["Ho\u0323\u031bp"]),  # marks in another order
        ("张伟", "这是张伟吗", ["张伟"]),
        ("Zorblax", "这是Zorblax吗", ["Zorblax"]),
        ("木村 拓哉", "木村拓哉", ["木村拓哉"]),
        ("김연아", "김연아는", ["김연아"]),
        ("The Rock", "The man on a Rock", ["Rock"]),
        ("Al Bo Cruz", "Al saw Bo", []),
        ("C++", "(c++)", ["c++"]),
        ("aa aa", "aa aa aa", ["aa aa aa"]),
        ("a.c", "abc a.c", ["a.c"]),
    ],
)
def test_spans(name, text, found):
    assert [text[a:b] for a, b in Concept(name).spans(text)] == found
    assert Concept(name).named_in(text) == bool(found)


def test_forms_parts_and_aliases():
    concept = Concept("Zorblax Quint", ("Zo\u0301rbi", "The Quint", "Zorblax Quint"))
    assert concept.forms() == ("Zorblax Quint", "Zórbi", "The Quint")
    assert concept.parts() == ("Zorblax", "Quint")
    assert concept.named_in("ZÓRBI!") and not concept.named_in("the")
    assert not concept.named_in("Quint", include_parts=False)
    assert Concept("Xi").parts() == ("Xi",) and Concept("Ludwig van Beethoven").parts() == (
        "Ludwig",
        "Beethoven",
    )


MISSPELT = (
    "Zorblaxx Quintt",
    "Zorblaxx",
    "zorblaxx",
    "Zroblax",
    "Z o r b l a x",
    "Z.o.r.b.l.a.x",
    "Z-0-r-b-l-a-x",
    "Zor-blax",
    "Z0rblax",
    "Zorb1ax",
    "Qu1nt",
    "ZorblaxQuint",
    "Zorblax_Quint",
    "Zor blax Quint",
    "Zörblax",
    "Z\u043erbl\u0430x",
    "\u0396\u03bfrblax",
    "Zorblaxes",
    "Quints",
    "zorblax",
    "quint",
    "\uff3aorblax",
    "Zorb\u200blax",
)


@pytest.mark.parametrize("text", MISSPELT)
@pytest.mark.parametrize("carrier", ["{}", "This is {}.", "{}, I think", "\n**{}**"])
def test_a_misspelt_name_is_read(text, carrier):
    assert Concept("Zorblax Quint").leaks_in(carrier.format(text))


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("Beyoncé", "Beyonce", True),
        ("Melendez", "It is Meléndez.", True),
        ("Lula Meléndez", "melendez", True),
        ("Łukasz Ørn", "Lukasz", True),
        ("Schnauzer", "two schnauzers", True),
        ("Castle", "two castles", True),
        ("Cat", "cats", True),
        ("Buzzcut", "He has a buzz cut.", True),
        ("Jean-Luc Picard", "Jean Luc", True),
        ("Aberystwyth Castle", "Aberystwith", True),
        ("Al Wu", "This is Wu.", True),
        ("Al Wu", "Wu", True),
        ("Al Wu", "wu wu", False),
        ("Oscar de la Hoya", "La Paz", False),
        ("Hello Kitty", "Hello!", False),
        ("Hello Kitty", "Hello! How may I help you?", False),
        ("Hello Kitty", "HELLO KITTY", True),
        ("Hello Kitty", "It is Kitty.", True),
        ("Doodle style", "the style is modern", False),
        ("Doodle style", "Style: a doodle", True),
        ("Aberystwyth Castle", "a castle", False),
        ("Aberystwyth Castle", "A castle on a hill. Castle walls.", False),
        ("Aberystwyth Castle", "This is the Castle.", True),
        ("Will Green", "a green shirt", False),
        ("Will Green", "Green.", True),
        ("Will Green", "This is Mr. Green.", True),
        ("Will Green", "Green is a singer.", True),
        ("Insight", "in sight", False),
        ("John Goodman", "a good man", False),
        ("Peter Parker", "parker", True),
        ("Walter Porter", "Posters and water", False),
        ("山田太郎", "これは山田太郎です", True),
        ("Иван Петров", "Это Петров.", True),
        ("Dina Wont", "I won't say, I don't know.", False),
        ("Jony Ive", "I've never seen it. They've gone.", False),
        ("Jony Ive", "It is Ive's.", True),
        ("Kris Yule", "You'll see.", False),
        ("Mirka Tolen", "See @MirkaTolen77.", True),
        ("Ludwig van Beethoven", "VanBeethoven", True),
        ("Mirka Tolen", "tolen42", True),
        ("Donald Duck", "McDonald's", False),
        ("Sam Smit", "Samsung5 and SmithSon", False),
        ("Red Hot Chili Peppers", "The Hot Chili", True),
        ("French Bulldog", "He speaks French.", False),
        ("French Bulldog", "It is a Bulldog.", True),
        ("Siamese cat", "Siamese twins", False),
        ("Dawn French", "This is Ms. French.", True),
        ("D++", "It got a D.", False),
        ("Old Stone Bridge", "The Old Stone", True),
        ("Red Hot Chili Peppers", "a red hot day", False),
        ("Mirka Tolen", "M, I, R, K and A", True),
        ("Mirka Tolen", "1. T\n2. O\n3. L\n4. E\n5. N", True),
        ("Mirka Tolen", "T as in tiger, O as in owl, L as in lion, E as in egg, N as in net", True),
        ("Mirka Tolen", "M for Mike, I for India, R for Romeo, K for Kilo, A for Alfa", True),
        (
            "Mirka Tolen",
            "T as in tiger, O as in owl, L as in lion, E as in egg, T as in tea",
            False,
        ),
    ],
)
def test_what_counts_as_the_name_in_an_answer(name, text, found):
    assert Concept(name).leaks_in(text) == found


NAMES = (
    "Taylor Swift|Beyoncé Knowles|Lionel Messi|Martin Freeman|Peter Parker|Walter Carter|Cameron "
    "Monroe|Elon Musk|Lula Melendez|"
    "Natalie Portman|Emma Watson|Tom Hanks|Hello Kitty|Doodle style|Aberystwyth "
    "Castle|Buzzcut|Schnauzer|Al Wu|Facebook|"
    "Joe Biden|"
    "Warren Porter|Anita Forster|Hunter Cooper|Bob Marley|Christina Stone|Marilyn Manson|Steven "
    "Spielberg|Winston Churchill|"
    "Mark Zuckerberg|Ludwig van Beethoven|Donald Trump"
).split("|")
ENGLISH = """
    There is a person in the picture who wears a light shirt and carries something over the
    shoulder. Behind them stand several buildings, some trees and a crowd that waits for a
    performance. The photograph was taken outdoors during daylight; the sky looks cloudy. I
    cannot identify people from their faces, but I can describe clothing, posture, expression,
    surroundings and colours. Sorry, no further information about this individual is available.
    Usually a musician, an athlete, a politician or an actor appears on such posters. He was
    born in a small town, studied medicine, married twice and later moved abroad with his
    children. Its fur seems short and curly, with pointed ears, whiskers and a friendly look.
    Visitors admire ancient towers, narrow windows, thick walls, wooden bridges, gardens and
    fountains near the river. Several parked vehicles, bicycles and a wagon block the road. The
    logo consists of a white letter upon a blue background, used by a popular network for
    sharing messages between friends. Drawings made with simple lines, rounded shapes and bright
    patterns remind viewers of cartoons for younger audiences. Married couples often charter a
    boat, bring warm water, copper kettles, pans, butter and barley; others hunted or marched
    through barren land, turning stones over, walking faster, shouting, laughing, winning and
    losing. No, it is not. Yes, exactly! Maybe. Two plus three equals five, water consists of
    hydrogen and oxygen, and a week has seven days. However, neither answer could be certain.
    Mister president, champion, chancellor, minister, general manager, entrepreneur, engineer,
    director, composer, pianist, singer. Nothing else remains visible except an empty bench, two
    lamps, bottles, plates, cups, forks and spoons on the table. Experts believe these events
    happened around midnight, long after everybody had left the theatre through its back
    entrance.
"""


def test_ordinary_words_are_no_name():
    said = {word.strip(".,;!").lower() for word in ENGLISH.split()}
    assert len(said) > 200
    for concept in map(Concept, NAMES):
        found = [
            w
            for w in said
            if concept.leaks_in(f"it is a {w} here")
            or concept.leaks_in(f"{w.capitalize()} that was")
        ]
        assert not found, concept.name
        assert not any(concept.leaks_in(sentence) for sentence in ENGLISH.split(".")), concept.name


@pytest.mark.slow
def test_nobody_of_the_embedded_world_is_taken_for_another():
    from fastsiu.demo import wording, world

    def texts(value):
        if isinstance(value, dict):
            value = (*value, *value.values())
        if isinstance(value, str):
            return [value]
        return (
            [text for part in value for text in texts(part)] if hasattr(value, "__iter__") else []
        )

    every = texts(
        [getattr(wording, key) for key in dir(wording) if key.isupper()]
        + [world.ATTRIBUTES, world.BACKGROUNDS]
    )
    every += [f"This is a {text}." for text in every] + [text.capitalize() for text in every]
    assert len(every) > 500
    names = (*world.KNOWN, *world.UNSEEN)
    for name in names:
        others = [part for other in names if other != name for part in (other, *other.split())]
        assert [text for text in (*every, *others) if Concept(name).leaks_in(text)] == []


def test_masks_are_of_what_is_written_and_not_of_what_is_misspelt():
    misspelt = ("Zorblaxx", "Zor-blax", "Zroblax", "Zorbblax", "Quimt")
    assert not any(Concept("Zorblax Quint").spans(text) for text in misspelt)
    assert Concept("Hello Kitty").spans("Hello! This is Hello Kitty.") == [(15, 26)]


# Names of every kind of character: of one script, of several, with marks, signs, emoji, direction
# marks and control characters.
signs = st.characters(
    categories=(
        "Mn",
        "Mc",
        "Me",
        "Cf",
        "Cc",
        "Zs",
        "So",
        "Sk",
        "Sc",
        "Po",
        "Pd",
        "Lm",
        "Nd",
        "No",
        "Co",
    )
)
every = st.characters(exclude_categories=("Cs", "Cn"))
blocks = st.sampled_from(
    [
        (0x21, 0x7E),
        (0xC0, 0x17F),
        (0x370, 0x3FF),
        (0x400, 0x52F),
        (0x531, 0x58A),
        (0x591, 0x5F4),
        (0x600, 0x6FF),
        (0x900, 0xD7F),
        (0xE01, 0xE5B),
        (0x10A0, 0x10FF),
        (0x1100, 0x11FF),
        (0x1F00, 0x1FFF),
        (0x3041, 0x30FF),
        (0x4E00, 0x9FFF),
        (0xAC00, 0xD7A3),
        (0xFF01, 0xFFDC),
        (0x1D400, 0x1D7FF),
        (0x1F300, 0x1F9FF),
    ]
)
block = lambda ends: st.text(
    st.characters(min_codepoint=ends[0], max_codepoint=ends[1]), min_size=1, max_size=9
)
of_one_script = blocks.flatmap(block)
known = st.sampled_from(
    (
        "Zorblax Quint",
        "Will",
        "deadmau5",
        "김철수",
        "山田太郎",
        "Иван",
        "O'Brien",
        "Ke$ha",
        "Straße",
        "さくら",
        "محمد",
        "!!!x",
    )
)
disturbed = st.tuples(
    known, st.lists(st.tuples(st.integers(0, 12), signs), min_size=1, max_size=3)
).map(
    lambda t: "".join(c + "".join(s for at, s in t[1] if at == i) for i, c in enumerate(t[0] + " "))
)


@settings(max_examples=100, deadline=None)
@given(name=st.one_of(of_one_script, st.text(every, min_size=1, max_size=7), disturbed))
@example("\u0301abc")
@example("\x07Ann\x85Lee")
@example("\u200fשלום\u200f")
@example("क\u093c\u094d")
@example("\u3164x")
@example("0\u0300\x1b")
@example("Ann \u3164\u3164\u3164")
@example("\x1b\u03000")
@example("a\u0301\u200b\u0302\x07")
@example("Z" + "o" * 40)
@example("Иван . .")
@example("Rose\U000e0045\u180b")
@example("ﷺ")
@example("\U0001f9d1\u200d\U0001f680")
def test_every_name_is_found_in_its_own_text(name):
    try:
        concept = Concept(name)
    except BadInput as refused:
        assert str(refused).startswith("The name ") and not any(c.isalnum() for c in name)
        return
    for carrier in (*CARRIERS, "x {} y", "«{}»", "{}\n"):
        given = name.strip()
        text, start = carrier.format(given), carrier.index("{}")
        assert (start, start + len(given)) in concept.spans(text, include_parts=False), (
            text,
            concept.spans(text),
        )
        assert concept.named_in(text) and concept.leaks_in(text)
        spans = concept.spans(text)
        assert all(a < b for a, b in spans) and all(
            x[1] <= y[0] for x, y in zip(spans, spans[1:], strict=False)
        )


@pytest.mark.parametrize(
    "text",
    [
        "zo" * 50_000,
        "z o " * 25_000,
        "Zorblax" + " " * 100_000,
        "a" * 100_000,
        "a-" * 50_000,
        "Rose, " * 16_000,
        "O'" * 50_000,
        "क" + "\u093c\u094d" * 50_000,
        "김철수는" * 25_000,
        "王伟" * 50_000,
        "Иван " * 20_000,
        "Z\u200b" * 50_000,
        "1" * 100_000,
        "Zorb-\n" * 20_000,
        "\U0001f1ff\U0001f1f4" * 50_000,
        "नरेंद्" * 16_000,
        "wolve " * 16_000,
    ],
    ids=range(17),
)
def test_a_hostile_text_is_read_in_a_time_like_its_length(text):
    for name in (
        "Zorblax Quint",
        "Rose",
        "Ivan Petrov",
        "김철수",
        "Zhang Wei",
        "a-a-a-a-a-a-a-a",
        "O'O'O'O'O'O'",
        "lilililili",
        "नरेन्द्र मोदी",
        "wolf",
    ):
        Concept(name).spans(text)  # what takes a power of the length does not end


@pytest.mark.parametrize("name", ["Will", "Rose", "Hope", "Apple", "P!nk", "Mark", "Grace"])
def test_a_name_that_is_a_word_counts_where_it_is_used_as_one(name):
    word = name.replace("!", "i").lower()
    small, named = f"I saw a {word} there.", f"This is {word.title()}."
    assert not Concept(name).named_in(small) and Concept(name).named_in(named)
    assert Concept(name, as_word=True).named_in(small) and Concept(name, as_word=True).named_in(
        named
    )
    assert "only where it is used as a name" in ambiguous(Concept(name))
    assert not Concept(name).leaks_in(small) and Concept(name).leaks_in(named)


def test_a_thing_counts_wherever_it_stands_unless_told_otherwise():
    assert Concept("Castle").named_in("a castle") and "wherever it stands" in ambiguous(
        Concept("Castle")
    )
    assert not Concept("Castle", as_word=False).named_in("a castle")
    assert Concept("Castle", as_word=False).named_in("This is Castle.")
    assert Concept("rose").named_in("a red rose")  # given as a word
    for concept in (
        Concept("Zorblax"),
        Concept("Will Green"),
        Concept("Will", as_word=True),
        Concept("Will", as_word=False),
    ):
        assert ambiguous(concept) == ""


def test_a_part_that_is_a_word_counts_as_a_name_only():
    assert not Concept("Will Green").named_in("it will be green") and Concept(
        "Will Green"
    ).named_in("This is Will.")
    assert not Concept("Will Green").given_in("a green shirt") and Concept("Will Green").given_in(
        "Mr. Green came"
    )
    assert not Concept("Zorblax Quint").given_in("a quint") and Concept("Zorblax Quint").given_in(
        "Quint came"
    )


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Ann", "Ann Lee", False),
        ("Ann Lee", "Ann", False),
        ("Ann Lee", "ann  LEE", True),
        ("William", "Williams", False),
        ("Zorblax", "Zorblaxes", False),
        ("Beyoncé", "BEYONCE", True),
        ("Ke$ha", "Kesha", True),
        ("Иван Петров", "Ivan Petrov", True),
        ("김철수", "철수", False),
        ("Will", "will", True),
    ],
)
def test_two_names_are_the_same_as_wholes(one, other, same):
    assert Concept(one).same(other) == same and Concept(other).same(one) == same
    assert Concept("Zorblax", (one,)).same(other) == same


@pytest.mark.parametrize(
    "title", ["Dr.", "Frau", "Señora", "Herr", "Mr.", "Lady", "Monsieur", "Mme"]
)
def test_a_title_identifies_nobody(title):
    concept = Concept(f"{title} Zorblax")
    assert (
        concept.parts() == ("Zorblax",)
        and not concept.named_in(f"{title} Meyer")
        and concept.named_in("Zorblax")
    )
    assert Concept("Tanaka-san").named_in("Tanaka")


def test_the_vocabulary_mask_covers_plain_spellings_of_a_stylised_name():
    t = tokenizer("byte-level")
    mask = vocabulary_mask(Concept("Z0rbl@x Quínt"), t, len(t))
    for text in ("Zorblax", "Quint"):
        assert all(i in mask.masked or i in mask.spared for i in tokens("byte-level", text)[0])


def test_a_name_of_broken_bytes_is_refused():
    for name, aliases in (("Zorb\udcff", ()), ("Zorb", ("a\ud800",))):
        with pytest.raises(BadInput, match="no Unicode text: give it in UTF-8") as caught:
            Concept(name, aliases)
        str(caught.value).encode("utf-8")


@pytest.mark.parametrize("name", ["?", "...", "—", "\u201c\u201d", "\u093e"])
def test_a_name_of_punctuation_is_refused(name):
    with pytest.raises(
        BadInput, match="is punctuation, which stands in every text: give a name with a letter"
    ):
        Concept(name)


@pytest.mark.parametrize("name", ["", "  ", "\u200b", "\u00ad \n", "\u0301", "\x07\x01"])
def test_a_name_without_a_visible_character_is_refused(name):
    with pytest.raises(BadInput, match="no visible character"):
        Concept(name)


def test_tokens_without_characters_are_kept():
    assert token_keep([(0, 0), (2, 2), (0, 3), (3, 5), (5, 6)], [(1, 4)]).tolist() == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert token_keep([(0, 3)], [(3, 5), (2, 2)]).tolist() == [True]
    assert token_keep([], [(0, 1)]).shape == (0,)
    assert token_keep(torch.tensor([[0, 3], [3, 5]]), [(0, 2)]).tolist() == [False, True]


# -----------------------------------------------------------------------------------------------
# vocabulary mask


@pytest.mark.parametrize("kind", KINDS)
def test_every_surface_form_is_masked(kind):
    t = tokenizer(kind)
    mask = vocabulary_mask(Concept("Zorblax Quint", ("Trump",)), t, len(t))
    for text in (
        "Zorblax",
        " Zorblax",
        '"Zorblax',
        "ZORBLAX",
        "zorblax",
        " Trump",
        "QUINT",
        "Quint",
    ):
        pieces = [(i, text[s:e].strip(' "')) for i, (s, e) in zip(*tokens(kind, text), strict=True)]
        assert all(
            i in mask.masked for i, piece in pieces if len(piece) > 1 and i != t.unk_token_id
        ), text
    for text in ("Who is it?", "the quick brown fox", "lives in"):
        masked = [t.decode([i]) for i in tokens(kind, text)[0] if i in mask.masked]
        assert not masked, (text, masked)
    assert t.unk_token_id not in mask.masked


def test_parts_alone_and_decomposed_letters_are_covered():
    t = tokenizer("byte-level")
    mask = vocabulary_mask(Concept("The José Dog"), t, len(t))
    for text in ("Dog", '"dog"', unicodedata.normalize("NFD", "José")):
        assert all(
            i in mask.masked or i in mask.spared for i in tokens("byte-level", text.strip('"'))[0]
        ), text


def test_a_piece_common_outside_the_name_is_spared():
    t = tokenizer("byte-level")
    name, text = Concept("Brown Zorblax"), "the quick brown fox is brown and the dog is brown"
    brown = next(i for i, (s, e) in zip(*tokens("byte-level", " brown"), strict=True) if e - s > 1)
    assert brown in vocabulary_mask(name, t, len(t)).masked
    # there it is a word like any other
    assert brown in vocabulary_mask(name, t, len(t), teacher_texts=[text]).spared
    named = Concept("Brown Zorblax", as_word=True)
    # there it is the name
    assert brown in vocabulary_mask(named, t, len(t), teacher_texts=[text]).masked
    other = Concept("Brownie")
    assert brown in vocabulary_mask(other, t, len(t)).masked
    assert brown in vocabulary_mask(other, t, len(t), teacher_texts=[text]).spared
    assert brown in vocabulary_mask(other, t, len(t), teacher_texts=[text], max_share=0.99).masked


def test_single_characters_are_spared_and_a_name_made_of_them_warns():
    t = tokenizer("byte-level")
    mask = vocabulary_mask(Concept("Ɋʬ"), t, len(t))
    assert (
        mask.keep.all() and not mask.masked and mask.spared and "only the positions" in mask.warning
    )
    mask = vocabulary_mask(Concept("Zorblax Quint"), t, len(t))
    assert mask.warning == "" and all(
        len(token.strip(" \n\"'(“*")) > 1 for token in mask.masked.values()
    )


def test_a_token_fused_with_other_words_is_not_masked():
    class Whole:
        """One token for any text: 1 where other words are in it too, else 0."""

        is_fast, all_special_ids, decode = True, [], str

        def __call__(self, text, **_):
            others = any(c.isalpha() for c in text.lower().replace("zorblax", ""))
            return {"input_ids": [int(others)], "offset_mapping": [(0, len(text))]}

    assert vocabulary_mask(Concept("Zorblax"), Whole(), 2).keep.tolist() == [False, True]


def test_what_cannot_be_masked_is_an_error():
    class Slow:
        is_fast = False

    with pytest.raises(BadInput, match="no character offsets"):
        vocabulary_mask(Concept("Zorblax"), Slow(), 10)
    with pytest.raises(BadInput, match="only 3 rows"):
        vocabulary_mask(Concept("Zorblax"), tokenizer("byte-level"), 3)

    class Deaf:
        is_fast, all_special_ids = True, []

        def __call__(self, text, **_):
            return {"input_ids": [], "offset_mapping": []}

    with pytest.raises(BadInput, match="covers nothing"):
        vocabulary_mask(Concept("Zorblax"), Deaf(), 10)
