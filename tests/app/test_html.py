"""What the page shows: every text escaped, and nothing loaded from elsewhere."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import app_worker
import pytest

from fastsiu.app import html
from fastsiu.app.job import Asked, Exchange, Phase, View

EVIL = '<img src=http://evil.example/x onerror="alert(1)">\u202e'


@pytest.fixture
def view(tmp_path) -> View:
    """A finished job whose every text is hostile."""
    asked = Asked(EVIL, Path(EVIL))
    events = []
    wire = SimpleNamespace(send=events.append)
    samples = app_worker.gather(wire, asked)
    samples["rows"] = [(f"align, {EVIL}", EVIL, [(EVIL, True, False), (EVIL, False, True)])]
    samples |= {"protected": [EVIL], "warning": EVIL, "lessons": [(EVIL, 3, [(EVIL, EVIL)])]}
    result = app_worker.train(wire, asked, tmp_path / "result", tmp_path / "archive")
    result |= {"standing": EVIL, "reasons": [EVIL], "remains": EVIL, "caveats": [EVIL]}
    steps = tuple(value[0] for kind, value in events if kind == "step")
    return View(
        Phase.DONE,
        asked,
        stage=EVIL,
        notes=(EVIL,),
        problem=EVIL,
        said=((EVIL, EVIL, True),),
        samples=samples,
        ceiling=len(steps),
        steps=steps,
        looks=((1, 0.9, 1.0), (4, 0.01, 0.97)),
        result=result,
        chat=(Exchange(EVIL, None, EVIL, EVIL),),
    )


def everything(view: View) -> str:
    shown = (html.stepper, html.said, html.samples, html.training, html.verdict)
    working = replace(view, phase=Phase.TRAINING, stage=EVIL)
    return "".join(
        [
            *(one(view) for one in shown),
            html.chat(view.chat),
            html.status(working, 5.0),
            html.message(view, EVIL, None),
            html.preview("data:image/jpeg;base64,AA", EVIL),
        ]
    )


def test_texts_cannot_become_markup(view):
    page = everything(view)
    assert "<img src=http" not in page
    assert "\u202e" not in page
    assert page.count("&lt;img") > 15


def test_nothing_is_loaded_from_elsewhere(view):
    addresses = re.findall(r'(?:src|href)="([^"]*)"', everything(view))
    assert addresses
    assert all(one.startswith(("data:", "result/")) for one in addresses)


@pytest.mark.parametrize("phase", Phase)
def test_every_phase_has_a_step(phase):
    page = html.stepper(View(phase))
    assert page.count('aria-current="step"') == 1


@pytest.mark.parametrize("phase", [Phase.LOOKING, Phase.GATHERING, Phase.TRAINING])
def test_work_says_what_it_is_before_the_job_does(phase):
    assert html.BEGINNING[phase] in html.status(View(phase), 0.0)


def test_the_queue_says_how_many_come_first():
    assert "1 person is before you" in html.message(View(), "", 1)
    assert "2 people are before you" in html.message(View(), "", 2)


def test_the_masks_are_told_apart():
    marked = html.pieces([("This is ", True, False), ("a hat", False, False), ("Bo", True, True)])
    assert marked == 'This is <mark class="new">a hat</mark><mark class="name">Bo</mark>'


def test_progress_counts_the_steps(view):
    going = replace(view, phase=Phase.TRAINING, ceiling=8)
    assert 'value="0.500"' in html.training(going)
    assert "90% &rarr; 1%" in html.training(going)
