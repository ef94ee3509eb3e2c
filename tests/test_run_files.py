"""Runs as files: `--config` fills every verb's options, the command line wins, and every output
holds the file that repeats it."""

from __future__ import annotations

import os
import tomllib
import typing
from types import SimpleNamespace

import calls
import pytest
import typer

from fastsiu import cli, driver, independent
from fastsiu import output as outputs
from fastsiu.cli import config
from fastsiu.cli.app import app
from fastsiu.model import adapter
from fastsiu.model.memory import Layout
from fastsiu.model.vlm import Budget
from fastsiu.request import BadInput, Recipe, Request
from fastsiu.settings import ModelRef

GROUP = typer.main.get_command(app)
NEEDED = {
    "unlearn": [],
    "combine": ["a", "b", "--request", "r.jsonl"],
    "eval": [],
    "suite": ["set"],
    "merge": ["--adapter", "a", "--output", "o"],
    "compare": [],
    "benchmark": ["clear", "set"],
    "app": [],
    "ask": ["Who?"],
    "audit": ["--image", "i.png"],
    "push": ["dir", "owner/name"],
    "data": ["--image", "i.png"],
    "plan": [],
    "demo": [],
    "verify": ["dir"],
    "purge": ["dir"],
}


def options(verb):
    return [p for p in GROUP.commands[verb].params if p.name != "help"]


def is_flag(parameter) -> bool:
    return bool(getattr(parameter, "is_flag", False))


def is_several(parameter) -> bool:
    return bool(getattr(parameter, "multiple", False)) or parameter.nargs == -1


def context_of(verb, arguments, filled=None):
    return GROUP.commands[verb].make_context(verb, list(arguments), default_map=filled or {})


def test_every_verb_is_tried_here():
    assert set(NEEDED) == set(GROUP.commands)


@pytest.mark.parametrize("verb", NEEDED)
def test_every_option_of_a_verb_may_stand_in_a_file(verb, tmp_path):
    file = tmp_path / "run.toml"
    for parameter in options(verb):
        key = config._key(parameter)
        for spelling in {key, key.replace("-", "_")}:
            value = "true" if is_flag(parameter) else '["1"]' if is_several(parameter) else '"1"'
            file.write_text(f"{spelling} = {value}\n")
            arguments, filled = config.defaults(GROUP, [verb], file)
            found = filled[verb]
            assert arguments == [verb] and [*found] == [parameter.name], key
            assert found[parameter.name] in (True, ["1"], "1")


def test_the_command_line_wins(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('steps = 7\nseed = 3\nalias = ["A", "B"]\nredact = true\nimage = "x.png"\n')
    _, filled = config.defaults(GROUP, ["unlearn"], file)
    context = context_of("unlearn", ["--steps", "9", "--alias", "C"], filled["unlearn"])
    given = {k: context.params[k] for k in ("steps", "seed", "alias", "redact")}
    assert given == {"steps": 9, "seed": 3, "alias": ["C"], "redact": True}
    assert str(context.params["image"]) == "x.png"


def test_a_file_may_hold_arguments_and_name_its_verb(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text(f'verb = "verify"\ndirectory = "{tmp_path}"\n')
    assert cli.run(["--config", str(file)]) == 2
    assert str(tmp_path) in "".join(capsys.readouterr().err.split())
    arguments, filled = config.defaults(GROUP, [], file)
    assert arguments == ["verify"] and filled == {"verify": {"directory": str(tmp_path)}}
    with pytest.raises(BadInput, match="is for `fastsiu verify`, not for `fastsiu purge`"):
        config.defaults(GROUP, ["purge"], file)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("step = 5", "'step' is no option of `fastsiu unlearn`: did you mean 'steps'\\?$"),
        ("zzz = 5", "`--help` lists"),
        ("help = true", "is no option"),
        ("redact = 1", "'redact' must be true or false"),
        ("steps = true", "'steps' must be a text or a number"),
        ("steps = [1, 2]", "'steps' must be a text or a number"),
        ("alias = [1979-05-27]", "'alias' must be .* or a list of them"),
        ("steps = {a = 1}", "'steps' must be"),
        ("steps = ", "is no TOML"),
        ('retain = ""', "'retain' is empty"),
        ('alias = ["A", ""]', "'alias' is empty"),
        ('verb = "unlern"', "did you mean 'unlearn'"),
        ("micro-batch = 1\nmicro_batch = 4096", "'micro-batch' in two spellings.*: keep one.$"),
        ("batch_size = 1\nlr = 1\nbatch-size = 1", "'batch-size' in two spellings"),
        ("steps = " + "[" * 20_000, "is no TOML \\(it is nested too deep\\)"),
    ],
)
def test_what_a_file_may_not_hold_is_refused(content, sentence, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(content + "\n")
    with pytest.raises(BadInput, match=sentence) as refused:
        config.defaults(GROUP, ["unlearn"], file)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize("content", ["steps = 3\n", 'alias = ["Ü"]\r\n', "# all\n"])
def test_a_file_may_begin_with_a_byte_order_mark(content, tmp_path):
    file = tmp_path / "run.toml"
    found = []
    for mark in (b"", b"\xef\xbb\xbf"):
        file.write_bytes(mark + content.encode())
        found.append(config.defaults(GROUP, ["unlearn"], file))
    assert found[0] == found[1]


def test_a_value_out_of_bounds_is_refused_as_on_the_command_line(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text('image = "x.png"\nconcept = "X"\nsteps = "many"\n')
    assert cli.run(["unlearn", "--config", str(file)]) == 2
    assert "'--steps'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["plan", "--config"], "needs a file"),
        (["plan", "--config", "a", "--config=b"], "2 times"),
        (["plan", "--config", "nowhere.toml"], "There is no file nowhere.toml"),
    ],
)
def test_the_option_itself_is_checked(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_what_stands_behind_two_dashes_is_no_option():
    assert config.split(["ask", "--", "--config", "x"]) == (["ask", "--", "--config", "x"], None)


# The file that repeats a run ----------------------------------------------------------------------

GIVEN = {
    "unlearn": ["--image", "i.png", "--concept", 'Zo "Q" \\ \u202e Ü', "--alias", "A", "--steps"]
    + ["3", "--no-renormalize", "--lr", "0.001", "--preset", "paper", "--output", "o", "--json"],
    "eval": ["--concept", "N", "--images", "d", "--judge-key", "key.txt", "--attacks", "all"],
    "suite": ["set", "--unlearn", "--concepts", "a", "--concepts", "b", "--limit", "2"],
    "combine": ["a", "b", "--request", "r.jsonl", "--redact"],
    "merge": ["--adapter", "a", "--output", "o", "--no-verify"],
    "compare": ["--seeds", "2"],
    "audit": ["--image", "i.png", "--concept", "N", "--url", "http://localhost/v1", "--model", "m"]
    + ["--untouched", "b", "--url-key", "key.txt", "--share", "0.5", "--no-attacks"],
    "benchmark": ["clear", "set", "--limit", "2", "--set", "a", "--output", "t.json"],
}


@pytest.mark.parametrize("verb", GIVEN)
def test_the_file_repeats_the_run(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    before = context_of(verb, GIVEN[verb])
    text = config.as_toml(before)
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    assert tomllib.loads(text)["verb"] == verb
    monkeypatch.chdir(tmp_path / "elsewhere")
    _, filled = config.defaults(GROUP, [verb], tmp_path / "run.toml")
    output = ["--output", "o"] if verb == "merge" else []
    again = context_of(verb, output, filled[verb])
    for name, value in before.params.items():
        if name in config.NOT_REPEATED:
            assert f"{name.replace('_', '-')} =" not in text, name
        elif isinstance(value, type(tmp_path)):
            assert again.params[name] == tmp_path / value, name
        elif name == "adapters" and value is not None:
            assert again.params[name] == [tmp_path / one for one in value]
        else:
            assert again.params[name] == value, name
    assert "key.txt" not in text


def test_a_redacted_file_names_nobody(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "canary").mkdir()
    private = ["--image", "canary.png", "--concept", "canary", "--alias", "canary", "--protect"]
    private += ["canary", "--images", "canary", "--retain", "canary", "--data", "canary.jsonl"]
    context = context_of("unlearn", [*private, "--model", "canary", "--steps", "3", "--redact"])
    text = config.as_toml(context, redact=True)
    assert "canary" not in text and str(tmp_path) not in text
    assert "steps = 3" in text and "redact = true" in text
    assert text.startswith("# Left out, since the output is redacted: image, concept, model, ")
    hub = context_of("unlearn", ["--model", "owner/name", "--redact"])
    assert 'model = "owner/name"' in config.as_toml(hub, redact=True)


def test_a_servers_names_of_models_are_no_paths_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("m", "b"):
        (tmp_path / name).mkdir()
    served = tomllib.loads(config.as_toml(context_of("audit", GIVEN["audit"])))
    assert (served["model"], served["untouched"]) == ("m", "b")
    here = context_of("audit", ["--image", "i.png", "--model", "m", "--base", "b"])
    assert tomllib.loads(config.as_toml(here))["model"] == str(tmp_path / "m")
    text = config.as_toml(context_of("audit", [*GIVEN["audit"], "--redact"]), redact=True)
    told = tomllib.loads(text)
    assert told == {"verb": "audit", "share": 0.5, "attacks": False, "redact": True}


TELLING = 'verb = "unlearn"\nredact = true\nmodel = "owner/zorblax-vlm"\nsteps = 3\n'


@pytest.mark.parametrize("redact", [True, False])
def test_a_hub_model_whose_name_may_tell_stays_out_as_in_the_report(loaded, cast, tmp_path, redact):
    told = {"verdict": "forgotten", "reasons": [], "caveats": [], "masks": {}, "kind": "person"}
    told |= {"concept": "Zorblax Quint", "model": "owner/zorblax-vlm"}
    request = Request("Zorblax Quint", cast.image)
    sealed = driver.Sealed(Recipe(rank=2), {}, "d", {}, {"redact": redact}, TELLING)
    calls.bent(loaded, Recipe(rank=2), 0.02)
    try:
        driver.write(tmp_path / "o", loaded, [request], [told], sealed)
    finally:
        adapter.detach(loaded)
    holding = {
        path.name for path in (tmp_path / "o").iterdir() if b"zorblax" in path.read_bytes().lower()
    }
    assert holding == set() if redact else "run.toml" in holding
    assert "steps = 3" in (tmp_path / "o/run.toml").read_text()


def test_it_stays_out_of_the_file_beside_many_requests(cast, tmp_path):
    def names(model, redact):
        sealed = driver.Sealed(Recipe(), {}, "", None, {"redact": redact})
        request = Request("Zorblax Quint", cast.image)
        asked = ({1: request}, {"001": 1}, ModelRef(model), sealed, Layout(), Budget())
        return independent.Requests(tmp_path, *asked).names_the_model

    assert not names("owner/zorblax-vlm", True)
    assert names("owner/sees", True) and names("owner/zorblax-vlm", False)
    assert outputs.without_model(TELLING).splitlines()[1:] == [
        'verb = "unlearn"',
        "redact = true",
        "steps = 3",
    ]


@pytest.mark.parametrize("before", [[], ["--debug"]])
def test_a_value_is_no_verb(tmp_path, before):
    """A directory may be called as a verb is."""
    file = tmp_path / "mine.toml"
    file.write_text('verb = "unlearn"\nsteps = 3\n')
    given = [*before, "--concept", "demo", "--output", "app"]
    arguments, filled = config.defaults(GROUP, given, file)
    assert filled == {"unlearn": {"steps": "3"}}
    assert arguments == [*before, "unlearn", "--concept", "demo", "--output", "app"]
    arguments, _ = config.defaults(GROUP, [*before, "unlearn", "--output", "app"], file)
    assert arguments == [*before, "unlearn", "--output", "app"]


def test_a_name_from_standard_input_is_not_repeated():
    text = config.as_toml(context_of("unlearn", ["--concept", "-"]))
    assert "Left out" in text and "concept =" not in text


def test_a_name_from_standard_input_is_not_repeated_where_several_are_given():
    text = config.as_toml(context_of("compare", ["--concept", "A", "--concept", "-"]))
    assert "# Left out, since it came from standard input: concepts." in text
    assert "concepts =" not in text
    assert 'alias = ["-"]' in config.as_toml(context_of("unlearn", ["--alias", "-"]))


def options_of_text():
    """The options of text of each verb that writes run.toml."""
    for verb in GIVEN:
        for callback in (c.callback for c in app.registered_commands):
            if GROUP.commands[verb].callback.__name__ == callback.__name__:
                kinds = typing.get_type_hints(callback)
                for p in (p for p in options(verb) if p.param_type_name == "option"):
                    if str in (kinds[p.name], *typing.get_args(kinds[p.name])):
                        yield verb, p
                    elif list[str] in typing.get_args(kinds[p.name]):
                        yield verb, p


TEXTS = [(verb, parameter.name) for verb, parameter in options_of_text()]


def test_the_options_of_text_are_found():
    assert {("unlearn", "concept"), ("unlearn", "alias"), ("compare", "methods")} < set(TEXTS)
    assert {("eval", "base"), ("eval", "attacks"), ("suite", "concepts")} < set(TEXTS)


@pytest.mark.parametrize("text", ["Zorblax Quint", "all"])
@pytest.mark.parametrize(("verb", "name"), TEXTS)
def test_a_text_is_no_path_though_a_directory_is_called_so(verb, name, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / text).mkdir()
    parameter = next(p for p in options(verb) if p.name == name)
    filled = {name: [text] if is_several(parameter) else text}
    context = context_of(verb, NEEDED[verb], filled)
    monkeypatch.setattr(context, "get_parameter_source", lambda _: SimpleNamespace(name="MAP"))
    written = tomllib.loads(config.as_toml(context))[config._key(parameter)]
    place = str(tmp_path / text) if name in ("model", "base") else text
    assert written == ([place] if is_several(parameter) else place)


@pytest.mark.parametrize(
    ("name", "given"),
    [("image", ["--image", "i\udcff.png"]), ("alias", ["--alias", "A", "--alias", "B\udc80"])],
)
def test_what_is_no_utf_8_is_left_out_and_said(name, given):
    text = config.as_toml(context_of("unlearn", [*given, "--steps", "3"]))
    assert text.startswith(f"# Left out, since it is no UTF-8, which TOML needs: {name}.\n")
    assert tomllib.loads(text) == {"verb": "unlearn", "steps": 3}


def test_so_is_a_path_below_a_directory_that_is_no_utf_8(tmp_path, monkeypatch):
    (tmp_path / "d\udcff").mkdir()
    monkeypatch.chdir(tmp_path / "d\udcff")
    text = config.as_toml(
        context_of("compare", ["--suite", "set", "--seeds", "2", "--concept", "-"])
    )
    assert text.splitlines()[:2] == [
        "# Left out, since it is no UTF-8, which TOML needs: suite.",
        "# Left out, since it came from standard input: concepts.",
    ]
    assert tomllib.loads(text) == {"verb": "compare", "seeds": 2}


def test_a_pipe_is_not_repeated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    text = config.as_toml(context_of("eval", ["--concept-file", "pipe", "--questions", "pipe"]))
    assert text.startswith("# Left out, since it came from a pipe: concept-file, questions.\n")
    assert tomllib.loads(text) == {"verb": "eval"}


@pytest.mark.slow
def test_outputs_hold_the_file_for_their_owner_alone(cast, demo_dir, tmp_path, capsys):
    """Run from a file, then again from the output's own: the same adapter."""
    file = tmp_path / "mine.toml"
    file.write_text(
        f'image = "{cast.image}"\nconcept = "{cast.target}"\nmodel = "{demo_dir}"\n'
        'preset = "paper"\nsteps = 1\nbatch-size = 4\nrank = 2\n'
    )
    first, again, hidden = (tmp_path / name for name in ("first", "again", "hidden"))
    assert cli.run(["unlearn", "--config", str(file), "--output", str(first)]) in (0, 1)
    kept = first / "run.toml"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert cli.run(["verify", str(first)]) == 0
    assert cli.run(["unlearn", "--config", str(kept), "--output", str(again)]) in (0, 1)
    weights = "adapter_model.safetensors"
    assert (first / weights).read_bytes() == (again / weights).read_bytes()
    redacted = ["unlearn", "--config", str(kept), "--redact", "--output", str(hidden)]
    assert cli.run(redacted) in (0, 1)
    text = (hidden / "run.toml").read_text()
    assert cast.target not in text and cast.image.name not in text and "steps = 1" in text


# Completion ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown(shell, monkeypatch, capsys):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert cli.run(["--show-completion", shell]) == 0
    shown = capsys.readouterr()
    assert "_FASTSIU_COMPLETE" in shown.out and not shown.err


def test_completion_completes_verbs(monkeypatch, capsys):
    monkeypatch.setenv("_FASTSIU_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "fastsiu unl")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert cli.run([]) == 0
    assert capsys.readouterr().out.split() == ["unlearn"]


def test_the_demos_output_repeats_it(monkeypatch, tmp_path):
    """The training is another test's."""
    monkeypatch.chdir(tmp_path)
    seen = {}

    def unlearn(request, *, report, **options):
        seen.update(run=report.run, recipe=options["recipe"].changes)
        raise BadInput("enough")

    monkeypatch.setattr(driver, "unlearn", unlearn)
    assert cli.run(["demo", "--seed", "3", "--output", "zoo"]) == 2
    (tmp_path / "run.toml").write_text(seen["run"])
    first = dict(seen)
    assert cli.run(["--config", "run.toml", "--output", "other"]) == 2
    assert seen["recipe"] == first["recipe"] == {"seed": 3}
