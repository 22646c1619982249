"""What must hold between parameters, and the names of files."""

from __future__ import annotations

import pytest
from params_table import catalogue

from trainer.errors import JobError
from trainer.params.codec import Catalogue, ModeInfo, load
from trainer.params.core import SECTIONS, Network, Task
from trainer.params.field import param
from trainer.params.files import name_problem
from trainer.params.rules import Rule
from trainer.params.table import parameters_of

TABLE = catalogue()
GOOD = {"lora_data_directory": "pictures"}


def refused(**given):
    with pytest.raises(JobError) as caught:
        load({**GOOD, **given}, TABLE)
    return {problem.field: problem.message for problem in caught.value.problems}


def warned(**given):
    return load({**GOOD, **given}, TABLE).warnings


def test_timesteps():
    assert (
        "above train_max_timesteps (200)"
        in refused(train_min_timesteps=500, train_max_timesteps=200)["train_min_timesteps"]
    )
    assert not warned(train_min_timesteps=200, train_max_timesteps=200)
    assert refused(train_min_timesteps=1000)


def test_a_rule_waits_until_its_fields_are_right():
    assert set(refused(train_min_timesteps=500, train_max_timesteps="many")) == {"train_max_timesteps"}


def test_folder_modes_need_a_folder():
    for mode in ("LoRA", "Multi-ADDifT"):
        assert f"mode {mode} learns from a folder" in refused(mode=mode, lora_data_directory=" ")["lora_data_directory"]
    pictures = {"original image": "a.png", "target image": "b.png"}
    for mode in ("iLECO", "Difference", "ADDifT"):
        assert load({"mode": mode, **(pictures if mode != "iLECO" else {})}, TABLE)
    assert load({}, TABLE, complete=False)


def test_modes_that_compare_two_pictures_need_both():
    for mode in ("Difference", "ADDifT"):
        assert refused(mode=mode).keys() == {"original image", "target image"}
        assert "compares two images" in refused(mode=mode, original_image="a.png")["target image"]
        assert load({"mode": mode}, TABLE, complete=False)


def test_length():
    assert "train_epochs" in refused(train_iterations=0)["train_iterations"]
    assert not warned(train_iterations=0, train_epochs=3)
    assert "train_epochs" not in refused(mode="iLECO", train_iterations=0, train_epochs=3)["train_iterations"]


def test_targets_and_blocks():
    key = "network_blocks(BASE = TextEncoder)"
    assert "BASE" in refused(network_targets="text_encoder", network_blocks="M00")[key]
    assert "UNet" in refused(network_targets="unet", network_blocks=["BASE"])[key]
    assert not warned(network_targets="text_encoder", network_blocks="BASE")
    assert not warned(network_targets="both", network_blocks="M00")


def test_a_mode_that_leaves_the_text_encoder_alone_is_not_left_without_layers():
    key, words = "network_train_text_encoder", {"mode": "iLECO"}
    assert "network_targets is text_encoder" in refused(**words, network_targets="text_encoder")[key]
    assert "only BASE" in refused(**words, **{"network_blocks(BASE = TextEncoder)": "BASE"})[key]
    assert load({**words, "network_targets": "text_encoder", key: True}, TABLE)
    assert load({**words, "network_targets": "both"}, TABLE)


def test_rates():
    assert "is 0" in refused(train_learning_rate=0)["train_learning_rate"]
    assert "out of range" in refused(train_learning_rate=-1e-4)["train_learning_rate"]
    assert load({**GOOD, "train_textencoder_learning_rate": 0}, TABLE)
    for name in ("prodigy", "DAdaptAdam", "DAdaptAdan"):
        assert "expects 1" in warned(train_optimizer=name)[0]
        assert not warned(train_optimizer=name, train_learning_rate=1)
    assert not warned(train_optimizer="lion")


def test_strength_alpha_warmup_samples():
    assert "do nothing" in refused(network_strength=0)["network_strength"]
    assert "4.125 times" in warned(network_rank=8, network_alpha=33)[0]
    assert not warned(network_rank=8, network_alpha=32)
    assert "never reached" in warned(train_iterations=100, train_lr_warmup_steps=100)[0]
    (told,) = warned(train_iterations=100, train_lr_warmup_steps=100, train_epochs=2)
    assert "never reached" not in told and told.startswith("train_iterations = 100: has no effect")
    assert "sample_every is 50" in refused(sample_every=50)["sample_prompts"]
    assert not warned(sample_every=50, sample_prompts="a cat")


@pytest.mark.parametrize(
    "name", ["cat", "猫", "v1.5 cat", "a" * 180, "con1", "my.con", "-x", "untitled_100steps", ".hidden"]
)
def test_good_names(name):
    assert not name_problem(name) and load({**GOOD, "save_lora_name": name}, TABLE)


@pytest.mark.parametrize("name", [
    "a/b", "a\\b", "..", ".", "../a", "/tmp/a", "C:", "C:\\a", "a:b", "a*", "a?", 'a"', "<a>", "a|b", "con", "CON.txt",
    "nul", "Com1", "lpt9.x", "a.", "a ", " a", "a\nb", " ", "a" * 181, "猫" * 61, "con .x",
])  # fmt: skip
def test_bad_names(name):
    assert name_problem(name)
    assert refused(save_lora_name=name)["save_lora_name"]


def test_the_ending_is_not_part_of_the_name():
    assert "write 'cat'" in refused(save_lora_name="cat.safetensors")["save_lora_name"]


def test_catalogues_bring_their_own_rules_and_sections_may_be_missing():
    few = Catalogue(
        (Task, Network),
        rules=(Rule(("network_rank",), lambda job, mode: "odd" if job[Network].network_rank % 2 else ""),),
    )
    with pytest.raises(JobError, match="network_rank = 3: odd"):
        load({"network_rank": 3}, few)
    assert load({"network_rank": 4, "network_type": "anything"}, few).job[Network].network_type == "anything"


def test_declarations_are_checked():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Twice:
        network_rank: int = param(1, "x", "option")

    @dataclass(frozen=True)
    class Odd:
        strange: bytes = param(b"", "x", "option")

    @dataclass(frozen=True)
    class Bare:
        bare: int = 1

    @dataclass(frozen=True)
    class Wrong:
        rate: float = param(1, "x", "option")

    @dataclass(frozen=True)
    class Maybe:
        rate: float | None = param(1.0, "x", "option")

    with pytest.raises(ValueError, match="declared twice"):
        Catalogue((*SECTIONS, Twice))
    for section in (Odd, Bare, Wrong, Maybe):
        section.__annotations__ = {k: eval(v) if isinstance(v, str) else v for k, v in section.__annotations__.items()}
        with pytest.raises(ValueError):
            parameters_of(section)
    with pytest.raises(ValueError, match="foldr"):
        Catalogue(SECTIONS, {"LoRA": ModeInfo("LoRA", "", frozenset({"foldr"}))})


def test_optional_parameters():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Optional:
        batch: int | None = param(None, "x", "option", low=1)

    Optional.__annotations__ = {"batch": int | None}
    table = Catalogue((Optional,))
    assert load({}, table).job[Optional].batch is None and load({"batch": ""}, table).job[Optional].batch is None
    job = load({"batch": "3"}, table).job
    assert job[Optional].batch == 3 and load(job.to_dict(), table).job == job
    with pytest.raises(JobError, match="at least 1"):
        load({"batch": 0}, table)
