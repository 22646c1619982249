"""The standalone app as a user meets it: its own program, the real engine and the shipped demo, in a real browser."""
from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import engine_case
import pytest
from browser import Page, browser, server

pytest.importorskip("gradio")
pytest.importorskip("playwright")
import gradio
from PIL import Image
from safetensors import safe_open

if int(gradio.__version__.split(".")[0]) < 4:
    pytest.skip("standing alone needs gradio 4", allow_module_level=True)

STATE = "document.querySelector('#atelier_live_state').dataset.state"
STEP = "Number(document.querySelector('#atelier_live_step').textContent.split('/')[0])"
EMA = "document.querySelector('.atelier-line-ema').getAttribute('d')"
CURVES = "document.querySelectorAll('#atelier_plot_figure [id^=atelier_loss_] path').length"
SHORT = {"train_batch_size": 2, "train_state_every": 4}
"""What makes the demo's preset quick; the rest of it stays."""


class App:
    """`python -m trainer app` with folders of its own, which can be killed and started again."""

    def __init__(self, root: Path) -> None:
        self.root, self.port = root, engine_case.free_port()
        self.loras = root / "models" / "Lora"

    def running(self) -> object:
        words = ("app", "--port", str(self.port), "--models-dir", str(self.root / "models"))
        out = ("--lora-dir", str(self.loras), "--output-dir", str(self.root / "out"))
        return server("-m", "trainer", *words, *out, port=self.port, log=self.root / "log")


@pytest.fixture
def app(tmp_path: Path) -> App:
    return App(tmp_path)
