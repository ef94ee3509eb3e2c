"""Whose turn it is, and what is kept of a visitor."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from PIL import Image

from fastsiu.app.desk import FORGET, GONE, IDLE, Desk
from fastsiu.app.job import Asked, Phase, View
from fastsiu.request import BadInput


class StillJob:
    """A job that does nothing: its phase is what a test says."""

    def __init__(self):
        self.view, self.cleared = View(), 0

    def look(self, asked):
        self.view = View(Phase.LOOKING, asked)

    def clear(self):
        self.view, self.cleared = View(), self.cleared + 1

    def end(self):
        self.view = View(Phase.KNOWN, self.view.asked)


@pytest.fixture
def office(tmp_path):
    clock = SimpleNamespace(now=0.0)
    job = StillJob()
    desk = Desk(job, tmp_path / "visitors", lambda: clock.now)
    return SimpleNamespace(desk=desk, job=job, clock=clock)


def asked(name):
    return Asked(name, "picture")


def test_the_second_visitor_waits_and_sees_nothing_of_the_first(office):
    desk = office.desk
    first, second = desk.visit("a"), desk.visit("b")
    desk.begin(first, asked("Ann"))
    desk.begin(second, asked("Bo"))
    assert desk.ahead(first) is None
    assert desk.ahead(second) == 1
    assert desk.view(first).asked.concept == "Ann"
    assert desk.view(second) == View()
    with pytest.raises(BadInput, match="not your turn"):
        desk.act(second)


def test_the_same_browser_finds_its_job_again(office):
    desk = office.desk
    desk.begin(desk.visit("a"), asked("Ann"))
    assert desk.view(desk.visit("a")).asked.concept == "Ann"


def test_whoever_leaves_lets_the_next_one_begin(office):
    desk = office.desk
    first, second, third = (desk.visit(key) for key in "abc")
    for visitor, name in ((first, "Ann"), (second, "Bo"), (third, "Cy")):
        desk.begin(visitor, asked(name))
    assert desk.ahead(third) == 2
    desk.leave(first)
    assert office.job.view.asked.concept == "Bo"
    assert desk.owns(second)
    assert desk.ahead(third) == 1


def test_whoever_waits_and_goes_away_loses_the_place(office):
    desk = office.desk
    first, second, third = (desk.visit(key) for key in "abc")
    for visitor, name in ((first, "Ann"), (second, "Bo"), (third, "Cy")):
        desk.begin(visitor, asked(name))
    office.clock.now = GONE
    desk.visit("a"), desk.visit("c")
    office.clock.now = GONE + 1
    desk.visit("c")
    assert desk.ahead(third) == 1


def test_work_that_goes_on_is_nobody_elses(office):
    desk = office.desk
    desk.begin(desk.visit("a"), asked("Ann"))
    desk.begin(desk.visit("b"), asked("Bo"))
    office.clock.now = 10 * IDLE
    second = desk.visit("b")
    desk.begin(second, asked("Bo"))
    office.clock.now += 1
    desk.visit("b")
    assert office.job.view.asked.concept == "Ann"


def test_whoever_is_away_gives_way_to_those_who_wait_and_to_nobody_else(office):
    desk = office.desk
    first = desk.visit("a")
    desk.begin(first, asked("Ann"))
    office.job.end()
    office.clock.now = GONE + 1
    second = desk.visit("b")
    assert desk.owns(first)
    desk.begin(second, asked("Bo"))
    desk.visit("b")
    assert desk.owns(second)
    assert office.job.view.asked.concept == "Bo"
    assert "your turn has ended" in desk.visit("a").message


def test_whoever_does_nothing_for_long_gives_way(office):
    desk = office.desk
    first, second = desk.visit("a"), desk.visit("b")
    desk.begin(first, asked("Ann"))
    office.job.end()
    desk.begin(second, asked("Bo"))
    for _ in range(int(IDLE // 30) + 1):
        office.clock.now += 30
        desk.visit("a"), desk.visit("b")
    assert desk.owns(second)


def test_a_picture_is_taken_over_and_removed_with_its_visitor(office, tmp_path):
    desk, file = office.desk, tmp_path / "a name.png"
    Image.new("RGB", (600, 300), "red").save(file)
    visitor = desk.visit("a")
    visitor.picture = shown = desk.keep(visitor, file)
    assert not file.exists()
    assert shown.path.is_file()
    assert "name" not in shown.path.name
    assert shown.preview.startswith("data:image/jpeg;base64,")
    desk.leave(visitor)
    assert not shown.path.exists()
    assert visitor.picture is None


def test_a_file_that_is_no_picture_is_removed_and_told_by_its_name(office, tmp_path):
    file = tmp_path / "text.png"
    file.write_text("no picture")
    with pytest.raises(BadInput, match=r"^'text\.png' is not a picture"):
        office.desk.keep(office.desk.visit("a"), file)
    assert not file.exists()


def test_nothing_is_kept_of_whoever_is_long_gone(office, tmp_path):
    file = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(file)
    visitor = office.desk.visit("a")
    shown = office.desk.keep(visitor, file)
    office.clock.now = FORGET + 1
    office.desk.visit("b")
    assert not shown.path.exists()
    assert office.desk.visit("a") is not visitor
