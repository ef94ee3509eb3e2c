"""The folder kernels/ is not a package, and importing a part of FastSIU loads no more than that part needs."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import fastsiu

ROOT = Path(__file__).resolve().parent.parent


def run(code: str) -> str:
    """Run code in a fresh interpreter with the repository root first on sys.path."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_is_a_folder_and_a_symlink():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "fastsiu" / "kernels"
    assert link.is_symlink() and str(link.readlink()) == "../kernels"
    assert not (ROOT / "conftest.py").exists()


def test_the_module_called_kernels_is_not_ours():
    origin = run("import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)").strip()
    assert origin == "None" or ROOT not in Path(origin).parents


def test_transformers_imports_beside_our_kernels_folder():
    run("from transformers import AutoModelForImageTextToText")


@pytest.mark.parametrize(
    "statement, absent",
    [
        ("import fastsiu", ("torch", "numpy", "transformers")),
        ("from fastsiu import Request, Recipe, BadInput", ("torch", "transformers")),
        ("from fastsiu import fused_dmk_ce, DMKCELoss, TeacherCache, why_not", ("transformers", "peft")),
        ("from fastsiu import no_logits, supervised_rows, RowIndex, head_of", ("transformers", "peft")),
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
