"""The measurement of a training step: every contender takes part, and the UNet is left as it was."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from trainer.adapters.base import ADAPTERS
from trainer.cli.main import main
from trainer.errors import AtelierError
from trainer.tools.bench import EVERY_TYPE, SIZES, bench, bench_types

pytestmark = pytest.mark.newest


def tiny_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    made: nn.Module = UNet2DConditionModel(
        block_out_channels=(8, 16),
        cross_attention_dim=16,
        norm_num_groups=4,
        attention_head_dim=2,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return made


def test_a_measurement_of_a_tiny_unet_is_complete_and_leaves_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    unet = tiny_unet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    report = json.loads(json.dumps(bench(unet, steps=1, batch=2, rank=2)))
    names = {"bare", "ours", "peft", "lycoris"}
    assert set(report["seconds"]) >= {"bare", "ours"} and set(report["seconds"]) <= names
    assert set(report["ours_to"]) == set(report["seconds"]) - {"ours"}
    assert all(math.isfinite(value) and value > 0 for value in report["ours_to"].values())
    after = unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert all("forward" not in module.__dict__ for module in unet.modules())


def test_types_are_measured_against_plain_lora() -> None:
    unet = tiny_unet()
    types = ["lokr+network_factor=2+use_dora", "lierla+blocks=OUT*", "null", "universal"]
    report = json.loads(json.dumps(bench_types(unet, types, steps=2, rank=2)))["types"]
    assert set(report) == {"lierla", "c3lier", *types}
    assert 0 < report["lierla+blocks=OUT*"]["modules"] < report["lierla"]["modules"]
    assert report["lierla"]["to_lierla"] == report["c3lier"]["to_c3lier"] == 1
    assert all(fact["seconds"] > 0 and fact["trained"] > 0 for fact in report.values())
    assert report["lokr+network_factor=2+use_dora"]["modules"] == report["c3lier"]["modules"]
    assert all("forward" not in module.__dict__ for module in unet.modules())
    with pytest.raises(AtelierError, match="lierla has no option network_factor"):
        bench_types(unet, ["lierla+network_factor=2"])


def test_all_types_are_all_of_the_registry() -> None:
    named = {name.split("+")[0] for name in EVERY_TYPE}
    assert named == set(ADAPTERS.names())


def test_the_sizes_have_the_layout_of_sd1() -> None:
    from diffusers import UNet2DConditionModel

    for size, millions in (("small", 5.5), ("sd15", 860)):
        with torch.device("meta"):
            unet = UNet2DConditionModel(**SIZES[size][0])
        assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_an_unknown_size_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--size", "small", "huge"])
    assert "sd15" in capsys.readouterr().err
