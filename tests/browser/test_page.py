"""Report pages in a real browser: nothing overflows, nothing is requested, everything can be read.

The demo's, and one of run folders made by hand that has what the demo has not: tasks, seeds, sources.
Needs Debian's chromium and chromium-driver; run by `make test-browser` after `make demo`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

selenium = pytest.importorskip("selenium", reason="extra `browser` is not installed")

from run_folders import make_run, noisy, write_tasks  # noqa: E402
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

from tailkd.report.page import write_page  # noqa: E402

DEMO = Path(__file__).parents[2] / "runs" / "demo" / "report.html"
WIDTHS = (390, 768, 1280, 1920)
CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
CONTRAST = """
const linear = x => x / 255 <= .03928 ? x / 255 / 12.92 : ((x / 255 + .055) / 1.055) ** 2.4;
const luminance = (c) => { const v = c.map(linear);
  return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
const paper = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
  if (c.length === 3 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
const low = [];
for (const e of document.querySelectorAll("main *")) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  if (!own || e.tagName === "style") continue;
  const style = getComputedStyle(e), svg = e instanceof SVGElement;
  const ink = parse(svg && style.fill !== "none" ? style.fill : style.color).slice(0, 3);
  const behind = luminance(paper(svg ? e.closest("figure") : e));
  const [a, b] = [luminance(ink), behind].sort((x, y) => y - x);
  const ratio = (a + .05) / (b + .05);
  if (ratio < 4.5) low.push([e.tagName, e.textContent.trim().slice(0, 30), ratio]);
}
return low;
"""


SCALE = """
return Math.min(...[...document.querySelectorAll("figure svg")].filter(s => s.checkVisibility()).map(
  s => s.getBoundingClientRect().width / parseFloat(s.getAttribute("width")))) * 0.75;
"""
SHOWN = (
    "return [...document.querySelectorAll('figure')].filter(f => f.checkVisibility()).map(f => f.dataset.axis || '')"
)


@pytest.fixture(scope="module", params=["demo", "made"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "made":
        return made_page(tmp_path_factory.mktemp("made"))
    if not DEMO.is_file():
        pytest.skip("`make demo` has not run here")
    return DEMO


def made_page(folder: Path) -> Path:
    """Four methods with long names, two of them with three seeds, of two sources, measured on tasks."""
    objectives = {"kl": "forward_kl", "tad": "tail_aware", "reverse-kl-with-a-long-name": "reverse_kl", "clm": "none"}
    runs = []
    for number, (name, divergence) in enumerate(objectives.items()):
        for seed in (1, 2, 3)[: 3 if number < 2 else 1]:
            kl = noisy(0.5 - 0.1 * number, seed)
            made = {"curve": (3.0, 1.2, 0.9), "seconds": 2.0 + number, "objective": {"divergence": divergence}}
            run = make_run(folder, f"{name}-seed={seed}", kl=kl, seed=seed, **made)
            right = [float(item % (number + 2) == 0) for item in range(200)]
            write_tasks(run, piqa=right, hellaswag=right[:90], gsm8k=right[:50], sat_math=right[:32])
            run.evaluation["student"]["sources"] = {
                source: {"kl": 0.1, "cross_entropy": 3.0} for source in ("web", "books")
            }
            runs.append(run)
    return write_page(runs, folder / "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not (CHROMIUM.exists() and DRIVER.exists()):
        pytest.skip("chromium and chromium-driver are not installed (Debian's packages)")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=str(DRIVER)))
    yield driver
    driver.quit()


def show(browser: Any, page: Path, width: int = 1280, scheme: str = "light") -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"media": "", "features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get(page.as_uri())


def shot(browser: Any, page: Path, name: str) -> None:
    """A picture beside the page, to look at."""
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    folder = page.parent / "screenshots"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.png").write_bytes(base64.b64decode(taken["data"]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_can_be_read(browser: Any, page: Path, width: int, scheme: str) -> None:
    show(browser, page, width, scheme)
    shot(browser, page, f"{width}-{scheme}")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(CONTRAST) == []
    scale = browser.execute_script(SCALE)
    assert scale * 8 / 0.75 >= 9  # the smallest text of a chart (8 points) in CSS pixels


@pytest.mark.parametrize("axis", ["tokens", "flops", "seconds"])
def test_curves_against_what_is_chosen(browser: Any, page: Path, axis: str) -> None:
    """A click, or the arrow keys, show the curves of one axis and leave the other charts."""
    show(browser, page)
    known = browser.execute_script("return [...document.querySelectorAll('input[name=axis]')].map(i => i.id)")
    if f"axis-{axis}" not in known:
        pytest.skip("these runs have no bill")
    browser.execute_script(f"document.querySelector('label:has(#axis-{axis})').click()")
    curves = {shown for shown in browser.execute_script(SHOWN) if shown}
    assert curves == {axis}
    assert "" in browser.execute_script(SHOWN)
    assert browser.execute_script(CONTRAST) == []
    chosen = browser.find_element("id", f"axis-{axis}")
    chosen.send_keys(Keys.ARROW_RIGHT)
    following = known[(known.index(f"axis-{axis}") + 1) % len(known)].removeprefix("axis-")
    assert {shown for shown in browser.execute_script(SHOWN) if shown} == {following}


def test_it_prints(browser: Any, page: Path) -> None:
    show(browser, page)
    pdf = browser.execute_cdp_cmd(
        "Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": True}
    )
    content = base64.b64decode(pdf["data"])
    (page.parent / "print.pdf").write_bytes(content)
    assert content.startswith(b"%PDF")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.execute_script(CONTRAST) == []


def test_nothing_is_requested_and_nothing_complains(browser: Any, page: Path) -> None:
    browser.get_log("performance")
    browser.get_log("browser")
    show(browser, page)
    requested = [e["message"] for e in browser.get_log("performance") if '"Network.requestWillBeSent"' in e["message"]]
    assert all(page.as_uri() in message for message in requested)
    assert browser.get_log("browser") == []
    text = page.read_text("utf-8")
    assert "<script" not in text
    assert not [word for word in ('src="http', 'href="http', "@import", "url(http") if word in text]
    assert len(text.encode()) < 3_000_000


def test_it_can_be_heard(browser: Any, page: Path) -> None:
    """Pictures have words, tables have headers, headings come in order."""
    show(browser, page)
    words = browser.execute_script("return [...document.querySelectorAll('figure [role=img]')].map(e => e.ariaLabel)")
    assert len(words) == browser.execute_script("return document.querySelectorAll('figure').length") >= 6
    assert all(len(word) > 40 for word in words)
    assert browser.execute_script(
        "return [...document.querySelectorAll('tr')].every(r => r.querySelector('th[scope]'))"
    )
    levels = browser.execute_script("return [...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_the_answers_come_first(browser: Any, page: Path) -> None:
    show(browser, page, 390)
    questions = browser.execute_script("return [...document.querySelectorAll('dl.answers dt')].map(e => e.textContent)")
    assert questions == [
        "Which student is best, and by how much?",
        "Is the difference real?",
        "What did it cost?",
        "What was different between the runs?",
    ]
    assert browser.execute_script("return document.querySelector('dl.answers').getBoundingClientRect().top") < 250
