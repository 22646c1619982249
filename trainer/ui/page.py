"""Everything of the page around the form: the bar on top, the run and its queue, the templates scripts fill."""

from __future__ import annotations

import json

from ..params.catalogue import Catalogue
from .fields import button
from .form import form, tags
from .html import Child, Html, element
from .icons import icon
from .tool_pages import pictures_page, plot_page, try_card

PAGES = (("train", "Train"), ("plot", "Plot"), ("pictures", "Images"))


def page(catalogue: Catalogue) -> Html:
    """The whole tab as one element."""
    info = json.dumps(tags(catalogue), ensure_ascii=False, sort_keys=True)
    return element(
        "div",
        _head(),
        element("p", id="atelier_banner", class_="atelier-banner", role="status", hidden=True),
        _panel("train", element("div", form(catalogue), try_card(), class_="atelier-left"), _side()),
        _panel("plot", plot_page()),
        _panel("pictures", pictures_page()),
        *_templates(),
        id="atelier_root",
        class_="atelier",
        lang="en",
        data_info=info,
    )


def _panel(name: str, *inside: Child) -> Html:
    return element(
        "section",
        *inside,
        id=f"atelier_page_{name}",
        class_=f"atelier-page atelier-page-{name}",
        role="tabpanel",
        aria_labelledby=f"atelier_tab_{name}",
        hidden=name != PAGES[0][0],
    )


def _head() -> Html:
    tabs = [
        element(
            "button", text, type="button", role="tab", id=f"atelier_tab_{name}", data_page=name,
            aria_selected="true" if name == PAGES[0][0] else "false", aria_controls=f"atelier_page_{name}",
        )
        for name, text in PAGES
    ]  # fmt: skip
    return element(
        "header",
        element("nav", tabs, class_="atelier-tabs", role="tablist"),
        element(
            "span",
            element("button", "EN", type="button", data_language="en"),
            element("button", "日本語", type="button", data_language="ja"),
            class_="atelier-languages",
            id="atelier_languages",
        ),
        element("div", _presets(), _settings(), _search(), class_="atelier-bar", id="atelier_bar"),
        class_="atelier-head",
    )


def _presets() -> Html:
    return element(
        "div",
        element("label", "Preset", for_="atelier_preset", class_="atelier-name"),
        element("select", id="atelier_preset", title="Settings under a name; choosing one fills the form"),
        button("", "preset_load", kind="small", sign="first", title="Fill the form with this preset again"),
        button("", "preset_save", kind="small", sign="save", title="Save the form as a user preset"),
        button("", "preset_delete", kind="small", sign="trash", title="Delete this user preset"),
        button("", "preset_refresh", kind="small", sign="refresh", title="Refresh the presets"),
        element(
            "form",
            element("input", type="text", id="atelier_preset_name", placeholder="name",
                    aria_label="Name of the preset"),
            element("button", "Save", type="submit", class_="atelier-button"),
            id="atelier_preset_form",
            class_="atelier-inline",
            hidden=True,
        ),
        class_="atelier-group",
    )  # fmt: skip


def _settings() -> Html:
    return element(
        "div",
        element(
            "button", "Drop a settings JSON or a LoRA, or click", type="button", id="atelier_drop",
            class_="atelier-drop atelier-drop-line", title="Fills the form with the settings the file holds",
        ),
        element("input", type="file", id="atelier_file", accept=".json,.safetensors,application/json", hidden=True),
        element("select", id="atelier_settings_file", title="Settings files written earlier; choosing one loads it"),
        button("", "settings_save", kind="small", sign="save", title="Write the form to a settings file"),
        button("", "open_json", kind="small", sign="folder", title="Open the folder of settings files",
               data_open="json"),
        class_="atelier-group atelier-grow",
    )  # fmt: skip


def _search() -> Html:
    return element(
        "div",
        element("input", type="search", id="atelier_search", placeholder="Find a setting", aria_label="Find a setting"),
        class_="atelier-group",
    )


def _side() -> Html:
    return element("aside", _run(), _live(), _queue(), class_="atelier-side")


def _run() -> Html:
    return element(
        "section",
        element(
            "div",
            button("Start Training", "start", kind="primary", sign="play", title="Start now (Ctrl+Enter)",
                   more=element("b", id="atelier_start_count", hidden=True)),
            button("Add to Queue", "queue_add", sign="plus", title="Put these settings at the end of the queue"),
            button("Stop", "stop", kind="stop", sign="stop", title="End the run without saving a LoRA", disabled=True),
            button("Stop and Save", "stop_save", kind="stop", sign="stop",
                   title="End the run and save the LoRA as it is", disabled=True),
            class_="atelier-actions",
        ),
        element("p", id="atelier_writes", class_="atelier-note"),
        element("p", id="atelier_cost", class_="atelier-note"),
        element("ul", id="atelier_problems", class_="atelier-problems", role="alert", hidden=True),
        element("ul", id="atelier_warnings", class_="atelier-warnings", hidden=True),
        element("p", id="atelier_extra", class_="atelier-note", hidden=True),
        class_="atelier-card atelier-run",
        id="atelier_run",
    )  # fmt: skip


FACTS = (
    ("step", "Step"), ("loss", "Loss"), ("rate", "Rate"), ("speed", "Time per step"),
    ("left", "Time left"), ("memory", "Memory"),
)  # fmt: skip


def _live() -> Html:
    facts = [
        element("div", element("dt", title), element("dd", "–", id=f"atelier_live_{name}")) for name, title in FACTS
    ]
    return element(
        "section",
        element(
            "div",
            element("b", id="atelier_live_job", class_="atelier-ellipsis"),
            element("span", "Idle", id="atelier_live_state", class_="atelier-state", role="status"),
            class_="atelier-row",
        ),
        element("progress", id="atelier_progress", max=1000, value=0, aria_label="Progress"),
        element("p", id="atelier_live_stage", class_="atelier-note"),
        element("dl", facts, class_="atelier-facts"),
        element("div", _curve(), class_="atelier-curve", id="atelier_curve"),
        element("details", element("summary", "What this run does"), element("dl", class_="atelier-settings"),
                id="atelier_report", class_="atelier-report", hidden=True),
        element("div", id="atelier_samples", class_="atelier-samples", hidden=True),
        _result(),
        element("ol", id="atelier_log", class_="atelier-log", tabindex=0, aria_label="Log"),
        class_="atelier-card atelier-live",
        id="atelier_live",
    )  # fmt: skip


def _curve() -> Html:
    """Loss as it is and smoothed; the script writes both paths."""
    raw, ema = (element("path", class_=f"atelier-line atelier-line-{name}", fill="none") for name in ("raw", "ema"))
    lines = element("svg", raw, ema, viewBox="0 0 300 90", preserveAspectRatio="none", role="img",
                    aria_label="Loss, smoothed")  # fmt: skip
    marks = [element("span", id=f"atelier_curve_{name}") for name in ("high", "low")]
    return element("div", element("div", marks), lines, element("em", "The loss curve appears here."))


def _result() -> Html:
    return element(
        "div",
        element("p", id="atelier_result_text"),
        element(
            "div",
            button("Open folder", "open_loras", kind="small", sign="folder", data_open="loras"),
            button("Use in prompt", "use_in_prompt", kind="small", title="Put this LoRA into the txt2img prompt"),
            button("Compare", "compare_now", kind="small", title="Generate images with and without it"),
            class_="atelier-row",
        ),
        id="atelier_result",
        class_="atelier-result",
        hidden=True,
    )


def _queue() -> Html:
    return element(
        "section",
        element(
            "div",
            element("h3", "Queue"),
            button("Clear finished", "queue_clear", kind="small", hidden=True,
                   title="Remove finished jobs from the list; those that can be resumed stay"),
            button("Run queue", "queue_go", kind="small", sign="play", title="Start the next job", hidden=True),
            class_="atelier-row atelier-queue-head",
        ),
        element("p", "Nothing is waiting.", id="atelier_queue_empty", class_="atelier-note"),
        element("ol", id="atelier_queue", class_="atelier-queue"),
        class_="atelier-card atelier-queue-card",
        id="atelier_queue_card",
    )  # fmt: skip


def _templates() -> tuple[Html, ...]:
    actions = (("now", "play", "Run this one next"), ("up", "up", "Earlier"), ("down", "down", "Later"),
               ("resume", "refresh", "Resume where it stopped"), ("extend", "plus", "Train longer"),
               ("delete", "trash", "Delete from the queue"))  # fmt: skip
    buttons = [
        element("button", icon(sign), type="button", class_="atelier-button atelier-small", data_action=action,
                title=text, aria_label=text)
        for action, sign, text in actions
    ]  # fmt: skip
    entry = element(
        "li",
        element(
            "details",
            element("summary", element("b", data_name=True), element("span", data_about=True, class_="atelier-note")),
            element("dl", data_settings=True, class_="atelier-settings"),
        ),
        element("p", data_error=True, class_="atelier-error", hidden=True),
        element(
            "form",
            element(
                "label",
                element("span", data_unit=True),
                " ",
                element("input", type="text", inputmode="numeric", data_length=True),
            ),
            element("button", "Go on", type="submit", class_="atelier-button atelier-small"),
            class_="atelier-inline atelier-extend",
            data_extend=True,
            hidden=True,
        ),
        element("span", buttons, class_="atelier-queue-actions"),
        class_="atelier-queue-entry",
    )
    figure = element("figure", element("img", alt="", loading="lazy"), element("figcaption"), class_="atelier-figure")
    return (
        element("template", entry, id="atelier_template_queue"),
        element("template", figure, id="atelier_template_figure"),
    )
