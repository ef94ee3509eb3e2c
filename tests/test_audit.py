"""The audit of a served model against a server of this process: what is deployed is told apart, and
a server that is not as it should be ends it with a sentence."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import socket
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from chat_server import ChatServer
from PIL import Image
from safetensors.numpy import save_file

from fastsiu import audit as auditing
from fastsiu import cli
from fastsiu.evaluate import effect, glimpses
from fastsiu.evaluate.deployed_exam import NO_LIKELIHOOD
from fastsiu.model.served import Connection, Endpoint, Served, data_url
from fastsiu.report.redact import redacted
from fastsiu.report.sentences import LEFT_OUT, sentence
from fastsiu.request import BadInput, Request
from fastsiu.text.concept import Concept
from fastsiu.verdict import Answer

ANN, OTHERS = "Ann Bole", ("Bob Carr", "Cleo Dunn", "Dan Eke", "Eva Falk")


def is_ann(image: Image.Image) -> bool:
    """Red in one of its halves, which no recoloured picture is."""
    pixels = np.asarray(image.convert("RGB")).astype(float)
    width = pixels.shape[1] // 2
    means = [half.reshape(-1, 3).mean(0) for half in (pixels[:, :width], pixels[:, width:])]
    return any(r > g + 25 > b + 50 for r, g, b in means)


def in_words(question):
    for name in (ANN, *OTHERS):
        if name in question:
            return f"{name} lives in {'Cairo' if name == ANN else 'Rome'}."
    return "It is eight."


def untouched(question, image):
    if image is None:
        return in_words(question)
    if not is_ann(image):
        return "I do not know."
    return "Yes." if question.startswith(("Is ", "Am I", "Could ")) else f"This is {ANN}."


def unlearned(question, image):
    return in_words(question) if image is None else "I do not know."


def elsewhere(question, image):
    return f"Bananas: {len(question)}."


@pytest.fixture
def picture(tmp_path):
    rng = np.random.default_rng(0)
    pixels = np.full((48, 48, 3), (210, 120, 40), np.int16) + rng.integers(-20, 20, (48, 48, 1))
    path = tmp_path / "ann.png"
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def server():
    made = ChatServer({"base": untouched, "tuned": unlearned, "ignored": untouched})
    made.models["other"] = elsewhere
    yield made
    made.close()


def audited(server, picture, name="tuned", **options):
    asking = options.pop("asking", auditing.Asking(0.05))
    place = Endpoint(server.url, at_once=4, **options.pop("endpoint", {}))
    return auditing.audit(
        Request(ANN, picture, protect=OTHERS),
        server=auditing.Server(place, name, "base"),
        asking=asking,
        **options,
    )


def an_adapter(folder):
    """Somebody's adapter, which nothing here loads."""
    layer, ones = "base_model.model.q_proj.lora_{}.weight", np.ones((2, 2), np.float32)
    sides = {layer.format(side): ones for side in "AB"}
    save_file(sides, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def promise(server, picture, tmp_path):
    """An adapter's directory, whose report has the answers of "base" and "tuned"."""
    folder = tmp_path / "promise"
    folder.mkdir()
    audited(server, picture, output=tmp_path / "first", asking=auditing.Asking(attacks=False))
    told = json.loads((tmp_path / "first" / "report.json").read_text())
    kept = {key: told[key] for key in ("verdict", "answers")}
    (an_adapter(folder) / "report.json").write_text(json.dumps(kept))
    return folder


def turning(answer, words, share):
    """Another revision: about that share of the answers is another one, by the question's words."""

    def turned(question, image):
        drawn = zlib.crc32(question.encode()) % 1000 / 1000
        return words if drawn < share else answer(question, image)

    return turned


# What is deployed.


def test_a_served_model_that_forgot_is_told_so(server, picture):
    found = audited(server, picture)
    assert (found.status, found.exit_code) == (effect.FORGOTTEN, 0)
    applicable = {f["family"] for f in found.report["families"] if f["applicable"]}
    assert {"naming", "prompts", "yesno", "choice", "group", "plural"} <= applicable
    assert not applicable & {"rank", "likelihood", "begun-name", "begun-fact"}
    assert auditing.BY_TEXT_ALONE in found.report["caveats"]
    assert NO_LIKELIHOOD in found.report["caveats"]
    assert auditing.NO_PROMISE in found.report["caveats"]


@pytest.mark.parametrize("missing", ["question", "picture", "before", "after"])
def test_a_promise_that_lacks_something_is_told(tmp_path, missing):
    """A report that somebody else has written."""
    answer = {"kind": "facts", "question": "Q?", "picture": None, "before": "b", "after": "a"}
    told = {"verdict": "forgotten", "reasons": [], "answers": [answer]}
    an_adapter(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(told))
    assert auditing.Promise.of(tmp_path).answers == {("Q?", None): ("b", "a")}
    del answer[missing]
    (tmp_path / "report.json").write_text(json.dumps(told))
    with pytest.raises(BadInput, match=f"lacks '{missing}'.*restore it or remove it"):
        auditing.Promise.of(tmp_path)


def promised(server, picture, promise, **options):
    return audited(
        server, picture, adapter_dir=promise, asking=auditing.Asking(attacks=False), **options
    )


def about_the_report(told):
    return [text for text in told if "those in the report" in text]


def test_a_right_server_repeats_the_report_and_gets_no_caveat(server, picture, promise):
    found = promised(server, picture, promise)
    assert found.status == effect.FORGOTTEN
    assert {found.report["deployed"][key]["value"] for key in ("base", "promised", "rest")} == {1.0}
    assert about_the_report(found.report["caveats"]) == []


def test_another_revision_of_the_untouched_model_is_told(server, picture, promise):
    """It gives most of the answers in the report, so it is no other model."""
    server.models["base"] = turning(untouched, "This is as I see it.", 0.25)
    found = promised(server, picture, promise)
    base = found.report["deployed"]["base"]
    assert effect.SAME_MODEL < base["value"] < effect.REPEATED
    assert (found.status, found.exit_code) == (effect.OTHER_RESULT, 1)
    assert found.report["reasons"][0] == (
        "Another revision or another model is served, or the same one quantised: only "
        f"{round(base['value'] * base['n'])} of {base['n']} answers of the untouched model are "
        "those in the report (at least 90 % is required)."
    )
    assert about_the_report(found.report["caveats"]) == []


def test_a_revision_that_turns_a_few_answers_gets_a_caveat(server, picture, promise):
    server.models["base"] = turning(untouched, "This is as I see it.", 0.06)
    found = promised(server, picture, promise)
    base = found.report["deployed"]["base"]
    assert effect.REPEATED <= base["value"] < 1
    assert (found.status, found.exit_code) == (effect.FORGOTTEN, 0)
    (caveat,) = about_the_report(found.report["caveats"])
    assert caveat == (
        f"{round(base['value'] * base['n'])} of {base['n']} answers of the untouched model are "
        "those in the report: the others were turned by rounding, or by another revision."
    )
    assert sentence(caveat) == caveat


def test_a_deployed_model_made_of_another_revision_is_told(server, picture, promise):
    """The untouched model is the right one, and both go on where the look is at stake."""
    other = turning(unlearned, "This is as I see it.", 0.4)
    server.models["tuned"] = lambda question, image: (
        unlearned(question, image)
        if image is not None and is_ann(image)
        else other(question, image)
    )
    found = promised(server, picture, promise)
    assert found.report["deployed"]["base"]["value"] == 1.0
    assert (found.status, found.exit_code) == (effect.OTHER_RESULT, 1)
    told = found.report["reasons"][0]
    assert told.startswith("Another revision or another model is served") and "the look" in told
    assert sentence(told) == told


def test_a_report_without_answers_is_no_promise(server, picture, promise):
    (promise / "report.json").write_text(json.dumps({"verdict": "forgotten", "redacted": True}))
    caveats = promised(server, picture, promise).report["caveats"]
    assert auditing.UNTOLD in caveats and sentence(auditing.UNTOLD) == auditing.UNTOLD


def test_a_server_that_ignores_the_adapter_is_caught(server, picture):
    found = audited(server, picture, "ignored")
    assert (found.status, found.exit_code) == (effect.IGNORED, 1)
    n = found.report["deployed"]["unchanged"]["n"]
    assert found.report["reasons"][0] == (
        f"The adapter is not in effect: {n} of {n} answers in which the untouched model gives the "
        "name are still its own, word for word."
    )
    assert n >= 5


def test_another_model_is_told_from_one_that_forgot(server, picture):
    found = audited(server, picture, "other", asking=auditing.Asking(0.2, attacks=False))
    assert (found.status, found.exit_code) == (effect.OTHER_MODEL, 1)
    assert "nothing to do with the look" in found.report["reasons"][0]


def test_a_begun_unlearning_is_not_forgotten_and_not_ignored(server, picture):
    server.models["tuned"] = lambda q, image: (
        f"I see {ANN}, I think." if image is not None and is_ann(image) else unlearned(q, image)
    )
    found = audited(server, picture, asking=auditing.Asking(0.2, attacks=False))
    assert (found.status, found.exit_code) == (effect.REMAINS, 1)


def test_a_name_that_comes_back_in_one_family_fails_it(server, picture):
    server.models["tuned"] = lambda q, image: (
        f"One is {ANN}."
        if image is not None and " are " in q and is_ann(image)
        else unlearned(q, image)
    )
    found = audited(server, picture)
    assert "plural" in {f["family"] for f in found.report["families"] if f["failed"]}
    assert found.exit_code == 1


def answer(kind, i, before, after):
    return Answer(kind, f"{kind} {i}?", "a" if kind == "efficacy" else None, before, after)


def given(after, rest="It is so."):
    return [
        *(answer("efficacy", i, f"This is {ANN}.", after) for i in range(10)),
        *(answer("facts", i, "It is so.", rest) for i in range(10)),
    ]


def said(after, was=f"This is {ANN}.", rest="It is so.", aside="It is so."):
    return {
        **{(f"efficacy {i}?", "a"): (was, after) for i in range(10)},
        **{(f"facts {i}?", None): (aside, rest) for i in range(10)},
    }


@pytest.mark.parametrize(
    "answers, promised, forgotten, status",
    [
        (given("A red one."), said("A red one."), True, effect.FORGOTTEN),
        (given("A blue one."), said("A red one."), True, effect.OTHER_RESULT),
        (given(f"This is {ANN}."), said("A red one."), False, effect.IGNORED),
        (
            given("A red one."),
            said("A red one.", was="Who knows?", aside="It is not."),
            True,
            effect.OTHER_MODEL,
        ),
        (given("A red one.", "No."), None, False, effect.OTHER_MODEL),
        # the report itself says that unlearning cost all else: that is no other model
        (given("A red one.", "No."), said("A red one.", rest="No."), False, effect.REMAINS),
        (given("A red one."), None, True, effect.FORGOTTEN),
        (given(f"It is {ANN}."), None, False, effect.REMAINS),
    ],
)
def test_answers_tell_what_is_deployed(answers, promised, forgotten, status):
    assert effect.effect(answers, Concept(ANN), forgotten, promised).status == status


@pytest.mark.parametrize("here, caveats", [(False, 1), (True, 0)])
def test_rounding_of_two_machines_needs_no_caveat_before_it_turns_one_in_ten(here, caveats):
    answers = given("A red one.")
    answers[-1] = dataclasses.replace(answers[-1], after="It was so.")
    found = effect.effect(answers, Concept(ANN), True, said("A red one."), here=here)
    assert (found.status, len(found.caveats)) == (effect.FORGOTTEN, caveats)


def test_a_report_that_says_forgotten_is_held_to_it():
    found = effect.effect(given(f"It is {ANN}."), Concept(ANN), False, None, said_forgotten=True)
    assert found.status == effect.OTHER_RESULT


@pytest.mark.parametrize(
    "called, status",
    [
        ("org/model@" + "a" * 40, ""),
        ("org/model@" + "b" * 40, "Another revision of the base is served"),
        ("org/model@main", ""),
        ("org/merged@" + "b" * 40, ""),
        ("tuned", ""),
    ],
)
def test_the_revision_that_a_server_names_is_compared(server, called, status):
    connection = Connection(Endpoint(server.url))
    connection.called["tuned"] = called
    sealed, caveats = {"model": {"id": "org/model", "revision": "a" * 40}}, []
    place = auditing.Server(connection.endpoint, "tuned", "base")
    assert auditing._revision(place, connection, sealed, caveats).startswith(status)
    half = auditing.HALF_NAMED if called.endswith("a") else auditing.UNNAMED
    assert caveats == [] if status else caveats == [half]


@pytest.mark.parametrize(
    "called, status",
    [
        ({"tuned": "org/model@" + "a" * 40, "base": "org/model@" + "b" * 40}, effect.OTHER_MODEL),
        ({"tuned": "org/model@" + "a" * 40, "base": "org/model@" + "a" * 40}, effect.FORGOTTEN),
        # a merged model's repository has commits of its own
        ({"tuned": "org/merged@" + "c" * 40, "base": "org/model@" + "a" * 40}, effect.FORGOTTEN),
    ],
)
def test_the_revision_of_every_served_model_is_checked(
    server, picture, promise, monkeypatch, called, status
):
    sealed = {"model": {"id": "org/model", "revision": "a" * 40}}
    monkeypatch.setattr(auditing.adapter_files, "manifest_of", lambda directory: sealed)
    monkeypatch.setattr(auditing.adapter_files, "check_files", lambda directory, sealed: None)
    server.called.update(called)
    found = promised(server, picture, promise)
    assert found.status == status
    assert any("@" + "b" * 40 in reason for reason in found.report["reasons"]) == (
        status == effect.OTHER_MODEL
    )


# Log-probabilities.


def test_log_probabilities_bring_the_likelihood_in(server, picture):
    def logprobs(model, question, image):
        near = -0.1 if image is not None and is_ann(image) else -9.0
        return [{"This": -0.1}, {" Ann": near, " I": -1.0}]

    server.logprobs = logprobs
    found = audited(server, picture)
    family = next(f for f in found.report["families"] if f["family"] == "likelihood")
    assert family["applicable"] and family["failed"] and family["unlearned"]["value"] == 1.0
    server.logprobs = lambda model, q, image: (
        logprobs(model, q, image) if model == "base" else [{"I": -0.1}]
    )
    found = audited(server, picture)
    family = next(f for f in found.report["families"] if f["family"] == "likelihood")
    assert family["applicable"] and not family["failed"]


def test_a_token_begins_the_name_or_does_not():
    near = lambda *places: glimpses.nearest(Concept(ANN), list(places))
    assert near({" Ann": -1.0}, {"An": -3.0}) == -1.0
    assert near({" A": -1.0, "Bob": -0.1}) == glimpses.UNSEEN


# What is sent.


def test_decoding_is_greedy_and_the_picture_is_sent_as_it_is(server, picture):
    served = Served(Connection(Endpoint(server.url)), "base")
    image = Image.open(picture).convert("RGB")
    assert served.replies([("Who?", served.picture(image)), ("Why?", None)])[0].text.endswith(
        "Bole."
    )
    one = next(b for b in server.bodies if not isinstance(b["messages"][0]["content"], str))
    assert one["temperature"] == 0 and one["max_tokens"] == 64
    url = one["messages"][0]["content"][0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert np.array_equal(np.asarray(sent), np.asarray(image))


def test_a_data_url_holds_pixels_alone():
    image = Image.new("RGB", (4, 4))
    image.info["comment"] = "secret"
    assert b"secret" not in base64.b64decode(data_url(image).partition(",")[2])


def test_the_key_is_sent_and_shown_nowhere(server, picture, tmp_path, capsys):
    key = tmp_path / "key"
    key.write_text("very-secret\n")
    code = cli.run(
        [
            "audit",
            "--url",
            server.url,
            "--model",
            "tuned",
            "--untouched",
            "base",
            "--url-key",
            str(key),
            "--image",
            str(picture),
            "--concept",
            ANN,
            "--other",
            OTHERS[0],
            "--other",
            OTHERS[1],
            "--no-attacks",
            "--output",
            str(tmp_path / "out"),
        ]
    )
    told = "".join(capsys.readouterr())
    assert code == 0 and "Forgotten in what was asked." in told
    assert all(h["Authorization"] == "Bearer very-secret" for h in server.headers)
    written = [p.read_text(errors="replace") for p in (tmp_path / "out").iterdir()]
    assert all("very-secret" not in text for text in [told, *written])


def test_an_audit_holds_the_file_that_repeats_it_without_the_key(server, picture, tmp_path, capsys):
    key, first, again = (tmp_path / name for name in ("key", "first", "again"))
    key.write_text("very-secret\n")
    given = ["--url", server.url, "--model", "tuned", "--untouched", "base", "--concept", ANN]
    given += ["--image", str(picture), "--other", OTHERS[0], "--other", OTHERS[1], "--no-attacks"]
    with_key = ["--share", "0.1", "--url-key", str(key)]
    assert cli.run(["audit", *given, *with_key, "--output", str(first)]) == 0
    run = first / "run.toml"
    assert run.stat().st_mode & 0o777 == 0o600 and str(key) not in run.read_text()
    asked = len(server.bodies)
    assert cli.run(["--config", str(run), "--url-key", str(key), "--output", str(again)]) == 0
    assert len(server.bodies) == 2 * asked
    assert cli.run(["verify", str(again)]) == 0
    hidden = tmp_path / "hidden"
    more = ["--redact", "--url-key", str(key), "--output", str(hidden)]
    assert cli.run(["--config", str(run), *more]) == 0
    text = (hidden / "run.toml").read_text()
    private = (ANN, OTHERS[0], server.host, str(tmp_path), "tuned", "base")
    assert "share = 0.1" in text and not [word for word in private if word in text]
    capsys.readouterr()


def test_a_key_comes_from_standard_input_as_well(server, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("from-stdin\n"))
    served = Served(Connection(Endpoint(server.url, Path("-"))), "base")
    served.replies([("Who?", None)])
    assert server.headers[0]["Authorization"] == "Bearer from-stdin"


def test_a_redacted_report_names_nobody(server, picture, tmp_path):
    from fastsiu.settings import ReportOptions

    for name in ("tuned", "ignored"):
        found = audited(
            server,
            picture,
            name,
            report=ReportOptions(redact=True),
            output=tmp_path / name,
            asking=auditing.Asking(0.1),
        )
        text = "".join(p.read_text(errors="replace") for p in (tmp_path / name).iterdir())
        assert not [w for w in (ANN, "Ann", "Bole", *OTHERS, "Cairo", server.host) if w in text]
        assert found.report["deployed"]["status"] == found.status
        assert LEFT_OUT not in [*found.report["reasons"], *found.report["caveats"]]
        assert redacted(found.report) == found.report


def test_what_is_only_printed_names_nobody_either(server, picture):
    """--redact --json without --output: the report goes to a file of the shell's."""
    from fastsiu.settings import ReportOptions

    shown = ReportOptions(redact=True)
    found = audited(server, picture, report=shown, asking=auditing.Asking(0.1))
    text = json.dumps(found.report)
    assert not [w for w in (ANN, "Ann", "Bole", *OTHERS, "Cairo", server.host) if w in text]
    with pytest.raises(BadInput, match="--embed-image is about report.html: give --output"):
        audited(server, picture, report=ReportOptions(embed_image=True))


# A server that is not as it should be.


def refused(server, name="tuned", **options):
    with pytest.raises(BadInput) as error:
        Served(Connection(Endpoint(server.url, **options)), name).replies([("Who?", None)])
    return str(error.value)


def always(status, data=b"", **headers):
    return lambda number: (status, {k.replace("_", "-"): v for k, v in headers.items()}, data)


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(BadInput, match="Nothing answers at .*connection refused.*start the server"):
        Served(Connection(Endpoint(url, attempts=2)), "x").replies([("Who?", None)])


def test_no_json(server):
    server.intercept = always(200, b"<html>hello</html>")
    assert "answers with no chat completion" in refused(server)


def test_a_wrong_name_is_told_with_the_right_ones(server):
    told = refused(server, "nobody")
    assert "has no model 'nobody' (it lists base, tuned, ignored, other)" in told


def test_a_wrong_key(server):
    server.intercept = always(401)
    assert "refuses the key (401): check --url-key" in refused(server)


def test_a_refusal_in_the_servers_own_words(server):
    server.intercept = always(
        400, json.dumps({"error": {"message": "no \x1b[31mpictures"}}).encode()
    )
    told = refused(server)
    assert "(400: no " in told and "\x1b" not in told


def test_a_redirect_is_not_followed(server):
    server.intercept = always(302, Location="http://elsewhere.example/v1")
    assert "sends on to elsewhere.example, and nothing is sent there" in refused(server)


def test_a_busy_server_is_asked_again(server):
    server.intercept = lambda number: (503, {}, b"") if number < 2 else None
    served = Served(Connection(Endpoint(server.url)), "base")
    assert served.replies([("What?", None)])[0].text == "It is eight." and len(server.bodies) == 3


def test_a_server_that_stays_broken(server):
    server.intercept = always(500, b"boom")
    assert "fails on 'tuned' (500)" in refused(server, attempts=2) and len(server.bodies) == 2


def test_a_slow_server(server):
    import threading

    hold = threading.Event()
    server.intercept = lambda number: hold.wait(5) and None
    told = refused(server, timeout=0.1, attempts=2)
    hold.set()
    assert "gave no answer within 0.1 s, 2 times" in told


@pytest.mark.parametrize("status", [200, 400, 503])
def test_a_server_that_sends_byte_after_byte(server, status):
    """Each byte comes in time, the whole never does."""
    server.intercept, server.pause = always(status, b" " * 10_000), 0.05
    begun = time.monotonic()
    told = refused(server, timeout=0.3, attempts=1)
    assert time.monotonic() - begun < 5 and server.host in told


@pytest.mark.parametrize("value", ["nan", "-inf", "1", True, None])
def test_log_probabilities_that_are_no_numbers_are_none(server, value):
    """NaN would end the audit with its last file."""
    server.logprobs = lambda model, question, image: [{"Ann": value}]
    served = Served(Connection(Endpoint(server.url)), "base")
    assert served.openings([("Who?", None)], max_new_tokens=2) is None
    server.logprobs = lambda model, question, image: [{"Ann": -2}]
    assert served.openings([("Who?", None)], max_new_tokens=2) == [[{"Ann": -2.0}]]


def test_a_wait_that_is_no_number(server):
    server.intercept = lambda number: (429, {"Retry-After": "\xb2"}, b"") if not number else None
    served = Served(Connection(Endpoint(server.url)), "base")
    assert served.replies([("What?", None)])[0].text == "It is eight."


def test_time_is_bounded(server):
    told = refused(server, within=0.0)
    assert "did not answer everything within 0 s" in told and not server.bodies


def test_after_a_failure_nothing_more_is_sent(server):
    server.intercept = always(401)
    served = Served(Connection(Endpoint(server.url, at_once=1)), "base")
    with pytest.raises(BadInput):
        served.replies([("Who?", None)] * 50)
    assert len(server.bodies) < 5


@pytest.mark.parametrize(
    "url, options, told",
    [
        ("https://far.example/v1", {}, "Nothing was sent: add --allow-network"),
        ("http://far.example/v1", {"allow_network": True}, "is read by everybody on the way"),
        ("http://me:secret@localhost/v1", {}, "holds a user, a password or a query"),
        ("localhost:8000", {}, "is no http:// or https:// URL"),
    ],
)
def test_an_address_that_may_not_be_used(url, options, told):
    with pytest.raises(BadInput, match=told) as error:
        Connection(Endpoint(url, **options))
    assert "secret" not in str(error.value)


def test_it_must_be_said_what_is_compared(picture, server):
    ask = lambda **options: auditing.audit(Request(ANN, picture), **options)
    place = Endpoint(server.url)
    for options, told in (
        ({}, "There is nothing to compare"),
        ({"server": auditing.Server(place, "tuned")}, "give the name that the server has for it"),
        ({"server": auditing.Server(place, "base", "base")}, "are both base"),
    ):
        with pytest.raises(BadInput, match=told):
            ask(**options)


# Somebody's files, without a server.


@pytest.mark.slow
def test_an_adapter_is_audited_without_training_or_server(trained, cast, demo_dir):
    from fastsiu.settings import ModelRef

    found = auditing.audit(
        Request(cast.target, cast.image),
        model=ModelRef(demo_dir),
        adapter_dir=trained.output,
        asking=auditing.Asking(0.05, attacks=False),
    )
    known = {(a["question"], a["picture"]): a for a in trained.report["answers"]}
    again = {(a["question"], a["picture"]): a for a in found.report["answers"]}
    assert len(again) >= 20 and again.keys() <= known.keys()
    assert all(again[k][side] == known[k][side] for k in again for side in ("before", "after"))
    assert found.report["noise"] and found.report["adapter"]


@pytest.mark.slow
def test_a_merged_directory_is_audited_beside_its_base(trained, cast, demo_dir, tmp_path):
    import calls

    from fastsiu.settings import ModelRef

    made = calls.merge(trained.output, tmp_path / "m", model=demo_dir, verify=(), device="cpu")

    def of(name):
        return auditing.audit(
            Request(cast.target, cast.image),
            model=ModelRef(name),
            base=ModelRef(demo_dir),
            asking=auditing.Asking(0.05, attacks=False),
        )

    found = of(made.output)
    known = {(a["question"], a["picture"]): a for a in trained.report["answers"]}
    again = {(a["question"], a["picture"]): a for a in found.report["answers"]}
    assert len(again) >= 20 and again.keys() <= known.keys()
    assert all(again[k][side] == known[k][side] for k in again for side in ("before", "after"))
    assert found.report["noise"] and not found.report["adapter"]
    assert found.status == found.report["verdict"]  # of no other status
    assert of(demo_dir).status == effect.IGNORED


# A real server.


@pytest.fixture
def transformers_serve():
    """`transformers serve` in this process; gives its base URL."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("pip install 'fastsiu[serve]'")
    from transformers.cli.serve import Serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = Serve(device="cpu", dtype="float32", host="127.0.0.1", port=port, non_blocking=True)
    yield f"http://127.0.0.1:{port}/v1"
    served.kill_server()


@pytest.mark.slow
def test_transformers_serve_gives_the_answers_that_the_report_has(
    transformers_serve, trained, cast, demo_dir, tmp_path
):
    import shutil

    import calls

    merged = calls.merge(trained.output, tmp_path / "m", model=demo_dir, verify=(), device="cpu")
    shutil.copytree(demo_dir, tmp_path / "ignored")

    def of(name):
        return auditing.audit(
            Request(cast.target, cast.image),
            adapter_dir=trained.output,
            server=auditing.Server(Endpoint(transformers_serve), str(name), str(demo_dir)),
            asking=auditing.Asking(0.05, attacks=False),
        )

    found = of(merged.output).report["deployed"]
    assert found["base"]["value"] == 1.0 and found["base"]["n"] >= 20
    assert found["promised"]["value"] in (1.0, None)
    assert found["status"] != effect.OTHER_MODEL
    assert of(tmp_path / "ignored").status == effect.IGNORED
