"""The page in a real browser, over the real routes and a worker that only pretends; in each gradio a WebUI brings.

What does not depend on the version of gradio carries the marker `everywhere`.
"""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from browser import Page

pytest.importorskip("gradio")
pytest.importorskip("playwright")
from page_case import CURSOR, CURVES, IDLE, KIND, STATE, VERSION, Place, count, demo, ended, page, place
from PIL import Image

from trainer.engine.catalogue import catalogue
from trainer.params.widgets import widgets
from trainer.places import BASE_PICTURES

__all__ = ["page", "place"]  # fixtures


def test_what_is_seen_is_what_the_table_says(page: Page) -> None:
    table = catalogue()
    choices = [[mode, kind] for mode in table.modes for kind in table.types]
    found = page.page.evaluate(SHOWN, choices)
    for (mode, kind), shown in zip(choices, found, strict=True):
        wanted = {widget.key for widget in widgets(table, mode, False, kind) if widget.visible}
        assert set(shown["seen"]) == wanted, (mode, kind)
        assert shown["note"] == table.modes[mode].help
    page.seen(f"{VERSION}-form")


SHOWN = """(choices) => choices.map(([mode, kind]) => {
    Atelier.form.set('mode', mode);
    Atelier.form.set('network_type', kind);
    document.querySelectorAll('#atelier_form details').forEach((box) => (box.open = true));
    const fields = [...document.querySelectorAll('#atelier_form [data-field]:not([data-second])')];
    return {
        seen: fields.filter((one) => one.getClientRects().length).map((one) => one.dataset.field),
        note: document.querySelector('#atelier_mode_note').textContent,
    };
})"""


@pytest.mark.skipif(KIND == "host", reason="a WebUI puts scripts into the page itself, before it is shown")
@pytest.mark.parametrize("name", ["atelier.js", "atelier_settings.js"])
def test_a_script_that_comes_late_is_waited_for(place: Place, name: str) -> None:
    """The newest gradio puts scripts into a page that is ready already, in no order."""
    page = Page(place[0], place[1], late=name)
    assert page.id("preset").is_visible()
    page.close()


def test_errors_stand_at_their_fields_and_nothing_starts(page: Page, place: Place) -> None:
    demo(page, "wrong")
    page.fill(network_rank="many", train_min_timesteps=900, train_max_timesteps=100, save_lora_name="a/b")
    page.page.evaluate("document.querySelectorAll('#atelier_form details').forEach(box => box.open = false)")
    page.id("start").click()
    page.until("three errors, and the first has the cursor", f"Atelier.form.problems.length === 3 && {CURSOR}")
    assert "must be a whole number from 1 to 1024" in page.id("network_rank_error").inner_text()
    assert page.id("save_lora_name_error").is_visible()
    assert "is above train_max_timesteps" in page.id("train_min_timesteps_error").text_content()
    page.page.locator("#atelier_card_train summary").click()
    assert page.id("train_min_timesteps_error").is_visible()
    assert page.id("start_count").inner_text() == "3"
    page.seen(f"{VERSION}-errors", whole=False)
    status = page.page.evaluate("Atelier.ask('GET', 'status')")
    assert status["run"] is None or status["run"]["name"] != "wrong"
    page.fill(network_rank="4", train_min_timesteps=0, save_lora_name="right")
    page.until("no error while typing", "Atelier.form.problems.length === 0")
    assert not page.id("network_rank_error").is_visible() and not page.id("start_count").is_visible()


def test_from_the_click_to_the_curve(page: Page, place: Place) -> None:
    for name in ("second", "third"):  # what waits is worked off once something is started
        demo(page, name, steps=10)
        page.id("queue_add").click()
        page.page.wait_for_selector(f"#atelier_queue [data-name]:text-is('{name}')")
    assert page.id("queue_go").is_visible()
    page.fill(save_lora_name="first", train_iterations=200)
    page.page.keyboard.press("Control+Enter")
    page.until("it runs", f"{STATE} === 'running'")
    page.until("progress moves", "document.querySelector('#atelier_progress').value > 50")
    page.until("the curve is drawn", "document.querySelector('.atelier-line-ema').getAttribute('d').length > 30")
    told = page.id("banner").is_visible() and "wait until this run is over" in page.id("banner").inner_text()
    assert told is (KIND == "host"), "who draws pictures beside us is told that they wait"
    page.fill(save_lora_name="third")
    page.id("start").click()
    page.until("a name twice is refused", "!document.querySelector('#atelier_save_lora_name_error').hidden")
    assert "waits in the queue" in page.id("save_lora_name_error").inner_text()
    page.page.locator("#atelier_queue li[data-state=waiting] >> nth=0 >> summary").click()
    page.seen(f"{VERSION}-running", whole=False)
    for name in ("first", "second", "third"):
        ended(page, name)
        assert (place[2] / "out" / "Lora" / f"{name}.safetensors").is_file()
    page.until("it says that it is over", f"{STATE} === 'done'")
    assert "third.safetensors" in page.id("result_text").inner_text()
    page.id("tab_plot").click()
    page.until("the figure", count(CURVES, 1), 60)
    page.page.locator("#atelier_plot_logs input >> nth=0").check()
    page.page.locator("#atelier_plot_logs input >> nth=2").check()
    page.id("plot_log").check()
    page.until("two logs", count(CURVES, 2), 60)
    page.seen(f"{VERSION}-plot", whole=False)


@pytest.mark.everywhere
def test_stopping_and_the_order_of_the_queue(page: Page, place: Place) -> None:
    demo(page, "long", steps=4000)
    page.id("start").click()
    page.until("it runs", f"{STATE} === 'running'")
    for name in ("one", "two", "three"):
        page.fill(save_lora_name=name, train_iterations=4000)
        page.id("queue_add").click()
        page.page.wait_for_selector(f"#atelier_queue [data-name]:text-is('{name}')")
    waiting = "#atelier_queue li[data-state=waiting]"

    def order() -> list[str]:
        return page.page.locator(f"{waiting} [data-name]").all_inner_texts()

    def press(name: str, action: str) -> None:
        before = order()
        page.page.locator(f"{waiting}:has([data-name]:text-is('{name}')) [data-action={action}]").click()
        end = time.monotonic() + 10
        while order() == before and time.monotonic() < end:
            page.page.wait_for_timeout(50)

    press("three", "up")
    assert order() == ["one", "three", "two"]
    press("one", "down")
    assert order() == ["three", "one", "two"]
    press("three", "delete")
    assert order() == ["one", "two"]
    page.id("stop_save").click()
    page.until("the next one runs", "document.querySelector('#atelier_live_job').textContent.startsWith('one')")
    assert (place[2] / "out" / "Lora" / "long.safetensors").is_file()
    press("two", "delete")
    page.id("stop").click()
    page.until("all is quiet", IDLE)
    assert page.id("result_text").inner_text() == "Stopped, nothing written."
    assert not (place[2] / "out" / "Lora" / "one.safetensors").exists()


@pytest.mark.everywhere
def test_presets_and_dropped_files_fill_the_form(page: Page, place: Place, tmp_path: Path) -> None:
    page.fill(network_rank=7, save_lora_name="kept", train_learning_rate="3e-4")
    page.id("preset_save").click()
    page.fill(preset_name="mine")
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#atelier_preset option[value=mine]", state="attached")
    page.fill(network_rank=99)
    assert page.id("network_rank").evaluate("e => e.closest('[data-field]').classList.contains('atelier-changed')")
    page.id("preset_load").click()
    page.until("the preset is back", "document.querySelector('#atelier_network_rank').value === '7'")
    assert float(page.id("train_learning_rate").input_value()) == 3e-4
    page.id("preset_delete").click()
    page.page.wait_for_selector("#atelier_preset option[value=mine]", state="detached")

    settings = {"format": 1, "mode": "iLECO", "original prompt": "a\nb", "target prompt": "c\nd", "network_rank": 3}
    (tmp_path / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    page.id("file").set_input_files(str(tmp_path / "settings.json"))
    page.until("the file is in the form", "document.querySelector('#atelier_original_prompt').value === 'a\\nb'")
    assert page.id("network_rank").input_value() == "3"
    assert page.page.locator("#atelier_mode input:checked").get_attribute("value") == "iLECO"

    header = json.dumps({"__metadata__": {"atelier_job": json.dumps({**settings, "network_rank": 5})}}).encode()
    (tmp_path / "cat.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    page.id("file").set_input_files(str(tmp_path / "cat.safetensors"))
    page.until("the LoRA's job is in the form", "document.querySelector('#atelier_network_rank').value === '5'")
    (tmp_path / "bad.json").write_text('{"network_rnak": 4}', encoding="utf-8")
    page.id("file").set_input_files(str(tmp_path / "bad.json"))
    page.until("it is refused", "document.querySelector('#atelier_problems').innerText.includes('network_rank?')")
    assert page.id("network_rank").input_value() == "5"


@pytest.mark.everywhere
def test_two_pictures_and_a_second_pass(page: Page, place: Place, tmp_path: Path) -> None:
    original, target = (tmp_path / f"{name}.png" for name in ("closed", "open"))
    Image.new("RGB", (64, 64), "red").save(original)
    Image.new("RGB", (64, 64), "blue").save(target)
    page.page.locator("#atelier_mode input[value=Difference]").check(force=True)
    page.fill(save_lora_name="eyes", train_iterations=5, network_rank=7, original_prompt="a face")
    drop = "[data-picture-for=atelier_{}_image]"
    page.drop(page.page.locator(drop.format("original")), original)
    with page.page.expect_file_chooser() as chooser:
        page.page.locator(drop.format("target")).click()
    chooser.value.set_files(str(target))
    for name, file in (("original", original), ("target", target)):
        kept = f"document.querySelector('#atelier_{name}_image').value.endsWith('{file.name}')"
        page.until("the picture is kept", kept)
        shown = page.page.locator(f"{drop.format(name)} img")
        assert shown.is_visible() and shown.evaluate("one => one.decode().then(() => one.naturalWidth)") == 64
    assert not page.id("second").is_visible()
    page.id("use_2nd_pass_settings").check()
    page.id("copy_first").click()
    assert page.id("second_network_rank").input_value() == "7"
    page.fill(second_network_rank="many")
    page.id("start").click()
    page.until("an error in the second pass", "!document.querySelector('#atelier_second_network_rank_error').hidden")
    assert not page.id("network_rank_error").is_visible()
    page.seen(f"{VERSION}-second")
    page.fill(second_network_rank=3)
    page.id("start").click()
    ended(page, "eyes")
    run = page.page.evaluate("Atelier.ask('GET', 'status')")["run"]["id"]
    job = page.page.evaluate(f"Atelier.ask('GET', 'queue/{run}')")["settings"]
    assert job["network_rank"] == 7 and job["2nd pass"]["network_rank"] == 3 and job["use_2nd_pass_settings"] is True
    assert [Path(job[f"{name} image"]).read_bytes() for name in ("original", "target")] == [
        original.read_bytes(), target.read_bytes(),
    ]  # fmt: skip


@pytest.mark.everywhere
def test_picture_tools_and_comparison(page: Page, tmp_path: Path) -> None:
    page.id("tab_pictures").click()
    page.fill(resize_source=BASE_PICTURES, resize_resolutions="32x32,16x16", resize_divisible="0")
    page.id("resize_preview").click()
    page.until("its error", "!document.querySelector('#atelier_resize_divisible_error').hidden")
    page.fill(resize_divisible=8)
    page.id("resize_preview").click()
    page.until("twelve previews", count("#atelier_resize_grid img", 12))
    assert "32 × 32" in page.page.locator("#atelier_resize_grid figcaption >> nth=0").inner_text()
    page.id("resize_write").click()
    written = "document.querySelector('#atelier_resize_note').textContent.startsWith('24 images')"
    page.until("they are written", written)
    page.seen(f"{VERSION}-pictures")
    page.id("resize_train").click()
    assert "images" in page.id("lora_data_directory").input_value()
    page.page.locator("#atelier_mode input[value=iLECO]").check(force=True)
    page.fill(original_prompt="a cat", target_prompt="a dog")
    page.fill(try_width=64, try_height=60)
    page.page.evaluate("document.querySelector('#atelier_try').open = false")
    page.id("draw_both").click()
    page.until("sizes are checked", "!document.querySelector('#atelier_try_height_error').hidden")
    page.fill(try_height=64)
    page.id("draw_both").click()
    page.until("both pictures", count("#atelier_draw_grid img", 2))
    assert page.page.locator("#atelier_draw_grid figcaption").all_inner_texts() == ["Original", "Target"]


@pytest.mark.parametrize("width", [1280, 768])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_overlaps(place: Place, width: int, dark: bool) -> None:
    page = Page(place[0], place[1], width=width, dark=dark, language="ja-JP" if dark else "en-US")
    page.page.evaluate("document.querySelectorAll('#atelier_root details').forEach(box => box.open = true)")
    assert page.id("tab_train").inner_text() == ("学習" if dark else "Train")
    over = []
    for mode in sorted(catalogue().modes, key="LoRA".__eq__):
        page.page.evaluate("mode => Atelier.form.set('mode', mode)", mode)
        over += page.page.evaluate(OVERLAPS)
        over += page.page.evaluate(CUT_OFF)
    assert page.page.evaluate(RED), "errors, also where the theme's text for them is nearly white"
    page.seen(f"{VERSION}-{width}-{'dark' if dark else 'light'}")
    page.page.evaluate("scrollTo(0, 900)")
    page.until("Start stays in view", "document.querySelector('#atelier_start').getBoundingClientRect().top > 0")
    for tab in ("tab_pictures", "tab_plot"):
        page.id(tab).click()
        over += page.page.evaluate(OVERLAPS)
    assert over == []
    if not dark:
        page.page.locator("[data-language=ja]").click()
        page.until("Japanese", "document.querySelector('#atelier_tab_train').textContent === '学習'")
        page.page.locator("[data-language=en]").click()
        page.until("English again", "document.querySelector('#atelier_tab_train').textContent === 'Train'")
    page.close()


RED = """() => {
    const error = getComputedStyle(document.querySelector('#atelier_network_rank_error')).color;
    const [red, green, blue] = error.match(/[\\d.]+/g).map(Number);
    return red > 1.5 * Math.max(green, blue);
}"""

CUT_OFF = """() => {
    const pen = document.createElement('canvas').getContext('2d');
    const room = (one, style) => one.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    return [...document.querySelectorAll('#atelier_root select')].filter((one) => {
        const style = getComputedStyle(one);
        pen.font = style.font;
        return one.checkVisibility() && one.selectedOptions.length &&
            pen.measureText(one.selectedOptions[0].text).width > room(one, style);
    }).map((one) => `${one.id}: "${one.selectedOptions[0].text}" is cut off`);
}"""

OVERLAPS = """() => {
    const seen = [...document.querySelectorAll('#atelier_root input, #atelier_root select, #atelier_root textarea, ' +
        '#atelier_root button, #atelier_root .atelier-name, #atelier_root .atelier-error')].filter((one) => {
        const box = one.getBoundingClientRect();
        return box.width > 1 && box.height > 1 && one.checkVisibility() && getComputedStyle(one).opacity !== '0' &&
            getComputedStyle(one).visibility === 'visible' && !one.closest('.atelier-side, .atelier-log');
    });
    const wrong = [];
    seen.forEach((one, index) => {
        const a = one.getBoundingClientRect();
        if (a.right > innerWidth + 1) wrong.push(`${one.id || one.textContent} leaves the window`);
        for (const other of seen.slice(index + 1)) {
            if (one.contains(other) || other.contains(one)) continue;
            const b = other.getBoundingClientRect();
            const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
            const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
            if (wide > 1 && high > 1) wrong.push(`${one.id || one.textContent} on ${other.id || other.textContent}`);
        }
    });
    if (document.documentElement.scrollWidth > innerWidth + 1) wrong.push('the page scrolls sideways');
    return wrong;
}"""


@pytest.mark.everywhere
def test_the_page_waits_for_routes_that_come_after_it(place: Place) -> None:
    """At Reload UI a WebUI shows its page first and lets extensions add their routes some seconds later."""
    page, early = place[0].new_page("en-US"), []
    try:

        def too_early(route: Any) -> None:
            early.append(route.request.url)
            if len(early) < 3:
                route.fulfill(status=404, content_type="application/json", body='{"detail": "Not Found"}')
            else:
                route.continue_()

        page.route("**/atelier/v1/models", too_early)
        page.goto(place[1], timeout=60_000)
        page.wait_for_selector("#atelier_root[data-ready]", timeout=60_000, state="attached")
        assert len(early) >= 3
        assert page.locator("select[data-list] option").count() > 3
        assert page.locator("#atelier_preset option[value=demo]").count() == 1
    finally:
        page.close()


@pytest.mark.everywhere  # scripts alone, whatever made the page
def test_it_asks_seldom_and_not_at_all_when_hidden(page: Page) -> None:
    page.page.route("**/finished?*", cut_once())
    page.page.wait_for_timeout(1000)
    assert 1 <= asked(page, 3500) <= 2, page.asked
    name = f"asks{time.time_ns()}"
    demo(page, name, steps=4000)
    page.id("start").click()
    page.until("it runs", f"{STATE} === 'running'")
    page.page.wait_for_timeout(1200)
    assert 2 <= asked(page, 3000) <= 6, page.asked
    page.page.evaluate("document.querySelector('#atelier_root').parentElement.style.display = 'none'")
    page.page.wait_for_timeout(500)
    assert page.page.title().startswith("[…]"), "a number that nobody asks for any more would be wrong"
    assert asked(page, 2000) == 0, page.asked
    page.page.evaluate("document.querySelector('#atelier_root').parentElement.style.display = ''")
    page.until("the share is in the title", "/^.[0-9]+%/.test(document.title)")
    end_is_told_to_who_looks_elsewhere(page, name)


def cut_once() -> Any:
    """A proxy that cuts the first request for the end of a run, as after minutes without an answer."""
    cut: list[str] = []

    def handle(route: Any) -> None:
        if cut:
            return route.continue_()
        cut.append(route.request.url)
        route.fulfill(content_type="application/json", body='{"ended": false}')

    return handle


def asked(page: Page, milliseconds: float) -> int:
    """How many requests the page sends in this time; one that is held until a run is over does not count."""
    page.asked.clear()
    page.page.wait_for_timeout(milliseconds)
    return len([path for _, path in page.asked if path != "finished"])


def end_is_told_to_who_looks_elsewhere(page: Page, name: str) -> None:
    """A notification and a mark in the title, which goes when somebody looks; of the run that follows, too."""
    page.fill(save_lora_name=f"{name}b", train_iterations=40)
    page.id("queue_add").click()
    page.page.wait_for_selector(f"#atelier_queue [data-name]:text-is('{name}b')")
    page.page.evaluate(ELSEWHERE)
    page.page.evaluate("Atelier.ask('POST', 'stop', { save: true })")
    page.until("the title has a mark", "document.title.startsWith('✓')")
    page.until("both are told", "told.length === 2")
    assert page.page.evaluate("told") == [["Training finished", f"{one}.safetensors"] for one in (name, f"{name}b")]
    page.page.evaluate("delete document.visibilityState; document.dispatchEvent(new Event('visibilitychange'))")
    page.until("the mark is gone", "!/[✓%…]/.test(document.title)")
    page.until("it is over", IDLE)


ELSEWHERE = """() => {
    window.told = [];
    window.Notification = class {
        static permission = 'granted';
        constructor(words, { body }) { told.push([words, body]); }
    };
    Object.defineProperty(document, 'visibilityState', { get: () => 'hidden', configurable: true });
}"""
