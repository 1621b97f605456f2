# SPDX-License-Identifier: Apache-2.0
"""The report in a real browser: nothing hostile runs, everybody can use it, and it keeps up with a training."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_sample
from report_runs import add_agents, make_run

from verl_rlar.ledger import FILE_NAME, Ledger, Row
from verl_rlar.library import FOLDER_NAME, LibraryView
from verl_rlar.report.figures import gather
from verl_rlar.report.live import Live, watched
from verl_rlar.report.page import render
from verl_rlar.types import Kind, Outcome, Route, Score

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `dev`)")

RUN = "window.rlarRan = (window.rlarRan || 0) + 1"
HOSTILE = tuple(
    text.replace("RUN", RUN)
    for text in (
        "<script>RUN</script>",
        "</script><script>RUN</script>",
        "</SCRIPT ><script>RUN</script>",
        "<!--<script>RUN</script>-->",
        "--><script>RUN</script>",
        "]]><script>RUN</script>",
        "<img src=x onerror='RUN'>",
        "<IMG SRC=x OnErRoR=RUN>",
        "<img src=x onerror=&#82;UN>",
        "\"><img src=x onerror='RUN'>",
        "'><img src=x onerror=RUN>",
        "<svg onload='RUN'>",
        "<svg><script>RUN</script></svg>",
        "<svg><animate onbegin=RUN attributeName=x dur=1s>",
        "<svg><a xlink:href='javascript:RUN'><text y=20>x</text></a></svg>",
        "<math><mtext></form><form><mglyph><style></math><img src onerror='RUN'>",
        "<iframe srcdoc='<script>parent.RUN</script>'></iframe>",
        "<iframe src='javascript:parent.RUN'></iframe>",
        "<object data='javascript:RUN'></object>",
        "<embed src='javascript:RUN'>",
        "<a href='javascript:RUN' autofocus tabindex=0 onfocus='RUN'>x</a>",
        "<body onload='RUN'>",
        "<input autofocus onfocus='RUN'>",
        "<details open ontoggle='RUN'><summary>x</summary></details>",
        "<video><source onerror='RUN'></video>",
        "<audio src=x onerror='RUN'>",
        "<marquee onstart='RUN'>",
        "<style>@import 'javascript:RUN';*{animation:x}</style>",
        "<style>@keyframes x{}</style><p style='animation:x' onanimationstart='RUN'>",
        "<link rel=stylesheet href='javascript:RUN'>",
        "<base href='javascript:RUN//'>",
        "<meta http-equiv=refresh content='0;url=javascript:RUN'>",
        "<form action='javascript:RUN'><button>x</button></form>",
        "<template><script>RUN</script></template>",
        "<noscript><p title='</noscript><img src=x onerror=RUN>'>",
        "<textarea></textarea><script>RUN</script>",
        "<title></title><script>RUN</script>",
        "javascript:RUN",
        "data:text/html,<script>RUN</script>",
        "{{ RUN }} ${RUN} #{RUN} {% RUN %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }} RUN",
        "\\u003cscript\\u003eRUN\\u003c/script\\u003e",
        "\u2028RUN//\u2029",
        '"};RUN;//',
        "'};RUN;//`",
        "`${RUN}`",
        "__proto__",
        "constructor.prototype",
        "\x00<script>RUN</script>\x00",
        "\u202e<script>RUN</script>\u202c\U000e0001\u200b",
    )
)
"""None of them may run, wherever it stands."""
FORBIDDEN = (
    "img, iframe, object, embed, form, base, audio, video, marquee, template, textarea, math, main script, "
    "a[href^=java]"
)
LOOKS = (Path(__file__).parent / "report_page.js").read_text()
"""What is asked of a page, as functions of their names."""
Opened = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("RLAR_TEST_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("there is no Chromium here (RLAR_TEST_CHROMIUM, or one in PATH)")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=path, args=flags)
        yield made
        made.close()


def figures_of(folder: Path) -> dict[str, Any]:
    return gather(folder, LibraryView(folder / FOLDER_NAME))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("browser"))
    add_agents(folder)
    (folder / "report.html").write_bytes(render(figures_of(folder)))
    return folder / "report.html"


@pytest.fixture
def opened(browser: Any) -> Iterator[Opened]:
    """Opens a page, and fails at the end if a script failed, the policy was broken, or anything was fetched."""
    faults: list[str] = []
    contexts = []

    def start(where: Path | str, *, width: int = 1280, scheme: str = "light", live: bool = False) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        address = where if isinstance(where, str) else where.as_uri()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.on("dialog", lambda dialog: (faults.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on(
            "request",
            lambda asked: None if asked.url.startswith(("data:", address)) else faults.append(f"asked for {asked.url}"),
        )
        page.goto(address)
        page.wait_for_selector("html[data-ready]", state="attached")
        return page

    yield start
    for context in contexts:
        context.close()
    assert faults == []


def asked(page: Any, name: str) -> Any:
    """What a function of ``report_page.js`` says of a page."""
    return page.evaluate(f"async () => {{ {LOOKS}\nreturn await {name}(); }}")


def look_at_everything(page: Any) -> None:
    """Opens every tool, every sample, every view and every fold."""
    asked(page, "lookAtEverything")


def test_of_fifty_hostile_strings_none_runs(browser: Any, opened: Opened, tmp_path: Path) -> None:
    assert len(set(HOSTILE)) == len(HOSTILE) == 50
    turn = iter(range(10**9))

    def words(place: str) -> str:
        return f"{HOSTILE[next(turn) % 50]} {place}" if place not in ("math", "chat") else HOSTILE[len(place)]

    folder = make_run(tmp_path, words)
    add_agents(folder, words)
    (folder / "report.html").write_bytes(render(figures_of(folder)))
    page = opened(folder / "report.html")
    look_at_everything(page)
    assert page.evaluate("window.rlarRan") is None
    assert page.locator(FORBIDDEN).count() == 0
    assert page.locator("script").count() == 2
    assert asked(page, "handlers") == []
    shown = page.evaluate("document.body.textContent")
    assert "onerror=" in shown and "U+202E" in shown and "javascript:" in shown


def test_each_hostile_string_is_shown_as_it_is(browser: Any, opened: Opened, tmp_path: Path) -> None:
    figures = figures_of(make_run(tmp_path))
    group = figures["samples"][0]
    figures["samples"] = [
        group
        | {
            "uid": str(number),
            "rank": number,
            "source": text,
            "why": text,
            "responses": [group["responses"][0] | {"text": text}],
        }
        for number, text in enumerate(HOSTILE)
    ]
    (tmp_path / "report.html").write_bytes(render(figures))
    page = opened(tmp_path / "report.html")
    for number, text in enumerate(HOSTILE):
        item = page.locator(f'[data-key="group 1 {number} {group["step"]}"]')
        while not item.count():
            page.locator('[data-key="page on"]').click()
        item.click()
        said = page.locator(".reply .body p").text_content()
        assert re.sub(r"U\+[0-9A-F]{4,5}", "", said) == re.sub("[\0\u202e\u202c\u200b\U000e0001]", "", text)
    assert page.evaluate("window.rlarRan") is None


def test_the_policy_stops_what_should_never_come_that_far(browser: Any, file: Path) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(file.as_uri())
    assert asked(page, "breakIn") == [None, ["text", "markup", "fetch"]]
    context.close()


def test_it_works_by_keyboard_alone(opened: Opened, file: Path) -> None:
    page = opened(file)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    plot = page.locator(".plot").first
    plot.focus()
    page.keyboard.press("Home")
    first = plot.get_attribute("aria-valuetext")
    page.keyboard.press("ArrowRight")
    assert first.startswith("step 1,") and plot.get_attribute("aria-valuetext").startswith("step 2,")
    assert "shadow" in plot.get_attribute("aria-valuetext") and page.locator(".tip:visible").count() == 1
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert float(outline.removesuffix("px")) >= 2
    page.locator("#list .item").first.focus()
    before = page.locator("#group").text_content()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator("#list .item").nth(1).get_attribute("aria-current") == "true"
    assert page.evaluate("document.activeElement.getAttribute('aria-current')") == "true"
    assert page.locator("#group").text_content() != before
    button = page.locator('[data-key="curve routes"]')
    button.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('data-key')") == "curve routes"
    assert button.get_attribute("aria-pressed") == "true"


def test_it_has_landmarks_names_and_one_id_each(opened: Opened, file: Path) -> None:
    page = opened(file)
    look_at_everything(page)
    assert [page.locator(tag).count() for tag in ("main", "header.top", "nav", "h1")] == [1, 1, 1, 1]
    assert asked(page, "twice") == [] and asked(page, "nameless") == []
    assert page.locator("section[aria-labelledby]").count() == 7


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_the_contrast_that_it_takes_to_read_it(opened: Opened, file: Path, scheme: str) -> None:
    page = opened(file, scheme=scheme)
    assert asked(page, "tooFaint") == []
    page.locator("#theme").click()
    page.locator("#theme").click()
    assert page.locator("html").get_attribute("data-theme") == "dark"
    assert asked(page, "tooFaint") == []


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_nothing_is_wider_than_the_window(opened: Opened, file: Path, width: int) -> None:
    page = opened(file, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_filters_narrow_the_samples_and_alarms_lead_to_them(opened: Opened, file: Path) -> None:
    page = opened(file)

    def shown() -> list[str]:
        return page.locator("#list .dots").evaluate_all("all => all.map((el) => el.getAttribute('aria-label'))")

    everything = len(shown())
    page.get_by_label("Shown for").select_option("hacked")
    assert shown() and all("caught cheat" in tags for tags in shown()) and len(shown()) < everything
    page.get_by_label("From step").fill("6")
    assert all(
        int(t.split("·")[0].split()[-1]) >= 6 for t in page.locator("#list .first span:first-child").all_text_contents()
    )
    page.get_by_label("Words").fill("no such words anywhere")
    assert "No group is like that." in page.locator("#list").text_content()
    page.locator('[data-key="filter clear"]').click()
    assert len(shown()) == everything
    page.locator(".alarm", has_text="Caught cheats").get_by_role("button").click()
    assert all("caught cheat" in tags for tags in shown())
    page.locator(".alarm", has_text="was rolled back").get_by_role("button").click()
    assert page.locator("#tool h3").first.text_content() == "model"
    page.locator('[data-key="filter sort"]').select_option("low")
    means = [text for text in page.locator("#list .first span:last-child").all_text_contents() if text != "–"]
    assert means == sorted(means)


def test_evidence_clusters_and_costs_can_be_looked_at(opened: Opened, file: Path) -> None:
    page = opened(file)
    alarm = page.locator(".alarm", has_text='"open: sea tales": length is paid')
    assert alarm.locator(".evidence").text_content() == "correlation0.81figure40"
    alarm.get_by_role("button", name="Show samples").click()
    assert page.locator("#list .item").count() == 1 and "sea" in page.locator("#group").text_content()
    page.locator('[data-key="filter clear"]').click()
    assert page.locator("#list .item").count() > 1
    routing = page.locator("#routing")
    assert "open: sea tales" in routing.locator(".matrix").text_content()
    page.locator('[data-key="flow kind"]').click()
    assert "sea tales" not in routing.locator(".matrix").text_content() and "why advised" in routing.text_content()
    costs = page.locator("#costs")
    assert "$0.0040" in costs.text_content() and "880 tokens in 4 calls" in costs.text_content()
    costs.get_by_role("button", name="rubric").click()
    assert "question two" in page.locator("#tool").text_content()


def test_it_prints_without_its_controls(opened: Opened, file: Path) -> None:
    page = opened(file)
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible() and not page.locator(".bar").first.is_visible()
    assert page.locator("#overview").is_visible() and page.pdf()[:4] == b"%PDF"


def test_without_scripts_the_main_figures_are_there(browser: Any, file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    assert (
        "final_answer" in page.locator("noscript").inner_text()
        and "rolled back" in page.locator("noscript").inner_text()
    )
    context.close()


def test_a_live_page_keeps_up_and_does_not_disturb_who_reads(opened: Opened, tmp_path: Path) -> None:
    make_run(tmp_path)
    route = Route(parts=(), reason="", kind=Kind.OPEN, covered=False, snapshot="s")
    score = Score(value=None, outcome=Outcome.ABSTAINED, reason="")

    def one_more(ledger: Ledger, uid: str) -> None:
        sample = make_sample("x", uid=uid, step=13)
        ledger.add([Row(sample=sample, route=route, score=score, sent=0.5, sent_as="neutral", received=1, seconds=0)])

    files = watched(tmp_path, tmp_path / FOLDER_NAME)
    with (
        Live(lambda: figures_of(tmp_path), files, refresh_s=0.2, rest=0) as server,
        Ledger(tmp_path / FILE_NAME, token="run") as ledger,
    ):
        page = opened(server.url)
        page.locator("#state", has_text="252 responses").wait_for()
        page.get_by_label("Words").fill("prompt")
        chosen = page.locator("#list .item").nth(2).get_attribute("data-key")
        page.locator("#list .item").nth(2).click()
        one_more(ledger, "late")
        page.locator("#state", has_text="253 responses").wait_for()
        assert page.locator('#list [aria-current="true"]').get_attribute("data-key") == chosen
        assert page.get_by_label("Words").input_value() == "prompt"
        assert page.evaluate("document.activeElement.getAttribute('data-key')") == chosen
        assert page.locator("dl.facts dd", has_text="253").count() == 1
        page.get_by_label("Words").focus()
        page.keyboard.press("End")
        page.keyboard.type(" o")
        one_more(ledger, "later")
        page.locator("#state", has_text="254 responses").wait_for()
        assert page.get_by_label("Words").input_value() == "prompt o"
        assert page.evaluate("document.activeElement.getAttribute('data-key')") == "filter words"
        page.close()  # before the server that it asks again and again
