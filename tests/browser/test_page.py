"""The report page in a real browser: nothing overflows, nothing is requested, everything can be read.

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

from selenium import webdriver  # noqa: E402

PAGE = Path(__file__).parents[2] / "runs" / "demo" / "report.html"
SHOTS = Path(__file__).parents[2] / "runs" / "demo" / "screenshots"
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
return Math.min(...[...document.querySelectorAll("figure svg")].map(
  s => s.getBoundingClientRect().width / parseFloat(s.getAttribute("width")))) * 0.75;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not (CHROMIUM.exists() and DRIVER.exists()):
        pytest.skip("chromium and chromium-driver are not installed (Debian's packages)")
    if not PAGE.is_file():
        pytest.skip("`make demo` has not run here")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=str(DRIVER)))
    SHOTS.mkdir(exist_ok=True)
    yield driver
    driver.quit()


def show(browser: Any, width: int, scheme: str) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"media": "", "features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get(PAGE.as_uri())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_can_be_read(browser: Any, width: int, scheme: str) -> None:
    show(browser, width, scheme)
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    (SHOTS / f"{width}-{scheme}.png").write_bytes(base64.b64decode(shot["data"]))
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(CONTRAST) == []
    scale = browser.execute_script(SCALE)
    assert scale * 8 / 0.75 >= 9  # the smallest text of a chart (8 points) in CSS pixels


def test_it_prints(browser: Any) -> None:
    show(browser, 1280, "light")
    pdf = browser.execute_cdp_cmd(
        "Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": True}
    )
    content = base64.b64decode(pdf["data"])
    (SHOTS / "print.pdf").write_bytes(content)
    assert content.startswith(b"%PDF")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.execute_script(CONTRAST) == []


def test_nothing_is_requested_and_nothing_complains(browser: Any) -> None:
    browser.get_log("performance")
    show(browser, 1280, "light")
    requested = [e["message"] for e in browser.get_log("performance") if '"Network.requestWillBeSent"' in e["message"]]
    assert all(PAGE.as_uri() in message for message in requested)
    assert browser.get_log("browser") == []
    text = PAGE.read_text("utf-8")
    assert "<script" not in text
    assert not [word for word in ('src="http', 'href="http', "@import", "url(http") if word in text]
    assert len(text.encode()) < 3_000_000


def test_it_can_be_heard(browser: Any) -> None:
    """Pictures have words, tables have headers, headings come in order."""
    show(browser, 1280, "light")
    words = browser.execute_script("return [...document.querySelectorAll('[role=img]')].map(e => e.ariaLabel)")
    assert len(words) == 6
    assert all(len(word) > 40 for word in words)
    assert browser.execute_script(
        "return [...document.querySelectorAll('tr')].every(r => r.querySelector('th[scope]'))"
    )
    levels = browser.execute_script("return [...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_the_answers_come_first(browser: Any) -> None:
    show(browser, 390, "light")
    questions = browser.execute_script("return [...document.querySelectorAll('dl.answers dt')].map(e => e.textContent)")
    assert questions == [
        "Which student is best, and by how much?",
        "Is the difference real?",
        "What did it cost?",
        "What was different between the runs?",
    ]
    assert browser.execute_script("return document.querySelector('dl.answers').getBoundingClientRect().top") < 250
