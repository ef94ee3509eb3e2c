"""The folder kernels/ is not a package, and importing a part of FastSIU loads no more than that
part needs."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import fastsiu

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, root: Path = ROOT) -> str:
    """Run code in a fresh interpreter with the repository root first on sys.path."""
    command = [sys.executable, "-c", code]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="a source distribution has files where git has a link"
)
def test_kernels_is_a_folder_and_a_symlink():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "fastsiu" / "kernels"
    assert link.is_symlink() and str(link.readlink()) == "../kernels"
    assert not (ROOT / "conftest.py").exists()


def test_a_checkout_without_symbolic_links_says_what_to_do(tmp_path):
    """Git without them leaves a file with the link's text, on Windows for instance."""
    package = tmp_path / "fastsiu"
    leave = shutil.ignore_patterns("__pycache__", "kernels", "demo")
    shutil.copytree(ROOT / "fastsiu", package, ignore=leave)
    (package / "kernels").write_text("../kernels")
    code = (
        "import sys\n"  # this checkout's editable install has the link
        "sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n"
        "try:\n"
        "    import fastsiu\n"
        "    fastsiu.fused_dmk_ce\n"
        "except ImportError as error:\n"
        "    print(error)"
    )
    said = run(code, tmp_path)
    assert said.count("\n") == 1
    assert "git config core.symlinks true" in said and "pip install ." in said


def test_the_wheel_has_every_folder_of_the_package():
    listed = re.findall(r'"(fastsiu[\w.]*)",', (ROOT / "setup.py").read_text())
    folders = {p.parent.relative_to(ROOT) for p in (ROOT / "fastsiu").rglob("__init__.py")}
    names = {".".join(folder.parts) for folder in folders} | {"fastsiu.kernels"}
    assert sorted(listed) == sorted(names)


def test_the_source_distribution_takes_what_its_tests_need():
    lines = (ROOT / "MANIFEST.in").read_text().splitlines()
    grafted = {line.split()[1] for line in lines if line.startswith("graft ")}
    assert grafted >= {"tests", "kernels", "benches", "docs", "constraints", "fastsiu", ".ci"}


def test_the_module_called_kernels_is_not_ours():
    origin = run(
        "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    ).strip()
    assert origin == "None" or ROOT not in Path(origin).parents


def test_transformers_imports_beside_our_kernels_folder():
    run("from transformers import AutoModelForImageTextToText")


@pytest.mark.parametrize(
    "statement, absent",
    [
        ("import fastsiu", ("torch", "numpy", "transformers")),
        ("from fastsiu import Request, Recipe, BadInput", ("torch", "transformers")),
        (
            "from fastsiu import fused_dmk_ce, DMKCELoss, TeacherCache, why_not",
            ("transformers", "peft"),
        ),
        (
            "from fastsiu import no_logits, supervised_rows, RowIndex, head_of",
            ("transformers", "peft"),
        ),
    ],
)
def test_an_import_loads_only_what_it_needs(statement, absent):
    loaded = run(f"{statement}\nimport sys; print([m for m in {absent} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_every_public_name_resolves():
    for name, module in fastsiu._PUBLIC.items():
        if importlib.util.find_spec(f"fastsiu.{module}"):
            assert getattr(fastsiu, name).__name__ == name
    assert {*fastsiu.__all__} <= {*dir(fastsiu)}
    assert fastsiu.__version__.count(".") == 2


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastsiu.nothing


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {package: Version(version) for package, version in pairs}


def test_what_was_tested_is_what_is_asked_for():
    """The oldest pins are the lower bounds, torch's apart, and the newest are inside all bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest, newest = pins("oldest.txt"), pins("newest.txt")
    asked = [Requirement(line) for line in project["dependencies"]]
    for one in asked:
        assert oldest[one.name] in one.specifier and newest[one.name] in one.specifier
        (lower,) = (Version(part.version) for part in one.specifier if part.operator == ">=")
        assert lower == oldest[one.name] or one.name == "torch"
    extras = project["optional-dependencies"]
    tools = [
        Requirement(line).name for name in ("test", "trainers", "plot") for line in extras[name]
    ]
    assert {*oldest} == {*newest} == {one.name for one in asked} | {*tools} - {"fastsiu"}


@pytest.mark.slow
@pytest.mark.parametrize("torch_is_there", [False, True])
def test_the_cpu_kernel_is_built_ahead_where_torch_is_at_hand(torch_is_there, tmp_path):
    copy, built = tmp_path / "source", tmp_path / "built"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    leave = shutil.ignore_patterns("__pycache__", "demo", "*.so")
    shutil.copytree(ROOT / "kernels", copy / "kernels", ignore=leave)
    shutil.copytree(ROOT / "fastsiu", copy / "fastsiu", ignore=leave, symlinks=True)
    (copy / "fastsiu" / "demo").mkdir()
    (copy / "fastsiu" / "demo" / "__init__.py").touch()
    hide = "" if torch_is_there else "sys.modules['torch'] = None; "
    command = f"sys.argv = ['setup.py', '-q', 'build_py', '-d', {str(built)!r}]"
    run(f"import runpy, sys; {hide}{command}; runpy.run_path('setup.py')", copy)
    files = {path.name for path in (built / "fastsiu" / "kernels" / "cpu").iterdir()}
    assert "sweep.cpp" in files
    libraries = {name for name in files if name.endswith(".so")}
    if shutil.which("ninja") and (shutil.which("c++") or shutil.which("g++")):
        assert ("sweep_portable.so" in libraries) == torch_is_there
    assert files - libraries == {"sweep.cpp"} and bool(libraries) <= torch_is_there
