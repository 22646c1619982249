"""How the page behaves at first sight: what it keeps, offers and shows, in a browser."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from browser import Page
from page_case import STATE, Place, demo, ended, page, place
from PIL import Image

__all__ = ["page", "place"]  # fixtures
RATE = "document.querySelector('#atelier_train_learning_rate').value === '{}'"


def choose(page: Page, mode: str) -> None:
    page.page.locator(f"label.atelier-mode:has(input[value='{mode}'])").click()


@pytest.mark.everywhere
def test_a_refusal_of_start_stays_although_a_check_of_the_edit_before_is_on_its_way(page: Page) -> None:
    demo(page, "raced")
    page.until("all is right", "Atelier.form.problems.length === 0")

    def late(route: Any) -> None:
        page.page.wait_for_timeout(700)
        route.continue_()

    def refuse(route: Any) -> None:
        body = (
            '{"error": "no", "problems": [{"field": "save_lora_name", "attribute": "save_lora_name", '
            '"second": false, "value": "raced", "message": "exists already."}]}'
        )
        route.fulfill(status=422, content_type="application/json", body=body)

    page.page.route("**/atelier/v1/validate", late)
    page.page.route("**/atelier/v1/start", refuse)
    page.page.evaluate("""() => {
        Atelier.form.set('train_iterations', '77');
        setTimeout(() => document.querySelector('#atelier_start').click(), 350);
    }""")
    page.until("it is refused", "Atelier.form.problems.length === 1")
    page.page.wait_for_timeout(1800)
    assert page.id("save_lora_name_error").inner_text() == "exists already."
    assert page.id("start_count").inner_text() == "1"
    page.page.unroute("**/atelier/v1/validate")
    page.page.unroute("**/atelier/v1/start")
    page.fill(save_lora_name="raced2")
    page.until("an edit asks again", "Atelier.form.problems.length === 0")


@pytest.mark.everywhere
def test_problems_of_folders_stand_beside_all_others_while_typing(page: Page) -> None:
    demo(page, "wrong")
    page.fill(lora_data_directory="/nowhere", network_rank="0", train_learning_rate="abc")
    page.until("three problems", "Atelier.form.problems.length === 3")
    assert page.id("lora_data_directory_error").inner_text() == "does not exist. Check the folder."
    page.until("it is said once", "document.querySelector('#atelier_lora_data_directory_note').textContent === ''")
    page.fill(train_learning_rate="1e-4")
    page.until("two are left", "Atelier.form.problems.length === 2")
    assert page.id("lora_data_directory_error").is_visible()


@pytest.mark.everywhere
def test_the_note_of_the_folder_follows_the_steps(page: Page) -> None:
    demo(page, "noted", steps=300)
    note = "document.querySelector('#atelier_lora_data_directory_note').textContent"
    page.until("a note", f"{note}.includes('300')")
    page.fill(train_iterations="5")
    page.until("it follows", f"/steps: 5$/.test({note})")


@pytest.mark.everywhere
def test_a_mode_brings_its_values_where_nobody_chose_others(page: Page, place: Place) -> None:
    page.id("preset").select_option("demo")
    page.until("the preset is in the form", RATE.format("0.004"))
    choose(page, "iLECO")
    page.until("its own rate", RATE.format("0.0005"))
    assert "preset iLECO" in page.id("mode_values").inner_text() and page.id("model").input_value() == "demo"
    page.id("mode_values_button").click()
    page.until("back", RATE.format("0.004"))
    page.fill(train_learning_rate="3e-4", network_rank="5")
    choose(page, "Difference")
    page.until("others follow", "document.querySelector('#atelier_train_iterations').value === '500'")
    assert page.id("train_learning_rate").input_value() == "3e-4" and page.id("network_rank").input_value() == "5"
    own = place[2] / "presets" / "user"
    own.mkdir(exist_ok=True)
    (own / "mine.json").write_text('{"format": 1, "mode": "LoRA", "train_learning_rate": 0.003}')
    page.id("preset_refresh").click()
    page.page.wait_for_selector("#atelier_preset option[value=mine]", state="attached")
    page.id("preset").select_option("mine")
    page.until("mine", RATE.format("0.003"))
    choose(page, "iLECO")
    page.page.wait_for_selector("#atelier_mode_values_button:visible")
    assert page.id("train_learning_rate").input_value() == "0.003", "what somebody keeps is only offered others"
    page.id("mode_values_button").click()
    page.until("taken with one click", RATE.format("0.0005"))


@pytest.mark.everywhere
def test_typed_pairs_are_shown_side_by_side(page: Page, tmp_path: Path) -> None:
    for name, level in (("a", 90), ("b", 160)):
        picture = Image.new("RGB", (128, 64), (90, 90, 90))
        picture.paste((level, 90, 90), (0, 0, 64, 64))
        picture.save(tmp_path / f"{name}.png")
    choose(page, "ADDifT")
    page.fill(**{"original_image": tmp_path / "a.png", "target_image": tmp_path / "b.png"})
    page.until("three images", "document.querySelectorAll('#atelier_pairs_grid img[src]').length === 3")
    assert "50 % differ · 128×64 pixels, bucket 128×64" in page.id("pairs_grid").inner_text()
    page.seen("pairs", whole=False)
    choose(page, "LoRA")
    page.until("no pairs", "document.querySelector('#atelier_pairs').hidden")


@pytest.mark.everywhere
def test_what_the_packages_cannot_serve_is_marked(page: Page) -> None:
    option = page.page.locator("#atelier_train_optimizer option[value=CAME]")
    assert option.text_content() == "CAME (not installed)" and "pip install" in option.get_attribute("title")
    assert page.page.locator("label.atelier-unserved[title*=wandb]").count() >= 1


@pytest.mark.everywhere
def test_finished_jobs_are_extended_or_cleared_and_runs_parted_in_the_log(page: Page) -> None:
    demo(page, "resumable", steps=12)
    page.id("start").click()
    ended(page, "resumable")
    demo(page, "plain", steps=12)
    page.id("start").click()
    ended(page, "plain")
    parted = page.page.locator("#atelier_log li[data-level=run]").all_inner_texts()
    assert parted[-2:] == ["resumable", "plain"]
    row = page.page.locator("#atelier_queue li", has=page.page.locator("[data-name]:text-is('resumable')"))
    row.locator("[data-action=extend]").click()
    assert row.locator("[data-length]").input_value() == "24"
    row.locator("[data-length]").fill("30")
    row.locator("[data-extend] button").click()
    steps = "document.querySelector('#atelier_live_step').textContent"
    page.until("it goes on", f"{STATE} === 'done' && {steps} === '30 / 30'")
    page.id("queue_clear").click()
    page.until("the list is empty", "!document.querySelector('#atelier_queue li')")
    assert not page.id("queue_clear").is_visible()


def test_a_narrow_page_does_not_scroll_sideways_and_help_stays_inside(place: Place) -> None:
    narrow = Page(place[0], place[1], width=700)
    as_in_forge = "{ overflow: visible !important; } .gradio-container .main { padding: 8px !important; }"
    narrow.page.add_style_tag(content=f".gradio-container {as_in_forge}")
    narrow.page.evaluate("document.querySelectorAll('#atelier_form details').forEach(box => box.open = true)")
    top = "document.querySelector('{}').getBoundingClientRect().top"
    run, queue, task = (
        narrow.page.evaluate(top.format(name)) for name in (".atelier-run", ".atelier-queue-card", "#atelier_card_task")
    )
    assert run < queue < task, "the queue is not below the whole form"
    sideways = "document.documentElement.scrollWidth - innerWidth"
    assert narrow.page.evaluate(sideways) <= 1
    narrow.id("network_rank_label").hover()
    shown = narrow.id("network_rank_help")
    shown.wait_for(state="visible")
    box = shown.bounding_box()
    assert box["width"] > 200 and box["x"] >= 0 and box["x"] + box["width"] <= 700
    assert narrow.page.evaluate(sideways) <= 1
    narrow.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_an_empty_checkbox_has_the_shade_of_the_theme(place: Place, dark: bool) -> None:
    page = Page(place[0], place[1], dark=dark)
    page.id("tab_plot").click()
    assert not page.id("plot_log").is_checked()
    seen = Image.open(io.BytesIO(page.id("plot_log").screenshot())).convert("L")
    middle = seen.getpixel((seen.width // 2, seen.height // 2))
    assert middle < 100 if dark else middle > 200
    page.close()


@pytest.mark.parametrize("width", [1280, 700])
def test_start_stays_in_view_beside_one_scrollbar(place: Place, width: int) -> None:
    narrow = Page(place[0], place[1], width=width)
    scrolled = """() => [...document.querySelectorAll('#atelier_page_train *')].filter((one) =>
        one.clientHeight > 400 && one.scrollHeight > one.clientHeight + 1
        && /auto|scroll/.test(getComputedStyle(one).overflowY)).length"""
    assert narrow.page.evaluate(scrolled) == 0, "the page scrolls, and no column of it by itself"
    for at in (0, 400, 100000):
        narrow.page.evaluate(f"window.scrollTo(0, {at}); document.scrollingElement.scrollTop = {at}")
        narrow.page.wait_for_timeout(150)
        box = narrow.id("start").bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= 900
        inside = "([x, y]) => document.querySelector('#atelier_start').contains(document.elementFromPoint(x, y))"
        assert narrow.page.evaluate(inside, [box["x"] + 8, box["y"] + box["height"] / 2])
        words = narrow.page.locator("#atelier_start > span").bounding_box()
        assert words["x"] >= box["x"] and words["x"] + words["width"] <= box["x"] + box["width"], "its words fit"
    narrow.seen(f"scrolled-{width}", whole=False)
    narrow.close()
