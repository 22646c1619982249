"""Commands that make the files of experimental adapters: `basis` and `curvature`."""
from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any


def add_basis(commands: Any) -> None:
    """The command `basis`."""
    basis = commands.add_parser("basis", help="make the bases of network_type universal from a folder of LoRAs")
    basis.add_argument("folder", type=Path, help="folder of LoRAs for one kind of base model; sub-folders count")
    basis.add_argument("--out", type=Path, required=True, help="file to write, ending in .safetensors")
    basis.add_argument("--rank", type=int, default=16, help="directions per layer (16)")
    basis.add_argument("--json", action="store_true", help="the report as one JSON object")
    basis.set_defaults(run=_basis)


def _basis(options: argparse.Namespace) -> int:
    from ..tools.basis import make_basis

    tell = (lambda line: None) if options.json else print
    report = make_basis(options.folder, options.out, options.rank, tell)
    if options.json:
        print(json.dumps({**asdict(report), "path": str(report.path)}))
        return 0
    print(
        f"{report.path}: {report.layers} layers, {report.rank} directions each, from {report.loras} LoRAs. They hold"
        f" {report.explained:.0%} of what the LoRAs changed; random directions would hold {report.chance:.1%}."
    )
    return 0
