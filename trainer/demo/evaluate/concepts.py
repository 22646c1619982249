"""Modes that learn from words, on the painted world: red becomes blue, and red is taken away."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from PIL import Image

from ...adapters.file import read_lora
from ...maths import rng
from ...places import ROOT
from .. import world
from ..effect import comparison, grid
from ..measure import Probe, State, first_reached, memorisation, share
from .before import DRAWN, Before, around, drawn, kept, pool, step_of
from .scenario import Figures, Goal, Scenario, Trained

FROM, TO = "red", "blue"
OTHERS = tuple(colour for colour in world.COLOURS if colour != FROM)
ASKED, UNRELATED = 40, 70  # pictures for each seed, other ones for each
SIZE = (world.EDGE, world.EDGE)
TIMES = (500, 666, 833, 999)
CHECKS = 3  # files on the way whose predictions are measured too
SEEN = f"a small {FROM} cross on the right, grey background"
"""A sentence with the concept that no job is given."""

HELD = "\n".join((*OTHERS, *(f"a {colour} shape" for colour in OTHERS), "shape", *world.SHAPES,
                  *(f"{ground} background" for ground in world.BACKGROUNDS)))  # fmt: skip
"""What the world's own words are to keep: the instant map's preserve list, and with whole sentences iLECO's anchors."""

LINES = (FROM, f"a {FROM} shape", f"a small {FROM} circle on the left, white background",
         f"black background, a large {FROM} square on the right", f"{FROM} triangle, small, left, grey background",
         f"a large {FROM} ring on the left, black background")  # fmt: skip
"""The word alone and in sentences of the world's three kinds."""


def words(target: str, lines: Sequence[str] = LINES) -> dict[str, object]:
    """Original and target prompt of a job; with no target the word is taken out of every line."""
    pairs = [(line, replaced(line, target)) for line in lines]
    return {"original prompt": "\n".join(own for own, _ in pairs), "target prompt": "\n".join(to for _, to in pairs)}


def replaced(line: str, target: str) -> str:
    """The line with the concept's word replaced, or taken out."""
    return " ".join(line.replace(FROM, target).split())


def preset(name: str) -> dict[str, object]:
    """A shipped preset at the world's size and precision."""
    shipped = json.loads((ROOT / "presets" / f"{name}.json").read_text(encoding="utf-8"))
    return {**shipped, "train_model_precision": "fp32", "save_precision": "fp32"}


RATE, BLANK = 1e-3, 3e-3
"""Learning rates: from the preset's instant start, and from nothing."""
SMALL: Mapping[str, object] = {
    "image_size(height, width)": world.EDGE, "train_iterations": 100, "train_batch_size": 4,
    "network_name_filter": "*attn2_to_k; *attn2_to_v", "train_learning_rate": RATE,
}  # fmt: skip
"""What differs from the shipped preset, which is made for full-size models: keys and values of the cross-attention see
nothing but the text, so that what they learn from pure noise holds for every picture."""


def ileco(target: str, **changes: object) -> dict[str, object]:
    """The job of an iLECO scenario."""
    anchors = "\n".join((HELD, *prompts(unseen_scenes(12), "")))
    fit = {"ileco_anchors": anchors, "instant_preserve": HELD}
    job = {**preset("iLECO_Instant"), **SMALL, **words(target), **fit, **changes}
    return {**job, "save_per_steps": int(str(job["train_iterations"])) // (CHECKS + 1)}


def blank(target: str, **changes: object) -> dict[str, object]:
    """An iLECO that begins with a LoRA that does nothing."""
    job = ileco(target, train_learning_rate=BLANK, **changes)
    return {key: value for key, value in job.items() if key not in ("network_init", "instant_preserve")}


def unseen_scenes(count: int) -> list[world.Scene]:
    """Scenes of the other colours that the base model was not trained on, so that nothing asks for them later."""
    found = [scene for scene in world.all_scenes() if not world.in_base(scene) and scene.colour in OTHERS]
    return found[:: len(found) // count][:count]


def seed_rule(target: str, **changes: object) -> dict[str, object]:
    """TrainTrain's rule at the same steps: one noise, no anchor, its one pair, all layers, its weights of the loss."""
    own = ("ileco_anchors", "network_name_filter", "train_loss_weighting")
    job = {key: value for key, value in blank(target, **changes).items() if key not in own}
    return {**job, **words(target, LINES[1:2]), "train_traintrain_compatible": True, "train_min_timesteps": 0}


def instant(target: str, **changes: object) -> dict[str, object]:
    """The job of an instant scenario."""
    return {**preset("Instant"), **words(target), "instant_preserve": HELD, **changes}


def asked_scenes(count: int, seed: int) -> list[world.Scene]:
    """Scenes whose picture in the target colour the base model was trained on: only the word is new to it."""
    return pool(lambda scene: scene.colour == TO, count, seed)


def other_scenes(count: int, seed: int) -> list[world.Scene]:
    """Scenes of the other colours that the base model was trained on."""
    return pool(lambda scene: scene.colour in OTHERS, count, seed)


def prompts(scenes: Sequence[world.Scene], word: str = "") -> list[str]:
    """Their captions in all three kinds of sentences, with another colour word where one is given."""
    kinds = world.TEMPLATES
    return [world.caption(scene, template=kinds[n % len(kinds)], colour_word=word or None)
            for n, scene in enumerate(scenes)]  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Reads the results of one task: what the concept became (`target` "" for nothing), and what else changed."""

    target: str
    before: Before

    def __call__(self, trained: Trained) -> Figures:
        """How often the concept became its target (or is gone), what else changed, and the same in predictions."""
        asked, others = asked_scenes(ASKED, 30 + trained.seed), other_scenes(UNRELATED, 60 + trained.seed)
        wanted = self.target or FROM
        ceiling = self.before.readings(trained, prompts(asked, wanted))
        then, now = self.before.readings(trained, prompts(others)), drawn(trained, prompts(others), 1.0)
        shown = drawn(trained, prompts(asked, FROM), 1.0)
        pairs = list(zip(now, then, strict=True))
        return {
            f"reads {wanted}": share(reading.colour == wanted for reading in shown),
            f"base reads {wanted}": share(reading.colour == wanted for reading in ceiling),
            "shape kept": kept("shape", ceiling, shown, asked),
            "others changed": share(after.colour != before.colour for after, before in pairs),
            "their shapes changed": share(after.shape != before.shape for after, before in pairs),
            **self._predictions(trained),
        }

    def _predictions(self, trained: Trained) -> dict[str, float]:
        """Map ratio, leaks and noise memory on a sentence no job was given, over held-out states."""
        probe, to = self.before.probe(trained, SEEN, 2), replaced(SEEN, self.target)
        leaks = probe.leaks(SEEN, to, unrelated())
        reached, step = self._reached(trained, to), max(trained.steps, 1)
        return {
            "map ratio": probe.map_ratio(SEEN, to),
            "median leak": median(leaks.values()),
            "worst leak": max(leaks.values()),
            "noise gap": self._gap(trained),
            "steps to 0.8": reached,
            "seconds to 0.8": trained.seconds * reached / step if trained.steps else trained.seconds,
        }

    def _reached(self, trained: Trained, to: str) -> float:
        """The first measured step with map ratio ≥ 0.8 at median leak ≤ 0.1; infinite when there is none."""
        probe = self.before.probe(trained, SEEN, 2)
        own = {name: value.clone() for name, value in trained.network.state_dict().items()}
        trace = []
        try:
            for path in sorted(trained.path.parent.glob(f"{trained.path.stem}_*steps.safetensors"), key=step_of):
                trained.network.load(read_lora(path)[0])
                trace.append((step_of(path), *self._both(probe, to)))
        finally:
            trained.network.load_state_dict(own)
        found = first_reached([*trace, (trained.steps, *self._both(probe, to))])
        return math.inf if found is None else found

    @staticmethod
    def _both(probe: Probe, to: str) -> tuple[float, float]:
        return probe.map_ratio(SEEN, to), median(probe.leaks(SEEN, to, unrelated()[:5]).values())

    def _gap(self, trained: Trained) -> float:
        """Map ratio on the noise of the run minus that on fresh noise, with the first pair of prompts of the job."""
        job = json.loads((trained.folder / "job.json").read_text(encoding="utf-8"))
        original = str(job["original prompt"]).splitlines()[0]
        seen, unseen = (Probe(trained.model, trained.network, noises(trained, job, kind)) for kind in ("noise", "new"))
        return memorisation(seen, unseen, original, replaced(original, self.target))

    def sheet(self, trained: Trained) -> Image.Image:
        """Three prompts that should change and three that should not, without the adapter and with it."""
        asked = [*prompts(asked_scenes(3, seed=42), FROM), *prompts(other_scenes(3, seed=43))]
        settings = dataclasses.replace(DRAWN, steps=12, seed=41)
        pictures = comparison(trained.model, trained.network, asked, (0.0, 1.0), settings)
        return grid(pictures, asked, ("before", "after"), scale=1)


def unrelated() -> list[str]:
    """Prompts whose prediction is to stay: the empty one, sentences without the concept, single words."""
    return ["", *prompts(other_scenes(8, seed=33)), "shape", *OTHERS[:3]]


def noises(trained: Trained, job: Mapping[str, object], kind: str) -> list[State]:
    """Pure noise at four timesteps: that of the run's first step (TrainTrain's rule knows no other), or fresh."""
    shape = (trained.model.latent_channels, *(edge // trained.model.latent_factor for edge in SIZE))
    noise = rng.normal(shape, kind, int(str(job["train_seed"])), 0, range(2))
    return [State(noise.to(trained.model.device), time) for time in TIMES]


def lost(figures: Mapping[str, float]) -> float:
    """What a result loses by what it changes elsewhere: pictures beyond the goal, and between equals, predictions."""
    return 4 * max(0.0, figures["others changed"] - 0.03) + 0.1 * figures["worst leak"]


def scenarios(before: Before) -> tuple[Scenario, ...]:
    """Both tasks: iLECO as shipped, with a bank, from an instant start, by TrainTrain's rule; both instant maps."""
    return (*_mappings(Measured(TO, before)), *_removals(Measured("", before)))


def _mappings(measure: Measured) -> tuple[Scenario, ...]:
    goals = (Goal(f"reads {TO}", low=0.9), Goal("others changed", high=0.03))

    def one(variant: str, job: dict[str, object], rates: tuple[float, ...] = (), shown: str = "") -> Scenario:
        return Scenario(
            task=f"{FROM} becomes {TO}", variant=variant, job=job, measure=measure, rates=rates, goals=goals,
            value=lambda figures: figures[f"reads {TO}"] - lost(figures),
            grid=measure.sheet, shown=shown,
        )  # fmt: skip

    return (
        one("iLECO", ileco(TO), around(RATE)),
        one("iLECO, bank of 256", ileco(TO, ileco_bank=256), (RATE,)),
        one("iLECO without the instant start", blank(TO), (BLANK,)),
        one("TrainTrain's rule", seed_rule(TO), around(BLANK)),
        one("Instant, UCE", instant(TO), shown="modes-words.png"),
        one("Instant, SPEED", instant(TO, instant_method="speed")),
    )


def _removals(measure: Measured) -> tuple[Scenario, ...]:
    goals = (Goal(f"reads {FROM}", high=0.1), Goal("others changed", high=0.03))

    def one(variant: str, job: dict[str, object], rates: tuple[float, ...] = ()) -> Scenario:
        return Scenario(
            task=f"{FROM} is taken away", variant=variant, job=job, measure=measure, rates=rates, goals=goals,
            value=lambda figures: -figures[f"reads {FROM}"] - lost(figures),
            grid=measure.sheet,
        )  # fmt: skip

    return (
        one("iLECO", ileco("", ileco_guidance=0.75, ileco_anchor_weight=4), around(RATE)),
        one("iLECO without the instant start", blank("", ileco_guidance=0.75, ileco_anchor_weight=4), (BLANK,)),
        one("TrainTrain's rule", seed_rule(""), around(BLANK)),
        one("Instant, UCE", instant("")),
        one("Instant, SPEED", instant("", instant_method="speed")),
    )
