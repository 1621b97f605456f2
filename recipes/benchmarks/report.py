# SPDX-License-Identifier: Apache-2.0
"""What the report of a large run takes: to make, to send, and to open.

    python recipes/benchmarks/report.py                    # fills a ledger with 1,000,000 rows first: some minutes
    python recipes/benchmarks/report.py --rows 20000       # fewer
    python recipes/benchmarks/report.py --folder DIR       # keeps the run there, and takes the one that is there
    python recipes/benchmarks/report.py --json             # prints one object last

The run is that of ``ledger.py`` (`Ledger.add`, real texts and queries, 520 steps, six versions of the tools), with a
library beside it. Making is measured from the command's call on (`gather` and `render`), once after the system has
dropped the file from memory, and once more. Opening is measured in headless Chromium, where there is one (Playwright;
``RLAR_TEST_CHROMIUM`` or one in PATH): from the call to the page that has drawn all, median of five, each in a new
context; so is what a click on a sample takes until it is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from ledger import STEPS, VERSIONS, Run, _forget, fill
from rich.console import Console
from rich.table import Table

from verl_rlar.config import RlarConfig
from verl_rlar.ledger import FILE_NAME
from verl_rlar.library import FOLDER_NAME, Library, LibraryView, Trusted
from verl_rlar.report.figures import gather
from verl_rlar.report.page import render
from verl_rlar.trusted import trusted_tools

GOALS = {"megabytes": 10.0, "open_s": 3.0}
"""What must be more than the figure."""
OPENED = 5


def make_library(folder: Path, rows: int) -> None:
    """The library of the benchmark's run: the tools of the package, whose code changes five times."""
    sources = {tool.spec.name: tool.source for tool in trusted_tools(RlarConfig())}
    with Library(folder) as library:
        for version, snapshot in enumerate(Run(rows).snapshots):
            first = 1 + -(-version * STEPS // VERSIONS)
            tools = [Trusted(spec=spec, source=sources[spec.name], by="builtin") for spec in snapshot.tools]
            library.begin(tools, f"start {version}")
            library.snapshot(first)
        library.snapshot(STEPS)


def opening(file: Path) -> dict[str, float]:
    """Seconds until the page is there, and until a click has its effect; empty without a browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser_path = os.environ.get("RLAR_TEST_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        browser_path = None
    if browser_path is None:
        return {}
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    opened, clicked = [], []
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=browser_path, args=flags)
        for _ in range(OPENED):
            context = browser.new_context(viewport={"width": 1440, "height": 900})
            page = context.new_page()
            start = time.perf_counter()
            page.goto(file.as_uri())
            page.wait_for_selector("html[data-ready]", state="attached")
            drawn = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
            page.evaluate(drawn)
            opened.append(time.perf_counter() - start)
            clicked.append(
                page.evaluate(
                    "async () => { const start = performance.now(); "
                    "document.querySelectorAll('#list .item')[5].click(); "
                    f"await ({drawn})(); return (performance.now() - start) / 1000; }}"
                )
            )
            context.close()
        browser.close()
    return {"open_s": statistics.median(opened), "open_worst_s": max(opened), "click_s": statistics.median(clicked)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the ledger (default 1,000,000)")
    parser.add_argument("--folder", help="where the run goes, and stays (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one object last")
    args = parser.parse_args()
    figures: dict[str, float] = {"rows": args.rows}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        file = folder / FILE_NAME
        if not file.exists():
            figures["rows_per_s"] = fill(file, args.rows)["rows_per_s"]
        if not (folder / FOLDER_NAME).exists():
            make_library(folder / FOLDER_NAME, args.rows)
        for name in ("make_cold_s", "make_s"):
            if name == "make_cold_s":
                _forget(file)
            start = time.perf_counter()
            gathered = gather(folder, LibraryView(folder / FOLDER_NAME))
            page = render(gathered)
            figures[name] = time.perf_counter() - start
        assert gathered["run"]["rows"] <= args.rows
        figures |= {"megabytes": len(page) / 1e6, "groups_to_look_at": len(gathered["samples"])}
        figures["tools"] = len(gathered["tools"])
        report = folder / "report.html"
        report.write_bytes(page)
        figures |= opening(report)
    ok = all(figures[name] < goal for name, goal in GOALS.items() if name in figures)
    table = Table("figure", "value", "goal", title="The report", box=None)
    for name, value in figures.items():
        table.add_row(name, f"{value:,.4g}", f"< {GOALS[name]:g}" if name in GOALS else "")
    console = Console()
    console.print(table)
    if "open_s" not in figures:
        console.print("There is no Chromium with Playwright here, so the page was not opened.")
    if args.json:
        print(json.dumps({"name": "report", "figures": figures, "goals": GOALS, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
