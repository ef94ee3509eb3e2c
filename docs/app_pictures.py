"""Makes the pictures of docs/app.md: the app in a browser, on the embedded model.

    python docs/app_pictures.py

It needs the extra [test-app] and a Chromium of the machine's, takes two minutes on two quiet cores,
and prints the seconds of the path on the desktop, from the first press to both models' answers.
"""

from __future__ import annotations

import io
import re
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]
import app_browser  # noqa: E402

COLOURS = 128  # of a picture's palette, which keeps it small
DESKTOP = {"viewport": {"width": 1280, "height": 860}}
PHONE = {"viewport": {"width": 390, "height": 844}}
HIDE = ".scrolled { max-height: 190px !important; } #bar { position: static !important; }"


def main() -> None:
    with app_browser.serving(app_browser.APP) as server, app_browser.browser() as chromium:
        light = chromium.new_context(**DESKTOP, color_scheme="light")
        page = app_browser.Visit(light.new_page(), server.address).page
        began = time.monotonic()
        page.get_by_role("button", name="Zorblax Quint", exact=True).click()
        page.get_by_alt_text("The picture you chose").wait_for()
        shoot(page, "choose", "#step-1")
        page.get_by_role("button", name="Does the model know it?").click()
        page.get_by_role("button", name="Show what would be trained").click()
        page.get_by_role("button", name="Start the training").wait_for()
        page.add_style_tag(content=HIDE)
        shoot(page, "preview", "#step-3")
        page.get_by_role("button", name="Start the training").click()
        page.get_by_text(re.compile(r"step [4-9]\d of")).wait_for()
        shoot(page, "train", "#step-4")
        page.get_by_role("button", name="Ask both").wait_for()
        page.get_by_role("button", name="Ask both").click()
        page.locator(".exchange .answer.after p", has_not_text="...").wait_for()
        print(f"{time.monotonic() - began:.0f} s, on this machine as busy as it is")
        shoot(page, "result", "#step-5")
        dark = chromium.new_context(
            **PHONE, color_scheme="dark", storage_state=light.storage_state()
        )
        phone = app_browser.Visit(dark.new_page(), server.address).page
        phone.get_by_text("Forgotten: in").wait_for()
        phone.locator("#head-5").scroll_into_view_if_needed()
        phone.wait_for_timeout(1000)
        save(phone.screenshot(), "phone")


def shoot(page: Any, name: str, part: str) -> None:
    page.wait_for_timeout(800)
    save(page.locator(part).screenshot(), name)


def save(shot: bytes, name: str) -> None:
    """Writes a picture, small."""
    with Image.open(io.BytesIO(shot)) as image:
        small = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    small.save(ROOT / "docs" / f"app-{name}.png", optimize=True)


if __name__ == "__main__":
    main()
