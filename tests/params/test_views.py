"""Command line, widgets and the reference page are made from the same table."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from params_table import MODES, catalogue

from trainer.errors import AtelierError, JobError
from trainer.params.cli import add_flags, apply_overrides, collect_flags, flag, lay_over, unknown_flag_hint
from trainer.params.codec import load
from trainer.params.core import GROUPS, Images, Network, Train
from trainer.params.docs import markdown
from trainer.params.widgets import widgets

TABLE = catalogue()


def parse(*words):
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--model-folder")
    add_flags(parser, TABLE)
    return collect_flags(parser.parse_args(words))


def test_flags():
    given = parse("--network-rank", "8", "--image-size", "768,512", "--image-mirroring", "--no-save-overwrite",
                  "--train-vae-precision", "bf16", "--train-seed", "-1", "--network-blocks", "BASE,M00",
                  "--model-folder", "x", "--lora-data-directory", "pictures")  # fmt: skip
    assert given == {
        "network_rank": "8", "image_size": "768,512", "image_mirroring": True, "save_overwrite": False,
        "train_VAE_precision": "bf16", "train_seed": "-1", "network_blocks": "BASE,M00",
        "lora_data_directory": "pictures",
    }  # fmt: skip
    job = load(given, TABLE).job
    assert (job[Network].network_rank, job[Images].image_size, job[Train].train_VAE_precision) == (
        8,
        (768, 512),
        "bf16",
    )
    assert parse() == {}


def test_every_parameter_has_a_flag_and_a_line_of_help():
    parser = argparse.ArgumentParser()
    add_flags(parser, TABLE)
    text = " ".join(parser.format_help().split())
    for parameter in TABLE.parameters:
        assert (flag(parameter) in text) is (parameter.attribute != "format")
    assert len({flag(parameter) for parameter in TABLE.parameters}) == len(TABLE.parameters)
    assert "default: all" in text


def test_unknown_flags_get_a_hint():
    assert unknown_flag_hint(["--network-rnak=8", "8"], TABLE) == "--network-rnak=8: did you mean --network-rank?"
    assert unknown_flag_hint(["--qqqqq"], TABLE) == ""


def test_overrides():
    raw = {"network_rank": 16, "image_size(height, width)": "512", "2nd pass": {"network_rank": "4"}}
    laid = apply_overrides(raw, [
        "network_rank=8", "image_size=768,512", "2nd pass.network_rank=2", "lora_data_directory=a=b", "vae=",
    ])  # fmt: skip
    assert laid == {
        "network_rank": "8", "image_size(height, width)": "768,512", "2nd pass": {"network_rank": "2"},
        "lora_data_directory": "a=b", "vae": "",
    }  # fmt: skip
    assert raw["network_rank"] == 16 and raw["2nd pass"] == {"network_rank": "4"}
    assert apply_overrides({"image_size": 512}, ["image_size(height, width)=64"]) == {"image_size": "64"}


def test_overrides_alone_are_our_own_settings():
    laid = apply_overrides({}, ["image_size(height, width)=64", "lora_data_directory=x"])
    assert not load(laid, TABLE).job.traintrain


def test_overrides_that_cannot_be():
    with pytest.raises(JobError) as caught:
        apply_overrides(
            {}, ["network_rank", "=5", "network_rnak=8", "train_seed=1", "train_seed=2", "2nd pass.=1"], TABLE
        )
    told = [str(problem) for problem in caught.value.problems]
    assert len(told) == 5
    assert "must be key=value" in told[0] and "must be key=value" in told[1]
    assert "Did you mean network_rank?" in told[2] and "second time" in told[3] and "must be key=value" in told[4]


def test_lay_over_prefers_the_spelling_in_use():
    assert lay_over({"image_size": 1}, {"image_size(height, width)": 2}, TABLE) == {"image_size": 2}
    assert lay_over({"image_size(height, width)": 1}, {"image_size": 2}, TABLE) == {"image_size(height, width)": 2}
    assert lay_over({"2nd pass": None}, {"2nd pass": {"network_rank": 2}}, TABLE) == {"2nd pass": {"network_rank": 2}}


def visible(mode, second=False):
    return {widget.attribute for widget in widgets(TABLE, mode, second) if widget.visible}


def test_widgets_describe_every_parameter():
    found = widgets(TABLE, "LoRA")
    assert {widget.key for widget in found} == {parameter.key for parameter in TABLE.parameters} - {"format"}
    assert [GROUPS.index(widget.group) for widget in found] == sorted(GROUPS.index(widget.group) for widget in found)
    kinds = {widget.attribute: widget.kind for widget in found}
    assert [kinds[name] for name in ("mode", "network_rank", "network_blocks", "image_mirroring", "image_size")] == [
        "choice", "number", "checks", "check", "text"]  # fmt: skip
    by_name = {widget.attribute: widget for widget in found}
    assert by_name["network_blocks"].label == "network blocks(BASE = TextEncoder)"
    assert by_name["network_type"].choices == ("lierla", "c3lier", "loha")
    assert (by_name["image_size"].default, by_name["image_size"].unit, by_name["image_size"].multiple) == (
        "512",
        "px",
        8,
    )
    assert (by_name["network_rank"].low, by_name["network_rank"].high, by_name["network_rank"].whole) == (1, 1024, True)


def test_defaults_of_widgets_are_a_job():
    job = load(
        {widget.key: widget.default for widget in widgets(TABLE, "LoRA")} | {"format": 1}, TABLE, complete=False
    ).job
    assert job.to_dict() == {"format": 1, "mode": "LoRA"}


def test_modes_show_what_traintrain_shows():
    everywhere = {
        "network_rank",
        "train_iterations",
        "train_optimizer",
        "save_overwrite",
        "model_v_pred",
        "network_blocks",
    }
    for mode in MODES:
        assert everywhere | {"save_lora_name", "logging_verbose"} <= visible(mode)
    assert everywhere <= visible("Difference", second=True)
    folder = {"lora_data_directory", "image_buckets_step", "image_num_multiply", "image_mirroring", "network_resume"}
    for mode in ("LoRA", "Difference", "Multi-ADDifT"):
        assert folder <= visible(mode)
    for mode in ("iLECO", "ADDifT"):
        assert not folder & visible(mode)
    assert {mode for mode in MODES if "image_size" in visible(mode)} == {"LoRA", "iLECO", "Multi-ADDifT"}
    assert {mode for mode in MODES if "lora_trigger_word" in visible(mode)} == set(MODES) - {"iLECO"}
    assert {mode for mode in MODES if "diff_alt_ratio" in visible(mode)} == {"ADDifT", "Multi-ADDifT"}
    assert {mode for mode in MODES if "diff_target_name" in visible(mode)} == {"Multi-ADDifT"}
    assert {mode for mode in MODES if "diff_1st_pass_only" in visible(mode)} == {"Difference"}
    assert {mode for mode in MODES if "network_train_text_encoder" in visible(mode)} == {"iLECO"}
    assert {mode for mode in MODES if "train_textencoder_learning_rate" in visible(mode)} == {"LoRA"}
    second = visible("Difference", second=True)
    assert "use_2nd_pass_settings" in second and not second & {"save_lora_name", "lora_data_directory", "save_as_json"}
    assert visible("LoRA", second=True) == set()


def test_unknown_mode():
    with pytest.raises(AtelierError, match="Did you mean iLECO"):
        widgets(TABLE, "iLEC")


def test_the_everyday_is_few():
    everyday = [widget for widget in widgets(TABLE, "LoRA") if widget.visible and not widget.advanced]
    assert 12 <= len(everyday) <= 20


def test_help_is_one_or_two_short_sentences():
    for parameter in TABLE.parameters:
        text = parameter.spec.help
        longest = 1000 if parameter.attribute == "train_traintrain_compatible" else 160  # a list of what it does
        assert text.endswith(".") and text[0].isupper() and len(text) <= longest and "\n" not in text, parameter.key
        assert parameter.spec.group in GROUPS


def test_reference_page_has_every_parameter():
    page = markdown(TABLE)
    for parameter in TABLE.parameters:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{parameter.key}` |"))
        assert row.count("|") == 6 and parameter.spec.help in row
    assert "| `network_rank` | a whole number from 1 to 1024 | `16` | all |" in page
    assert (
        "Difference (2nd pass)" in page
        and "| `diff_alt_ratio` | a number from -10 to 10 | `1` | ADDifT, Multi-ADDifT |" in page
    )


def test_reference_page_is_up_to_date():
    full = pytest.importorskip("trainer.engine.catalogue", exc_type=ImportError)
    page = Path(__file__).resolve().parents[2] / "docs" / "reference" / "parameters.md"
    assert page.read_text(encoding="utf-8") == markdown(full.catalogue()), "run: python -m trainer docs"


def test_parameters_that_name_files_say_so():
    """Forms offer, and servers guard, what `holds` names; a path that does not say so would be read from anywhere."""
    full = pytest.importorskip("trainer.engine.catalogue", exc_type=ImportError)
    endings = ("_path", "_file", "directory", "folder", "image")
    guarded = {"folder", "picture", "lora", "model", "vae", "te", "file"}
    for parameter in full.catalogue().parameters:
        if parameter.kind == "text" and parameter.attribute.endswith(endings):
            assert parameter.spec.holds in guarded, f'{parameter.key} names a file: declare it with holds="file"'
