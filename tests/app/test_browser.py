"""The page in a browser: the whole path with the keyboard alone, on the embedded model."""

from __future__ import annotations

import json
import re
import signal
import zipfile

import pytest

pytest.importorskip("gradio", reason="needs the extra [app]")
pytest.importorskip("playwright", reason="needs the extra [test-app]")
pytest.importorskip("axe_playwright_python", reason="needs the extra [test-app]")

import app_browser
from app_browser import Visit, browser, serving

from fastsiu.app.page import FOLLOW

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(app_browser.CHROMIUM is None, reason="no Chromium was found"),
]
NAME = "Zorblax Quint"  # of the first example
DESKTOP = {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"}
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "color_scheme": "dark",
    "has_touch": True,
    "is_mobile": True,
}


def fine(visit: Visit) -> None:
    assert visit.violations() == []
    assert visit.elsewhere == []
    assert visit.errors == []
    assert visit.narrow()


def test_the_whole_path_on_a_desktop(cast, tmp_path):
    with serving(app_browser.APP, tmp_path) as server, browser() as chromium:
        visit = Visit(chromium.new_context(**DESKTOP).new_page(), server.address)
        page = visit.page
        fine(visit)
        visit.press(NAME)  # the example, whose verdict is the demo's
        page.get_by_alt_text("The picture you chose").wait_for()
        visit.press("Does the model know it?")
        visit.wait(f"The model knows {NAME}.")
        fine(visit)
        visit.press("Show what would be trained")
        page.get_by_role("button", name="Start the training").wait_for()
        assert page.locator("mark.new").count()
        assert page.locator("mark.name").count()
        assert "0o100600" in {oct(file.stat().st_mode) for file in server.files()}
        assert all(file.stat().st_mode & 0o077 == 0 for file in server.files())
        fine(visit)
        visit.press("Start the training")
        page.locator("figure svg").nth(1).wait_for()
        visit.wait("Probability of the name")
        fine(visit)
        verdict = page.locator("#verdict .headline")
        verdict.wait_for()
        assert verdict.inner_text().startswith("Forgotten: in")
        visit.focus("Download the report")
        page.evaluate(FOLLOW)
        assert page.evaluate(app_browser.FOCUSED) == "Download the report"  # it is in use
        visit.give(cast.files["other"])
        page.wait_for_function("document.querySelector('#asked-about img') !== null")
        visit.write("Question", f"Is this {cast.other}?")
        visit.press("Ask both")
        page.locator(".exchange .answer.after p", has_not_text="...").wait_for()
        assert page.locator(".exchange .answer").count() == 2
        fine(visit)
        page.emulate_media(color_scheme="light")
        page.reload()
        page.locator(".exchange").wait_for()
        verdict.wait_for()
        assert page.get_by_label("Its name").input_value() == NAME
        fine(visit)
        with page.expect_download() as download:
            visit.press("Download the adapter")
        with zipfile.ZipFile(download.value.path()) as packed:
            names = set(packed.namelist())
            report = json.loads(packed.read("report.json"))
        assert {"adapter_model.safetensors", "adapter_config.json", "report.html"} <= names
        assert "run.toml" in names
        assert "private.key" not in names
        assert report["verdict"] == "forgotten"
        with page.expect_download() as download:
            visit.press("Download the report")
        assert download.value.suggested_filename == "fastsiu-report.html"
        stranger = chromium.new_context().request
        assert stranger.get(f"{server.address}/result/report.json").status == 404
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(app_browser.PATIENCE) == 0
        assert server.left() == []


def test_stop_reload_and_queue_on_a_phone(cast, tmp_path):
    with serving([*app_browser.QUICK, "600"], tmp_path) as server, browser() as chromium:
        first = Visit(chromium.new_context(**PHONE).new_page(), server.address)
        first.press("Zorblax Quint")
        first.page.get_by_alt_text("The picture you chose").wait_for()
        first.press("Does the model know it?")
        first.wait("The model knows Zorblax Quint.")
        first.press("Show what would be trained")
        first.page.get_by_role("button", name="Start the training").wait_for()
        fine(first)
        first.press("Start the training")
        first.wait(re.compile(r"step \d+ of 600"))  # the page shows not every step
        fine(first)

        first.page.reload()
        first.wait("of 600")
        assert first.page.get_by_label("Its name").input_value() == "Zorblax Quint"
        assert first.page.get_by_alt_text("The picture you chose").is_visible()

        second = Visit(chromium.new_context(**PHONE).new_page(), server.address)
        assert second.page.locator("#bar").is_hidden()
        second.give(cast.image)
        second.page.get_by_alt_text("The picture you chose").wait_for()
        second.write("Its name", cast.target)
        second.press("Does the model know it?")
        second.wait("1 person is before you")
        fine(second)

        bar = first.page.locator("#bar")
        first.press("Stop")
        bar.wait_for(state="hidden")
        first.wait("Stopped. Nothing of it was kept")
        assert not list(server.place.rglob("adapter_model.safetensors"))
        first.press("Start the training")
        bar.wait_for()
        first.press("Stop")
        bar.wait_for(state="hidden")
        first.press("Remove all of this and start over")
        second.wait(f"The model knows {cast.target}.")
        assert first.page.get_by_text("The model knows").count() == 0
        fine(second)
