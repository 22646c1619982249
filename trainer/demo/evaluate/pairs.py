"""Modes that learn from pairs of pictures, on the painted world: what turns black, what grows, and what stays."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ...adapters.file import read_lora
from ...maths import rng
from ...places import ROOT
from .. import world
from ..effect import comparison, grid
from ..measure import Rate, pair_effect, share
from .before import DRAWN, Before, around, drawn, kept, pool, step_of
from .scenario import SECOND, Figures, Goal, Scenario, Trained

GOAL, KEPT = 0.9, 0.95
ASKED, CHECKED = 50, 16  # pictures of a result (other ones for each seed), and of a file saved on the way
CHECKS = 3  # files on the way
SUFFIX = "_after"
BOTH = "", SUFFIX  # ends of the names of a pair
PAIRS = (
    ("circle", "red", "small", "left"), ("square", "green", "large", "right"), ("triangle", "blue", "small", "right"),
    ("ring", "yellow", "large", "left"), ("cross", "purple", "large", "right"), ("circle", "cyan", "large", "left"),
    ("square", "yellow", "small", "left"), ("triangle", "red", "large", "right"),
    ("circle", "cyan", "small", "left"),
)  # fmt: skip
"""Shape, colour, size and side of the pictures that pairs are made of."""
MANY = 8  # of them are what many pairs are


@dataclass(frozen=True)
class Task:
    """An attribute of the pictures that goes from one value to another, and the words that never mention it; its pairs
    are PAIRS from the `first` on. At the timesteps `times` the change of the implied picture is compared with theirs.
    """

    name: str
    attribute: str
    old: str
    new: str
    first: int = 0
    times: tuple[int, ...] = (600, 800, 950)

    @property
    def words(self) -> tuple[str, ...]:
        """The attributes that prompts name: all others but the background's."""
        return tuple(name for name in world.ATTRIBUTES if name not in (self.attribute, "background"))

    @property
    def keeps(self) -> tuple[str, ...]:
        """The attributes that should stay: colour and shape, or what takes the place of the one that changes."""
        return tuple(name for name in ("colour", "shape", "size") if name != self.attribute)[:2]

    def prompt(self, scene: world.Scene) -> str:
        """What stands beside a picture, and what the model is asked."""
        return world.caption(scene, self.words)

    def named(self, scene: world.Scene) -> str:
        """The prompt that asks the untouched model for the new value in words."""
        new = dataclasses.replace(scene, **{self.attribute: self.new})
        return world.caption(new, (*self.words, self.attribute))

    def scenes(self, count: int) -> list[tuple[world.Scene, world.Scene]]:
        """Both scenes of `count` pairs."""
        found = []
        for shape, colour, size, side in PAIRS[self.first : self.first + count]:
            own = world.Scene(shape, colour, "white", size, side)
            found.append(tuple(dataclasses.replace(own, **{self.attribute: value}) for value in (self.old, self.new)))
        return found  # type: ignore[return-value]

    def write(self, folder: Path, count: int, ends: tuple[str, ...]) -> None:
        """`0.png` and `0_after.png` … below `folder`, alike in everything but the attribute, each with its prompt."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, scenes in enumerate(self.scenes(count)):
            for end, scene in zip(BOTH, scenes, strict=True):
                if end not in ends:
                    continue
                picture = world.render([scene], np.random.default_rng(number))[0]
                Image.fromarray(picture).save(folder / f"{number}{end}.png")
                (folder / f"{number}{end}.txt").write_text(self.prompt(scene), encoding="utf-8")


BACKGROUND = Task("white becomes black", "background", "white", "black")
DARK = dataclasses.replace(BACKGROUND, first=MANY)
WHITE = Task("black becomes white", "background", "black", "white", first=MANY)
DARK_LARGE, WHITE_LARGE = (dataclasses.replace(task, first=5) for task in (BACKGROUND, WHITE))
SIZE = Task("small becomes large", "size", "small", "large")
SIDE = Task("left becomes right", "side", "left", "right")
COLOUR = Task("blue becomes cyan", "colour", "blue", "cyan", first=2, times=(250, 300, 350))


@dataclass(frozen=True)
class Measured:
    """Reads the results of one task."""

    task: Task
    before: Before

    def __call__(self, trained: Trained) -> Figures:
        """How many pictures show the new value, the old one at strength −1, and what else they still show at both;
        beside it, what the untouched model still shows when words ask it for the new value.
        """
        task = self.task
        scenes = pool(lambda scene: True, ASKED, seed=50 + trained.seed)
        prompts = [task.prompt(scene) for scene in scenes]
        then, named = (self.before.readings(trained, each) for each in (prompts, [task.named(one) for one in scenes]))
        now, back = drawn(trained, prompts, 1.0), drawn(trained, prompts, -1.0)
        changed = self._share(now, task.new)
        reached = self._reached(trained, prompts[:CHECKED], changed.value)
        cosine, outside = self._direction(trained)
        return {
            task.new: changed,
            f"base {task.new}": self._share(then, task.new),
            f"{task.old} at −1": self._share(back, task.old),
            f"base {task.old}": self._share(then, task.old),
            **{f"{name} kept": kept(name, then, now, scenes) for name in task.keeps},
            **{f"base keeps {name}": kept(name, then, named, scenes) for name in task.keeps},
            **{f"{name} kept at −1": kept(name, then, back, scenes) for name in task.keeps},
            "cosine": cosine,
            "outside": outside,
            f"steps to {GOAL:.0%}": float(reached),
            f"seconds to {GOAL:.0%}": trained.seconds * reached / max(trained.steps, 1),
        }

    def _share(self, readings: Sequence[object], value: str) -> Rate:
        return share(getattr(reading, self.task.attribute) == value for reading in readings)

    def _reached(self, trained: Trained, prompts: Sequence[str], final: float) -> float:
        """The first file of the run with enough success on a few prompts; infinite when there is none."""
        own = {name: value.clone() for name, value in trained.network.state_dict().items()}
        try:
            for path in sorted(trained.path.parent.glob(f"{trained.path.stem}_*steps.safetensors"), key=step_of):
                trained.network.load(read_lora(path)[0])
                if self._share(drawn(trained, prompts, 1.0), self.task.new).value >= GOAL:
                    return step_of(path)
        finally:
            trained.network.load_state_dict(own)
        return trained.steps if final >= GOAL else math.inf

    @torch.no_grad()
    def _direction(self, trained: Trained) -> tuple[float, float]:
        """How the adapter moves the picture implied by a noisy one of a pair it never saw, against z_t − z_o.

        (cosine where the two differ, share of the change elsewhere), mean over scenes and timesteps.
        """
        model, found = trained.model, []
        for number, old in enumerate(pool(lambda scene: getattr(scene, self.task.attribute) == self.task.old, 4, 52)):
            scenes = [old, dataclasses.replace(old, **{self.task.attribute: self.task.new})]
            pixels = torch.cat([_pixels(scene, 900 + number) for scene in scenes])
            first, second = model.encode_images(pixels)[0].unsqueeze(1)
            mask = _different(pixels, first.shape[-1])
            rows = model.encode_prompts([self.task.prompt(old)])
            noise = rng.normal(first.shape[1:], "direction", number, 0, range(1))
            for time in self.task.times:
                t = torch.tensor([float(time)])
                x = model.process.add_noise(first, noise, t)
                with trained.network.at_strength(0.0):
                    plain = model.process.x0(model.predict(x, t, rows), x, t)
                change = model.process.x0(model.predict(x, t, rows), x, t) - plain
                found.append(pair_effect(change, second - first, mask))
        return tuple(sum(values) / len(found) for values in zip(*map(dataclasses.astuple, found), strict=True))  # type: ignore[return-value]

    def sheet(self, trained: Trained) -> Image.Image:
        """Six prompts at strength −1, without, and at strength 1."""
        prompts = [self.task.prompt(scene) for scene in pool(lambda scene: True, 6, seed=53)]
        settings = dataclasses.replace(DRAWN, steps=12, seed=41)
        pictures = comparison(trained.model, trained.network, prompts, (-1.0, 0.0, 1.0), settings)
        return grid(pictures, prompts, ("strength -1", "before", "strength 1"), scale=1)


def _pixels(scene: world.Scene, seed: int) -> torch.Tensor:
    picture = world.render([scene], np.random.default_rng(seed))
    return torch.from_numpy(picture).permute(0, 3, 1, 2).float() / 127.5 - 1


def _different(pixels_2CHW: torch.Tensor, edge: int) -> torch.Tensor:
    """Where two pictures differ, (1, 1, edge, edge) of 0 and 1."""
    summed = (pixels_2CHW[:1] - pixels_2CHW[1:]).abs().sum(1, keepdim=True) * 127.5
    return (F.adaptive_max_pool2d(summed, edge) > 10).float()


RATE, FEW, FIRST, LATER, HELD, PLAIN = 5e-4, 2e-4, 4e-3, 2e-3, 3e-3, 4e-3
"""Learning rates on the small model: ADDifT, in few steps, both passes of Difference, its second one held at low noise,
LoRA.
"""
SMALL: Mapping[str, object] = {"train_batch_size": 4, "train_learning_rate": RATE}
"""What ADDifT's settings here differ in from the shipped preset, which is made for full-size models."""


def preset(name: str, later: Mapping[str, object] | None = None, **changes: object) -> dict[str, object]:
    """A shipped preset on the small model, with files on the way; `later` changes its second pass."""
    shipped = json.loads((ROOT / "presets" / f"{name}.json").read_text(encoding="utf-8"))
    job: dict[str, object] = {**shipped, **PRECISE, **changes}
    last = job if later is None else {**shipped[SECOND], **PRECISE, **later}
    last["save_per_steps"] = max(1, int(str(last["train_iterations"])) // (CHECKS + 1))
    return job if later is None else {**job, SECOND: last}


PRECISE = {"train_model_precision": "fp32", "save_precision": "fp32"}


def one_pair(task: Task, folder: Path) -> dict[str, object]:
    """The pictures and prompt of a job of one pair."""
    prompt = task.prompt(task.scenes(1)[0][0])
    files = {"original image": str(folder / "0.png"), "target image": str(folder / f"0{SUFFIX}.png")}
    return {**files, "original prompt": prompt}


def addift(task: Task, folder: Path, name: str = "ADDifT_Background", **changes: object) -> dict[str, object]:
    """The job of ADDifT on one pair, from a shipped preset."""
    return {**preset(name, **{**SMALL, **changes}), **one_pair(task, folder)}


def folder_of(path: Path) -> dict[str, object]:
    """The settings of a job that learns from a folder of the world's pictures."""
    return {"lora_data_directory": str(path), "image_size(height, width)": world.EDGE, "image_buckets_step": world.EDGE,
            "image_min_length": world.EDGE}  # fmt: skip


def multi(folder: Path, **changes: object) -> dict[str, object]:
    """The job of Multi-ADDifT, of ADDifT's settings."""
    return {**preset("ADDifT_Background", **{**SMALL, **changes}), **folder_of(folder),
            "mode": "Multi-ADDifT", "diff_target_name": SUFFIX}  # fmt: skip


def difference(task: Task, folder: Path, name: str = "Difference_Residual", **later: object) -> dict[str, object]:
    """The job of Difference from a shipped preset; `later` changes the second pass, and the first one is never taken
    from a cache.
    """
    second = {"train_batch_size": 6, "train_gradient_accumulation": 1, "train_learning_rate": LATER, **later}
    first = {"train_learning_rate": FIRST, "train_iterations": 100, "data_cache": "memory"}
    return {**preset(name, second, **first), **one_pair(task, folder)}


def alike(task: Task, folder: Path) -> dict[str, object]:
    """The job of Difference whose passes share one set of settings."""
    first = {"train_learning_rate": FIRST, "train_iterations": 100, "data_cache": "memory"}
    return {**preset("Difference", **first), **one_pair(task, folder)}


def ordinary() -> dict[str, object]:
    """What prior preservation holds here: prompts of the world."""
    words = "\n".join(world.caption(scene) for scene in pool(lambda scene: True, 60, 7))
    return {"prior_prompts": words, "prior_states": 240, "prior_batch_size": 4}


def plain(folder: Path) -> dict[str, object]:
    """Plain LoRA on the targets alone, at the demonstration's settings."""
    return {**preset("demo", train_learning_rate=PLAIN, train_batch_size=4, train_iterations=100), **folder_of(folder)}


PICTURES: Mapping[str, tuple[Task, int, tuple[str, ...]]] = {
    "one": (BACKGROUND, 1, BOTH), "eight": (BACKGROUND, MANY, BOTH), "after": (BACKGROUND, MANY, (SUFFIX,)),
    "dim": (DARK, 1, BOTH), "pale": (WHITE, 1, BOTH), "wide": (WHITE_LARGE, 1, BOTH), "night": (DARK_LARGE, 1, BOTH),
    "grown": (SIZE, 1, BOTH), "moved": (SIDE, 1, BOTH), "dyed": (COLOUR, 1, BOTH),
}  # fmt: skip
"""Folders of what is learned from: pairs of a task, how many, and which of their two pictures."""


def prepare(folder: Path) -> None:
    """Draw the pictures that are learned from."""
    for name, (task, count, ends) in PICTURES.items():
        task.write(folder / name, count, ends)


def scenarios(folder: Path, before: Before) -> tuple[Scenario, ...]:
    """What is trained on the pictures below `folder`."""
    black, white, large, right, cyan = (Measured(task, before) for task in (BACKGROUND, WHITE, SIZE, SIDE, COLOUR))
    one, eight, after, dim, pale, wide, night, grown, moved, dyed = (folder / name for name in PICTURES)
    low_noise, lower = "Difference, held at low noise", "ADDifT, held at low noise"
    held = {"name": "Difference_Background", "train_learning_rate": HELD, **ordinary()}
    quicker = {"name": "ADDifT_Background_Held", **ordinary()}
    few = {"train_learning_rate": FEW}
    firm = {"train_learning_rate": 2 * FEW, **ordinary(), "prior_loss_weight": 1, "prior_max_timesteps": 500,
            "prior_both_directions": True}  # fmt: skip
    # The preset turns the pair round and strengthens the file, which is measured at the strength that was trained.
    swapped = {"original image": str(dyed / f"0{SUFFIX}.png"), "target image": str(dyed / "0.png"),
               "network_strength": 1}  # fmt: skip
    stronger = {"train_learning_rate": 2 * LATER, "train_iterations": 200}
    return (
        _scenario(black, "ADDifT, one pair", addift(BACKGROUND, one), around(RATE)),
        _scenario(black, "ADDifT by TrainTrain's rule", addift(BACKGROUND, one, train_traintrain_compatible=True),
                  (RATE,)),
        _scenario(black, "Multi-ADDifT, eight pairs", multi(eight), around(RATE)),
        _scenario(black, "Difference", difference(BACKGROUND, one), around(LATER), second=True),
        _scenario(black, "Difference, one set of settings", alike(BACKGROUND, one), around(FIRST)),
        _scenario(black, low_noise, difference(DARK, dim, **held), around(HELD), second=True),
        _scenario(white, low_noise, difference(WHITE, pale, **held), around(HELD), second=True,
                  shown="modes-pairs.png"),
        _scenario(black, lower, addift(DARK_LARGE, night, **quicker), around(RATE)),
        _scenario(white, lower, addift(WHITE_LARGE, wide, **quicker), around(RATE)),
        _scenario(black, "LoRA on eight targets", plain(after), around(PLAIN)),
        _scenario(cyan, "ADDifT, preset Style", {**addift(COLOUR, dyed, "ADDifT_Style_XL", **few), **swapped},
                  around(FEW)),
        _scenario(large, "ADDifT, preset Projected", addift(SIZE, grown, "ADDifT_Projected_SD1.5", **few), around(FEW)),
        _scenario(large, "ADDifT, preset Projected, held", addift(SIZE, grown, "ADDifT_Projected_SD1.5", **firm),
                  around(2 * FEW)),
        _scenario(large, "Difference", difference(SIZE, grown, train_iterations=150), (LATER,), second=True),
        _scenario(right, "Difference", difference(SIDE, moved, **stronger), second=True),
    )  # fmt: skip


def _scenario(
    measure: Measured, variant: str, job: dict[str, object], rates: tuple[float, ...] = (), *, second: bool = False,
    shown: str = "",
) -> Scenario:  # fmt: skip
    task = measure.task

    def value(figures: Mapping[str, float]) -> float:
        lost = sum(max(0.0, KEPT - figures[f"{name} kept"]) for name in task.keeps)
        return figures[task.new] + figures[f"{task.old} at −1"] - 4 * lost

    goals = (
        Goal(task.new, low=GOAL), Goal(f"{task.old} at −1", low=GOAL),
        *(Goal(f"{name} kept", low=KEPT) for name in task.keeps),
    )  # fmt: skip
    return Scenario(
        task=task.name, variant=variant, job=job, measure=measure, rates=rates, goals=goals, second=second,
        value=value, grid=measure.sheet, shown=shown,
    )  # fmt: skip
