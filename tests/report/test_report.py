"""The report: complete, self-contained, and unmoved by hostile names and answers."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reports import evaluation, family, rate, report

from fastsiu.report import render
from fastsiu.report.plot import HEIGHT, WIDTH, chart, trade_off
from fastsiu.report.render import FEW, LIMITS, render_html, render_markdown
from fastsiu.report.summary import inside as attacked_inside
from fastsiu.report.summary import standing
from fastsiu.report.words import METRICS

HOSTILE = (
    "<script>alert(1)</script> \"'><img src=http://evil.example/x onerror=alert(1)> {{ 7*7 }} "
    "| `x` [a](http://evil.example) \x1b[2J"
)


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
    "html head meta title style body header p div h1 h2 h3 em bdi ul li main section small b svg "
    "rect line text polyline circle "
    "span mark details summary table thead tbody tr th td figure figcaption i dl dt dd img"
).split()


def assert_self_contained(html):
    page = Page(html)
    assert set(page.tags) <= set(ALLOWED)
    for _tag, name, value in page.attributes:
        assert name not in ("href", "srcset", "action", "xlink:href") and not name.startswith("on")
        assert name != "src" or value.startswith("data:image/jpeg;base64,")
    styles = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert len(styles) == 1 and "url(" not in styles[0] and "@import" not in styles[0]
    return page


def test_the_page_says_everything():
    html = render_html(report())
    page = assert_self_contained(html)
    assert "http" not in re.sub(r"http-equiv", "", html)
    for words in (
        "The model has forgotten Zorblax Quint",
        "95 %",
        "Required: at least 99 %.",
        "No other pictures were given.",
        "It is zorblax quint.",
        "A man.",
        "Two names were not protected.",
        "Mira Oland",
        "1 of 2 accepted",
        "command line",
        "tokens masked",
        "1.235",
        *LIMITS,
    ):
        assert words in page.text, words
    assert "<mark>zorblax quint</mark>" in html and page.text.count(LIMITS[0]) == 1
    assert (
        "prefers-color-scheme: dark" in html
        and "@media print" in html
        and 'name="viewport"' in html
    )
    assert page.tags.count("polyline") == 4 and "img" not in page.tags


def test_the_other_verdict_gives_its_reasons():
    page = Page(
        render_html(
            report(verdict="not forgotten", reasons=["The name is still in 3 of 4 answers."])
        )
    )
    assert (
        "The model has not forgotten Zorblax Quint" in page.text and "still in 3 of 4" in page.text
    )
    text = render_markdown(
        report(verdict="not forgotten", reasons=["The name is still in 3 of 4 answers."])
    )
    assert (
        text.startswith("# The model has not forgotten Zorblax Quint\n")
        and "still in 3 of 4" in text
    )


def hostile_report(text):
    answer = {"kind": "efficacy", "question": text, "picture": text, "before": text, "after": text}
    return report(
        concept=text,
        model=text,
        reasons=[text],
        answers=[answer],
        caveats=[text],
        dreams=[{"name": text, "accepted": 0, "of": 1}],
        masks={"spared": [text]},
        recipe={text: text, "x": {"value": text, "from": text}},
        samples={text: 1},
        seconds={text: 1.0},
        after={"generality": {"value": None, "reason": text}},
    )


def test_hostile_text_stays_text():
    html = render_html(hostile_report(HOSTILE))
    page = assert_self_contained(html)
    assert "alert(1)" in page.text and "{{ 7*7 }}" in page.text and "\x1b" not in html
    markdown = render_markdown(hostile_report(HOSTILE))
    assert (
        "<script" not in markdown
        and "<img" not in markdown
        and "\x1b" not in markdown
        and "http://" not in markdown
    )
    assert "[a](" not in markdown and not re.search(r"(?<!\\)`", markdown)
    rows = [line for line in markdown.splitlines() if "alert" in line and line.startswith("|")]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) in (4, 5) for row in rows)


def test_markup_around_a_name_stays_text():
    answer = {
        "kind": "efficacy",
        "question": "Who?",
        "picture": None,
        "before": "<b>Quint</b>",
        "after": "<i>quint <b>",
    }
    html = render_html(report(concept="Quint", answers=[answer]))
    assert (
        "&lt;b&gt;<mark>Quint</mark>&lt;/b&gt;" in html
        and "&lt;i&gt;<mark>quint</mark> &lt;b&gt;" in html
    )


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
        [
            {"step": 0, "loss": float("nan"), "p_name": None},
            {"step": 1, "loss": float("inf"), "p_name": 0.0},
        ],
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


# --------------------------------------------------------------------------------------------------
# evaluations


def test_an_evaluation_explains_every_metric():
    html = render_html(evaluation())
    page = assert_self_contained(html)
    for words in (
        "The model has forgotten Zorblax Quint",
        "Asked 20 times who the training picture shows, the model gave the name "
        "20 times before and 0 times after.",
        "Of 20 answers about pictures of anything else, 19 stayed the same.",
        "-8.25",
        "-9.5",
        METRICS["Is it gone below the surface, too?"]["rank"].meaning,
        "No answers of this kind were collected.",
        "org/model-7b",
        "the level that forgetting should reach",
        *LIMITS,
    ):
        assert words in page.text, words
    # null in every row: told once, with the reason, and not in the table
    assert page.text.count("Group pictures") == 1
    text = render_markdown(evaluation())
    for words in (
        "| Rank of the name (rank) | 12.5, n = 20 | 12.5, n = 20 | 12.5, n = 20 |",
        "19 stayed the same",
        "-8.25",
    ):
        assert words in text, words
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert tables and all(
        len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
        for table in tables
    )


def test_what_is_kept_is_told_beside_the_noise_floor():
    given = report(noise="rounded", thresholds={"facts": 0.9, "lost": 0.4})
    given["before"]["facts"], given["after"]["facts"] = rate(0.95, 20), rate(0.9, 20)
    said = "18 were kept; the untouched model computed in bfloat16 keeps 19."
    for text in (Page(render_html(given)).text, render_markdown(given)):
        assert said in text and "by no more than 0.4 nats" in text and "stayed the same" not in text
    assert "85.5 %" in render_markdown(given)  # 90 % of 95 % are required
    given["noise"] = "reordered"
    assert "asked in another order keeps 19" in render_markdown(given)
    assert "stayed the same" in render_markdown(report()) and "nats" not in render_markdown(
        report()
    )


def test_the_box_of_the_plot_is_what_is_demanded_of_what_noise_keeps():
    limits = {"efficacy": 0.99, "facts": 0.9}
    given = report(thresholds=limits)
    for side in ("before", "after"):
        del given[side]["specificity"]
    narrow = trade_off(given)
    given["before"]["facts"] = rate(0.9)
    wide = trade_off(given)
    assert narrow["least"] == (0.9, 0.99) and wide["least"] == (pytest.approx(0.81), 0.99)
    assert wide["box"][0] < narrow["box"][0] and wide["box"][2] > narrow["box"][2]


def test_an_answer_that_is_kept_is_no_example_of_what_went_wrong():
    answer = {
        "kind": "facts",
        "question": "?",
        "picture": None,
        "before": "A red cat.",
        "after": "D.",
    }
    wanted = lambda **changes: render._as_wanted({**answer, **changes}, None)
    assert not wanted() and not wanted(lost=0.3) and wanted(lost=0.2)
    assert wanted(after="a red cat. And") and wanted(after="A red c", cut=[False, True])
    assert not wanted(after="A red c")


def test_a_metric_without_an_explanation_is_shown_all_the_same():
    given = evaluation()
    given["rows"]["unlearned"]["<new>"] = {"value": 0.123, "n": 3}
    assert (
        "&lt;new&gt;" in render_html(given)
        and "0.123" in render_html(given)
        and "0.123" in render_markdown(given)
    )


@pytest.mark.parametrize(
    "changes", [{"verdict": None}, {"verdict": "not forgotten", "reasons": ["Only one was asked."]}]
)
def test_nothing_was_unlearned(changes):
    asked = [
        {
            "kind": "efficacy",
            "question": "Who?",
            "picture": "a.png",
            "before": "Zorblax.",
            "after": "Zorblax.",
        }
    ]
    given = evaluation(answers=asked, **changes)
    del given["rows"]["unlearned"]
    page, text = assert_self_contained(render_html(given)), render_markdown(given)
    assert (
        "What the model knows of Zorblax Quint" in page.text
        and "has" not in page.text.split("In short")[0][:60]
    )
    assert (
        "Forgotten, and" not in page.text
        and "was required" not in page.text
        and "| Who? | a.png | Zorblax. |" in text
    )
    assert text.startswith("# What the model knows of Zorblax Quint")


def test_of_many_answers_a_few_come_first_and_the_failure_before_them():
    html = render_html(evaluation())
    first, rest = html.split("All 20 answers</h2>")
    assert (
        "3 of 20" in first
        and first.count("view ") == 3
        and first.index("view 7)") < first.index("view 0)")
    )
    assert rest.count("view ") == 20 and "<details>" in rest and "<details open>" not in rest
    few = render_html(evaluation(answers=evaluation()["answers"][:FEW]))
    assert few.count("view ") == FEW and "<details>" not in few


def test_answers_of_every_kind_are_listed():
    answer = lambda kind: {
        "kind": kind,
        "question": f"Q {kind}?",
        "picture": None,
        "before": "b",
        "after": "a",
    }
    answers = [answer("yesno"), answer("new kind")]
    for text in (render_html(report(answers=answers)), render_markdown(report(answers=answers))):
        assert "Q yesno?" in text and "Q new kind?" in text


def test_an_alias_counts_as_the_name():
    answer = {
        "kind": "efficacy",
        "question": "Who?",
        "picture": None,
        "before": "The Blue One.",
        "after": "It.",
    }
    assert "<mark>Blue One</mark>" in render_html(report(answers=[answer], aliases=["blue one"]))


def inside(point, box):
    return box[0] <= point["x"] <= box[0] + box[2] and box[1] <= point["y"] <= box[1] + box[3]


@pytest.mark.parametrize(
    "changed, met",
    [
        ({}, True),
        ({"efficacy": 0.97}, False),
        ({"efficacy": 0.97, "generality": 0.96}, False),
        ({"generality": 0.94}, False),
        ({"generality": 0.96}, True),
        ({"facts": 0.5}, False),
        ({"specificity": 0.89}, False),
        ({"recognition": 0.6}, False),
        ({"efficacy": 0.99, "generality": 0.95, "facts": 0.9}, True),
    ],
)
def test_a_point_is_in_the_box_where_every_share_is_met(changed, met):
    after = {
        k: rate(v)
        for k, v in ({"efficacy": 1.0, "specificity": 0.95, "facts": 0.9} | changed).items()
    }
    limits = {
        "efficacy": 0.99,
        "generality": 0.95,
        "recognition": 0.9,
        "specificity": 0.9,
        "facts": 0.9,
    }
    before = {k: rate(1.0 if k in ("specificity", "facts") else 0.0) for k in after}
    drawn = trade_off(report(before=before, after=after, thresholds=limits))
    points = {p["who"]: p for p in drawn["points"]}
    assert inside(points["unlearned"], drawn["box"]) is met and not inside(
        points["untouched"], drawn["box"]
    )
    assert all(0 <= p["x"] <= WIDTH and 0 <= p["y"] <= HEIGHT for p in points.values())
    assert points["untouched"]["y"] > points["unlearned"]["y"]  # further down: less is gone


def test_the_control_is_a_level_where_nothing_of_it_is_kept():
    points = {p["who"]: p for p in trade_off(evaluation())["points"]}
    assert points["control"]["gone"] == pytest.approx(0.98) and points["control"]["kept"] is None
    assert 'class="level"' in render_html(evaluation()) and 'class="level"' not in render_html(
        report()
    )
    from_rows = {k: v for k, v in evaluation().items() if k not in ("before", "after")}
    assert {p["who"] for p in trade_off(from_rows)["points"]} == {
        "untouched",
        "unlearned",
        "control",
    }
    assert trade_off({"concept": "X"}) is None


def test_a_merged_model_in_every_precision():
    forms = [
        {"dtype": "bfloat16", "verdict": "forgotten", "reasons": [], "after": report()["after"]},
        {
            "dtype": "nf4",
            "verdict": "not forgotten",
            "reasons": ["It is back."],
            "after": {"efficacy": rate(0.25)},
        },
        {"dtype": "int8", "verdict": None, "reason": "bitsandbytes is missing: install it."},
    ]
    page, text = (
        assert_self_contained(render_html(report(merged=forms))),
        render_markdown(report(merged=forms)),
    )
    for words in ("bfloat16", "nf4", "not forgotten", "25 %", "not asked: bitsandbytes is missing"):
        assert words in page.text and words in text, words
    # there is no adapter that could be dropped
    assert LIMITS[0] not in page.text and LIMITS[1] in page.text
    assert "precision" not in render_markdown(report())


# --------------------------------------------------------------------------------------------------
# the picture


def test_the_picture_is_small_bare_and_only_in_the_page(tmp_path):
    from fastsiu.output import write_reports

    exif = Image.Exif()
    exif[0x010E] = "secret place"
    Image.new("RGB", (900, 600), "red").save(
        tmp_path / "x.jpg", exif=exif, comment=b"secret place", icc_profile=b"secret place"
    )
    picture = Image.open(tmp_path / "x.jpg")
    assert "secret place" in str(picture.info)
    write_reports(tmp_path, report(), picture=picture)
    html = (tmp_path / "report.html").read_text()
    assert_self_contained(html)
    assert (
        "img-src data:;" in html
        and html.count("<img") == 1
        and 'alt="The picture that was trained on"' in html
    )
    data = base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])
    shown = Image.open(io.BytesIO(data))
    assert shown.size == (512, 341) and b"secret" not in data and not shown.getexif()
    assert shown.getpixel((200, 200))[0] > 200
    for name in ("report.json", "report.md"):
        assert "base64" not in (tmp_path / name).read_text()
    assert picture.size == (900, 600)
    assert "img-src" not in render_html(report())


@pytest.mark.parametrize(
    "share, words",
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.99, "99 %"),
        (0.9996, ">99.9 %"),
        (0.0001, "<0.1 %"),
        (0.075, "7.5 %"),
        (0.0005, "0.1 %"),
    ],
)
def test_what_is_not_all_is_not_rounded_to_all(share, words):
    from fastsiu.report.render import _percent

    assert _percent(share) == words


FAILED = [family(), family("naming", 0.0), family("languages", 0.0, applicable=False)]


def test_families_are_shown_worst_first_with_what_was_not_asked():
    given = evaluation(verdict="not forgotten", reasons=["It still tells."], families=FAILED)
    page, text = assert_self_contained(render_html(given)), render_markdown(given)
    told = (
        "Not forgotten: in 1 of 2 families of questions",
        "Asked for its facts without its name",
        "Whether a probe of the model",
        "What remains in any case: the adapter can be dropped or scaled",
    )
    for words in told:
        assert words in page.text and words in text, words
    assert "Where was this one born?" in page.text
    assert text.index("(two-hop)") < text.index("(naming)") < text.index("(languages)")
    assert (
        "not applicable" in text
        and "Not applicable" in page.text
        and "too much" in text
        and "as strangers" in text
    )
    assert "Can it be got back" not in render_markdown(
        report()
    ) and "Can it be got back" not in render_html(report())


def deep(attack, setting, side, value, low=None, reason=None):
    return {
        "attack": attack,
        "setting": setting,
        "side": side,
        "value": value,
        "n": 8,
        "low": low,
        "high": low,
        "reason": reason,
    }


INSIDE = [
    deep("probe", "logit lens, layer 2 of 3, name first", "untouched", 1.0, 0.9),
    deep("probe", "logit lens, layer 2 of 3, name first", "unlearned", 0.25, 0.1),
    deep("probe", "logit lens, layer 2 of 3, mean rank of 16", "unlearned", 4.69),
    deep("mia", "which picture: AUC by KL", "unlearned", 0.45, 0.2),
    deep("relearn", "1 picture, rate 0.001, 3 steps", "unlearned", 0.0, 0.0),
    deep("relearn", "1 picture, rate 0.001, steps to 50%", "unlearned", 12),
    deep(
        "relearn",
        "trained on pictures of others, rate 0.001, 30 steps",
        "unlearned",
        None,
        reason="There are no <others>.",
    ),
]


def test_attacks_from_inside_have_a_line_for_each_setting():
    lines = {one.setting: one for one in attacked_inside({"inside": INSIDE})}
    assert len(lines) == 6
    assert lines["logit lens, layer 2 of 3, name first"].cells == {
        "untouched": "100 %",
        "unlearned": "25 %",
        "control": "",
    }
    assert lines["logit lens, layer 2 of 3, mean rank of 16"].cells["unlearned"] == "4.69"
    assert lines["which picture: AUC by KL"].cells["unlearned"] == "0.45"  # no share
    assert lines["trained on pictures of others, rate 0.001, 30 steps"].cells["unlearned"] == "none"
    brief = [one.setting for one in attacked_inside({"inside": INSIDE}, brief=True)]
    assert brief == [setting for setting in lines if setting != "1 picture, rate 0.001, 3 steps"]
    page, text = render_html(evaluation(inside=INSIDE)), render_markdown(evaluation(inside=INSIDE))
    for told in (page, text):
        assert all(setting in told for setting in lines) and "<others>" not in told
    assert "from inside" not in render_html(evaluation()) + render_markdown(evaluation())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"families": []}, "Forgotten as far as it was asked"),
        (
            {},
            "Forgotten: in 2 families of questions on this picture and its transforms the model "
            "answers as it does about",
        ),
        ({"verdict": "not forgotten", "families": FAILED}, "Not forgotten: in 1 of 2 families"),
        ({"verdict": "not forgotten", "families": []}, "Not forgotten: see the reasons."),
        ({"verdict": None}, ""),
    ],
)
def test_the_first_sentence_says_no_more_than_was_asked(changes, said):
    given = evaluation(**changes)
    assert standing(given).startswith(said) and bool(standing(given)) is bool(said)
    more = evaluation(after={**given["after"], "generality": given["after"]["efficacy"]})
    assert "on this picture, its transforms and other pictures of it the" in standing(more)


@pytest.mark.parametrize("least, low", [(-8.5e-12, 0.0), (0.5, 0.0), (-0.4, -0.4)])
def test_an_axis_ends_at_zero_where_only_rounding_is_below_it(least, low):
    rows = [{"step": 1, "kl": 2.2}, {"step": 2, "kl": least}]
    assert chart(rows, ("kl",))["low"] == low
