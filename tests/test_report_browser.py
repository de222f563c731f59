"""The report page in a browser: what is drawn, and how it follows keys, choices, themes and screens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("plotly")
from browser import Browser, browser, find
from reported import FITTED, LONG_NAME

from gemopt.evaluate import evaluate
from gemopt.placement import Placement
from gemopt.profile import Profile
from gemopt.report import Report
from gemopt.traces import Traces

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def folder(report_folder: Path) -> Path:
    return report_folder


@pytest.fixture(scope="module")
def made(report_page: Report) -> Report:
    return report_page


@pytest.fixture(scope="module")
def seen(made: Report, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The page in a browser; the tests below leave it as they found it."""
    if find() is None:
        pytest.skip("no Chromium: apt-get install chromium, or set CHROMIUM")
    made.save(folder / "page.html")
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        opened.screen(1366, 768)
        opened.open(folder / "page.html")
        yield opened


def values(seen: Browser, plot: str, trace: int, key: str = "y") -> list[float]:
    found: list[float] = seen.js(f"Array.from(document.getElementById('plot-{plot}')._fullData[{trace}].{key})")
    return found


def choose(seen: Browser, picker: str, choice: str) -> None:
    seen.js(
        f"(() => {{ const s = document.querySelector('select[data-picker={picker}]'); s.value = {json.dumps(choice)};"
        " s.dispatchEvent(new Event('change')); })()"
    )


def test_every_plot_is_drawn_without_complaint_or_network(seen: Browser, made: Report) -> None:
    drawn = seen.js(
        "[...document.querySelectorAll('.plot')].map(each => [each.id, each._fullData.length, each.querySelectorAll("
        "'.main-svg .trace path, .main-svg .hm image, .main-svg .points path').length,"
        " each.getBoundingClientRect().height])"
    )
    assert [row[0] for row in drawn] == [f"plot-{each.name}" for each in made.sections if each.figure is not None]
    assert len(drawn) == 9 and not seen.js("document.querySelector('.sketch')")
    for name, traces_, shapes, height in drawn:
        assert traces_ > 0 and shapes > 0 and height >= 250, name
    assert seen.complaints == []
    assert {url.partition(":")[0] for url in seen.asked} <= {"file", "data", "blob"}
    assert not seen.js("[...document.querySelectorAll('.modebar-btn')].some(b => /cloud|share/i.test(b.dataset.title))")


def test_the_picker_shows_one_layer(seen: Browser, folder: Path) -> None:
    routed, measured = Traces.load(folder / "traces.safetensors"), Profile.load(folder / "profile.json")
    found = evaluate(Placement.load(folder / "placement.json"), measured, routed.steps(slice(0, FITTED)))
    whole = values(seen, "ranks", 1)
    np.testing.assert_allclose(whole, found.step_us, rtol=1e-6)
    choose(seen, "layer", "layer 3")
    np.testing.assert_allclose(values(seen, "ranks", 1), found.makespan_TL[:, 1], rtol=1e-6)
    seen.js("document.querySelector('button[data-step=\"1\"]').click()")
    np.testing.assert_allclose(values(seen, "ranks", 1), found.makespan_TL[:, 2], rtol=1e-6)
    choose(seen, "layer", "all layers")
    assert values(seen, "ranks", 1) == whole
    curves = seen.js("document.getElementById('plot-devices')._fullData.filter(t => t.visible).length")
    choose(seen, "devices", f"rank 1: {LONG_NAME}")
    assert seen.js("document.getElementById('plot-devices')._fullData.filter(t => t.visible).length") == 2 < curves
    assert values(seen, "devices", 0, "x") == [0, 4, 8, 16, 32, 64]
    choose(seen, "devices", "all ranks")
    assert seen.complaints == []


def test_keys_zoom_and_theme_and_hover(seen: Browser) -> None:
    ranges = "document.getElementById('plot-search')._fullLayout.xaxis.range.map(Number)"
    press = "document.getElementById('plot-search').dispatchEvent(new KeyboardEvent('keydown', {key: '%s'}))"
    low, high = seen.js(ranges)
    seen.js(press % "+")
    assert np.diff(seen.js(ranges))[0] == pytest.approx(0.7 * (high - low))
    seen.js(press % "ArrowRight")
    assert seen.js(ranges)[0] > low
    seen.js(press % "0")
    near = 0.02 * (high - low)  # its margins are of the width that the picture has by now
    seen.until(f"Math.hypot({ranges}[0] - {low}, {ranges}[1] - {high}) < {near}")  # it draws when it finds the time
    ink = "getComputedStyle(document.querySelector('#plot-makespan .xtitle')).fill"
    light, ground = seen.js(ink), seen.js("getComputedStyle(document.body).backgroundColor")
    seen.js("document.getElementById('theme').click()")
    turned = "document.getElementById('plot-moves')._fullData[0].reversescale"
    assert not seen.js(turned), "no moves are of the colour of the ground"
    assert seen.js(ink) != light and seen.js("getComputedStyle(document.body).backgroundColor") != ground
    seen.js("document.getElementById('theme').click()")
    assert seen.js(ink) == light and seen.js(turned)
    seen.js("Plotly.Fx.hover('plot-makespan', [{curveNumber: 1, pointNumber: 1}])")
    assert "us" in seen.js("document.querySelector('#plot-makespan .hoverlayer').textContent")
    assert seen.complaints == []


def test_it_fits_a_phone_and_paper(seen: Browser, folder: Path) -> None:
    seen.screen(390, 844, phone=True, dark=True)
    seen.open(folder / "page.html")
    assert seen.js("document.documentElement.scrollWidth") <= 390
    assert seen.js("[...document.querySelectorAll('.plot')].every(p => p.getBoundingClientRect().width <= 390)")
    assert seen.js("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    seen.screen(1366, 768)
    seen.open(folder / "page.html")
    seen.pdf(folder / "page.pdf")
    assert (folder / "page.pdf").read_bytes().startswith(b"%PDF")
    assert seen.js("document.getElementById('plot-makespan')._fullLayout.width") > 700  # as before printing
    assert seen.complaints == []
