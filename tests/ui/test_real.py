"""The standalone app as a user meets it: a program of its own, the real engine and the shipped demo, in a browser."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from app_case import STATE, STEP, App, opened
from browser import Browser, Page, browser

pytest.importorskip("gradio")
pytest.importorskip("playwright")
import gradio
from PIL import Image

from trainer.adapters.file import read_lora

VERSION = gradio.__version__
if int(VERSION.split(".")[0]) < 4:
    pytest.skip("standing alone needs gradio 4", allow_module_level=True)

CURVES = "document.querySelectorAll('#atelier_plot_figure [id^=atelier_loss_] path').length"
SHORT = {"train_iterations": 10, "train_batch_size": 2, "prior_states": 8}
"""What makes the demo's preset quick; the rest of it stays."""


@pytest.fixture
def app(tmp_path: Path) -> App:
    return App(tmp_path)


@pytest.fixture(scope="module")
def running() -> Iterator[Browser]:
    with browser() as found:
        yield found


def ended(page: Page, *names: str) -> None:
    for name in names:
        row = f"#atelier_queue li[data-state=done] [data-name]:text-is('{name}')"
        page.page.wait_for_selector(row, timeout=120_000)


def shown_pictures(page: Page) -> list[Image.Image]:
    data = page.page.locator("#atelier_draw_grid img").evaluate_all("all => all.map(one => one.src)")
    return [Image.open(io.BytesIO(base64.b64decode(one.split(",")[1]))) for one in data]


def test_the_first_lora(app: App, running: Browser) -> None:
    with opened(app, running) as (page, _):
        errors_first(page)
        train(page, app)
        plot(page)
        queue_two(page, app)
        compare(page)
        fill_from_lora(page, app)


def errors_first(page: Page) -> None:
    """The demo stands ready; a wrong value keeps it from starting and says so at its field."""
    assert page.id("preset").input_value() == "demo" and page.id("network_rank").input_value() == "16"
    page.id("lora_data_directory_note").filter(has_text="12").wait_for(timeout=60_000)
    page.fill(train_learning_rate="fast", save_lora_name="first", **SHORT)
    page.id("start").click()
    page.until("its error", "!document.querySelector('#atelier_train_learning_rate_error').hidden")
    assert "number" in page.id("train_learning_rate_error").inner_text()
    assert page.page.evaluate("Atelier.ask('GET', 'status')")["run"] is None
    page.fill(train_learning_rate="4e-3", sample_prompts="a flamingo circle", sample_every=10, sample_steps=2)
    page.until("no error left", "Atelier.form.problems.length === 0")
    page.until("what it will do", "document.querySelector('#atelier_cost').textContent.includes('10 steps')")
    assert page.id("writes").inner_text() == "Writes first.safetensors"
    assert "first run of this kind" in page.id("cost").inner_text()


def train(page: Page, app: App) -> None:
    """Start Training, and everything that is seen of it until the file is there."""
    assert not app.loras.exists()
    page.id("start").click()
    page.until("it has begun", f"['preparing', 'running'].includes({STATE})")
    page.until("a step is told", f"{STEP} > 0")
    page.until("it ends", f"{STATE} === 'done'")
    assert page.page.evaluate(STEP) == 10 and page.id("progress").evaluate("bar => bar.value") == 1000
    assert page.id("result_text").inner_text() == "Written: first.safetensors"
    tensors, metadata = read_lora(app.loras / "first.safetensors")
    assert json.loads(metadata["atelier_job"])["train_iterations"] == 10
    assert all(tensor.any() for name, tensor in tensors.items() if name.endswith("lora_up.weight"))
    assert page.page.locator("#atelier_samples img").evaluate("one => one.decode().then(() => one.naturalWidth)") == 64
    report = page.id("report").text_content()
    assert "trainable parameters" in report and "estimated memory (MB)" in report
    page.seen(f"{VERSION}-real-done", whole=False)
    page.fill(save_lora_name="second")
    page.until("what the last one took", "document.querySelector('#atelier_cost').textContent.includes('as last time')")


def plot(page: Page) -> None:
    page.id("tab_plot").click()
    page.until("a curve", f"{CURVES} === 1")
    curve = page.page.locator("#atelier_plot_figure [id^=atelier_loss_] path").get_attribute("d")
    assert curve.count("L") == 9, "ten losses"
    page.seen(f"{VERSION}-real-plot", whole=False)
    page.id("tab_train").click()


def queue_two(page: Page, app: App) -> None:
    for name in ("second", "third"):
        page.fill(save_lora_name=name, sample_every=0)
        page.id("queue_add").click()
        page.page.wait_for_selector(f"#atelier_queue li[data-state=waiting] [data-name]:text-is('{name}')")
    page.id("queue_go").click()
    ended(page, "second", "third")
    assert sorted(path.stem for path in app.loras.iterdir()) == ["first", "second", "third"]


def compare(page: Page) -> None:
    """Before and after at four strengths; 0 is the bare model, which the original prompt alone draws too."""
    page.page.locator("#atelier_try > summary").click()
    page.fill(try_width=64, try_height=64, try_steps=2, try_prompt="a flamingo circle")
    page.id("compare_now").click()
    page.until("four images", "document.querySelectorAll('#atelier_draw_grid img').length === 4")
    assert page.page.locator("#atelier_draw_grid figcaption").all_inner_texts() == ["-1", "0", "0.5", "1"]
    pictures = shown_pictures(page)
    assert {one.size for one in pictures} == {(64, 64)} and len({one.tobytes() for one in pictures}) == 4
    page.seen(f"{VERSION}-real-compare")
    page.page.locator("#atelier_mode input[value=iLECO]").check(force=True)
    page.fill(original_prompt="a flamingo circle", target_prompt="a blue circle")
    page.id("draw_both").click()
    page.until("both prompts", "document.querySelectorAll('#atelier_draw_grid img').length === 2")
    original, target = shown_pictures(page)
    assert original.tobytes() == pictures[1].tobytes() != target.tobytes()


def fill_from_lora(page: Page, app: App) -> None:
    """A finished LoRA dropped on the page brings its settings back."""
    page.drop(page.id("bar"), app.loras / "first.safetensors")
    page.until("its name is back", "document.querySelector('#atelier_save_lora_name').value === 'first'")
    values = {name: page.id(name).input_value() for name in ("train_iterations", "train_learning_rate", "network_rank")}
    assert values == {"train_iterations": "10", "train_learning_rate": "0.004", "network_rank": "16"}
    assert page.page.locator("#atelier_mode input:checked").get_attribute("value") == "LoRA"


@pytest.mark.everywhere
def test_a_killed_app_offers_its_job_again(app: App, running: Browser) -> None:
    with opened(app, running) as (page, served):
        page.fill(save_lora_name="long", **{**SHORT, "train_iterations": 5000, "train_state_every": 2})
        page.id("start").click()
        page.until("it runs", f"{STEP} > 2")
        served.process.kill()
        served.process.wait()
    with opened(app, running) as (page, _):
        page.until("it is offered", "!document.querySelector('#atelier_banner').hidden")
        assert "long" in page.id("banner").inner_text()
        assert page.page.evaluate("Atelier.ask('GET', 'status')")["state"] == "idle", "nothing runs by itself"
        page.page.locator("#atelier_queue li[data-state=interrupted] [data-action=resume]").click()
        page.until("it goes on", f"{STATE} === 'running' && {STEP} > 2")
        assert "Resuming after step" in page.id("log").text_content()
        page.id("stop_save").click()
        page.until("it ends", f"{STATE} === 'saved_early'")
        assert (app.loras / "long.safetensors").is_file()
