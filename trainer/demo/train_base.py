"""Trains the tiny base model of the painted world: `python -m trainer.demo.train_base PART --work DIR`.

Every part continues from its checkpoint in DIR, so the command can be stopped and repeated at any time.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

from . import base_common as common
from . import base_text, base_unet, base_vae, reader, world

PARTS = ("vae", "text", "unet", "decoder", "score", "pictures", "all")


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % Wilson interval of a share `right` / `count`."""
    share, square = right / count, z * z / count
    centre, half = share + square / 2, z * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return (centre - half) / (1 + square), (centre + half) / (1 + square)


def write_index(folder: Path) -> None:
    """Write model_index.json and the scheduler's configuration of the diffusers folder."""
    common.write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.31.0",
            "requires_safety_checker": False,
            "feature_extractor": [None, None],
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    common.write_json(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "DDIMScheduler",
            "_diffusers_version": "0.31.0",
            "timestep_spacing": "trailing",
            **base_unet.SCHEDULE,
        },
    )


def ship_parts(work: Path, ship: Path | None, parts: tuple[str, ...]) -> None:
    """Copy finished parts of `work`/base into the folder `ship`, when one is given."""
    if ship is not None:
        write_index(ship)
        for part in parts:
            common.copy_part(work / "base" / part, ship / part)


def print_scores(name: str, scores: dict[str, float], count: int) -> None:
    """One line per attribute: share and 95 % interval."""
    for attribute, share in scores.items():
        low, high = wilson(round(share * count), count)
        print(f"{name:24} {attribute:10} {100 * share:6.2f} %  [{100 * low:.2f}, {100 * high:.2f}]  n={count}")


def score(folder: Path, settings: dict, count: int = 300, seed: int = 50_000) -> None:
    """Print the reader's scores on clean pictures, round trips and samples of the model in `folder`."""
    rng = np.random.default_rng(seed)
    scenes = world.draw_scenes(2000, rng, kind="all")
    print_scores("clean", reader.score(scenes, reader.read(world.render(scenes, rng))), 2000)
    print_scores("round trip", base_vae.round_trip_score(base_vae.load(folder), 2000, seed + 1), 2000)
    unet, captions, began = base_unet.load(folder), base_unet.Captions(folder), time.monotonic()
    scenes = world.draw_scenes(count, np.random.default_rng(seed + 2), kind="open")
    states = captions([world.caption(scene) for scene in scenes])
    latents = base_unet.sample(unet, states, captions([""]), seed, **settings)
    seconds = time.monotonic() - began
    readings = reader.read(base_vae.decode(base_vae.load(folder), latents))
    print_scores("samples", reader.score(scenes, readings), count)
    for name, seen in (("of trained combinations", True), ("of new combinations", False)):
        pairs = [(s, r) for s, r in zip(scenes, readings, strict=True) if world.in_base(s) == seen]
        print_scores(name, reader.score([s for s, _ in pairs], [r for _, r in pairs]), len(pairs))
    print(f"prompt gap {base_unet.prompt_gap(unet, captions):.4f}; sampling {count} took {seconds:.1f} s")


def new_shape_scenes(count: int = 12) -> list[world.Scene]:
    """Scenes of the held-out shape over all colours, backgrounds, sizes and sides."""
    grounds, sizes, sides = list(world.BACKGROUNDS), list(world.SIZES), list(world.SIDES)
    colours = list(world.COLOURS)
    return [
        world.Scene(
            world.HELD_OUT_SHAPE,
            colours[n % 6],
            grounds[(n + n // 6) % 3],
            sizes[n % 2 if n < 6 else (n + 1) % 2],
            sides[n // 2 % 2],
        )
        for n in range(count)
    ]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m trainer.demo.train_base", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints, outside the repository")
    parser.add_argument("--ship", type=Path, help="diffusers folder that finished parts are copied to")
    parser.add_argument("--steps", type=int, help="training steps of the part, in place of its budget")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--model", type=Path, default=common.SHIPPED, help="score: the folder to measure")
    parser.add_argument("--sampler", choices=("ddim", "dpm++ 2m"), default="dpm++ 2m", help="score: the sampler")
    parser.add_argument("--sampler-steps", type=int, default=12, help="score: sampler steps")
    parser.add_argument("--guidance", type=float, default=2.0, help="score: classifier-free guidance")
    return parser.parse_args()


def main() -> None:
    """Run one part, or all in order."""
    options = arguments()
    torch.set_num_threads(options.threads)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torchrun --nproc-per-node 2 -m trainer.demo.train_base unet ...
        torch.distributed.init_process_group("gloo")
    work, ship = options.work, options.ship
    trainings = {
        "vae": (base_vae.train, base_vae.BUDGET, ("vae",)),
        "text": (base_text.train, base_text.BUDGET, ("text_encoder", "tokenizer")),
        "unet": (base_unet.train, base_unet.BUDGET, ("unet",)),
        "decoder": (base_vae.train_decoder, base_vae.DECODER_BUDGET, ("vae",)),
    }
    for part, (train, budget, folders) in trainings.items():
        if options.part not in (part, "all"):
            continue
        if options.steps is not None:
            budget = dataclasses.replace(budget, steps=options.steps)
        train(work, budget, **({"ship": ship} if part == "unet" else {}))
        if common.rank() == 0:
            ship_parts(work, ship, folders)
    if options.part == "pictures":
        world.write_folder(Path(__file__).parent / "pictures", new_shape_scenes(), seed=7)
    if options.part in ("score", "all"):
        settings = {"kind": options.sampler, "steps": options.sampler_steps, "guidance": options.guidance}
        score(work / "base" if options.part == "all" else options.model, settings)


if __name__ == "__main__":
    main()
