"""A server of the app and a browser before it, for tests and for the pictures of the documents."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE = 300.0  # seconds; a busy machine takes long
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
APP = [sys.executable, "-m", "fastsiu", "app", "--port", "0"]
QUICK = [sys.executable, str(Path(__file__).parent / "app_server.py")]
# What a screen reader would call the element that has the focus.
FOCUSED = """() => {
  const one = document.activeElement;
  if (!one || one === document.body) return '';
  const label = one.labels && one.labels[0] ? one.labels[0].innerText : one.innerText;
  return (one.getAttribute('aria-label') || label || '').trim();
}"""


@dataclass
class Server:
    process: subprocess.Popen[str]
    address: str
    place: Path  # for temporary files: what it leaves is there

    def left(self) -> list[Path]:
        return list(self.place.glob(".fastsiu*"))

    def files(self) -> list[Path]:
        return [path for path in self.place.rglob("*") if path.is_file()]


@contextlib.contextmanager
def serving(command: Sequence[str], place: Path | None = None) -> Iterator[Server]:
    """A server; `command` prints "Open ADDRESS". place: its temporary directory"""
    place = place or Path(tempfile.mkdtemp(prefix="fastsiu-test-app-"))
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(place)}
    )
    assert process.stdout is not None
    try:
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found, "the server ended before it had an address"
        yield Server(process, found[0], place)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(PATIENCE)
        process.stdout.close()


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield chromium
        finally:
            chromium.close()


@dataclass
class Visit:
    """One visitor's page, used with the keyboard alone.

    elsewhere: addresses outside of the server that the page asked for
    errors:    what its console says is wrong
    """

    page: Any
    address: str
    elsewhere: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(1000 * PATIENCE)
        self.page.on("request", lambda request: self._asked(request.url))
        self.page.on(
            "console", lambda said: self.errors.append(said.text) if said.type == "error" else None
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        # The browser tells of file choosers only while somebody listens, and begins a moment late:
        # one that `expect_file_chooser` alone waits for may never come.
        self.page.on("filechooser", lambda chooser: None)
        self.page.goto(self.address)
        self.page.get_by_role("heading", name="1. What is to be forgotten?").wait_for()

    def _asked(self, url: str) -> None:
        if not url.startswith((self.address + "/", "data:", "blob:")):
            self.elsewhere.append(url)

    def focus(self, name: str, most: int = 120) -> None:
        """Presses Tab until what has the focus begins with `name`."""
        for _ in range(most):
            self.page.keyboard.press("Tab")
            if self.page.evaluate(FOCUSED).startswith(name):
                return
        raise AssertionError(f"no way to {name!r} with the keyboard")

    def press(self, name: str) -> None:
        self.focus(name)
        self.page.keyboard.press("Enter")

    def write(self, name: str, text: str) -> None:
        self.focus(name)
        self.page.keyboard.press("Control+a")
        self.page.keyboard.type(text)

    def give(self, file: Path) -> None:
        """Chooses a file in the next upload field."""
        self.focus("Click to upload")
        with self.page.expect_file_chooser() as chooser:
            self.page.keyboard.press("Enter")
        chooser.value.set_files(file)

    def wait(self, text: str | re.Pattern[str]) -> None:
        self.page.get_by_text(text).first.wait_for()

    def violations(self) -> list[str]:
        """What axe finds wrong."""
        from axe_playwright_python.sync_playwright import Axe

        # Gradio's own words, and colours on their way: a button that is enabled again fades in
        self.page.wait_for_function("!document.querySelector('p.loading')")
        moving = "document.getAnimations().some(one => one instanceof CSSTransition)"
        self.page.wait_for_function(f"!{moving}")
        found = Axe().run(self.page).response["violations"]
        return [f"{one['id']}: {node['html'][:200]}" for one in found for node in one["nodes"]]

    def narrow(self) -> bool:
        """Whether nothing is wider than the window."""
        wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        return bool(self.page.evaluate(wide))
