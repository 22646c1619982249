"""Where a step may read the device: each reading makes the program wait until the device has come so far.

A reading in a step that is not listed here fails, and so does an entry that a run no longer needs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """A place in the code that reads in every row whose name this pattern finds, and why it may."""

    place: str
    rows: str
    reason: str


_DADAPT = "pytorch_optimizer/optimizer/dadapt.py"
_OWN_SIZE = "The library takes its step size as a number in Python, once a step."

READINGS = (
    Reading(
        "maths/scaling.py:LossScaler.step",
        r"^optimizer (?!AdamW:|Adam:).*fp16",
        "These optimizers cannot leave a step out on the device, so the program asks whether the gradients overflowed.",
    ),
    Reading("pytorch_optimizer/optimizer/prodigy.py:Prodigy.step", "^optimizer Prodigy:", _OWN_SIZE),
    Reading(f"{_DADAPT}:DAdaptAdam.step", "^optimizer DadaptAdam:", _OWN_SIZE),
    Reading(f"{_DADAPT}:DAdaptLion.step", "^optimizer DadaptLion:", _OWN_SIZE),
    Reading(f"{_DADAPT}:DAdaptAdaGrad.step", "^optimizer DAdaptAdaGrad:", _OWN_SIZE),
    Reading(f"{_DADAPT}:DAdaptAdan.step", "^optimizer DAdaptAdan:", _OWN_SIZE),
    Reading(f"{_DADAPT}:DAdaptSGD.step", "^optimizer DAdaptSGD:", _OWN_SIZE),
)


def allowed(row: str) -> set[str]:
    """The places that read in a step of this row."""
    return {one.place for one in READINGS if re.search(one.rows, row)}
