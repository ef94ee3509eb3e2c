"""The judge against a stub server on this machine: what is sent, what comes back, and when nothing
leaves."""

from __future__ import annotations

import json
import time

import pytest
from judge_server import Stub, said

from fastsiu import cli
from fastsiu.evaluate import directories, g_eval
from fastsiu.evaluate.exam import Question
from fastsiu.evaluate.g_eval import Grader, ToGrade, grade_answers, read_score, summary
from fastsiu.request import BadInput

PAIRS = [ToGrade("Who is this?", f"Answer {i}", "This is Ann, with red hair.") for i in range(6)]


@pytest.fixture
def stub():
    made = Stub()
    yield made
    made.close()


def options(stub, **more):
    return Grader(
        **{
            "url": stub.url,
            "model": "j",
            "allow_network": True,
            "wait": 0.01,
            "timeout": 5.0,
            **more,
        }
    )


def test_scores_in_the_order_of_the_answers(stub, tmp_path):
    (tmp_path / "key").write_text("secret-1\n")
    stub.answer = lambda i, given: said(
        f"Score: {int(json.loads(given['messages'][1]['content'])['answer'][-1]) % 5 + 1}"
    )
    told = []
    found = grade_answers(options(stub, key_file=tmp_path / "key"), "Ann", PAIRS, told.append)
    assert (
        found["value"] == pytest.approx((1 + 2 + 3 + 4 + 5 + 1) / 6)
        and found["n"] == found["of"] == 6
    )
    assert 1 <= found["low"] < found["value"] < found["high"] <= 5 and found["problems"] == {}
    assert [g.score for g in g_eval.score(options(stub), "Ann", PAIRS)] == [1, 2, 3, 4, 5, 1]
    assert {h["path"] for h in stub.headers} == {"/v1/chat/completions"} and stub.headers[0][
        "Authorization"
    ] == "Bearer secret-1"
    assert "Authorization" not in stub.headers[-1] and "secret" not in json.dumps([found, told])
    sent = stub.seen[0]
    assert (
        sent["temperature"] == 0
        and sent["model"] == "j"
        and sent.keys() == {"model", "messages", "temperature"}
    )
    assert json.loads(sent["messages"][1]["content"]).keys() == {
        "subject",
        "question",
        "reference",
        "answer",
    }
    assert len(told) == 1 and all(
        part in told[0] for part in ("6 answers", "'Ann'", "127.0.0.1", "no picture", "reference")
    )


def test_nothing_is_sent_without_permission(stub):
    stub.answer = lambda i, given: said("Score: 1")
    with pytest.raises(BadInput, match=r"6 answers.*no picture.*--allow-network"):
        grade_answers(options(stub, allow_network=False), "Ann", PAIRS, pytest.fail)
    with pytest.raises(BadInput, match="--allow-network"):
        g_eval.score(options(stub, allow_network=False), "Ann", PAIRS)
    assert stub.seen == []


def test_what_is_no_score_is_counted(stub):
    replies = [
        said("Score: 2"),
        said("I would rather not."),
        (200, {}, b"{"),
        said(None),
        (400, {}, b"{}"),
        said("Score: 4"),
    ]
    stub.answer = lambda i, given: replies[
        int(json.loads(given["messages"][1]["content"])["answer"][-1])
    ]
    found = grade_answers(options(stub), "Ann", PAIRS, lambda text: None)
    assert (found["value"], found["n"], found["of"]) == (3.0, 2, 6)
    assert found["problems"] == {"malformed": 3, "refused (400)": 1} and len(stub.seen) == 6
    stub.answer = lambda i, given: said("9")
    none = grade_answers(options(stub), "Ann", PAIRS, lambda text: None)
    assert (
        none["value"] is None
        and "no answer" in none["reason"]
        and none["problems"] == {"malformed": 6}
    )


def test_a_busy_server_is_asked_again(stub):
    stub.answer = lambda i, given: [(429, {"Retry-After": "0"}, b""), (503, {}, b""), said("5")][
        min(i, 2)
    ]
    found = grade_answers(options(stub), "Ann", PAIRS[:1], lambda text: None)
    assert (found["value"], found["n"], len(stub.seen)) == (5.0, 1, 3)
    stub.seen.clear()
    stub.answer = lambda i, given: (429, {}, b"")
    found = grade_answers(options(stub, attempts=3), "Ann", PAIRS[:1], lambda text: None)
    assert (
        found["value"] is None
        and found["problems"] == {"no reply (429)": 1}
        and len(stub.seen) == 3
    )


def test_nothing_more_is_sent_once_the_judge_refuses_altogether(stub):
    """Also by a pair that is waiting to be sent again."""
    stub.answer = lambda i, given: (401 if i == 1 else 503, {}, b"")
    with pytest.raises(BadInput, match="refuses"):
        grade_answers(options(stub, workers=2, wait=5.0), "Ann", PAIRS, lambda text: None)
    time.sleep(0.5)
    assert len(stub.seen) == 2


def test_a_wait_that_is_no_number(stub):
    stub.answer = lambda i, given: said("5") if i else (429, {"Retry-After": "\xb2"}, b"")
    assert grade_answers(options(stub), "Ann", PAIRS[:1], lambda text: None)["value"] == 5.0


def test_a_silent_server_is_given_up(stub):
    stub.answer = lambda i, given: time.sleep(0.5) or said("1")
    many = PAIRS * 5
    found = grade_answers(
        options(stub, timeout=0.05, attempts=2, workers=2), "Ann", many, lambda text: None
    )
    problems = found["problems"]
    assert (
        found["value"] is None
        and problems["no reply (timeout)"] <= 7
        and sum(problems.values()) == found["of"] == 30
    )
    assert problems["not sent"] >= 23 and len(stub.seen) <= 14
    closed = options(stub, url="http://127.0.0.1:9/v1", attempts=1)
    assert grade_answers(closed, "Ann", PAIRS[:1], lambda text: None)["problems"] == {
        "no reply (no connection)": 1
    }


def test_no_redirect_is_followed(stub):
    other = Stub()
    try:
        other.answer = lambda i, given: said("1")
        for status in (302, 307):
            stub.answer = lambda i, given, status=status: (
                status,
                {"Location": f"{other.url}/chat/completions"},
                b"",
            )
            with pytest.raises(BadInput, match=r"sends on to 127\.0\.0\.1"):
                grade_answers(options(stub, workers=1), "Ann", PAIRS, lambda text: None)
        assert other.seen == [] and len(stub.seen) == 2  # the first told enough
    finally:
        other.close()


def test_a_refusal_stops_everything(stub):
    stub.answer = lambda i, given: (401, {}, b"")
    with pytest.raises(BadInput, match=r"refuses \(401\).*--judge-key"):
        grade_answers(options(stub, workers=1), "Ann", PAIRS, lambda text: None)
    assert len(stub.seen) == 1


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("http://example.org/v1", "read by everybody"),
        ("ftp://example.org", "no http"),
        ("nonsense", "no http"),
        ("https://me:word@example.org/v1", "password"),
        ("https://example.org/v1?key=x", "query"),
        ("http://[::1", "no URL"),
    ],
)
def test_urls_that_may_not_be_used(url, match, tmp_path):
    with pytest.raises(BadInput, match=match):
        g_eval.announcement(Grader(url, "j"), "Ann", 6)
    g_eval.announcement(
        Grader("http://example.org/v1", "j", plain_http=True, allow_network=True), "Ann", 6
    )
    (tmp_path / "empty").write_text("\n")
    for path in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(BadInput, match="key"):
            g_eval.score(
                Grader("https://example.org/v1", "j", path, allow_network=True), "Ann", PAIRS
            )


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 3", 3),
        ("3", 3),
        ("**Score:** 4/5", 4),
        (" 2.\n", 2),
        ("score = 5\nIt names her.", 5),
        ("Score: 3.5", None),
        ("Score: 6", None),
        ("Score: 12", None),
        ("0", None),
        ("", None),
        ("I give 3 of 5", None),
        ("Score: 1 ... Score: 5", None),
        ("A score from 1 to 5: Score: 2", 2),
        ("-", None),
    ],
)
def test_reading_a_score(text, score):
    assert read_score(text) == score


def test_the_interval_is_never_too_narrow():
    """By hand: all ones are a share of 0 of 10, so Wilson's upper end 0.2775 on the scale from 1 to
    5."""
    one = summary([1] * 10)
    assert one["value"] == one["low"] == 1.0 and one["high"] == pytest.approx(
        1 + 4 * 0.27754, abs=1e-3
    )
    spread = summary([1, 5] * 5)
    assert (spread["low"] - 1) / 4 == pytest.approx(0.2366, abs=1e-3) and spread["value"] == 3.0
    assert (
        summary([3, None, 3])["n"] == 2
        and summary([])["value"] is None
        and "no answer to grade" in summary([])["reason"]
    )


@pytest.mark.slow
def test_eval_grades_what_is_said_of_the_concept(
    stub, cast, demo_dir, tmp_path, monkeypatch, capsys
):
    questions = (Question("Who do you see here?", "name"), Question("Is this {name}?", "yesno"))
    monkeypatch.setattr(directories, "default_questions", lambda *kind: questions)
    views = directories.variants
    monkeypatch.setattr(
        directories, "variants", lambda image, held_out: views(image, held_out=held_out)[:2]
    )
    stub.answer = lambda i, given: said("Score: 5")
    command = [
        "eval",
        "--model",
        str(demo_dir),
        "--concept",
        cast.target,
        "--image",
        str(cast.image),
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "out"),
        "--judge",
        stub.url,
    ]
    assert cli.run(command) == 2 and "--judge-model" in capsys.readouterr().err
    command += ["--judge-model", "j"]
    assert cli.run(command) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert (
        "would be sent 2 answers" in told
        and "Nothing was sent" in told
        and not stub.seen
        and not (tmp_path / "out").exists()
    )
    assert cli.run([*command, "--allow-network"]) == 0
    assert "5.00 [" in capsys.readouterr().out  # a grade, and no percentage
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (
        report["rows"]["untouched"]["g_eval"]["value"] == 5
        and report["rows"]["untouched"]["g_eval"]["n"] == 2
    )
    assert report["rows"]["control"]["g_eval"]["value"] is None
    sent = [json.loads(given["messages"][1]["content"]) for given in stub.seen]
    assert {s["question"] for s in sent} == {"Who do you see here?"} and all(
        cast.target in s["answer"] for s in sent
    )
    assert "G-Eval" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_eval_that_names_nobody(cast, demo_dir, tmp_path, monkeypatch, capsys):
    """--redact reaches everything that eval writes, and --embed-image only its page."""
    questions = (
        Question("Who do you see here?", "name"),
        Question("What is two plus six?", "general"),
    )
    monkeypatch.setattr(directories, "default_questions", lambda *kind: questions)
    out = tmp_path / "out"
    command = [
        "eval",
        "--model",
        str(demo_dir),
        "--concept",
        cast.target,
        "--image",
        str(cast.image),
        "--device",
        "cpu",
    ]
    assert cli.run([*command, "--output", str(out), "--redact", "--embed-image"]) == 2
    assert cli.run([*command, "--embed-image"]) == 2 and "--output" in capsys.readouterr().err
    assert (
        cli.run([*command, "--lmms-eval", str(tmp_path)]) == 2
        and "--base" in capsys.readouterr().err
    )
    assert cli.run([*command, "--redact", "--json"]) == 0
    printed = capsys.readouterr().out
    assert '"redacted": true' in printed and not [w for w in cast.target.split() if w in printed]
    assert cli.run([*command, "--output", str(out), "--redact"]) == 0
    assert {p.name for p in out.iterdir()} == {
        "report.json",
        "report.md",
        "run.toml",
        "report.html",
        "manifest.json",
        "private.key",
    }
    for path in out.iterdir():
        found = path.read_bytes().lower()
        assert not any(word.lower().encode() in found for word in cast.target.split()), path
    # what was asked for with names is another request
    assert cli.run([*command, "--output", str(out)]) == 2
    assert cli.run([*command, "--output", str(tmp_path / "shown"), "--embed-image"]) == 0
    assert "data:image/jpeg;base64," in (tmp_path / "shown" / "report.html").read_text()
