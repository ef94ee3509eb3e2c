"""docs/troubleshooting.md holds every sentence with which a run can end."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generator():
    path = ROOT / "docs" / "troubleshooting.py"
    spec = importlib.util.spec_from_file_location("docs_troubleshooting", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_sources_say(generator):
    same = generator.PAGE.read_text() == generator.page()
    assert same, "`make docs` writes docs/troubleshooting.md anew"


def raised(generator):
    """(file, line) of every `raise BadInput(...)`, NumericFailure and OutOfMemory."""
    for path in generator.sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = getattr(node.exc.func, "id", getattr(node.exc.func, "attr", ""))
                if name in ("BadInput", *generator.INTERNAL):
                    yield path, node


def test_every_error_that_is_raised_has_a_sentence_there(generator):
    """But for those whose text comes from a function or a variable, which are few."""
    silent, told = [], {}
    for path, node in raised(generator):
        if path not in told:
            told[path] = {sentence.text for sentence in generator.sentences(path)}
        texts = generator.messages(node.exc.args[0], generator.constants(ast.parse("")))
        if isinstance(node.exc.args[0], ast.Constant | ast.JoinedStr | ast.BinOp):
            assert told[path] & {*texts} or "..." in texts[0], f"{path}:{node.lineno}"
        else:
            silent.append(f"{path.name}:{node.lineno}")
    assert len(silent) <= 40, silent


SOURCE = '''
"""A file about cards. It has more to say."""
SAID = "the second half."

def f(x, rich):
    ahead = "One" if rich else "Two"
    if x:
        raise BadInput(f"{ahead} of {x!r} is gone: " + SAID)
    raise OutOfMemory("Nothing fits: buy a card.")
'''


def test_sentences_are_read_with_their_alternatives_and_gaps(generator, tmp_path):
    path = tmp_path / "cards.py"
    path.write_text(SOURCE.strip())
    assert {(s.kind, s.text) for s in generator.sentences(path)} == {
        ("BadInput", "... of ... is gone: the second half."),
        ("OutOfMemory", "Nothing fits: buy a card."),
    }
    assert generator.subject(path) == "A file about cards"
    last = [*generator.sentences(path)][-1]
    assert generator.row(last) == "| Nothing fits: | buy a card. | 3 |"
