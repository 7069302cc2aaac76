"""The page in a real browser: it opens without a word on the console, the table sorts, the charts hold their data."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_page import a_duel

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; its console is kept."""
    webdriver = pytest.importorskip("selenium.webdriver")
    pytest.importorskip("plotly")
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver_path = shutil.which("chromedriver")
    if binary is None or driver_path is None:
        pytest.skip("needs a browser and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    # No network: what the page needs is in the page.
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from hf_lema.reporting.page import write_page

    path = tmp_path_factory.mktemp("page") / "report.html"
    hostile = dataclasses.replace(a_duel(), title='</script><b id="escaped">a & "b"</b>')
    write_page([a_duel(), hostile], path)
    return path


def show_as(browser: Any, width: int = 1280, theme: str = "light") -> None:
    """A window of that width with that theme."""
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 640}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    # What hangs on either is drawn again at the next frames.
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def opened(browser: Any, path: Path) -> None:
    """The page on a wide, light screen; opening it takes seconds, so once for all tests that do not ask for more."""
    show_as(browser)
    if browser.current_url != path.as_uri():
        browser.get(path.as_uri())


def first_column(browser: Any) -> list[str]:
    script = "return [...document.querySelectorAll('#duel-0 tbody th')].map(cell => cell.textContent)"
    return browser.execute_script(script)


def click_head(browser: Any, text: str) -> None:
    script = "[...document.querySelectorAll('#duel-0 thead button')].find(b => b.textContent === arguments[0]).click()"
    browser.execute_script(script, text)


@pytest.mark.parametrize(("width", "theme"), [(390, "dark"), (1280, "light")])
def test_page_opens_without_a_word_on_the_console_and_fits_the_window(
    browser: Any, page: Path, width: int, theme: str
) -> None:
    show_as(browser, width, theme)
    browser.get(page.as_uri())

    assert browser.get_log("browser") == []
    widths = "const root = document.documentElement; return [root.scrollWidth, root.clientWidth]"
    page_width, window_width = browser.execute_script(widths)
    assert page_width == window_width
    assert browser.execute_script("return document.querySelectorAll('.main-svg').length") > 0


def test_charts_hold_the_figures_of_the_duel(browser: Any, page: Path) -> None:
    opened(browser, page)
    script = "return document.getElementById(arguments[0]).data.map(trace => [trace.name, trace.x, trace.y])"
    curves = browser.execute_script(script, "duel-0-loss")
    duel = a_duel()
    finished = [result for result in duel.results if result.loss]

    for result in finished:
        assert [result.name, list(range(1, 9)), list(result.loss)] in curves
    assert ["lema", list(range(1, 9)), [0.0] * 8] in curves, "the difference to peft"
    points = browser.execute_script(script, "duel-0-trade-off")
    assert [(name, *x) for name, x, _ in points] == [("peft", 16.0), ("lema", 4.0), ("lema-auto", 12.0)]
    drawn = "return document.querySelectorAll('#' + arguments[0] + ' .scatterlayer .trace').length"
    assert browser.execute_script(drawn, "duel-0-loss") == len(curves)


def test_every_chart_of_the_page_is_drawn(browser: Any, page: Path) -> None:
    opened(browser, page)
    script = "return [...document.querySelectorAll('.chart')].map(c => [c.id, c.querySelectorAll('.trace').length])"
    charts = dict(browser.execute_script(script))

    keys = ["trade-off", "loss", "vram", "ram", "vram-bars", "ram-bars"]
    assert list(charts) == [f"duel-{number}-{key}" for number in (0, 1) for key in keys]
    assert min(charts.values()) > 0


def test_a_chart_can_be_saved_as_a_picture(browser: Any, page: Path) -> None:
    opened(browser, page)
    script = "Plotly.toImage(document.getElementById('duel-0-loss')).then(arguments[0])"

    assert browser.execute_async_script(script).startswith("data:image/png;base64,")


def test_nothing_on_the_page_sends_a_chart_anywhere(browser: Any, page: Path) -> None:
    opened(browser, page)
    script = "return [...document.querySelectorAll('.modebar-btn')].map(button => button.dataset.title)"

    assert set(browser.execute_script(script)) == {
        "Download plot as a PNG",
        "Zoom",
        "Pan",
        "Zoom in",
        "Zoom out",
        "Reset axes",
    }
    # By the page's own policy the browser refuses even what would need no network.
    fetched = "const done = arguments[0]; fetch('data:,x').then(() => done('sent'), () => done('refused'))"
    assert browser.execute_async_script(fetched) == "refused"
    browser.get_log("browser")  # the refusal is told there


def test_table_sorts_by_a_click_and_backwards_by_a_second_and_rows_without_a_figure_stay_last(
    browser: Any, page: Path
) -> None:
    opened(browser, page)
    assert sorted(first_column(browser)) == ["lema", "lema-auto", "peft", "qlora"]

    click_head(browser, "VRAM GiB")
    assert first_column(browser) == ["lema", "lema-auto", "peft", "qlora"]
    click_head(browser, "VRAM GiB")
    assert first_column(browser) == ["peft", "lema-auto", "lema", "qlora"]
    sorted_heads = "return [...document.querySelectorAll('[aria-sort]')].map(h => h.textContent + h.ariaSort)"
    assert browser.execute_script(sorted_heads) == ["VRAM GiBdescending"]

    click_head(browser, "contender")
    assert first_column(browser) == ["lema", "lema-auto", "peft", "qlora"]


def test_on_a_phone_the_names_beside_the_curves_make_room(browser: Any, page: Path) -> None:
    opened(browser, page)
    names = "return document.getElementById('duel-0-loss').layout.annotations.length"
    assert browser.execute_script(names) == 1
    show_as(browser, width=390)

    assert browser.execute_script(names) == 0


def test_colours_follow_the_theme_while_the_page_is_open(browser: Any, page: Path) -> None:
    opened(browser, page)
    ink = "return document.getElementById('duel-0-loss').layout.font.color"
    light = browser.execute_script(ink)
    show_as(browser, theme="dark")

    assert browser.execute_script(ink) != light
    assert browser.get_log("browser") == []


def test_text_of_a_record_is_text_on_the_page_and_no_markup(browser: Any, page: Path) -> None:
    opened(browser, page)

    assert browser.execute_script("return document.getElementById('escaped')") is None
    assert browser.execute_script("return document.querySelector('#duel-1 h1').textContent").startswith("</script>")
