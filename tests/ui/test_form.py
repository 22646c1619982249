"""The form is the table: each parameter of each mode and adapter type has its field, and nothing becomes markup."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser

import page_words
import pytest
from params_table import catalogue as small_catalogue

from trainer.engine.catalogue import catalogue
from trainer.params.catalogue import Catalogue
from trainer.params.core import GROUPS
from trainer.params.field import ModeInfo, param
from trainer.params.widgets import widgets
from trainer.places import ROOT
from trainer.ui.cards import CARDS, card_of
from trainer.ui.fields import bounds, families
from trainer.ui.form import form, tags
from trainer.ui.html import Html, element, join
from trainer.ui.page import page

TABLE = catalogue()
WIDE = dataclasses.replace(small_catalogue(), types={"lierla": frozenset()})
"""All five modes of TrainTrain, and a second pass."""


class Fields(HTMLParser):
    """The fields of a form: (second, key) → attributes; and every id."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.fields: dict[tuple[bool, str], dict[str, str | None]] = {}
        self.ids: list[str] = []
        self.inputs: dict[str, str] = {}
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if "data-field" in given:
            self.fields["data-second" in given, str(given["data-field"])] = given
        if "data-key" in given:
            self.inputs[str(given["id"])] = str(given["data-key"])


def shown(info: dict, given: dict[str, str | None], mode: str, kind: str, second: bool) -> bool:
    """What the page's script decides with the tags it is given, said once more."""
    by_type = info[mode]["second" if second else "first"]
    needs = given.get("data-needs")
    return by_type is not None and (not needs or needs in by_type[kind])


@pytest.mark.parametrize("table", [TABLE, WIDE], ids=["whole", "traintrain"])
def test_every_parameter_of_every_mode_has_its_field(table: Catalogue) -> None:
    found, info = Fields(form(table)), tags(table)
    seconds = False
    for mode in table.modes:
        for kind in table.types:
            for second in (False, True):
                for widget in widgets(table, mode, second, kind):
                    switch = second and widget.attribute in ("mode", "use_2nd_pass_settings")
                    given = found.fields.get((second, widget.key))
                    if given is None or switch:
                        assert second and (not widget.visible or switch), (mode, kind, widget.key)
                        continue
                    seconds = seconds or second
                    if (second, widget.key) != (False, "use_2nd_pass_settings"):
                        assert shown(info, given, mode, kind, second) is widget.visible, (mode, kind, widget.key)
    assert seconds is any(mode.second is not None for mode in table.modes.values())


def test_ids_are_ours_and_given_once() -> None:
    found = Fields(page(TABLE))
    assert all(name.startswith("atelier_") for name in found.ids)
    assert len(found.ids) == len(set(found.ids))
    assert len(set(re.findall(r' for="([^"]+)"', page(TABLE))) - set(found.ids)) == 0
    buttons = re.findall(r'<button[^>]* id="([^"]+)"', page(TABLE))
    assert len(buttons) > 20
    assert not any(name.endswith(("_generate", "_interrupt", "_skip")) for name in buttons), "WebUIs press these"


def test_a_new_mode_and_a_new_type_appear_by_themselves() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Dream:
        dream_depth: float = param(0.5, "How deep it dreams.", "option", needs="dream", low=0, high=1)
        knots: int = param(3, "How many knots.", "option", needs="knots", low=1)
        prune: bool = param(False, "Cut what is small.", "option", needs="prune")

    table = Catalogue(
        sections=(*TABLE.sections, Dream),
        modes={**TABLE.modes, "Dream": ModeInfo("Dream", "Learns in its sleep.", frozenset({"dream", "run", "steps"}))},
        choices={"network_type": (*TABLE.types, "knot")},
        types={**TABLE.types, "knot": frozenset({"knots"})},
        always=TABLE.always | {"prune"},
    )
    markup = page(table)
    found, info = Fields(markup), tags(table)
    assert "Learns in its sleep." in json.loads(re_data(markup))["Dream"]["help"]
    assert 'value="Dream"' in markup and '<option value="knot">' in markup and "How deep it dreams." in markup
    cards = {name: card_of(table.by_name[name], table).name for name in ("dream_depth", "knots", "prune")}
    assert cards == {"dream_depth": "learn", "knots": "network", "prune": "train"}
    assert shown(info, found.fields[False, "dream_depth"], "Dream", "lierla", False)
    assert not shown(info, found.fields[False, "dream_depth"], "LoRA", "lierla", False)
    assert shown(info, found.fields[False, "knots"], "LoRA", "knot", False)
    assert not shown(info, found.fields[False, "knots"], "LoRA", "lierla", False)
    assert shown(info, found.fields[False, "prune"], "LoRA", "lierla", False)


def re_data(markup: str) -> str:
    import html

    found = re.search(r'data-info="([^"]*)"', markup)
    assert found
    return html.unescape(found.group(1))


def test_what_a_field_says() -> None:
    by_name = {widget.attribute: widget for widget in widgets(TABLE, "LoRA")}
    assert bounds(by_name["network_rank"]) == "1 – 1024"
    assert bounds(by_name["image_size"]) == "32 – 4096 px, × 8"
    assert bounds(by_name["train_seed"]) == "≥ -1"
    assert bounds(by_name["lora_trigger_word"]) == ""
    blocks = families(by_name["network_blocks"].choices)
    assert [part[0] for part in blocks] == ["BASE", "IN00", "M00", "OUT00"]
    assert [len(part) for part in blocks] == [1, 12, 1, 12]
    assert families(("tensorboard", "wandb")) == [("tensorboard", "wandb")]


def test_defaults_stand_in_the_form_as_the_table_has_them() -> None:
    found = Fields(form(TABLE)).fields
    assert found[False, "train_learning_rate"]["data-default"] == "0.0001"
    assert found[False, "image_size(height, width)"]["data-default"] == "512"
    assert found[False, "save_overwrite"]["data-default"] == "false"
    assert str(found[False, "network_blocks(BASE = TextEncoder)"]["data-default"]).startswith("BASE,IN00,IN01")
    assert found[False, "mode"]["data-default"] == "LoRA"


def test_cards_follow_the_groups_of_the_table() -> None:
    named = {parameter.attribute: card_of(parameter, WIDE).name for parameter in WIDE.parameters}
    assert {named[name] for name in ("original_prompt", "original_image", "lora_data_directory")} == {"learn"}
    assert named["network_blocks"] == "blocks" and named["use_2nd_pass_settings"] == "second"
    network = ("export_format", "network_block_lrs", "enable_effilora", "num_experts", "loraplus_lr_ratio", "use_dora")
    assert {card_of(TABLE.by_name[name], TABLE).name for name in network} == {"network"}
    assert {card_of(TABLE.by_name[name], TABLE).name for name in ("abm_steps", "lalora_lambda")} == {"train"}
    assert {card_of(TABLE.by_name[name], TABLE).name for name in ("ileco_bank", "diff_strength")} == {"learn"}
    assert {parameter.spec.group for parameter in TABLE.parameters} <= set(GROUPS)
    assert {card_of(parameter, TABLE) for parameter in TABLE.parameters} <= set(CARDS)


def test_text_never_becomes_markup() -> None:
    sly = '<img src=x onerror="alert(1)">&'
    assert element("p", sly, title=sly) == (
        '<p title="&lt;img src=x onerror=&quot;alert(1)&quot;&gt;&amp;">&lt;img src=x onerror="alert(1)"&gt;&amp;</p>'
    )
    assert join([sly, Html("<b>"), None, [["x"]]]) == '&lt;img src=x onerror="alert(1)"&gt;&amp;<b>x'
    assert element("input", disabled=True, hidden=False, data_key="a b") == '<input disabled data-key="a b">'


def told_by_the_table() -> dict[str, set[str]]:
    """What is shown for parameters, modes and adapter types, which their own files say."""
    return {
        "parameters": {parameter.spec.help for parameter in TABLE.parameters},
        "modes": {mode.help for mode in TABLE.modes.values()},
        "choices": {text for notes in TABLE.notes.values() for text in notes.values()},
    }


def test_every_word_of_the_page_is_there_in_japanese() -> None:
    japanese = json.loads((ROOT / "localizations" / "ja_JP.json").read_text(encoding="utf-8"))
    stages = page_words.of_stages()
    assert {"encoding images", "encoding captions"} <= stages
    own = page_words.of_page(TABLE) | page_words.of_scripts() | stages
    own |= {"Step", "Loss", "Learning rate"}  # the axes of the plot
    own |= {parameter.spec.unit for parameter in TABLE.parameters} - {"", "px"}
    assert len(own) > 120
    assert sorted(own - set(japanese)) == []
    for what, helps in told_by_the_table().items():
        lacking = sorted(text for text in helps if text not in japanese)
        assert lacking == [], f"translate these helps of {what} in localizations/ja_JP.json"
    for text, translated in japanese.items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", translated)), text
