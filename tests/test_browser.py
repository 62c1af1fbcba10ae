"""The viewer and the demo in a real browser, headless Chromium. Skipped where there is none."""

import shutil
import time

import pytest
import torch
from conftest import load_model
from test_view import HOSTILE, blank, canvas_of, noisy, recorded, replay, sampler

from nanomdm.checkpoint import Loaded
from tools import page

pytest.importorskip("selenium", reason="no selenium: pip install selenium")
pytest.importorskip("starlette", reason="no starlette: pip install starlette uvicorn")
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from test_demo import LIMITS, serving, slow

from tools.server import Demo

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-extensions", "--window-size=1100,900"),
)
LIGHT, DARK = "rgb(246, 245, 242)", "rgb(19, 20, 22)"


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    browsers = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, browsers)), None)
    if not found or not (path := shutil.which("chromedriver")):
        pytest.skip("no browser here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(path))  # downloads nothing
    yield started
    started.quit()


@pytest.fixture
def browser(driver):
    """The browser as it is first, which has nothing to complain about in the end."""
    driver.get_log("browser")
    yield driver
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert [line for line in driver.get_log("browser") if " 400 " not in line["message"]] == []


@pytest.fixture(scope="module")
def loaded(trained) -> Loaded:
    return load_model(trained / "ckpt.pt")


@pytest.fixture(scope="module")
def remasked(loaded) -> tuple[list[dict], list]:
    """A trace in which tokens are masked again, and its states."""
    settings = sampler("remask", steps=12, remask_rate=0.3)
    (messages,) = recorded(loaded, [canvas_of(loaded, "KING", 32)], settings)
    assert any("mask" in message for message in messages)
    return messages, replay(messages)


@pytest.fixture(scope="module")
def viewer(remasked, tmp_path_factory) -> str:
    """The address of a page with two traces."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page.assemble("view", "x", {"subtitle": "", "traces": [remasked[0]] * 2}))
    return path.as_uri()


def element(browser, name: str):
    return browser.find_element(By.ID, name)


def cells(browser) -> list:
    return browser.find_elements(By.CSS_SELECTOR, ".cell")


def shown(browser) -> str:
    """The board's text, a mask as ░."""
    return browser.execute_script(
        "return [...document.querySelectorAll('.cell')].map((e) => "
        "e.matches('.masked') ? '░' : e.textContent).join('')"
    )


def press(browser, *keys: str) -> None:
    ActionChains(browser).send_keys(*keys).perform()


def state(browser) -> str:
    return element(browser, "count").text


def wait(browser, condition, seconds: float = 15) -> None:
    WebDriverWait(browser, seconds, poll_frequency=0.05).until(lambda _: condition())


def emulate(browser, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def test_a_grid_is_shown_in_rows_and_columns_with_its_boxes(browser, remasked, tmp_path):
    first, *rest = remasked[0]
    path = tmp_path / "grid.html"
    traces = [[first | {"grid": [8, 2, 4]}, *rest]]  # of 32 tokens: 4 rows of 8
    path.write_text(page.assemble("view", "x", {"subtitle": "", "traces": traces}))
    browser.get(path.as_uri())
    boxes = [cell.rect for cell in cells(browser)]
    assert len({box["y"] for box in boxes}) == 4 and len({box["x"] for box in boxes}) == 8
    across = [round(b["x"] - a["x"]) for a, b in zip(boxes[:7], boxes[1:8], strict=True)]
    down = [round(b["y"] - a["y"]) for a, b in zip(boxes[:24:8], boxes[8::8], strict=True)]
    assert across[3] > across[2] == across[4] and down[1] > down[0] == down[2]


def background(browser) -> str:
    return browser.execute_script("return getComputedStyle(document.body).backgroundColor")


# --- The viewer ----------------------------------------------------------------------------------


def test_the_page_plays_from_masks_to_the_text(browser, viewer, remasked, loaded):
    browser.get(viewer)
    browser.execute_script("$('speed').value = 4; $('speed').onchange()")
    assert "playing" in browser.find_element(By.TAG_NAME, "body").get_attribute("class")
    wait(browser, lambda: state(browser) == "step 12 of 12 · 0 masks left")
    text = loaded.tokenizer.decode(remasked[1][-1]).replace("\n", "↵")
    assert shown(browser) == text
    press(browser, Keys.HOME)
    assert shown(browser) == "KING" + "░" * 28


def test_the_page_reconstructs_every_state(browser, viewer, remasked):
    browser.get(viewer)
    states = browser.execute_script(
        "const trace = traces[0], id = ({ token }) => trace.ids[token] ?? null;"
        "return trace.left.map((_, n) => trace.cells(n).map(id))"
    )
    assert states == remasked[1]


def test_the_page_asks_for_nothing(browser, viewer):
    browser.get(viewer)
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_keys_step_play_and_colour(browser, viewer):
    browser.get(viewer)
    press(browser, Keys.END, Keys.LEFT, Keys.LEFT, Keys.RIGHT)
    assert state(browser).startswith("step 11 of 12")
    press(browser, "c")
    assert element(browser, "high").text == "100%"
    press(browser, Keys.HOME, " ")
    wait(browser, lambda: state(browser).startswith("step 3 of 12"))
    press(browser, " ")
    assert element(browser, "play").get_attribute("aria-label") == "play"
    press(browser, "2")
    tabs = element(browser, "samples").find_elements(By.TAG_NAME, "button")
    assert [tab.get_attribute("aria-pressed") for tab in tabs] == ["false", "true"]


def test_a_token_in_focus_shows_its_alternatives(browser, viewer, remasked, loaded):
    browser.get(viewer)
    press(browser, Keys.HOME)
    cells(browser)[0].click()
    press(browser, *[Keys.RIGHT] * 4)  # from token to token, onto the first mask
    with torch.no_grad():
        xt = torch.tensor([[35 if i is None else i for i in remasked[1][0]]])
        best = loaded.model(xt)[0, 4].softmax(dim=-1).topk(5)
    panel = element(browser, "panel").text.split("\n")
    assert panel[:4] == ["mask", "position 5", "not revealed yet", "the network predicts now"]
    names = [loaded.tokenizer.decode([i]) for i in best.indices.tolist()]
    names = [{" ": "space", "\n": "new line"}.get(name, name) for name in names]
    assert panel[4::2] == names
    found = [float(p.rstrip("%")) for p in panel[5::2]]
    assert found == pytest.approx((100 * best.values).tolist(), abs=0.51)


def test_a_token_pointed_at_shows_when_it_came(browser, viewer, remasked):
    browser.get(viewer)
    press(browser, Keys.END)
    came = max(n for n in range(1, 13) if remasked[1][n - 1][9] is None)
    ActionChains(browser).move_to_element(cells(browser)[9]).perform()
    assert f"came in step {came}, with probability" in element(browser, "panel").text


def test_a_token_that_is_masked_again_flashes(browser, viewer, remasked):
    states = remasked[1]
    step, i = next(
        (n, i)
        for n in range(1, 13)
        for i in range(32)
        if states[n][i] is None and states[n - 1][i] is not None
    )
    emulate(browser, "light")
    browser.get(viewer)
    press(browser, Keys.HOME, *[Keys.RIGHT] * step)
    colours = [cell.value_of_css_property("background-color") for cell in cells(browser)]
    assert colours[i] == "rgba(255, 91, 91, 1)"
    waiting = next(k for k in range(32) if states[step][k] is states[step - 1][k] is None)
    assert colours[waiting] != colours[i]


def test_the_page_is_light_or_dark_as_the_system_and_then_as_the_switch_says(browser, viewer):
    for scheme, here, other in (("light", LIGHT, DARK), ("dark", DARK, LIGHT)):
        emulate(browser, scheme)
        browser.get(viewer)
        assert background(browser) == here
        element(browser, "theme").click()
        assert background(browser) == other


def test_a_hostile_text_is_shown_and_does_nothing(browser, tmp_path):
    loaded = noisy([HOSTILE + str(n) for n in range(6)], 8)
    rows = recorded(loaded, [blank(8)], sampler("spread", steps=3))
    content = page.assemble("view", HOSTILE, {"subtitle": HOSTILE, "traces": rows})
    (tmp_path / "page.html").write_text(content)
    browser.get((tmp_path / "page.html").as_uri())
    press(browser, Keys.END)
    cells(browser)[0].click()
    assert shown(browser).count(HOSTILE) == 8
    assert browser.title == element(browser, "subtitle").text == HOSTILE
    assert browser.find_elements(By.CSS_SELECTOR, "img, main script") == []


def phone(browser) -> None:
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def test_the_page_fits_a_phone_and_a_tap_shows_the_alternatives(browser, viewer):
    phone(browser)
    browser.get(viewer)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    press(browser, Keys.END)
    cells(browser)[20].click()
    assert "position 21" in element(browser, "panel").text
    sizes = [button.rect for button in browser.find_elements(By.CSS_SELECTOR, ".controls button")]
    assert min(min(size["width"], size["height"]) for size in sizes) >= 40


# --- The demo ------------------------------------------------------------------------------------


@pytest.fixture
def server(loaded):
    demo = Demo(loaded, LIMITS)
    with serving(demo) as port:
        yield f"http://127.0.0.1:{port}/"


def generate(browser, text: str, **values) -> None:
    for name, value in ({"text": text} | values).items():
        element(browser, name).clear()
        element(browser, name).send_keys(str(value))
    element(browser, "generate").click()


def finished(browser) -> str:
    """The status of a generation that has been made and played."""
    wait(browser, lambda: "network call" in element(browser, "status").text)
    press_end = "player.go(player.end)"
    browser.execute_script(press_end)
    return element(browser, "status").text


def test_a_text_with_blanks_is_filled_before_the_visitors_eyes(browser, loaded):
    demo, model = slow(loaded, seconds=0.03)
    with serving(demo) as port:
        browser.get(f"http://127.0.0.1:{port}/")
        generate(browser, "The [MASK*16] night", steps=16)
        wait(browser, lambda: 0 < shown(browser).count("░") < 16)
        assert shown(browser).startswith("The ") and shown(browser).endswith(" night")
        status = finished(browser)
        assert status.startswith(f"{model.calls} network calls, ") and "seconds" in status
        assert "░" not in shown(browser) and len(shown(browser)) == 26


def test_an_edited_token_stays_when_the_rest_is_regenerated(browser, server):
    browser.get(server)
    generate(browser, "KING", steps=4)
    finished(browser)
    cells(browser)[9].click()
    choice = browser.find_elements(By.CSS_SELECTOR, ".choices li:not(.chosen)")[0]
    wanted = choice.find_element(By.TAG_NAME, "b").text
    choice.click()
    cells(browser)[20].click()
    typed = browser.find_element(By.CSS_SELECTOR, ".edit input")
    typed.send_keys("rose", Keys.ENTER)
    wait(browser, lambda: shown(browser)[20:24] == "rose")
    before = shown(browser)
    element(browser, "again").click()
    wait(browser, lambda: "seed 2" in element(browser, "status").text)
    finished(browser)
    after = shown(browser)
    expected = {"space": " ", "new line": "↵"}.get(wanted, wanted)
    assert after[:4] == "KING" and after[9] == expected and after[20:24] == "rose"
    assert after != before and "░" not in after


def test_a_visitor_who_goes_elsewhere_stops_the_sampler(browser, loaded):
    demo, model = slow(loaded, seconds=0.1)
    with serving(demo) as port:
        browser.get(f"http://127.0.0.1:{port}/")
        browser.execute_script("$('strategy').value = 'first_hitting'")
        generate(browser, "")
        wait(browser, lambda: model.calls > 2)
        browser.get("about:blank")
        wait(browser, lambda: not demo.running)
        calls = model.calls
        time.sleep(0.25)
        assert calls == model.calls < 32


def test_a_mistake_is_shown_as_a_sentence_and_as_text(browser, server):
    browser.get(server)
    generate(browser, "<img src=x onerror=alert(1)>")
    wait(browser, lambda: element(browser, "error").is_displayed())
    assert element(browser, "error").text.startswith("the tokenizer has no character '<'")
    generate(browser, "[MASK*16]<b>")
    wait(browser, lambda: "position 0" in element(browser, "error").text)
    assert browser.find_elements(By.CSS_SELECTOR, "main img, #error *") == []


def test_the_demo_fits_a_phone(browser, server):
    phone(browser)
    browser.get(server)
    generate(browser, "KING", steps=3)
    finished(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
