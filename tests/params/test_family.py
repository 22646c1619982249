"""The names of adapter types and their settings, as users of other trainers know them: in files, flags and the form.

Written out by hand, so that no rename passes unseen.
"""

from __future__ import annotations

import pytest

from trainer.engine.catalogue import catalogue
from trainer.params.cli import apply_overrides
from trainer.params.codec import load
from trainer.params.widgets import widgets

TYPES = (
    "lierla", "c3lier", "loha", "lokr", "ia3", "dylora", "glora", "oft", "boft", "full", "norm", "eh", "null",
    "universal", "experts",
)  # fmt: skip
OPTIONS = {  # name: (type it belongs to, default, another value)
    "use_dora": ("loha", False, True),
    "network_rslora": ("lierla", False, True),
    "network_tucker": ("c3lier", False, True),
    "network_freeze_down": ("lierla", False, True),
    "network_timestep_rank": ("lierla", 0, 4),
    "network_factor": ("lokr", -1, 8),
    "network_decompose_both": ("lokr", False, True),
    "network_full_matrix": ("lokr", False, True),
    "network_unit": ("dylora", 4, 8),
    "network_dropout": ("lierla", 0.0, 0.1),
    "network_rank_dropout": ("lokr", 0.0, 0.1),
    "network_module_dropout": ("ia3", 0.0, 0.1),
    "network_max_norm": ("lierla", 0.0, 1.0),
    "loraplus_lr_ratio": ("lierla", 1.0, 16.0),
    "loraplus_te_lr_ratio": ("lierla", None, 4.0),
    "network_init": ("lierla", "default", "lora_ga"),
    "network_block_ranks": ("lierla", "", "IN00=4;M00=8"),
    "network_block_alphas": ("lierla", "", "IN00=4;M00=8"),
    "network_block_lrs": ("full", "", "IN00=4;M00=8"),
    "network_name_filter": ("boft", "", "*attn2*"),
    "network_null_space": ("null", "weights", "activations"),
    "basis_path": ("universal", "", "bases.safetensors"),
    "svd_cache_path": ("null", "", "cache.safetensors"),
    "lalora_context_path": ("lierla", "", "context.safetensors"),
    "lalora_lambda": ("glora", 0.0, 2.0),
    "num_experts": ("experts", 4, 6),
    "enable_effilora": ("lierla", False, True),
    "abm_enabled": ("lierla", False, True),
    "abm_steps": ("lierla", 500, 20),
    "abm_lr": ("lierla", 1e-4, 1e-3),
    "abm_margin": ("lierla", 0.5, 1.0),
    "abm_weight_strategy": ("lierla", "uniform", "quadratic"),
    "abm_batch_size": ("lierla", None, 3),
    "export_format": ("oft", "auto", "native"),
    "export_rank": ("oft", 0, 8),
    "export_max_error": ("oft", 0.05, 0.1),
}
TABLE = catalogue()
START = {"format": 1, "mode": "LoRA", "lora_data_directory": "pictures"}


def test_the_types_and_their_other_spellings() -> None:
    assert set(TABLE.choices["network_type"]) == set(TYPES)
    for given, wanted in (("lora", "lierla"), ("locon", "c3lier"), ("LoHa", "loha")):
        assert load({**START, "network_type": given}, TABLE).job.value("network_type") == wanted
    told = TABLE.notes["network_type"]
    assert set(told) == set(TYPES) and all(0 < len(line) <= 120 and "\n" not in line for line in told.values())


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_has_its_name_in_files_flags_and_form(name: str) -> None:
    kind, default, other = OPTIONS[name]
    base = {**START, "network_type": kind}
    assert load(base, TABLE).job.value(name) == default
    assert load({**base, name: other}, TABLE, complete=False).job.value(name) == other
    typed = apply_overrides(base, [f"{name}={other}"], TABLE)
    assert load(typed, TABLE, complete=False).job.value(name) == other
    (shown,) = (widget for widget in widgets(TABLE, "LoRA") if widget.key == name)
    assert shown.help and shown.label == name.replace("_", " ")
    assert TABLE.by_name[name].shown_in(TABLE.tags(TABLE.modes["LoRA"], kind))


@pytest.mark.parametrize(("given", "told"), [
    ({"export_format": "native", "export_rank": 8}, True),
    ({"export_format": "native", "export_max_error": 0.5}, True),
    ({"network_type": "loha", "export_rank": 8}, True),
    ({"network_type": "loha", "export_rank": 8, "export_format": "lora"}, False),
    ({"network_type": "loha", "export_rank": 8, "use_dora": True}, False),
    ({"network_type": "oft", "export_rank": 8}, False),
    ({"network_type": "lierla", "export_rank": 8}, False),
])  # fmt: skip
def test_settings_of_a_lora_that_is_not_written_are_told(given: dict[str, object], told: bool) -> None:
    lines = [line for line in load({**START, **given}, TABLE).warnings if line.startswith("export_")]
    assert len(lines) == told and all("has no effect" in line for line in lines)
