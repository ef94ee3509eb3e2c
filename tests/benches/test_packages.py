"""benches/packages.py: wheels in a folder, and releases looked at before anything is made."""

import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def packages(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benches"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    import packages

    return packages


def wheel(
    folder: Path, name: str, release: str, tag: str = "py3-none-any", inside: str = ""
) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{release}-{tag}.whl", "w") as made:
        made.writestr(inside or f"{name}.py", f"RELEASE = {release!r}\n")
        info = f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n"
        made.writestr(f"{name}-{release}.dist-info/METADATA", info)


def test_wheels_of_a_folder_come_before_what_is_installed(packages, tmp_path):
    wheel(tmp_path / "wheels", "fastsiu_made_up", "1.2")
    wheel(tmp_path / "wheels", "transformers", "5.17.0", inside="made_up.py")
    found = packages.unpack(tmp_path / "wheels", tmp_path / "site")
    assert found == ["fastsiu-made-up 1.2", "transformers 5.17.0"]
    import fastsiu_made_up

    assert fastsiu_made_up.RELEASE == "1.2" and packages.release("transformers") == "5.17.0"
    reason = packages.lacking("real")
    assert "transformers<5.25,>=5.23 (here is 5.17.0)" in reason and reason.endswith(".")
    assert packages.lacking("real") and "transformers" not in (packages.lacking("tune") or "")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "no wheels"),
        ([("a", "1"), ("a", "2")], "twice"),
        ([("a", "1", "cp27-cp27m-win32")], "not for Python"),
        ([("a", "1", "py3-none-any", "a-1.data/scripts/a")], "installed and not unpacked"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_sentence(packages, tmp_path, files, said):
    (tmp_path / "wheels").mkdir()
    for file in files:
        wheel(tmp_path / "wheels", *file)
    with pytest.raises(packages.BadInput, match=said) as error:
        packages.unpack(tmp_path / "wheels", tmp_path / "site")
    assert str(error.value).count(". ") == 0 and ":" in str(error.value)
    with pytest.raises(packages.BadInput, match="not a folder"):
        packages.unpack(tmp_path / "none", tmp_path / "site")


def test_what_is_needed_stands_in_pyproject(packages, monkeypatch):
    here = {"torch": "2.11.0+cu130", "triton": "3.6.0", "numpy": "2.5.2", "transformers": "5.17.0"}
    here |= {"pytest": "9.0", "hypothesis": "6.1", "pytest-benchmark": "5.2"}
    monkeypatch.setattr(packages, "release", here.get)
    # the image to be expected
    assert all(packages.lacking(s) is None for s in ("tests", "ours", "rivals", "tune", "study"))
    reason = packages.lacking("real")
    assert "anyascii<0.4,>=0.3.3 (not installed)" in reason and "--wheels" in reason
    assert "numpy below 2.4" in packages.no_interpreter()
    here["numpy"] = "2.3.5"
    assert packages.no_interpreter() is None
    here["triton"] = "3.4.0"
    assert "triton<3.8,>=3.5 (here is 3.4.0)" in packages.lacking("tune")
    del here["torch"]
    assert "torch<2.14,>=2.9 (not installed)" in packages.lacking("ours")
    assert any("NF4" in line for line in packages.left_out())
