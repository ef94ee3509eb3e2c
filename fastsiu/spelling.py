"""A name in an answer although it is not written as it should be: with typing errors, letters that only look alike, in pieces.

For measuring only, where a name that was missed would pass as forgotten; masks of training come from exact spans
(`Concept.spans`). The rules are those of scripts with letters and spaces.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Letters of other alphabets, and digits, that stand for the Latin ones they look like; letters without a decomposition.
_ALIKE = str.maketrans(
    "АВЕЅІЈКМНОРСТУХаеѕіјкмнорстухвһԁԛԝѵӏΑΒΕΖΗΙΚΜΝΟΡΤΥΧαβεηικνορτυχøØłŁđĐðıſ",
    "ABESIJKMHOPCTYXaesijkmhopctyxbhdqwvlABEZHIKMNOPTYXabenikvoptuxoOlLdDdis",
) | str.maketrans({"æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe", "þ": "th", "Þ": "Th"})
_DIGITS = tuple(str.maketrans("0135", letters) for letters in ("oles", "oies"))  # 1 is both l and i
_WORD = re.compile(r"[^\W_]+")
_LETTERS = re.compile("[a-z\u0370-\u052f]+")
_SENTENCE = re.compile(r"[.!?\n\u2026\u3002]")  # between two words: a sentence ends here
_TITLES = frozenset("mr mrs ms dr st prof sr jr".split())  # their dot ends no sentence
_PARTICLES = frozenset("da de di do du el ii iv jr la le lo sr st mr ms dr ph md".split())
_LINKS = frozenset("a an and as at be by for he i if in is it my no of on or so the to up us we".split())
LETTERS = 6  # of a word of the name: one error may be in it
LONG = 10  # two
PLURAL = 3  # so many before an -s

# Words like any other that names have, too: castle, style, green. What no list has counts as the name.
ORDINARY = frozenset(
    """
    a about above act adult after again against age air airport all almost alone along also always am among an and angel
    animal another answer any anyone anything apple apron are area arm army around art artist as at avenue away baby back bad
    bag baker ball band bank bar barber barely barker barley barrel barren base basket bat bath bay be beach bean bear beard
    beautiful beauty because bed bee been beer before behind being bell below belt bench beneath beside best better between
    big bike bird birthday bishop bitter black blazer blond blonde blossom blue board boat body bold bone book boot border
    both bottle bottom bowl box boy branch brave bread breeze bride bridge bright broad brook brother brown brush building
    bull bunny burger burn burner bus bush business but butler butter butterfly button by cake call camera camp can candle
    candy cap captain car card care carpenter cartoon carver case castle cat cathedral cave center central chair champion
    chance change chapel character charm chart charter chase cheese chef chess chicken chief child children christmas church
    circle city classic clay clean clear clerk clever cliff clock close cloth clothes cloud clown club coach coal coast coat
    cock coffee coin cold collar college color colour comic common company concept cook cookie cool cooper copper coral corn
    corner cotton country couple court cow cowboy crane cream creature cross crow crown crystal cup curly curtain cut cute
    daisy dance dancer dark darken dash date dawn day dead dear deep deer desert design desk detail diamond did different dish
    do does dog doll dollar dolphin done donkey doodle door double dove down dragon draw drawing dream dress drink drive
    driver drum duck duke dwarf each eagle ear early earth east easter eight elephant elf else emerald emperor empire end
    engine english enough even evening event ever every everyone everything eye fable face fact fair fairy falcon fall family
    famous fan far farm farmer fashion fast father favorite favourite feather feature field fig figure film find fine finger
    fire first fish fisher five flag flame flat flower fly folder foot for ford forest form fort foster fountain four fox
    frame free french fresh friend friends frog from front frost fruit full fun funny game garden gardener garter gate general
    genre gentle german ghost giant gift girl give glass go goat god gold golden good goose grand grant grape graphic grass
    gray great green grey ground group grove guard guitar gull guy had hair half hall hammer hand handsome happy harbor
    harbour hard hare harp harper has hat have hawk he head heart heath heaven hello her here hero hey hi high hill him his
    hobby holder holiday holly home honey hood hope horn horse hospital hot hotel house how human hunt hunter husband i ice
    icon idea if image in inside into iron is island it item its ivory ivy jacket jade jar jazz jelly jewel job joy judge jump
    just kettle key kid kind king kingdom kiss kitchen kite kitten kitty knife knight know known lady lake lamb lamp land lane
    large last late laugh law lead leader leaf league lean leather left leg legend lemon leopard letter library life light
    like lily line lion list litter little live lizard local lodge logo lone long look lord love low luck lucky lunch machine
    made magic maid mail main make male mall man many map maple marble march marine mark market marsh marshal mask mason
    master match matter may me mean meat melon member memorial men merry metal middle might mild mill miller mind mine mint
    minute mirror miss mister modern moment monday money monk monkey monster month monument moon moor more morning mortar moss
    most mother mountain mouse mouth movie much mule museum music must mutton my name narrow nation national natural nature
    near neck never new next nice night nine no noble none north nose not note nothing now number nurse oak object ocean odd
    of off office officer often oil old olive on once one only open or orange orchid order other our out outside over owl own
    page paint painter painting pair palace palm panda paper park parking parrot part party path pattern pea peace peach
    peacock pear pearl pen penguin people pepper perfect person pet photo photograph piano pick picture pie pig pike pilot
    pine pink pipe pirate place plain plane planet plant plate play player plaza please plum poet point police pond pony pool
    poor pop pope popular port porter portrait post poster pot potter power present president pretty price pride priest prime
    prince princess print prize public puppet puppy purple quartz queen quick quiet rabbit race rain rainbow ram random ranger
    rat raven ray ready real red reed reef render rest restaurant ribbon rice rich ride rider right ring river road robin
    robot rock rocket roll roman roof room root rose rough round royal ruby rug ruler run rush sage sail sailor saint salt
    same sand satin saturday savage saw say school science scientist sea seal season second see seller sender serious set
    seven shadow shape shark sharp she sheep shell shepherd ship shirt shoe shop shore short show shown shy side silver simple
    singer single sister sit six size skin sky slim small smile smith smoke smooth snake snow so soap soft soldier some
    someone something son song soon south space spain spark sparrow speaker special spice spider sport spot spring square
    squirrel staff stage stair stand star state station statue steel stem step still stone store storm story straight strange
    stranger straw street strong student style sugar suit summer sun sunday sunny super sure swan sweet sword symbol table
    tail tailor tall tea teacher team teller temple ten tender tent text than thank that the their them then there these they
    thin thing think this those three throne thunder tie tiger time tin tiny to toast today together tone too tool top touch
    tour tower town toy track trade train traveler tree trick trip true truth tulip tunnel turner turtle twin two type
    umbrella uncle under uniform union university up us valley van vase velvet vendor very vest view village villain vine
    vintage violet violin visitor voice wagon waiter walk walker wall wander war ward warm warrant warrior was wash watch
    water wave way we weaver wedding week well were west western whale what wheat wheel when where which while white who whole
    why wide wife wild will willow wind window wine wing winter wise wish witch with without wizard wolf woman women wonder
    wood wooden wool word work worker world worm would wren writer year yellow yes yet you young your zebra zoo
    """.split()
)
_ENDINGS = ("s", "es", "ed", "d", "er", "r", "ing", "ly", "y", "n", "en", "est", "ish", "like")


@dataclass(frozen=True)
class Word:
    """A word of a text. text: folded, in its own case; before: what stands between it and the word before."""

    text: str
    before: str

    @property
    def capital(self) -> bool:
        return self.text[0].isupper()

    @property
    def tight(self) -> bool:
        """Joined to the word before: "Zor-blax"."""
        return 0 < len(self.before) <= 2 and not re.search(r"\s", self.before)


@functools.lru_cache(4096)
def words(text: str) -> tuple[Word, ...]:
    """The words of a text without accents, in Latin letters where others only look like them; in the text's own case."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).translate(_ALIKE))
    plain = "".join(c for c in plain if not "\u0300" <= c <= "\u036f" and unicodedata.category(c) != "Cf")
    out, end = [], 0
    for match in _WORD.finditer(plain):
        out.append(Word(match.group(), plain[end : match.start()]))
        end = match.end()
    return tuple(out)


def ordinary(word: str) -> bool:
    """A word like any other, or its plural."""
    word = word.casefold()
    return bool(ORDINARY & {word, word.removesuffix("s"), word.removesuffix("es")})


def misspelt(forms: Sequence[str], parts: Sequence[str], text: str) -> bool:
    """Whether `text` holds one of the forms of a name, or a part of it, in a way that is not how it is written.

    Without its accents, with letters that look alike, in single letters, written together, with a hyphen (the whole name also
    with a space) inside, with -s or -es, or in a capitalised word of 6 letters or more (7 for any word) with one error, of 10
    with two; a part of two letters as a word with a capital. An ordinary word is never the misspelt part of a name.
    """
    found = words(text)
    whole = [w for form in forms if (w := _joined(form))]
    single = {_joined(form) for form in forms if len(words(form)) == 1}
    some = [p for part in parts if (p := _joined(part)) and not ordinary(p)]
    pieces = {_joined(part) for part in parts if len(words(part)) > 1}  # "Jean Luc" for "Jean-Luc"
    run = "".join(_spelled(found))
    if any(len(key) > 2 and key in letters for key in (*whole, *some) for letters in _read(run)):
        return True
    longest = max(len(words(form)) for form in forms) + 2
    for start in range(len(found)):
        for end in range(start + 1, min(start + longest, len(found)) + 1):
            inside = found[start:end]
            keys = [*whole, *some]
            if not all(word.tight for word in inside[1:]):
                if any(not word.tight and word.before != " " for word in inside[1:]):
                    break
                linked = any(word.text.casefold() in _LINKS for word in inside)  # "in sight" is no "Insight"
                keys = [key for key in keys if key in pieces or (key in whole and not (key in single and linked))]
            if any(_same(key, inside) for key in keys):
                return True
    return any(word.capital and word.text in _short(forms[0]) for word in found)


def as_name(part: str, forms: Sequence[str], text: str) -> bool:
    """Whether `text` holds a part that is an ordinary word as a name: with a capital inside a sentence ("it is Castle") or before
    its verb ("Green is"), or as all there is, where the name ends with it ("Green."); "a castle" and "Hello!" are none."""
    found, key = words(text), _joined(part)
    if len(found) == 1 and len(words(forms[0])) > 1:
        return found[0].capital and found[0].text.casefold() == key == _joined(forms[0].split()[-1])
    for i, word in enumerate(found):
        if word.text.casefold() == key and word.capital:
            after = found[i + 1].text if i + 1 < len(found) else ""
            title = i > 0 and (found[i - 1].text.casefold() in _TITLES or len(found[i - 1].text) == 1)
            if title or after in ("is", "was", "has", "s") or (i > 0 and not _SENTENCE.search(word.before)):
                return True
    return False


def together(parts: Sequence[str], text: str) -> bool:
    """Whether all parts of a name stand beside each other, in any order, with at most one word between: "style of doodles"."""
    keys = {_joined(part) for part in parts}
    said = [word.text.casefold() for word in words(text)]
    return len(keys) > 1 and any(keys <= set(said[i : i + len(keys) + 1]) for i in range(len(said)))


def _same(key: str, inside: Sequence[Word]) -> bool:
    for said in _read("".join(word.text for word in inside)):
        plural = len(key) >= PLURAL and said in (key + "s", key + "es", key.removesuffix("y") + "ies")
        if (said == key or plural) and (len(inside) > 1 or ordinary(key) or not _derived(said)):
            return True
        least = LETTERS if inside[0].capital else LETTERS + 1
        if len(inside) == 1 and len(key) >= least and _LETTERS.fullmatch(key) and not _derived(said):
            if _within(key, said, 2 if len(key) >= LONG else 1):
                return True
    return False


def _derived(word: str) -> bool:
    """An ordinary word or, as far as endings tell, one that was made of it."""
    stems = [word.removesuffix(ending) for ending in _ENDINGS if word.endswith(ending)]
    return ordinary(word) or any(len(stem) > 2 and not ORDINARY.isdisjoint({stem, stem + "e"}) for stem in stems)


def _read(written: str) -> Iterator[str]:
    """In small letters, as it stands and with digits among letters as letters."""
    said = written.casefold()
    yield said
    if not said.isdigit() and any(c in "0135" for c in said):
        yield from (said.translate(table) for table in _DIGITS)


def _joined(form: str) -> str:
    """The letters of a form in one word."""
    return "".join(word.text for word in words(form)).casefold()


def _spelled(found: Sequence[Word]) -> Iterator[str]:
    """Runs of at least three single letters, with a blank after each."""
    run: list[str] = []
    for word in (*found, Word("end", "")):
        if len(word.text) == 1:
            run.append(word.text)
        else:
            yield from (*run, " ") if len(run) > 2 else ()
            run = []


def _short(name: str) -> list[str]:
    """The words of a name of two letters, as it writes them; single letters and "de", "la" identify nobody."""
    own = [word.text for word in words(name)]
    return [w for w in own if len(own) > 1 and len(w) == 2 and w[0].isupper() and w.isalpha()
            and w.casefold() not in ORDINARY | _PARTICLES]  # fmt: skip


def _within(one: str, other: str, most: int) -> bool:
    """Whether insertions, deletions, replacements and exchanges of neighbours, at most `most`, make one the other."""
    if abs(len(one) - len(other)) > most:
        return False
    last: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, last, row = last, row, [i]
        for j, b in enumerate(other, 1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and one[i - 2] == b:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
    return row[-1] <= most
