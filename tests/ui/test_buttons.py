"""The smaller buttons of the page, each clicked in a browser for what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser import Page
from page_case import CURVES, IDLE, KIND, Place, count, demo, ended, page, place

from trainer.places import BASE_PICTURES

__all__ = ["page", "place"]  # fixtures
VALUE = "document.querySelector('#atelier_{}').value === '{}'"


@pytest.mark.everywhere
def test_lists_files_and_presets_are_looked_for_again(page: Page, place: Place) -> None:
    root = place[2]
    (root / "out" / "Lora" / "dropped_in.safetensors").touch()
    page.id("lists_refresh").click()
    page.page.wait_for_selector("#atelier_try_lora option[value='dropped_in.safetensors']", state="attached")
    (root / "presets" / "user").mkdir(exist_ok=True)
    (root / "presets" / "user" / "copied.json").write_text('{"format": 1, "mode": "LoRA", "network_rank": 21}')
    page.id("preset_refresh").click()
    page.page.wait_for_selector("#atelier_preset option[value=copied]", state="attached")
    page.id("preset").select_option("copied")
    page.until("it is in the form", VALUE.format("network_rank", 21))
    page.fill(network_rank=11, save_lora_name="noted")
    page.id("settings_save").click()
    page.page.wait_for_selector("#atelier_settings_file option[value*=noted]", state="attached")
    assert page.id("drop").inner_text().startswith("Wrote 2")
    page.fill(network_rank=12)
    page.id("settings_file").select_option(index=1)
    page.until("the file is in the form", VALUE.format("network_rank", 11))


@pytest.mark.everywhere
def test_search_shows_what_is_wanted_and_nothing_else(page: Page) -> None:
    def seen() -> list[str]:
        fields = page.page.locator("#atelier_form [data-field]:not([data-second]):visible")
        return sorted(fields.evaluate_all("all => all.map(one => one.dataset.field)"))

    before = seen()
    page.id("search").fill("train_min_timesteps")
    assert seen() == ["train_min_timesteps"]
    page.id("search").fill("no such thing")
    assert seen() == []
    page.id("search").fill("")
    assert seen() == before


@pytest.mark.everywhere
def test_folders_are_asked_for_and_a_refusal_is_shown_whole(page: Page) -> None:
    words = "No file manager opens on this machine. The folder is /home/somebody/webui/extensions/atelier/json."
    asked: list[str] = []

    def refuse(route: object) -> None:
        asked.append(json.loads(route.request.post_data)["folder"])  # type: ignore[attr-defined]
        route.fulfill(status=422, content_type="application/json", body=json.dumps({"error": words}))  # type: ignore[attr-defined]

    page.page.route("**/atelier/v1/open", refuse)
    page.id("open_json").click()
    page.until("it is said", f"document.querySelector('#atelier_drop').textContent === {json.dumps(words)}")
    assert page.id("drop").evaluate("box => box.scrollHeight <= box.clientHeight + 1"), "two lines hold it"
    for tab, button in (("tab_plot", "open_logs"), ("tab_pictures", "augment_open"), ("tab_pictures", "resize_open")):
        page.id(tab).click()
        with page.page.expect_response("**/atelier/v1/open"):
            page.id(button).click()
    assert asked == ["json", "logs", "images", "images"]


@pytest.mark.everywhere
def test_pictures_one_by_one_and_as_one_sheet(page: Page, tmp_path: Path) -> None:
    page.page.locator("#atelier_mode input[value=iLECO]").check(force=True)
    page.fill(original_prompt="a cat", target_prompt="a dog", try_width=64, try_height=32)
    page.page.evaluate("document.querySelector('#atelier_try').open = false")
    for name in ("original", "target"):
        page.id(f"draw_{name}").click()
        label = f"document.querySelector('#atelier_draw_grid figcaption')?.textContent === '{name.title()}'"
        page.until(f"the {name} alone", f"{count('#atelier_draw_grid img', 1)} && {label}")
    page.id("draw_both").click()
    page.until("both", f"{count('#atelier_draw_grid img', 2)} && !document.querySelector('#atelier_draw_save').hidden")
    with page.page.expect_download() as waited:
        page.id("draw_save").click()
    waited.value.save_as(tmp_path / "sheet.png")
    from PIL import Image

    assert Image.open(tmp_path / "sheet.png").size == (2 * 64, 32 + 24)
    page.page.locator("#atelier_mode input[value=LoRA]").check(force=True)
    assert not page.id("draw_both").is_visible(), "only where there are two prompts"


@pytest.mark.everywhere
def test_turned_copies_and_dropped_logs(page: Page, tmp_path: Path) -> None:
    page.id("tab_pictures").click()
    page.fill(augment_source=BASE_PICTURES, augment_copies=1, augment_scale=0.5, augment_angle="steep")
    page.id("augment_preview").click()
    page.until("its error", "!document.querySelector('#atelier_augment_angle_error').hidden")
    page.fill(augment_angle=10)
    page.id("augment_preview").click()
    page.until("twelve previews", count("#atelier_augment_grid img", 12))
    page.id("augment_write").click()
    told = "document.querySelector('#atelier_augment_note').textContent.startsWith('12 images')"
    page.until("they are written", told)
    page.id("tab_plot").click()
    log = tmp_path / "mine.csv"
    log.write_text("network_rank,4\nStep,Loss,Learning Rate 1\n1,0.5,1e-4\n2,0.25,1e-4\n")
    page.drop(page.id("page_plot"), log)
    named = "document.querySelector('#atelier_plot_note').textContent === 'mine.csv'"
    page.until("its curve", f"{count(CURVES, 1)} && {named}")
    axes = "document.querySelectorAll('#atelier_plot_figure [id*=axes_]').length"
    page.until("losses and rates", f"{axes} === 2")
    page.id("plot_rates").uncheck()
    page.until("losses alone", f"{axes} === 1")


@pytest.mark.everywhere
def test_a_job_that_is_wanted_now_goes_first(page: Page) -> None:
    for name in ("later", "sooner"):
        demo(page, name, steps=8)
        page.id("queue_add").click()
        page.page.wait_for_selector(f"#atelier_queue [data-name]:text-is('{name}')")
    row = "#atelier_queue li[data-state=waiting]:has([data-name]:text-is('sooner'))"
    page.page.locator(f"{row} [data-action=now]").click()
    ended(page, "sooner")
    ended(page, "later")
    page.until("all is quiet", IDLE)
    times = page.page.evaluate("Atelier.ask('GET', 'queue')")["ended"]
    started = {one["name"]: one["started"] for one in times}
    assert started["sooner"] < started["later"]


@pytest.mark.skipif(KIND == "alone", reason="there is no txt2img beside the standalone app")
def test_what_goes_to_and_fro_between_us_and_txt2img(page: Page) -> None:
    demo(page, "worn", steps=5)
    page.id("start").click()
    ended(page, "worn")
    page.id("use_in_prompt").click()
    box = "#txt2img_prompt textarea"
    page.until("the LoRA is in the prompt", f"document.querySelector('{box}').value === '<lora:worn:1>'")
    page.id("use_in_prompt").click()
    assert page.page.locator(box).input_value() == "<lora:worn:1>", "once is enough"
    page.page.evaluate("document.querySelector('#txt2img_steps input[type=number]').value = 33")
    page.page.evaluate("document.querySelector('#atelier_try').open = true")
    page.id("draw_take").click()
    assert page.id("try_steps").input_value() == "33"
