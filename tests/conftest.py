"""Test settings shared by all files."""
from __future__ import annotations

from hypothesis import settings

# The same examples in every run, and no time limit per example: a busy machine is not a wrong answer.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")
