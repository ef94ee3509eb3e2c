"""`--log`: the curves reach the tracker, on this machine alone and without a name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastsiu import cli
from fastsiu.request import BadInput
from fastsiu.session import Listener
from fastsiu.show import experiment_log
from fastsiu.train import Step

CANARY = "Zorblaxcanary"


def steps(listener: Listener) -> None:
    for request in range(2):  # of two requests: the steps begin at 1 again
        for number in (1, 2):
            listener.step(Step(number, 3.0 - number - request, 0.5, 0.25, 0.125, 1.0, 0.0), 2)
        listener.stage(f"Asking about {CANARY}")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory of its own, a command line with the name, and no way out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fastsiu", "unlearn", "--concept", CANARY])
    for key in experiment_log._SENDS:
        monkeypatch.delenv(key, raising=False)
    return tmp_path


def assert_nobody_named(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert CANARY.encode() not in path.read_bytes() and CANARY not in str(path), path


def test_tensorboard_gets_every_step(here):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = []
    told = Listener(step=lambda step, ceiling: seen.append((step.step, ceiling)))
    with experiment_log.logged(told, "tensorboard") as listener:
        steps(listener)
    assert seen == [(1, 2), (2, 2), (1, 2), (2, 2)]
    (folder,) = (here / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {f"train/{k}" for k in ("loss", "ce", "kl", "p_name", "retained")} <= set(
        events.Tags()["scalars"]
    )
    found = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert found == [(1, 2.0), (2, 1.0), (3, 1.0), (4, 0.0)]
    assert_nobody_named(here)


def test_a_run_without_a_step_leaves_no_curve(here):
    """As one that finds its output already there."""
    pytest.importorskip("tensorboard")
    with experiment_log.logged(Listener(), "tensorboard") as listener:
        listener.stage("Nothing to do")
    assert list(here.iterdir()) == []


@pytest.mark.slow
def test_wandb_stays_offline_and_names_nobody(here, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(here))
    with experiment_log.logged(Listener(), "wandb") as listener:
        steps(listener)
        assert wandb.run.settings.mode == "offline"
    assert [*(here / "wandb").glob("offline-run-*/*.wandb")]
    assert_nobody_named(here)


@pytest.mark.slow
def test_trackio_stays_here_and_names_nobody(here, monkeypatch):
    pytest.importorskip("trackio")
    import subprocess

    # where it keeps its runs is read when it is imported
    monkeypatch.setenv("TRACKIO_DIR", str(here / "kept"))
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]; sys.argv = ['fastsiu', sys.argv[1]]\n"
        "from fastsiu.show import experiment_log\n"
        "from fastsiu.session import Listener\n"
        "from fastsiu.train import Step\n"
        "with experiment_log.logged(Listener(), 'trackio') as listener:\n"
        "    listener.step(Step(1, 2.0, 0.5, 0.25, 0.125, 1.0, 0.0), 2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, CANARY, *sys.path], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert_nobody_named(here / "kept")


@pytest.mark.parametrize("key", experiment_log._SENDS)
def test_trackio_that_would_send_is_refused(key, here, monkeypatch):
    monkeypatch.setenv(key, "owner/space")
    with (
        pytest.raises(BadInput, match=f"{key} is set"),
        experiment_log.logged(Listener(), "trackio"),
    ):
        pass


@pytest.mark.parametrize(
    ("tracker", "module"),
    [
        ("trackio", "trackio"),
        ("wandb", "wandb"),
        ("tensorboard", "torch.utils.tensorboard"),
    ],
)
def test_a_tracker_that_is_not_installed_names_the_extra(tracker, module, here, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with (
        pytest.raises(BadInput, match=r"fastsiu\[log\]"),
        experiment_log.logged(Listener(), tracker),
    ):
        pass


def test_an_unknown_tracker_is_refused_before_anything_is_loaded(here, cast, capsys):
    asked = ["unlearn", "--image", str(cast.image), "--concept", "X", "--log", "mlflow"]
    assert cli.run(asked) == 2
    assert "choose trackio, wandb, tensorboard" in " ".join(capsys.readouterr().err.split())


def test_without_a_tracker_the_listener_is_the_same():
    listener = Listener()
    with experiment_log.logged(listener, None) as same:
        assert same is listener
