"""Test settings shared by all files."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# The same examples in every run, and no time limit per example: a busy machine is not a wrong answer.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

# Files that test what no package version changes: once is enough for all sets of versions.
EVERYWHERE = {
    "test_adapters_contract", "test_adapters_experts", "test_adapters_export", "test_adapters_fast",
    "test_adapters_lowrank", "test_adapters_null", "test_adapters_options", "test_adapters_presets",
    "test_adapters_types", "test_adapters_universal", "test_architecture", "test_data_buckets", "test_data_cache",
    "test_data_dataset", "test_data_plan", "test_data_scan", "test_demo_effect", "test_demo_evaluate",
    "test_demo_measure", "test_demo_modes", "test_demo_world", "test_engine_flags", "test_engine_losses",
    "test_engine_again", "test_engine_faults", "test_engine_resume", "test_engine_scaler", "test_engine_trackers",
    "test_gpu_memory", "test_gpu_numbers", "test_gpu_runs",
    "test_jobs_live", "test_jobs_many", "test_jobs_queue", "test_jobs_store", "test_launch", "test_maths",
    "test_modes_addift",
    "test_modes_concept", "test_modes_difference", "test_modes_table", "test_modes_traintrain", "test_no_float64",
    "test_optim", "test_params_family", "test_params_fuzz", "test_params_load", "test_params_presets",
    "test_params_rules",
    "test_params_traintrain",
    "test_params_views", "test_readme", "test_recipes", "test_schedulers", "test_stages_abm", "test_stages_lalora",
    "test_stages_prior", "test_tools_bench", "test_tools_pairs", "test_types", "test_writing",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of these files, so that a second set of versions can leave them out; skip those for a card where
    there is none.
    """
    without = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(without)
        if item.path.stem in EVERYWHERE:
            item.add_marker("everywhere")


@pytest.fixture
def no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predicting the memory of a step would take most of the time of a short run; other tests do it."""
    monkeypatch.setattr("trainer.engine.preflight.phase_bytes", lambda *_: {})
