"""What is free again after a run goes back to the system, also where the C library would keep it."""

from __future__ import annotations

import platform
import subprocess
import sys

import children
import pytest

FREED = """
import torch
from trainer.models.room import give_back

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

give_back()
torch.ones(7 * 2**20)  # glibc maps the first of a size, and has those after it in its heap
before, large, small = resident(), [], []
for _ in range(20):
    large.append(torch.ones(5 * 2**20))
    small.append(torch.ones(1000))  # stays, between the large ones
held = resident() - before
del large
give_back()
print(held, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps freed memory")
def test_freed_main_memory_goes_back_to_the_system() -> None:
    command = [sys.executable, "-c", FREED]
    done = subprocess.run(command, env=children.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    held, left = map(float, done.stdout.split())
    assert held > 390 and left < 40, (held, left)
