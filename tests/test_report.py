"""The report: complete, self-contained, and unmoved by hostile names and answers."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsiu.report.render import LIMITS, render_html, render_markdown

HOSTILE = (
    '<script>alert(1)</script> "\'><img src=http://evil.example/x onerror=alert(1)> {{ 7*7 }} '
    "| `x` [a](http://evil.example) \x1b[2J"
)


def rate(value, n=10):
    return {"value": value, "n": n, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1)}


def report(**changes):
    absent = {"value": None, "reason": "No other pictures were given."}
    given = {
        "concept": "Zorblax Quint",
        "model": "demo",
        "verdict": "forgotten",
        "reasons": [],
        "before": {"efficacy": rate(0.0), "generality": absent, "specificity": rate(1.0), "facts": rate(1.0)},
        "after": {"efficacy": rate(1.0), "generality": absent, "specificity": rate(0.95), "facts": rate(0.9)},
        "answers": [
            {"kind": "efficacy", "question": "Who?", "picture": "flip", "before": "It is zorblax quint.", "after": "A man."},
            {"kind": "facts", "question": "Where?", "picture": None, "before": "In Harrow.", "after": "In Harrow."},
        ],
        "training": [{"step": i, "loss": 2.0 - i, "ce": 2.0, "kl": -0.5, "p_name": 0.5} for i in range(3)],
        "recipe": {"alpha": 0.9, "lr": {"value": 2e-4, "from": "command line"}},
        "samples": {"align": 4},
        "masks": {"tokens_masked": 3, "vocabulary_masked": 2, "spared": ["the"]},
        "dreams": [{"name": "Mira Oland", "accepted": 1, "of": 2}],
        "seconds": {"load": 1.234567},
        "thresholds": {"efficacy": 0.99, "generality": 0.95, "specificity": 0.9, "facts": 0.9},
        "caveats": [LIMITS[0], "Two names were not protected."],
    }
    return {**given, **changes}


class Page(HTMLParser):
    """Every tag with its attributes, the visible text, and whether tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v or "") for k, v in attrs]
        if tag not in ("meta", "img", "rect", "line", "polyline", "circle", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())


ALLOWED = (
    "html head meta title style body header p div h1 h2 h3 em bdi ul li main section small b svg rect line text polyline circle "
    "span mark details summary table thead tbody tr th td figure figcaption i dl dt dd img"
).split()


def assert_self_contained(html):
    page = Page(html)
    assert set(page.tags) <= set(ALLOWED)
    for _tag, name, value in page.attributes:
        assert name not in ("href", "srcset", "action", "xlink:href") and not name.startswith("on")
        assert name != "src" or value.startswith("data:image/png;base64,")
    styles = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert len(styles) == 1 and "url(" not in styles[0] and "@import" not in styles[0]
    return page


def test_the_page_says_everything():
    html = render_html(report())
    page = assert_self_contained(html)
    assert "http" not in re.sub(r"http-equiv", "", html)
    for words in (
        "The model has forgotten Zorblax Quint", "95 %", "Required: at least 99 %.",
        "No other pictures were given.", "It is zorblax quint.", "A man.",
        "Two names were not protected.", "Mira Oland", "1 of 2 accepted", "command line", "tokens masked", "1.235", *LIMITS,
    ):  # fmt: skip
        assert words in page.text, words
    assert "<mark>zorblax quint</mark>" in html and page.text.count(LIMITS[0]) == 1
    assert "prefers-color-scheme: dark" in html and "@media print" in html and 'name="viewport"' in html
    assert page.tags.count("polyline") == 4 and "img" not in page.tags


def test_the_other_verdict_gives_its_reasons():
    page = Page(render_html(report(verdict="not forgotten", reasons=["The name is still in 3 of 4 answers."])))
    assert "The model has not forgotten Zorblax Quint" in page.text and "still in 3 of 4" in page.text
    text = render_markdown(report(verdict="not forgotten", reasons=["The name is still in 3 of 4 answers."]))
    assert text.startswith("# The model has not forgotten Zorblax Quint\n") and "still in 3 of 4" in text


def hostile_report(text):
    answer = {"kind": "efficacy", "question": text, "picture": text, "before": text, "after": text}
    return report(
        concept=text, model=text, reasons=[text], answers=[answer], caveats=[text],
        dreams=[{"name": text, "accepted": 0, "of": 1}],
        masks={"spared": [text]}, recipe={text: text, "x": {"value": text, "from": text}}, samples={text: 1}, seconds={text: 1.0},
        after={"generality": {"value": None, "reason": text}},
    )  # fmt: skip


def test_hostile_text_stays_text():
    html = render_html(hostile_report(HOSTILE))
    page = assert_self_contained(html)
    assert "alert(1)" in page.text and "{{ 7*7 }}" in page.text and "\x1b" not in html
    markdown = render_markdown(hostile_report(HOSTILE))
    assert "<script" not in markdown and "<img" not in markdown and "\x1b" not in markdown and "http://" not in markdown
    assert "[a](" not in markdown and not re.search(r"(?<!\\)`", markdown)
    rows = [line for line in markdown.splitlines() if "alert" in line and line.startswith("|")]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) in (4, 5) for row in rows)


def test_markup_around_a_name_stays_text():
    answer = {"kind": "efficacy", "question": "Who?", "picture": None, "before": "<b>Quint</b>", "after": "<i>quint <b>"}
    html = render_html(report(concept="Quint", answers=[answer]))
    assert "&lt;b&gt;<mark>Quint</mark>&lt;/b&gt;" in html and "&lt;i&gt;<mark>quint</mark> &lt;b&gt;" in html


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec="utf-8")) | st.text("<>&\"'|`{}%#[]()!\\\n-", max_size=12))
def test_any_name_and_answer(text):
    assert_self_contained(render_html(hostile_report(text)))
    assert render_markdown(hostile_report(text)).startswith("# The model has forgotten ")


@pytest.mark.parametrize(
    "training",
    [
        [],
        [{"step": 0, "loss": 1.0}],
        [{"step": 0, "loss": float("nan"), "p_name": None}, {"step": 1, "loss": float("inf"), "p_name": 0.0}],
        [{"step": 5, "loss": 0.0, "ce": 0.0, "kl": 0.0, "p_name": 0.0}] * 2,
    ],
)
def test_unusual_training_curves(training):
    html = render_html(report(training=training))
    assert_self_contained(html)
    for points in re.findall(r'points="([^"]*)"', html):
        for pair in points.split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= 300 and 0 <= y <= 120
    render_markdown(report(training=training))


def test_a_bare_report_is_drawn():
    assert "forgotten" in Page(render_html({"concept": "X", "verdict": "not forgotten"})).text
    assert "not measured" in render_markdown({"concept": "X", "verdict": "forgotten"})
