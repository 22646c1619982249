"""Test settings shared by all files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples in every run, and no time limit per example: a busy machine is not a wrong answer.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

# Folder: its files that test what no package version changes; once is enough for all sets of versions.
ALL = None
EVERYWHERE: dict[str, set[str] | None] = {
    "": {"test_architecture", "test_launch", "test_writing"},
    "adapters": {
        "test_contract",
        "test_experts",
        "test_export",
        "test_fast",
        "test_null",
        "test_options",
        "test_presets",
        "test_types",
        "test_universal",
    },
    "data": {"test_buckets", "test_cache", "test_dataset", "test_plan", "test_scan"},
    "demo": ALL,
    "docs": ALL,
    "engine": {
        "test_again",
        "test_faults",
        "test_flags",
        "test_losses",
        "test_no_float64",
        "test_resume",
        "test_scaler",
        "test_trackers",
    },
    "golden": ALL,
    "gpu": ALL,
    "jobs": ALL,
    "maths": {"test_loss", "test_lowrank", "test_projection", "test_rng"},
    "modes": {"test_addift", "test_concept", "test_difference", "test_table", "test_traintrain"},
    "optim": ALL,
    "params": {"test_family", "test_fuzz", "test_load", "test_presets", "test_rules", "test_traintrain", "test_views"},
    "stages": ALL,
    "tools": {"test_bench", "test_pairs"},
}  # fmt: skip
TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of these files, so that a second set of versions can leave them out; skip those for a card where
    there is none.
    """
    # What takes longest begins first, so that no core is idle at the end.
    items.sort(key=lambda item: not item.get_closest_marker("fake_cuda"))
    without = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(without)
        folder = item.path.parent.relative_to(TESTS).as_posix()
        files = EVERYWHERE.get("" if folder == "." else folder, set())
        if files is ALL or item.path.stem in files:
            item.add_marker("everywhere")


@pytest.fixture
def no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predicting the memory of a step would take most of the time of a short run; other tests do it."""
    monkeypatch.setattr("trainer.engine.preflight.phase_bytes", lambda *_: {})
