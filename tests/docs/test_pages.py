"""The documents: short where they promise it, linked to what is there, and no figure is typed."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer
import yaml

from fastsiu.cli import app
from fastsiu.cli.app import ORDER

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *DOCS,
]
# what a machine runs, word by word
FIRST = ["pip install -e . && fastsiu demo", 'pip install -e ".[test]" && pytest']


def loaded(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables():
    return loaded("tables")


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130


def test_the_readme_is_narrow():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert [line for line in lines if len(line) > 100 and not line.startswith("|")] == []


def test_the_readme_begins_with_the_two_commands():
    block = (ROOT / "README.md").read_text().split("```")[1].strip().splitlines()
    assert [line.split(" #")[0].strip() for line in block] == FIRST


def test_the_readme_and_help_list_all_verbs_in_one_order():
    told = (ROOT / "README.md").read_text().split("| verb |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (`.+?`) \|", told, flags=re.M)
    group = typer.main.get_command(app)
    assert [verb for row in rows for verb in re.findall(r"`(\w+)`", row)] == list(ORDER)
    assert group.list_commands(typer.Context(group)) == list(ORDER)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_are_there(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    inside = [t.split("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]
    assert [t for t in inside if not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_files_that_are_there(page):
    names = re.findall(r"python (?:-P )?((?:benches|docs|tests)/\S+?\.py)", page.read_text())
    assert [name for name in names if not (ROOT / name).is_file()] == []


def nav() -> set[str]:
    """The names of all pages in mkdocs.yml's nav."""

    def leaves(node):
        if isinstance(node, str):
            return {node}
        parts = node.values() if isinstance(node, dict) else node
        return set().union(*map(leaves, parts))

    return leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])


def test_every_page_is_in_the_nav():
    generated = set(loaded("hooks").PAGES.values()) if importlib.util.find_spec("mkdocs") else None
    if generated is None:
        pytest.skip("mkdocs is not installed: pip install 'fastsiu[docs]'")
    assert nav() == {page.name for page in DOCS} | generated


def test_the_architecture_has_a_place_for_everything():
    page = (ROOT / "docs" / "architecture.md").read_text()
    there = {p.name + "/" * p.is_dir() for p in (ROOT / "fastsiu").iterdir()}
    parts = {name for name in there if name.endswith(("/", ".py")) and name[:2] != "__"}
    assert [name for name in sorted(parts) if f"`{name}`" not in page] == []


def test_nothing_is_fetched_from_a_network():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert config["theme"]["font"] is False and "extra_javascript" not in config


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: page.name)
def test_every_table_has_its_command_and_its_end(page, tables):
    text = page.read_text()
    begins = re.findall(r"<!-- (?:table|excerpt): ", text)
    assert len(begins) == len(tables.BLOCK.findall(text)) == text.count(tables.END)
    for kind, what, _ in tables.BLOCK.findall(text):
        if kind == "table":
            assert (ROOT / shlex.split(what)[1]).is_file()


def test_excerpts_in_the_readme_say_what_the_pages_say(tables):
    text = (ROOT / "README.md").read_text()
    assert tables.renewed(text, "excerpt") == text


@pytest.mark.slow
@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_tables_are_what_their_commands_print(page, tables):
    text = page.read_text()
    assert tables.renewed(text, "table") == text, "python docs/tables.py writes them anew"


def test_new_results_reach_their_table_and_nothing_else(tables, monkeypatch):
    monkeypatch.setattr(tables, "printed", lambda command: f"| {command} |")
    page = (
        "before\n<!-- table: python benches/a.py --table -->\n| old |\n<!-- end of table -->\n"
        "<!-- table: python benches/step.py -->\n| measured |\n<!-- end of table -->\nafter\n"
    )
    assert tables.renewed(page, "table") == page.replace(
        "| old |", "| python benches/a.py --table |"
    )


def test_fields_of_a_docstring_become_a_list():
    pytest.importorskip("griffe")
    fields = loaded("fields")
    text = "Does it.\n\na, b:  two\n       lines\nc: one;  d: two\n\nRaises E: never."
    assert fields.listed(text).splitlines() == [
        "Does it.",
        "",
        "",
        "- `a, b`: two",
        "  lines",
        "- `c`: one",
        "- `d`: two",
        "",
        "Raises E: never.",
    ]
    assert fields.escaped("out-<random>/ and `<b>`") == "out-&lt;random>/ and `<b>`"


@pytest.mark.parametrize("gate", ["Makefile", ".ci/run"])
def test_a_gate_builds_the_site_so_that_a_dead_link_fails(gate, tmp_path):
    """mkdocs counts warnings where it prints them: with --quiet it finds none."""
    pytest.importorskip("mkdocs")
    if not (ROOT / gate).is_file():
        pytest.skip(f"{gate} is no part of this distribution")
    command = re.search(r"mkdocs (build.*)", (ROOT / gate).read_text())
    assert command
    words = [word.replace("$work", str(tmp_path)) for word in shlex.split(command[1])]
    config = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "docs").mkdir()
    (tmp_path / "mkdocs.yml").write_text(
        "site_name: Two\n" + "".join(re.findall(r"(?m)^validation: .*\n", config))
    )
    page = tmp_path / "docs" / "index.md"
    built = lambda: subprocess.run(
        [sys.executable, "-m", "mkdocs", *words], cwd=tmp_path, capture_output=True, text=True
    )
    page.write_text("# One\n")
    assert built().returncode == 0
    page.write_text("# One\n\n![gone](gone.png)\n")
    done = built()
    assert done.returncode != 0 and "gone.png" in done.stderr


@pytest.mark.slow
def test_the_site_is_built_and_a_dead_link_fails(tmp_path):
    pytest.importorskip("mkdocs")
    import shutil

    if not importlib.util.find_spec("mkdocstrings"):
        pytest.skip("mkdocstrings is not installed: pip install 'fastsiu[docs]'")
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info", ".*", "model", "tests")
    shutil.copytree(ROOT, tree, ignore=ignored, symlinks=True)
    shutil.copytree(ROOT / "fastsiu" / "model", tree / "fastsiu" / "model")
    (tree / "tests" / "helpers").mkdir(parents=True)
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(build, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fused_dmk_ce" in (tmp_path / "site" / "api.html").read_text()
    site = {page.name: page.read_text() for page in (tmp_path / "site").glob("*.html")}
    assert [name for name, html in site.items() if "<p>```" in html] == [], "a fence shown as text"
    with (tree / "docs" / "memory.md").open("a") as page:
        page.write("\n[gone](../benches/gone.py)\n")
    done = subprocess.run(build, cwd=tree, capture_output=True, text=True)
    assert done.returncode != 0 and "../benches/gone.py" in done.stderr
