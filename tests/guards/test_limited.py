"""Templates and patterns from outside: those that end pass, those that do not are told in a
sentence."""

from __future__ import annotations

import pytest

from fastsiu.guards import limited
from fastsiu.guards.limited import check_patterns, check_template
from fastsiu.request import BadInput

NAMES = [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(40)]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(limited, "SECONDS", 1.0)


@pytest.mark.parametrize(
    "template",
    [
        "{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% "
        "endfor %}{{ n.x }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 2000000000 }}",
        "{{ 'ab' * 1000000 }}",
        "{% if messages[0]['content'][0]['text'] | length > 99 %}{{ 'a' * 10 ** 10 }}{% endif %}",
    ],
)
def test_a_template_that_does_not_end(template):
    with pytest.raises(BadInput, match="chat template takes more than 1 s or 1024 MB"):
        check_template(template, {})


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{{ bos_token }}{% for m in messages %}{{ m['content'] | tojson }}{% endfor %}",
        "{{ raise_exception('no system') }}",
        "{% generation %}{{ messages }}{% endgeneration %}{% break %}",
        "{{ nothing.there.at.all }}",
    ],
)
def test_a_template_that_ends_or_fails_by_itself(template):
    check_template(template, {"bos_token": "<s>"})


def test_one_template_is_tried_once(monkeypatch):
    ran, run = [], limited._run
    monkeypatch.setattr(limited, "_run", lambda *given: ran.append(1) or run(*given))
    for _ in range(3):
        check_template("{{ messages }} once", {"eos_token": "</s>"})
    check_template("{{ messages }} once", {"eos_token": "<end>"})
    assert len(ran) == 2


@pytest.mark.parametrize(
    "pattern", ["(a|a|.)*(b|.)*(.*)*$x", "(.*)*(.*)*!", "((l|a|y|e|r|s|.)+)+!"]
)
def test_a_pattern_that_takes_years(pattern):
    with pytest.raises(BadInput, match="takes more than 1 s on the model's layers"):
        check_patterns([pattern], NAMES, "adapter_config.json")


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "(?P<a>x)(?P<a>y)"])
def test_what_is_no_pattern(pattern):
    with pytest.raises(BadInput, match="adapter_config.json is no regular expression"):
        check_patterns(["fine", pattern], NAMES, "adapter_config.json")


def test_patterns_as_they_are_used():
    usual = [r".*\.(q_proj|v_proj)$", r"(?:.*?(?:language|text).*?(?:q_proj|k_proj).*?)", "q_proj"]
    check_patterns(usual, NAMES, "adapter_config.json")
    check_patterns([], NAMES, "adapter_config.json")
