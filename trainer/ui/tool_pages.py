"""The plot page, the page of picture tools, and the card that draws pictures with a LoRA."""

from __future__ import annotations

from ..tools.augment_pictures import SIDES
from ..tools.resize_pictures import INTERPOLATIONS
from .fields import button
from .html import Child, Html, element


def _entry(text: str, name: str, value: object = "", **attributes: object) -> Html:
    """A labelled text input of a tool; its id is `atelier_<name>`."""
    about = attributes.pop("title", None)
    look = attributes.pop("class_", "")
    entry = element("input", type="text", id=f"atelier_{name}", value=str(value), autocomplete="off", **attributes)
    label = element("label", text, for_=f"atelier_{name}", class_="atelier-name", title=about)
    error = element("p", class_="atelier-error", id=f"atelier_{name}_error", role="alert", hidden=True)
    return element("div", label, element("span", entry, class_="atelier-entry"), error,
                   class_=f"atelier-field {look}".strip())  # fmt: skip


def _number(text: str, name: str, value: object, title: str = "") -> Html:
    return _entry(text, name, value, inputmode="decimal", title=title or None)


def _switch(text: str, name: str, checked: bool = False, title: str = "") -> Html:
    box = element("input", type="checkbox", id=f"atelier_{name}", checked=checked)
    label = element("label", text, for_=f"atelier_{name}", class_="atelier-name", title=title or None)
    return element("div", element("span", box, label, class_="atelier-check"), class_="atelier-field atelier-is-check")


def try_card() -> Html:
    """Pictures of the current prompts: before the training (iLECO) and with a LoRA at several strengths."""
    entries: list[Child] = [
        _entry("prompt", "try_prompt", class_="atelier-wide", title="Empty takes the prompt of the form"),
        _entry("negative prompt", "try_negative", class_="atelier-wide"),
        _number("seed", "try_seed", 1, "The same for all images, so that only the LoRA makes a difference"),
        _number("steps", "try_steps", 20),
        _number("CFG scale", "try_cfg", 7),
        _number("width", "try_width", 512),
        _number("height", "try_height", 512),
        element(
            "div",
            element("label", "LoRA", for_="atelier_try_lora", class_="atelier-name"),
            element("select", id="atelier_try_lora", data_list="lora"),
            element("p", class_="atelier-error", id="atelier_try_lora_error", role="alert", hidden=True),
            class_="atelier-field atelier-two",
        ),
        _entry("strengths", "try_strengths", "-1, 0, 0.5, 1", title="One image each"),
    ]
    buttons = element(
        "div",
        button("Compare strengths", "draw_compare", title="The same image at each of these strengths"),
        button("Take from txt2img", "draw_take", title="Seed, steps, size and negative prompt of the txt2img tab",
               hidden=True),
        button("Save grid", "draw_save", sign="save", hidden=True),
        class_="atelier-row atelier-wrap",
    )  # fmt: skip
    return element(
        "details",
        element("summary", "Before and after"),
        element("div", entries, class_="atelier-fields"),
        buttons,
        element("p", id="atelier_draw_note", class_="atelier-note", role="status"),
        element("div", id="atelier_draw_grid", class_="atelier-grid"),
        class_="atelier-card",
        id="atelier_try",
    )


def plot_page() -> Html:
    """Logs to choose from beside the figure the server draws of them."""
    choose = element(
        "section",
        element(
            "div",
            element("h3", "Logs"),
            button("", "plot_refresh", kind="small", sign="refresh", title="Refresh the logs"),
            button("", "open_logs", kind="small", sign="folder", title="Open the folder of logs", data_open="logs"),
            class_="atelier-row",
        ),
        element("p", "The running or the latest log is shown unless you choose others.", class_="atelier-note"),
        element("ul", id="atelier_plot_logs", class_="atelier-logs"),
        element("h3", "Axes"),
        _switch("logarithmic loss", "plot_log"),
        _switch("learning rates", "plot_rates", True),
        _entry("smoothing", "plot_smooth", "0.98", inputmode="decimal",
               title="0 shows the losses as they are; near 1 smooths over many steps"),
        class_="atelier-card atelier-plot-choose",
    )  # fmt: skip
    figure = element(
        "section",
        element("p", id="atelier_plot_note", class_="atelier-note", role="status"),
        element("div", id="atelier_plot_figure", class_="atelier-plot-figure"),
        class_="atelier-card",
    )
    return element("div", choose, figure, class_="atelier-plot")


def pictures_page() -> Html:
    """Tools for training pictures: rotated and scaled copies, and several resolutions."""
    return element("div", _augment(), _resize(), class_="atelier-tools")


def _source(name: str) -> Child:
    return [
        _entry("folder or image", f"{name}_source", class_="atelier-two",
               title="A folder of images or one image file"),
        element("button", element("span", "Or drop an image here"), type="button", class_="atelier-drop",
                data_picture_for=f"atelier_{name}_source"),
        _entry("name of the new folder", f"{name}_output", class_="atelier-wide",
               title="Made below logs/images; empty takes the name of the source"),
    ]  # fmt: skip


def _tool(name: str, title: str, about: str, fields: Child) -> Html:
    buttons = element(
        "div",
        button("Preview", f"{name}_preview"),
        button("Write images", f"{name}_write", kind="primary"),
        button("Open folder", f"{name}_open", kind="small", sign="folder", data_open="images"),
        button("Train on these", f"{name}_train", kind="small", hidden=True,
               title="Takes the new folder as lora data directory"),
        class_="atelier-row atelier-wrap",
    )  # fmt: skip
    return element(
        "section",
        element("h3", title),
        element("p", about, class_="atelier-note"),
        element("div", _source(name), fields, class_="atelier-fields"),
        buttons,
        element("p", id=f"atelier_{name}_note", class_="atelier-note", role="status"),
        element("div", id=f"atelier_{name}_grid", class_="atelier-grid"),
        class_="atelier-card",
        id=f"atelier_{name}",
    )


def _augment() -> Html:
    return _tool(
        "augment",
        "Rotate and scale",
        "Writes copies turned by random angles, or shrunk at random on a transparent canvas of the same size.",
        [
            _number("copies of each", "augment_copies", 4),
            _number("largest angle", "augment_angle", 30, "Degrees to both sides; 0 does not turn"),
            _number("smallest scale", "augment_scale", 1, "0.5 shrinks to half at most; 1 does not shrink"),
            element(
                "div",
                element("label", "keep at", for_="atelier_augment_side", class_="atelier-name",
                        title="Side of the canvas that a shrunk image stays at"),
                element("select",
                        [element("option", side, value=side) for side in SIDES],
                        id="atelier_augment_side"),
                class_="atelier-field",
            ),
            _number("seed", "augment_seed", 1),
            _switch("copy captions", "augment_captions", True),
        ],
    )  # fmt: skip


def _resize() -> Html:
    options = [element("option", name, value=name) for name in INTERPOLATIONS]
    return _tool(
        "resize",
        "Several resolutions",
        "Writes each image at several sizes, each made from the original, never enlarged.",
        [
            _entry("resolutions", "resize_resolutions", "512x512,384x384,256x256", class_="atelier-wide",
                   title="Largest areas, as width x height, with commas between them"),
            _number("divisible by", "resize_divisible", 8, "Sides become multiples of it, by cutting the edges"),
            element(
                "div",
                element("label", "interpolation", for_="atelier_resize_interpolation", class_="atelier-name"),
                element("select", options, id="atelier_resize_interpolation"),
                class_="atelier-field",
            ),
            _switch("save as PNG", "resize_png"),
            _switch("copy captions and masks", "resize_associated", True),
        ],
    )  # fmt: skip
