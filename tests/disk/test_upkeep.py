"""`verify` finds every changed byte, `purge` removes what is ours and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from fastsiu import cli, manifest
from fastsiu.disk import staging, upkeep
from fastsiu.output import Transaction, digest_model
from fastsiu.request import BadInput, Recipe

ADAPTER = {"adapter_model.safetensors": b"weights" * 9, "adapter_config.json": b"{}"}
MODEL = {"model.safetensors": b"base" * 9, "config.json": b"{}", "tokenizer.json": b"[]"}
MERGED = {"model.safetensors": b"merged" * 9, "config.json": b"{}", "tokenizer.json": b"[]"}


def put(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def written(path: Path, files=ADAPTER, weights=None, **more) -> Path:
    transaction = Transaction(path)
    with transaction as folder:
        put(
            folder,
            {**files, "report.json": b'{"verdict": "forgotten", "reasons": []}', "report.md": b"x"},
        )
        put(folder / "001", {"report.json": b"{}"})
        made = manifest.manifest(
            recipe=Recipe(),
            model_id="m",
            revision=None,
            weights=weights or {},
            digest="d" * 64,
            key=transaction.key,
            pictures={},
            masks={},
        )
        transaction.commit({**made, **more})
    return path


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capfd.readouterr()
        code = cli.run([str(a) for a in arguments])
        return (code, *capfd.readouterr())

    return run


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


# verify


@pytest.mark.parametrize(
    "name", [*ADAPTER, "report.json", "report.md", "001/report.json", "manifest.json"]
)
def test_verify_names_the_file_of_which_a_byte_was_changed(call, tmp_path, name):
    out = written(tmp_path / "out")
    code, said, err = call("verify", "out")
    assert (code, err) == (0, "") and "as they were written" in said
    if name == "manifest.json":
        stored = json.loads((out / name).read_text())
        (out / name).write_text(
            json.dumps({**stored, "model": {**stored["model"], "id": "another"}})
        )
    else:
        flip(out / name)
    code, said, err = call("verify", "out")
    assert code == 1 and name in said and "is not as written" in said


def test_verify_names_what_is_missing_and_what_was_added(call, tmp_path):
    out = written(tmp_path / "out")
    (out / "report.md").unlink()
    (out / "adapter_model.bin").write_bytes(b"x")
    code, said, _ = call("verify", "out")
    assert code == 1 and "report.md is missing" in said and "adapter_model.bin was added" in said


@pytest.mark.parametrize(
    "name", ["additional_chat_templates/default.jinja", "merges.txt", "a/b/model.safetensors"]
)
def test_what_a_loader_would_read_is_told_wherever_it_was_added(call, tmp_path, name):
    out = written(tmp_path / "out")
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("{{ foreign }}")
    code, said, _ = call("verify", "out")
    assert code == 1 and f"{name} was added" in "".join(said.split("\n"))
    written(out / "evaluated")  # a result of its own
    (out / name).unlink()
    assert call("verify", "out")[0] == 0


def test_another_key_is_told_and_a_published_output_has_none(call, tmp_path):
    out = written(tmp_path / "out")
    (out / "private.key").write_text("0" * 64 + "\n")
    code, said, _ = call("verify", "out")
    assert code == 1 and "private.key is not as written" in " ".join(said.split())
    (out / "private.key").unlink()
    assert call("verify", "out")[0] == 0


@pytest.mark.parametrize(
    "table, key, name",
    [("requests.json", "requests", "output"), ("suite.json", "concepts", "slug")],
)
def test_verify_misses_an_output_that_the_table_names(call, tmp_path, table, key, name):
    place = tmp_path / "all"
    place.mkdir()
    for one in ("001", "002"):
        written(place / one)
    rows = [{name: one, "status": "forgotten"} for one in ("001", "002")]
    rows.append({name: "003", "status": "failed"})
    (place / table).write_text(json.dumps({"format": upkeep.TABLES[table], key: rows}))
    assert call("verify", "all")[0] == 0
    shutil.rmtree(place / "002")
    code, said, _ = call("verify", "all")
    assert code == 1 and f"002 is missing, which {table} names" in " ".join(said.split())


@pytest.mark.parametrize("table", sorted(set(upkeep.TABLES) - {"compare.json"}))
def test_verify_names_a_table_that_was_changed(call, tmp_path, table):
    (tmp_path / "all").mkdir()
    written(tmp_path / "all" / "001")
    content = {"format": upkeep.TABLES[table], "of": 1}
    sealed = {**content, "sha256": manifest.seal(content)}
    (tmp_path / "all" / table).write_text(json.dumps(sealed))
    assert call("verify", "all")[0] == 0
    (tmp_path / "all" / table).write_text(json.dumps({**sealed, "of": 2}))
    code, said, _ = call("verify", "all")
    assert code == 1 and f"{table} is not as written" in " ".join(said.split())


def test_verify_looks_at_every_output_of_several(call, tmp_path):
    for slug in "ab":
        (tmp_path / "suite").mkdir(exist_ok=True)
        written(tmp_path / "suite" / slug)
    (tmp_path / "suite" / "suite.json").write_text("{}")
    assert call("verify", "suite")[0] == 0
    flip(tmp_path / "suite" / "b" / "report.md")
    code, said, _ = call("verify", "suite")
    assert code == 1 and "b/report.md is not as written" in said
    assert call("verify", "suite", "--model", "suite")[0] == 2


def test_what_is_no_output_is_exit_code_2(call, tmp_path):
    put(tmp_path / "mine", {"thesis.tex": b"x"})
    put(tmp_path / "list", {"manifest.json": b"[1]"})
    put(tmp_path / "deep", {"manifest.json": b"[" * 100_000})
    put(
        tmp_path / "other",
        {"manifest.json": b'{"files": {"../x": {"bytes": 1, "sha256": ""}}, "request": ""}'},
    )
    (tmp_path / "file").write_text("x")
    for name in ("mine", "list", "deep", "other", "file", "absent"):
        code, said, err = call("verify", name)
        assert code == 2 and said == "" and len(err.strip().splitlines()) == 1, name


@pytest.mark.parametrize("redacted", [False, True])
@pytest.mark.parametrize("kind", ["adapter", "base", "merged"])
def test_what_is_deployed_is_compared_with_the_manifest(call, tmp_path, kind, redacted):
    base = put(tmp_path / "base", MODEL)
    weights = digest_model(base)
    if redacted:
        weights = {f"{number:03d}": sha for number, sha in enumerate(weights.values(), 1)}
    files = MERGED if kind == "merged" else ADAPTER
    out = written(tmp_path / "out", files, weights, **({"merge": {}} if kind == "merged" else {}))
    deployed = put(tmp_path / "deployed", MODEL if kind == "base" else files)
    (deployed / "README.md").write_text("of no weight")
    code, said, _ = call("verify", out, "--model", deployed)
    assert code == 0, said
    for name in MODEL if kind == "base" else files:
        flip(deployed / name)
        code, said, _ = call("verify", out, "--model", deployed)
        assert code == 1 and name in said
        flip(deployed / name)
        (deployed / name).rename(tmp_path / "aside")
        assert call("verify", out, "--model", deployed)[0] == 1
        (tmp_path / "aside").rename(deployed / name)
    added = "adapter_model.bin" if kind == "adapter" else "model-00002.safetensors"
    (deployed / added).write_bytes(b"x")
    code, said, _ = call("verify", out, "--model", deployed)
    assert code == 1 and added in said
    assert call("verify", out, "--model", tmp_path / "absent")[0] == 2
    assert call("verify", written(tmp_path / "unsealed"), "--model", base)[0] == 2


def test_a_merged_model_is_not_the_base(call, tmp_path):
    base = put(tmp_path / "base", MODEL)
    out = written(tmp_path / "out", MERGED, digest_model(base), merge={})
    code, said, _ = call("verify", out, "--model", base)
    assert code == 1 and "model.safetensors is not the manifest's" in said


# purge


def test_a_merged_model_has_no_template_that_was_added(tmp_path):
    files = {"model.safetensors": b"1", "config.json": b"{}"}
    out = written(tmp_path / "out", files=files, merge={})
    deployed = put(tmp_path / "deployed", files)
    assert upkeep.verify(out, deployed).wrong == []
    put(deployed / "additional_chat_templates", {"default.jinja": b"{{ foreign }}"})
    (told,) = upkeep.verify(out, deployed).wrong
    assert told.endswith("additional_chat_templates/default.jinja was added.")


@pytest.fixture
def place(tmp_path):
    """Results, leftovers, and files of somebody else."""
    written(tmp_path / "one")
    (tmp_path / "suite").mkdir()
    written(tmp_path / "suite" / "a")
    put(
        tmp_path / "suite",
        {"suite.json": b'{"format": "fastsiu suite evaluation 1"}', "report.md": b"x"},
    )
    put(
        tmp_path / "compared",
        {
            "compare.json": b'{"format": "fastsiu comparison 1"}',
            "compare.md": b"",
            "compare.svg": b"",
        },
    )
    (tmp_path / "several").mkdir()
    written(tmp_path / "several" / "001")
    put(
        tmp_path / "several",
        {"matrix.json": b'{"mode": "sequence", "order": [], "matrix": [], "requests": []}'},
    )
    put(tmp_path / f"{staging.PREFIX}{staging.here()}-1-00000000", {"f": b"x"})
    put(tmp_path / "suite" / f"{staging.PREFIX}{staging.here()}-1-00000000", {"f": b"x"})
    put(tmp_path / "mine", {"thesis.tex": b"x", "manifest.json": b'{"name": "an app"}'})
    put(
        tmp_path / "given",
        {"suite.json": b'{"format": "fastsiu suite 1", "title": "mine"}', "report.md": b"x"},
    )
    put(tmp_path, {"notes.txt": b"x", ".fastsiu.partial-notes": b"x"})
    (tmp_path / "link").symlink_to(tmp_path / "one")
    return tmp_path


MINE = {"mine", "given", "notes.txt", ".fastsiu.partial-notes", "link"}
RESULTS = {"one", "suite", "compared", "several"}


def names(place: Path) -> set[str]:
    return {p.name for p in place.iterdir()}


@pytest.mark.skipif(staging.fcntl is None, reason="needs file locks")
def test_purge_removes_what_killed_runs_left_and_says_so(call, place):
    code, said, err = call("purge", ".")
    assert code == 0 and said.count("left by a killed run") == 2 and err == ""
    assert names(place) == MINE | RESULTS and names(place / "suite") == {
        "a",
        "suite.json",
        "report.md",
    }
    assert call("verify", "one")[0] == call("verify", "suite")[0] == 0
    code, said, _ = call("purge", ".")
    assert code == 0 and "Nothing to remove" in said
    with staging.Staging(place) as alive:
        code, said, _ = call("purge", ".")
        assert code == 0 and f"Kept {alive.name}" in said.replace("./", "") and alive.exists()
        code, said, err = call("purge", ".", "--all", "--yes")
        assert code == 2 and "at work" in err and names(place) == MINE | RESULTS | {alive.name}


def test_all_removes_the_results_and_nothing_else(call, place):
    (place / "one" / "my notes.txt").write_text("x")
    (place / "suite" / "b").mkdir()
    (place / "suite" / "b" / "mine.txt").write_text("x")
    code, said, err = call("purge", ".", "--all")
    assert code == 2 and "add --yes" in err and names(place) >= RESULTS
    code, said, err = call("purge", ".", "--all", "--yes")
    assert code == 0 and said.count("Removed the result") == 4
    assert "Kept one/my notes.txt, which FastSIU has not written." in said
    assert names(place) == MINE | {"one", "suite"}
    assert names(place / "one") == {"my notes.txt"} and names(place / "suite") == {"b"}
    assert names(place / "mine") == {"thesis.tex", "manifest.json"} and names(place / "given") == {
        "suite.json",
        "report.md",
    }


@pytest.mark.parametrize(("answer", "gone"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_somebody_at_a_terminal_is_asked(call, place, monkeypatch, answer, gone):
    import io
    import sys

    stdin = io.StringIO(answer)
    stdin.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", stdin)
    code, said, err = call("purge", ".", "--all")
    assert code == 0 and "one" in err and (names(place) & RESULTS == set()) is gone
    assert gone or ("Nothing was removed" in said and names(place) >= RESULTS)


def test_a_result_itself_can_be_purged(call, place):
    assert call("purge", "one", "--all", "--yes")[0] == 0
    assert not (place / "one").exists()


def test_a_manifest_leads_nowhere_else(call, tmp_path):
    """Names with "..", absolute ones, and directories that are links to elsewhere."""
    precious = put(tmp_path / "elsewhere", {"report.json": b"precious"})
    out = written(tmp_path / "out")
    stored = json.loads((out / "manifest.json").read_text())
    for name in (
        "../elsewhere/report.json",
        str(precious / "report.json"),
        "001/../../elsewhere/report.json",
    ):
        entry = {"bytes": 8, "sha256": "0"}
        (out / "manifest.json").write_text(json.dumps({**stored, "files": {name: entry}}))
        code, said, _ = call("purge", ".", "--all", "--yes")
        assert code == 0 and "Nothing to remove" in said and (precious / "report.json").exists()
    (out / "manifest.json").write_text(json.dumps(stored))
    shutil.rmtree(out / "001")
    (out / "001").symlink_to(precious)
    code, said, _ = call("purge", ".", "--all", "--yes")
    assert (
        code == 0
        and (precious / "report.json").read_bytes() == b"precious"
        and names(out) == {"001"}
    )


def test_purge_of_no_directory(call, tmp_path):
    (tmp_path / "file").write_text("x")
    for name in ("absent", "file"):
        code, said, err = call("purge", name)
        assert code == 2 and said == "" and "no directory" in err


def test_the_formats_are_those_that_are_written():
    from fastsiu import independent
    from fastsiu.compare import run as compare
    from fastsiu.disk import several_state
    from fastsiu.evaluate.suites import job as suite_job
    from fastsiu.evaluate.suites import table as suite_table

    assert upkeep.TABLES == {
        suite_table.SUITE: suite_job.FORMAT,
        "compare.json": compare.FORMAT,
        several_state.MATRIX: None,
        independent.TABLE: independent.FORMAT,
    }
    assert staging.MARKS == (suite_table.SUITE, several_state.MATRIX, independent.TABLE)
    assert {"mode", "order", "matrix", "requests"} == set(several_state.SHAPE)


def test_a_second_purge_ends_what_a_killed_one_began(tmp_path, monkeypatch):
    out = written(tmp_path / "out")
    plain, left = Path.unlink, [3]

    def unlink(path, *args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        plain(path, *args, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        upkeep.remove(out)
    monkeypatch.undo()
    assert (
        upkeep.survey(tmp_path).results == [out]
        and upkeep.remove(out) == []
        and os.listdir(tmp_path) == []
    )


def test_survey_raises_where_there_is_no_directory(tmp_path):
    with pytest.raises(BadInput):
        upkeep.survey(tmp_path / "absent")
