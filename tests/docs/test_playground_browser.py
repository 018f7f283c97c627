"""The playground in Chromium: its answers are the library's, and mouse, finger, keyboard and address work.

``make test-browser`` runs this. The page is built by Sphinx as it is published, and opened from a folder and from a
server.
"""

from __future__ import annotations

import functools
import http.server
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.docs.test_playground import (
    CASES,
    DOCS,
    NOT_UNIQUE,
    direction_tolerance,
    errors,
    playground_cases,
    weight_tolerance,
)

pytestmark = pytest.mark.browser

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PRESETS = list(playground_cases.PRESETS)
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
DESK = {"viewport": {"width": 1280, "height": 900}}


def chromium() -> str:
    """Where Chromium is; an error that says what to do if it is nowhere."""
    named = os.environ.get("CHROMIUM")
    names = [named] if named else ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise RuntimeError(
            f"No Chromium found under {', '.join(names)}. Install one (on Debian: apt-get install chromium), or set "
            "CHROMIUM to the path of a Chrome or Chromium. `make test` needs none."
        )
    return found


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise RuntimeError("These tests need playwright: run them by `make test-browser`.") from error
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The page alone, built with the configuration of the documentation."""
    out = tmp_path_factory.mktemp("site")
    settings = [
        "extensions=myst_parser,sphinx.ext.autodoc,site_math",
        "root_doc=playground",
        "include_patterns=playground.md",
    ]
    defines = [part for setting in settings for part in ("-D", setting)]
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", *defines, str(DOCS), str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(DOCS.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def served(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            # Browsers ask a server for an icon without being told to.
            if self.path == "/favicon.ico":
                self.send_response(204)
                self.end_headers()
            else:
                super().do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/playground.html"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def open_page(browser, site):
    """Open the page; at the end nothing must have gone wrong in it, and nothing but its own files been asked for."""
    contexts, complaints = [], []
    folder = (site / "playground.html").as_uri()

    def opened(hash_="", *, base=folder, settings=DESK, motion="reduce", **more):
        context = browser.new_context(**{**settings, "reduced_motion": motion, **more})
        contexts.append(context)
        page = context.new_page()
        own = base.rsplit("/", 1)[0]
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
        page.on("websocket", lambda socket: complaints.append(f"socket: {socket.url}"))

        def asked(request):
            if not request.url.startswith((own, "data:")):
                complaints.append(f"request: {request.url}")

        page.on("request", asked)
        page.goto(base + hash_)
        page.wait_for_selector(".pg-ready")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def rows_of(page):
    return page.evaluate("gradsurgeryPlayground.state.rows")


def handle(page, i):
    return page.locator(f".pg-handle[data-row='{i}']")


def centre(page, i):
    box = handle(page, i).locator(".pg-knob").bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def unit(page):
    """Pixels a unit of length."""
    return page.locator(".pg-plane").bounding_box()["width"] / 2 / 2.9


def card(page, method):
    return page.locator(f".pg-card[data-method='{method}']").inner_text()


# ------------------------------------------------------------------------------------------ mathematics


# What the page is asked for each case: the method and its options, none for the defaults.
ASKED = {
    **{method: (method, {}) for method in ("sum", "pcgrad", *playground_cases.METHODS)},
    **playground_cases.VARIANTS,
}


def test_answers_are_those_of_the_library(open_page):
    page = open_page()
    assert set(page.evaluate("gradsurgeryMethods.METHODS.map(({ key }) => key)")) == {key for key, _ in ASKED.values()}
    found = page.evaluate(
        """([cases, asked]) => cases.map(({ rows }) => {
            const { solve, pcgradInOrder } = gradsurgeryMethods;
            const answers = Object.fromEntries(Object.entries(asked).map(
                ([name, [key, options]]) => [name, solve(key, rows, options)]));
            const weights = pcgradInOrder(rows);
            const direction = [0, 1].map((k) => weights.reduce((sum, w, i) => sum + w * rows[i][k], 0));
            return { ...answers, "pcgrad in order": { weights, direction } };
        })""",
        [CASES, ASKED],
    )
    worst = 0.0
    for case, own in zip(CASES, found, strict=True):
        assert own.keys() == case["answers"].keys()
        for method, answer in case["answers"].items():
            where = f"{method}, {case['name']}"
            direction, weights = errors(case["rows"], answer, own[method])
            worst = max(worst, direction)
            assert direction <= direction_tolerance(method, case["name"]), where
            if (method, case["name"]) in NOT_UNIQUE:
                continue
            assert weights <= weight_tolerance(method, case["name"]), where
    print(f"directions differ by {worst:.1e} of their terms at most")


def test_effects_are_the_signs_of_the_slopes(open_page):
    page = open_page()
    effects = page.evaluate(
        "cases => cases.map(({ rows }) => Object.fromEntries(gradsurgeryMethods.METHODS.map("
        "({ key }) => [key, gradsurgeryMethods.solve(key, rows).effects])))",
        CASES,
    )
    seen = set()
    for case, own in zip(CASES, effects, strict=True):
        rows = np.array(case["rows"])
        lengths = np.linalg.norm(rows, axis=1)
        for method, signs in own.items():
            answer = case["answers"][method]
            terms = lengths.sum() if answer["weights"] is None else np.abs(answer["weights"]) @ lengths
            slopes = rows @ answer["direction"]
            for slope, length, sign in zip(slopes, lengths, signs, strict=True):
                if abs(slope) > 1e-11 * terms * length:
                    assert sign == -np.sign(slope), (method, case["name"])
                elif abs(slope) < 1e-13 * terms * length:
                    assert sign == 0, (method, case["name"])
                seen.add(sign)
    assert seen == {-1, 0, 1}


def test_the_cone_is_where_no_loss_rises(open_page):
    page = open_page()
    cones = page.evaluate("cases => cases.map(({ rows }) => gradsurgeryMethods.cone(rows))", CASES)
    angles = np.linspace(0, 2 * np.pi, 1441)
    circle = np.stack([np.cos(angles), np.sin(angles)])
    kinds = set()
    for case, cone in zip(CASES, cones, strict=True):
        rows = np.array([row for row in case["rows"] if any(row)])
        kinds.add(cone["kind"])
        if cone["kind"] == "plane":
            assert len(rows) == 0
            continue
        cosines = (rows / np.linalg.norm(rows, axis=1)[:, None]) @ circle
        worst = cosines.min(axis=0)
        if cone["kind"] == "wedge":
            into, width = (angles - cone["from"]) % (2 * np.pi), cone["to"] - cone["from"]
            assert 0 < width <= np.pi + 1e-12
            inside = (into > 1e-6) & (into < width - 1e-6)
            outside = (into > width + 1e-6) & (into < 2 * np.pi - 1e-6)
            assert (worst[inside] > 0).all(), case["name"]
            assert (worst[outside] < 0).all(), case["name"]
            continue
        assert (worst < 1e-12).all(), case["name"]
        if cone["kind"] in ("line", "ray"):
            along = np.array([math.cos(cone["from"]), math.sin(cone["from"])])
            slopes = rows @ along / np.linalg.norm(rows, axis=1)
            assert slopes.min() > -1e-12
            assert (np.abs(slopes).max() < 1e-12) == (cone["kind"] == "line")
    assert kinds == {"plane", "wedge", "line", "ray", "point"}


def test_presets_are_among_the_cases(open_page):
    page = open_page()
    presets = page.evaluate("gradsurgeryPlayground.PRESETS.map(({ key, rows }) => [key, rows])")
    assert dict(presets) == playground_cases.PRESETS


def test_stories_of_the_presets_hold():
    """What the page says of its situations, from the library's numbers."""
    rises, still = {}, {}
    first = {"sum", "pcgrad", "mgda", "cagrad", "nash", "upgrad"}
    for case in CASES:
        name = case["name"].removeprefix("preset ")
        if name == case["name"]:
            continue
        rows = np.array(case["rows"])
        answers = {method: np.array(answer["direction"]) for method, answer in case["answers"].items()}
        rises[name] = {m for m, d in answers.items() if (rows @ d < -1e-9).any()} & first
        still[name] = {m for m, d in answers.items() if np.linalg.norm(d) < 1e-9} & first
    assert rises == {
        "conflict": {"sum"},
        "agreement": set(),
        "lengths": {"sum", "cagrad"},
        "opposite": {"sum", "cagrad"},
        "fan": {"sum"},
        "outvoted": {"sum", "cagrad"},
        "around": {"sum", "pcgrad", "cagrad"},
        "zero": set(),
    }
    assert still == {
        **{name: set() for name in rises},
        "opposite": {"pcgrad", "mgda", "nash", "upgrad"},
        "around": {"mgda", "nash", "upgrad"},
        "zero": {"mgda"},
    }


# ------------------------------------------------------------------------------------------ use


@pytest.mark.parametrize("how", ["folder", "server"])
def test_the_page_opens(open_page, served, how):
    page = open_page(base=served) if how == "server" else open_page()
    assert page.locator(".pg-card:visible").count() == 6
    assert "loss 2 rises" in card(page, "sum")
    assert "both losses fall" in card(page, "upgrad")
    assert "1.37" in card(page, "upgrad")
    assert page.locator("h1").inner_text().startswith("Playground")


def test_it_works_offline_from_a_folder(open_page):
    page = open_page()
    page.context.set_offline(True)
    page.reload()
    page.click("[data-preset=fan]")
    assert rows_of(page) == playground_cases.PRESETS["fan"]


def test_drag_with_the_mouse(open_page):
    page = open_page()
    before = card(page, "mgda")
    x, y = centre(page, 1)
    page.mouse.move(x + 3, y - 2)
    page.mouse.down()
    page.mouse.move(x + 3 + 0.5 * unit(page), y - 2 - 0.25 * unit(page), steps=5)
    assert rows_of(page)[1] == pytest.approx([-0.35, 0.75], abs=0.011)
    page.mouse.move(2000, y, steps=3)
    page.mouse.up()
    assert math.hypot(*rows_of(page)[1]) == pytest.approx(2.45, abs=0.02), "stays within the frame"
    kept = rows_of(page)
    page.mouse.move(x, y)
    assert rows_of(page) == kept, "let go"
    assert card(page, "mgda") != before
    assert rows_of(page)[0] == [2, 0.35]


def test_the_other_mouse_buttons_do_not_drag(open_page):
    page = open_page()
    page.mouse.move(*centre(page, 1))
    page.mouse.down(button="middle")
    page.mouse.move(700, 300, steps=3)
    page.mouse.up(button="middle")
    assert rows_of(page) == playground_cases.PRESETS["conflict"]


def swipe(page, start, end):
    session = page.context.new_cdp_session(page)

    def touch(kind, *points):
        points = [dict(zip("xy", point, strict=True)) for point in points]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", start)
    for k in range(1, 9):
        touch("touchMove", [a + (b - a) * k / 8 for a, b in zip(start, end, strict=True)])
    touch("touchEnd")
    page.wait_for_timeout(300)


def test_drag_with_a_finger_does_not_scroll(open_page):
    page = open_page(settings=PHONE)
    page.locator(".pg-plane").scroll_into_view_if_needed()
    scrolled = page.evaluate("scrollY")
    x, y = centre(page, 0)
    swipe(page, (x, y), (x - 0.5 * unit(page), y - 1.0 * unit(page)))
    assert rows_of(page)[0] == pytest.approx([1.5, 1.35], abs=0.03)
    assert page.evaluate("scrollY") == scrolled
    # Elsewhere a finger scrolls, beside the arrows too.
    box = page.locator(".pg-plane").bounding_box()
    x, y = box["x"] + 40, box["y"] + box["height"] - 60
    kept = rows_of(page)
    swipe(page, (x, y), (x, y - 200))
    assert page.evaluate("scrollY") > scrolled + 100
    assert rows_of(page) == kept


def test_keyboard(open_page):
    page = open_page()
    handle(page, 0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    assert rows_of(page)[0] == [2.05, 0.4]
    page.keyboard.press("Shift+ArrowDown")
    page.keyboard.press("Shift+ArrowLeft")
    assert rows_of(page)[0] == [1.55, -0.1]
    assert page.evaluate("document.activeElement.dataset.row") == "0", "keeps the focus"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")
    assert rows_of(page)[1] == [-0.9, 0.5]
    page.keyboard.press("Control+ArrowLeft")
    page.keyboard.press("Enter")
    assert rows_of(page)[1] == [-0.9, 0.5]


def test_arrow_keys_stay_with_the_gradient_that_was_dragged(open_page):
    """The site has keys of its own, which lead to other pages: they must not hear these."""
    page = open_page()
    page.evaluate("window.heard = []; document.addEventListener('keydown', (event) => heard.push(event.key))")
    address = page.url.partition("#")[0]
    x, y = centre(page, 1)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 40, y - 20, steps=4)
    page.mouse.up()
    scrolled, (before, up) = page.evaluate("scrollY"), rows_of(page)[1]
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "ArrowDown", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
    assert rows_of(page)[1] == pytest.approx([before + 0.05, up - 0.05], abs=1e-9)
    assert page.evaluate("heard") == []
    assert page.evaluate("scrollY") == scrolled
    assert page.url.partition("#")[0] == address


def test_every_control_is_reached_by_tab_and_shows_its_focus(open_page):
    page = open_page("#g=1,0;0,1;-1,0.5")
    page.locator("[data-preset=conflict]").focus()
    visited = []
    for _ in range(40):
        what = page.evaluate(
            """() => {
                const at = document.activeElement;
                if (!at.closest('.playground')) return null;
                const ring = at.querySelector('.pg-ring');
                const style = getComputedStyle(ring ?? at);
                const drawn = style.stroke !== 'none' && !style.stroke.includes('0, 0, 0, 0');
                const seen = ring ? drawn : style.outlineStyle !== 'none';
                return [at.getAttribute('aria-label') ?? at.textContent ?? at.value, seen];
            }"""
        )
        if what is None:
            break
        visited.append(what)
        page.keyboard.press("Tab")
    names = [name for name, _ in visited]
    assert all(seen for _, seen in visited), visited
    assert names[0] == "Conflict"
    for wanted in (
        "Gradient of loss 1",
        "Gradient of loss 3",
        "Gradient of loss 2, x",
        "Copy link",
        "Draw Nash-MTL",
        "CAGrad: c",
        "ConicGrad",
    ):
        assert wanted in names


def test_names_and_values_for_screen_readers(open_page):
    page = open_page()
    slider = page.get_by_role("slider", name="Gradient of loss 2")
    assert slider.get_attribute("aria-valuetext") == "x −0.85, y 0.50, length 0.99, direction 150 degrees"
    slider.focus()
    page.keyboard.press("ArrowUp")
    assert slider.get_attribute("aria-valuetext").startswith("x −0.85, y 0.55")
    live = page.locator("#pg-live")
    page.wait_for_function("document.getElementById('pg-live').textContent.includes('y 0.55')")
    assert live.get_attribute("aria-live") == "polite"
    assert re.search(r"plain sum: loss 2 rises, weights 1\.00, 1\.00\.", live.text_content())
    assert re.search(r"UPGrad: both losses fall", live.text_content())
    # Words, not signs alone.
    assert "falls" in page.locator(".pg-card[data-method=upgrad] .pg-effect").first.text_content()


def test_numbers_can_be_typed(open_page):
    page = open_page()
    field = page.get_by_label("Gradient of loss 1, y")
    field.fill("-0.125")
    assert rows_of(page)[0] == [2, -0.125]
    field.fill("")
    assert rows_of(page)[0] == [2, -0.125], "nothing is no number"
    field.blur()
    assert field.input_value() == "-0.125"
    page.get_by_label("Gradient of loss 1, x").fill("1234.5")
    assert "g₁ ×504" in page.locator(".pg-layer-labels").text_content()


def test_the_third_gradient(open_page):
    page = open_page()
    page.click(".pg-third")
    assert len(rows_of(page)) == 3
    assert handle(page, 2).is_visible()
    assert "loss 3" in card(page, "nash")
    page.click(".pg-third")
    assert rows_of(page) == playground_cases.PRESETS["conflict"]
    assert not handle(page, 2).is_visible()
    assert "loss 3" not in card(page, "nash")


def test_methods_can_be_hidden(open_page):
    page = open_page()
    drawn = page.locator(".pg-layer-methods [data-of=cagrad]")
    assert drawn.count() == 2
    page.get_by_label("Draw CAGrad").uncheck()
    assert drawn.count() == 0
    assert "CAGrad" not in page.locator(".pg-layer-labels").text_content()


def test_more_methods_can_be_asked_for(open_page):
    page = open_page()
    drawn = page.locator(".pg-layer-methods [data-of=conic]")
    assert drawn.count() == 0
    page.click("[data-more=conic]")
    assert drawn.count() == 2
    assert page.locator(".pg-card:visible").count() == 7
    assert page.locator("[data-more=conic]").get_attribute("aria-pressed") == "true"
    page.click("[data-more=sago]")
    assert "none" in card(page, "sago"), "it has no weights"
    page.wait_for_url("**/*more=conic,sago*")
    other = open_page("#" + page.url.split("#")[1])
    assert other.locator(".pg-card:visible").count() == 8
    page.click("[data-more=conic]")
    assert drawn.count() == 0
    assert not page.locator(".pg-card[data-method=conic]").is_visible()


def test_arguments_are_those_of_the_library(open_page):
    page = open_page("#g=2,0.35;-0.85,0.5&more=fairgrad,config,gcs")
    rows = np.array([[2, 0.35], [-0.85, 0.5]])

    def length(method):
        return page.locator(f".pg-card[data-method={method}] .pg-length").first.inner_text()

    def expected(method, **options):
        theta = playground_cases.torch.from_numpy(rows)
        direction = playground_cases.step(playground_cases.METHODS[method], theta, **options)["direction"]
        return f"length {math.hypot(*direction):.2f}"

    assert length("cagrad") == expected("cagrad")
    page.get_by_label("CAGrad: c").fill("1.5")
    assert length("cagrad") == expected("cagrad", c=1.5) != expected("cagrad")
    page.get_by_label("FairGrad: alpha").fill("0")
    assert length("fairgrad") == expected("fairgrad", alpha=0.0) != expected("fairgrad")
    page.get_by_label("ConFIG: length").select_option("min")
    assert length("config") == expected("config", length="min") != expected("config")
    page.get_by_label("GCS: switched").check()
    page.wait_for_url("**/*gcs.switched=true*")
    assert "cagrad.c=1.5" in page.url
    assert "config.length=min" in page.url
    assert "fairgrad.alpha=0" in page.url
    other = open_page("#" + page.url.split("#")[1])
    for method in ("cagrad", "fairgrad", "config", "gcs"):
        assert card(other, method) == card(page, method)
    assert other.get_by_label("GCS: switched").is_checked()
    # What is no value of an argument is the default.
    odd = open_page("#g=2,0.35;-0.85,0.5&more=config&cagrad.c=-1&config.length=long&conic.c=")
    assert length("cagrad") != odd.locator(".pg-card[data-method=cagrad] .pg-length").first.inner_text()
    assert "ConFIG" in odd.locator(".pg-layer-labels").text_content()
    assert odd.evaluate("gradsurgeryPlayground.state.options") == {
        "cagrad": 0.4, "config": "projection", "conic": 0.5, "fairgrad": 2, "gcs": False, "sago": False,
    }  # fmt: skip


def test_arrow_keys_of_a_slider_stay_with_it(open_page):
    page = open_page()
    page.evaluate("window.heard = []; document.addEventListener('keydown', (event) => heard.push(event.key))")
    page.get_by_label("CAGrad: c").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("gradsurgeryPlayground.state.options.cagrad") == 0.5
    assert page.evaluate("heard") == []


def test_results_are_in_sight_while_a_finger_drags(open_page):
    """On a phone what happens to each loss stands right below the plane, and changes with it."""
    page = open_page("#g=1.4,0.5;1.3,-0.1;-1.1,0.6", settings=PHONE)
    page.locator(".pg-plane").evaluate("node => node.scrollIntoView({ block: 'start', behavior: 'instant' })")
    table = page.locator(".pg-summary")
    frame, results = page.locator(".pg-plane").bounding_box(), table.bounding_box()
    assert frame["y"] + frame["height"] <= results["y"] < frame["y"] + frame["height"] + 20
    assert results["y"] + results["height"] <= PHONE["viewport"]["height"]
    before = table.inner_text()
    assert "▲" in table.locator("[data-method=sum]").inner_text()
    session = page.context.new_cdp_session(page)
    x, y = centre(page, 2)
    touch = {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]}
    session.send("Input.dispatchTouchEvent", touch)
    for k in range(1, 5):
        point = {"x": x + 20 * k, "y": y - 15 * k}
        session.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
    page.wait_for_timeout(100)
    assert table.inner_text() != before, "while it is held"
    assert table.bounding_box() == results, "it stays where it is"
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def test_a_card_lights_its_arrow(open_page):
    page = open_page()
    page.locator(".pg-card[data-method=mgda]").hover()
    assert page.locator(".pg-layer-methods [data-of=mgda].pg-dim").count() == 0
    assert page.locator(".pg-layer-methods [data-of=sum].pg-dim").count() == 2


def test_the_address_brings_a_situation_back(open_page):
    page = open_page()
    page.click("[data-preset=fan]")
    handle(page, 2).focus()
    page.keyboard.press("ArrowUp")
    page.get_by_label("one length").check()
    page.get_by_label("Draw MGDA").uncheck()
    page.wait_for_url("**/*hide=mgda*")
    address = page.url
    assert "g=1.1,0.2;0.75,0.75;-1.3,0.5" in address
    other = open_page("#" + address.split("#")[1])
    assert rows_of(other) == [[1.1, 0.2], [0.75, 0.75], [-1.3, 0.5]]
    assert other.get_by_label("one length").is_checked()
    assert not other.get_by_label("Draw MGDA").is_checked()
    assert card(other, "upgrad") == card(page, "upgrad")
    # A new address in an open page counts too.
    other.evaluate("location.hash = '#g=1,0;0,1'")
    other.wait_for_function("gradsurgeryPlayground.state.rows[1][0] === 0")
    assert rows_of(other) == [[1, 0], [0, 1]]
    assert other.get_by_label("true length").is_checked()


@pytest.mark.parametrize(
    "hash_",
    ["#what-is-drawn", "#g=", "#g=1,2", "#g=1,2;3", "#g=1,2;3,x", "#g=1,2;3,", "#g=1,2;3,1e9", "#g=1,2;NaN,0",
     "#g=1,2;3,4;5,6;7,8", "#g=<b>,1;2,3", "#%"],
)  # fmt: skip
def test_addresses_that_hold_nothing_give_the_first_situation(open_page, hash_):
    assert rows_of(open_page(hash_)) == playground_cases.PRESETS["conflict"]


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_motion_only_for_those_who_like_it(open_page, motion):
    page = open_page(motion=motion)
    at_once = page.evaluate(
        "() => { document.querySelector('[data-preset=around]').click();"
        " return JSON.stringify(gradsurgeryPlayground.state.rows); }"
    )
    assert (json.loads(at_once) == playground_cases.PRESETS["around"]) == (motion == "reduce")
    page.wait_for_function("document.querySelector('[data-preset=around]').getAttribute('aria-pressed') === 'true'")
    assert rows_of(page) == playground_cases.PRESETS["around"]


def test_the_link_is_copied(open_page, served):
    page = open_page(base=served, permissions=["clipboard-read", "clipboard-write"])
    page.click("[data-preset=zero]")
    page.click("text=Copy link")
    page.wait_for_selector("text=Copied.")
    assert page.evaluate("navigator.clipboard.readText()").endswith("#g=1.7,0.5;-0.8,0.9;0,0")


# ------------------------------------------------------------------------------------------ looks


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_page(open_page, width):
    page = open_page(settings={"viewport": {"width": width, "height": 844}})
    for preset in PRESETS:
        page.click(f"[data-preset={preset}]")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        over = page.evaluate(
            """() => {
                const own = document.querySelector('.playground').getBoundingClientRect().right + 0.5;
                return [...document.querySelectorAll('.playground *')].filter(
                    (node) => !node.closest('.pg-plane, .pg-unseen') && node.getBoundingClientRect().right > own
                ).map((node) => node.className || node.tagName);
            }"""
        )
        assert over == []


@pytest.mark.parametrize("settings", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("arrows", ["true length", "one length"])
def test_labels_keep_apart(open_page, settings, preset, arrows):
    page = open_page(settings=settings)
    page.click(f"[data-preset={preset}]")
    page.get_by_label(arrows).check()
    boxes = page.evaluate(
        """() => [...document.querySelectorAll('.pg-label, .pg-handle .pg-knob')].map((node) => {
            const { left, right, top, bottom } = node.getBoundingClientRect();
            return [node.textContent || 'knob', left, right, top, bottom];
        }).filter(([, left, right]) => right > left)"""
    )
    frame = page.locator(".pg-plane").bounding_box()
    assert len(boxes) > 6
    for i, (name, left, right, top, bottom) in enumerate(boxes):
        assert left >= frame["x"] - 1, name
        assert right <= frame["x"] + frame["width"] + 1, name
        for other, left2, right2, top2, bottom2 in boxes[:i]:
            if {name, other} == {"knob"}:
                continue
            across = min(right, right2) - max(left, left2)
            down = min(bottom, bottom2) - max(top, top2)
            assert across <= 1 or down <= 3, (name, other)


@pytest.mark.parametrize("settings", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("rows", ["1,-0.4;-1,0.4", "0.86,-0.33;-0.85,0.5"], ids=["still", "equal"])
def test_a_label_of_many_methods_is_folded(open_page, settings, rows):
    page = open_page(f"#g={rows}", settings=settings)
    for button in page.locator(".pg-more button").all():
        button.click()
    frame = page.locator(".pg-plane").bounding_box()
    labels = page.locator(".pg-label.pg-of-several")
    assert max(label.text_content().count("=") + label.text_content().count(",") for label in labels.all()) >= 3
    for label in labels.all():
        box = label.bounding_box()
        assert box["x"] >= frame["x"] - 1, label.text_content()
        assert box["x"] + box["width"] <= frame["x"] + frame["width"] + 1, label.text_content()


def luminance(colour):
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(
    ("system", "chosen", "dark"),
    [("light", "auto", False), ("dark", "auto", True), ("light", "dark", True), ("dark", "light", False)],
)
def test_light_and_dark(open_page, system, chosen, dark):
    page = open_page(color_scheme=system)
    page.evaluate("chosen => { document.body.dataset.theme = chosen; }", chosen)
    names = [
        "ink",
        "grey",
        "paper",
        "falls",
        "rises",
        *(f"{m}-text" for m in playground_cases.METHODS | {"pcgrad": None}),
    ]
    colours = page.evaluate(
        """names => {
            const style = getComputedStyle(document.querySelector('.playground'));
            return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--pg-${name}`).trim()]));
        }""",
        names,
    )
    paper = luminance(colours.pop("paper"))
    assert (paper < 0.1) == dark
    for name, colour in colours.items():
        low, high = sorted([paper, luminance(colour)])
        assert (high + 0.05) / (low + 0.05) >= 4.5, name


def test_without_a_browser_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setenv("CHROMIUM", "/nowhere/chromium")
    with pytest.raises(RuntimeError, match=r"apt-get install chromium.*CHROMIUM"):
        chromium()


def test_scripts_name_no_other_place():
    for path in Path(DOCS / "_static" / "playground").glob("playground.*"):
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.|fetch\(|XMLHttpRequest|import\(|@import|url\(", text), path.name
