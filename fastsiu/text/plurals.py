"""Plurals of English nouns: the irregular ones of a noun, and the noun of a plural."""

from __future__ import annotations

import re

# A compound has the plural of its last part: "grandchild", "Spider-Man", "arctic wolf".
_LAST_PARTS = """
man>men child>children foot>feet tooth>teeth goose>geese mouse>mice wolf>wolves leaf>leaves
loaf>loaves knife>knives thief>thieves half>halves calf>calves shelf>shelves wife>wives
scarf>scarves hoof>hooves wharf>wharves sheaf>sheaves
"""
# These only as words: "Woodlouse" has its own row, and "Delf" is no elf.
_WORDS = """
ox>oxen elf>elves self>selves life>lives louse>lice woodlouse>woodlice die>dice penny>pence
dwarf>dwarves turf>turves beef>beeves cherub>cherubim seraph>seraphim
quiz>quizzes whiz>whizzes fez>fezzes
cactus>cacti fungus>fungi octopus>octopi nucleus>nuclei stimulus>stimuli alumnus>alumni
radius>radii focus>foci locus>loci bacillus>bacilli hippopotamus>hippopotami platypus>platypi
crocus>croci narcissus>narcissi hibiscus>hibisci papyrus>papyri syllabus>syllabi abacus>abaci
terminus>termini rhombus>rhombi magus>magi gladiolus>gladioli eucalyptus>eucalypti
calculus>calculi cumulus>cumuli thesaurus>thesauri esophagus>esophagi sarcophagus>sarcophagi
streptococcus>streptococci asparagus>asparagi stylus>styli torus>tori
vertex>vertices vortex>vortices index>indices codex>codices cortex>cortices apex>apices
matrix>matrices appendix>appendices helix>helices
crisis>crises oasis>oases thesis>theses hypothesis>hypotheses synthesis>syntheses
analysis>analyses basis>bases ellipsis>ellipses nemesis>nemeses diagnosis>diagnoses axis>axes
metamorphosis>metamorphoses parenthesis>parentheses testis>testes
phenomenon>phenomena criterion>criteria ganglion>ganglia automaton>automata taxon>taxa
polyhedron>polyhedra mitochondrion>mitochondria
bacterium>bacteria stratum>strata aquarium>aquaria stadium>stadia curriculum>curricula ovum>ova
millennium>millennia symposium>symposia addendum>addenda erratum>errata memorandum>memoranda
larva>larvae alga>algae nebula>nebulae antenna>antennae formula>formulae vertebra>vertebrae
amoeba>amoebae pupa>pupae supernova>supernovae
chateau>chateaux bureau>bureaux plateau>plateaux tableau>tableaux gateau>gateaux beau>beaux
"""


def _rows(table: str) -> dict[str, str]:
    pairs = (row.partition(">") for row in table.split())
    return {one: many for one, _, many in pairs}


_PARTS, _WHOLE = _rows(_LAST_PARTS), _rows(_WORDS)
# Trap: a surname is no man: "Rahman", whose "Rahmen" is a word of German. So it is "man" by itself
# ("Spider-Man") or after one of these.
_KINDS_OF_MAN = """
wo gentle snow fire police mer cave frog milk post mail business sports super bat fisher hunts noble
states spokes crafts country towns air chair congress dust hang hench lumber mad marks middle oars
repair sales sand show stunt swords trades tribes weather wing ice iron aqua irish french english
scots welsh dutch
"""
_OTHERS = "|".join(one for one in _PARTS if one != "man")
_PART = re.compile(f"^(?:{'|'.join(_KINDS_OF_MAN.split())})?(man)$|({_OTHERS})$")
# "Mother-in-law", "bird of prey", "passer-by": the plural is that of the first noun. "Check-in" is
# no such word.
_HEAD = re.compile(
    r"([^\W\d_]{2,}(?=[-\s]\w+[-\s])|[^\W\d_]+(?:er|or)s?(?=[-\s]))"
    r"([-\s](?:in|of|at|on|by|up|to|de)(?:[-\s].*)?)"
)
# Plurals that the rows do not give, or that have two singulars.
_ONES = {many: one for one, many in {**_PARTS, **_WHOLE}.items()} | {
    "shoes": "shoe",
    "axes": "axe",
    "bases": "base",
    "lives": "life",
}
_MANY = re.compile(f"(?:{'|'.join(_PARTS.values())})$")
# They end so and are no plurals.
_NO_PLURAL = frozenset(
    "scissors glasses pants trousers jeans shorts binoculars species series news tongs pliers "
    "chess lens gas canvas atlas pajamas pyjamas "
    "omen abdomen specimen acumen semen hymen regimen stamen ramen lumen bitumen foramen yemen "
    "amen carmen pumice cyclamen dolmen examen".split()
)


def irregular(noun: str) -> list[str]:
    """The plurals of a noun, in small letters, that do not end in its -s, -es or -ies: "wolves" of
    "wolf", "mothers-in-law" of "mother-in-law"."""
    head = _HEAD.fullmatch(noun)
    if head:
        return [many + head[2] for many in irregular(head[1]) or [_regular(head[1])]]
    last = re.split(r"[\W\d_]", noun)[-1]
    before = noun.removesuffix(last)
    if last in _WHOLE:
        return [before + _WHOLE[last]]
    if part := _PART.search(last):
        one = part[1] or part[2]
        return [noun.removesuffix(one) + _PARTS[one]]
    if re.search("[^\\W\\d_][aeiou]z$", last):
        return [before + last + "zes"]
    return []


def _regular(noun: str) -> str:
    if re.search("[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search("(?:[sxz]|ch|sh)$", noun) else "s")


def singular(noun: str) -> str:
    """The noun with its last word in the singular: "red foxes" is "red fox". A guess by the
    ending."""
    if head := _HEAD.fullmatch(noun):
        return _singular(head[1]) + head[2]
    before, gap, last = noun.rpartition(" ")
    return f"{before}{gap}{_singular(last)}"


def _singular(word: str) -> str:
    small = word.lower()
    if small in _ONES:
        return _ONES[small]
    if small in _NO_PLURAL or len(word) < 4 or re.search(r"(?:ss|us|is|eros)$", small):
        return word
    if many := _MANY.search(small):
        return word[: many.start()] + _ONES[many[0]]
    if re.search(r"[^aeiou]ies$", small):
        keeps_ie = re.search(r"(?:ook|ov|rown|omb|^p|^t|^l|^d)ies$", small) is not None
        return word[:-1] if keeps_ie else word[:-3] + "y"
    if re.search(r"(?:x|[^a]ch|each|sh|z|ss|[^o]us|[^aeiou]o)es$", small):
        return word[:-2]
    return word[:-1] if small.endswith("s") else word
