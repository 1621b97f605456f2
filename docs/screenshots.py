# SPDX-License-Identifier: Apache-2.0
"""Makes the pictures of the report in the documentation, in headless Chromium.

    bash recipes/quickstart/run.sh --tiny
    python docs/screenshots.py runs/quickstart-tiny

Needs Playwright and Pillow (extra `dev`), and a Chromium in PATH or named by ``RLAR_TEST_CHROMIUM``. What is shown is
the report of that run as `rlar report` makes it; only the path in its header is cut to the part that was given here.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).resolve().parent / "pages" / "images"
WIDTH, HEIGHT = 1280, 860
PICTURES = (("report-light", "light", None), ("routes-dark", "dark", "routing"), ("samples-light", "light", "samples"))
"""File, colour scheme, and the id of the section that is shown; None: the top of the page."""
QUALITY = 72


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures")
    arguments = parser.parse_args()
    from PIL import Image
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    browser_path = os.environ.get("RLAR_TEST_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if browser_path is None:
        print("there is no Chromium here: install one, or name it with RLAR_TEST_CHROMIUM", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as started:
        report = Path(folder) / "report.html"
        command = [sys.executable, "-m", "verl_rlar", "report", arguments.run, "-o", str(report)]
        subprocess.run(command, check=True)
        browser = started.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        for name, scheme, section in PICTURES:
            context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)
            page = context.new_page()
            page.goto(report.as_uri())
            page.wait_for_selector("html[data-ready]", state="attached")
            page.evaluate("path => { document.querySelector('header.top .place').textContent = path }", arguments.run)
            shot = picture(page, section)
            file = arguments.out / f"{name}.webp"
            Image.open(io.BytesIO(shot)).convert("RGB").save(file, quality=QUALITY, method=6)
            print(f"{file}: {file.stat().st_size / 1000:.0f} kB")
            context.close()
        browser.close()
    return 0


def picture(page: Any, section: str | None) -> bytes:
    """What is seen of a section, as PNG."""
    if section is not None:
        page.locator(f"#{section}").scroll_into_view_if_needed()
        page.evaluate("id => document.getElementById(id).scrollIntoView({block: 'start'})", section)
        page.wait_for_timeout(300)
    shot: bytes = page.screenshot()
    return shot


if __name__ == "__main__":
    sys.exit(main())
