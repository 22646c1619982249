"""Commands that make the files of experimental adapters: `basis` and `curvature`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import AtelierError
from ..places import Places
from ..writing import why


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


def add_curvature(
    commands: Any, add_places: Callable[[argparse.ArgumentParser], None], places: Callable[[argparse.Namespace], Places]
) -> None:
    """The command `curvature`; the flags of folders and what becomes of them are those of the other commands."""
    found = commands.add_parser("curvature", help="measure what ordinary images depend on, for lalora_context_path")
    found.add_argument("--model", required=True, help="base model: a file, a name in the model folder, or demo")
    found.add_argument("--out", type=Path, required=True, help="file to write, ending in .safetensors")
    found.add_argument(
        "--pictures", default="", metavar="FOLDER", help="images to preserve; without them the model generates its own"
    )
    found.add_argument("--prompts", type=Path, metavar="FILE", help="prompts of these images, one per line")
    found.add_argument("--states", type=int, default=64, help="states that are measured (64)")
    found.add_argument("--labels", choices=("model", "data"), default="model", help="data: the images' own noise")
    found.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the training")
    found.add_argument("--json", action="store_true", help="the report as one JSON object")
    add_places(found)
    found.set_defaults(run=partial(_curvature, places))


def _curvature(places: Callable[[argparse.Namespace], Places], options: argparse.Namespace) -> int:
    from ..engine.catalogue import catalogue
    from ..params.cli import apply_overrides
    from ..tools.curvature import curvature_job, make_curvature

    prompts = _text(options.prompts) if options.prompts else ""
    settings = apply_overrides({"model": options.model}, options.set, catalogue())
    job = curvature_job(settings, options.pictures, prompts)
    tell = (lambda line: None) if options.json else print
    report = make_curvature(job, places(options), options.out, options.states, options.labels == "data", tell)
    if options.json:
        print(json.dumps({**asdict(report), "path": str(report.path)}))
        return 0
    print(f"{report.path}: {report.layers} layers, {report.states} states, {report.seconds:.0f} s")
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = why(error) if isinstance(error, OSError) else "it is not UTF-8"
        raise AtelierError(
            f"--prompts = {path.name!r}: cannot be read ({reason}). Give a text file in UTF-8."
        ) from error
