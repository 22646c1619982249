"""The modes' evaluation: jobs that can be run, pairs that differ in one thing, figures worked out by hand."""

from __future__ import annotations

import json
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.demo import measure, world
from trainer.demo.evaluate import before as compared
from trainer.demo.evaluate import concepts, pairs
from trainer.demo.evaluate.before import Before
from trainer.demo.evaluate.modes import prepare, scenarios
from trainer.demo.evaluate.runner import Result, Runner, Summary
from trainer.demo.evaluate.scenario import Scenario, Trained
from trainer.demo.reader import Reading, read
from trainer.engine.catalogue import catalogue
from trainer.engine.passes import plan_passes
from trainer.engine.preflight import check_before_loading
from trainer.events import EventLog
from trainer.maths.alphas import scaled_linear_alphas
from trainer.maths.process import Diffusion
from trainer.models.base import Conditioning
from trainer.params.codec import load
from trainer.params.core import Train
from trainer.places import Places


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("modes")


@pytest.fixture(scope="module")
def suite(folder):
    prepare(folder)
    return scenarios(folder)


def test_every_scenario_is_a_job_whose_data_is_there(suite, folder):
    names = {f"{scenario.task}, {scenario.variant}" for scenario in suite}
    assert len(names) == len(suite) > 12
    kinds = set()
    for scenario in suite:
        ((_, raw),) = scenario.jobs(1, (scenario.rate,) if scenario.rate else ())
        loaded = load({"format": 1, "model": "demo", **raw}, catalogue())
        assert not loaded.job.unknown
        hidden = [line for line in loaded.warnings if "no effect" in line and not line.startswith("train_seed")]
        assert not hidden, hidden
        check_before_loading(loaded.job, Places.standalone().under(folder / "out"))
        kinds.add(raw["mode"])
    assert kinds == {"iLECO", "Instant", "Difference", "ADDifT", "Multi-ADDifT", "LoRA"}


def test_all_that_learns_by_steps_is_swept_or_a_variant_of_what_is(suite):
    swept = {scenario.job["mode"] for scenario in suite if len(scenario.rates) == 5}
    assert swept == {"iLECO", "Difference", "ADDifT", "Multi-ADDifT", "LoRA"}
    for scenario in suite:
        assert (scenario.job["mode"] in swept) == (scenario.job["mode"] != "Instant")
        assert not scenario.rates or scenario.rate in scenario.rates


def test_the_swept_rate_of_difference_is_the_second_pass(suite):
    scenario = next(one for one in suite if one.job["mode"] == "Difference")
    ((_, raw),) = scenario.jobs(2, (0.0123,))
    first, second = plan_passes(load({"format": 1, "model": "demo", **raw}, catalogue()).job)
    assert second.job[Train].train_learning_rate == 0.0123 != first.job[Train].train_learning_rate
    assert first.job[Train].train_seed == 2


def test_the_two_pictures_of_a_pair_differ_in_one_attribute(folder, suite):
    for name, task in (
        ("one", pairs.BACKGROUND), ("eight", pairs.BACKGROUND), ("grown", pairs.SIZE), ("moved", pairs.SIDE),
        ("night", pairs.DARK_LARGE), ("dyed", pairs.COLOUR),
    ):  # fmt: skip
        files = sorted((folder / "pictures" / name).glob("*.png"))
        assert len(files) == 2 * (8 if name == "eight" else 1)
        found = read(np.stack([_pixels(file) for file in files]))
        readings = dict(zip([file.stem for file in files], found, strict=True))
        for stem in {file.stem.removesuffix(pairs.SUFFIX) for file in files}:
            old, new = readings[stem], readings[stem + pairs.SUFFIX]
            assert (getattr(old, task.attribute), getattr(new, task.attribute)) == (task.old, task.new)
            others = [one for one in world.ATTRIBUTES if one != task.attribute]
            assert [getattr(old, one) for one in others] == [getattr(new, one) for one in others]
            texts = {(folder / "pictures" / name / f"{stem}{end}.txt").read_text() for end in ("", pairs.SUFFIX)}
            assert len(texts) == 1 and not {task.old, task.new, "background"} & set(texts.pop().split())


def _pixels(file):
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


# ------------------------------------------------------------------------------------- figures, on a model known


class Network:
    """One adapter of ΔW = 1 on a layer of weight 0: `value` is what a forward sees, by its hook or in the weight."""

    def __init__(self):
        self.strength, self.weight = 1.0, torch.zeros(1)
        module = SimpleNamespace(weight=self.weight, bias=None)
        self.adapter = SimpleNamespace(module=module, delta=lambda: torch.ones(1), delta_bias=lambda: None)

    def __iter__(self):
        return iter([self.adapter])

    @property
    def value(self):
        return self.strength + self.weight.item()

    @contextmanager
    def at_strength(self, value):
        kept, self.strength = self.strength, value
        yield
        self.strength = kept

    def state_dict(self):
        return {}

    def load_state_dict(self, values):
        assert values == {}


def test_what_changed_and_what_stayed_is_counted_by_hand(tmp_path, monkeypatch):
    """The word red draws blue in 3 of 4 pictures, green ones turn yellow in every fifth, crosses become rings."""
    network = Network()

    def ask(model, prompts, settings):
        found = []
        for number, prompt in enumerate(prompts):
            words = prompt.replace(",", " ").split()
            colour = next(name for name in world.COLOURS if name in words)
            shape = next(name for name in world.SHAPES if name in words)
            if network.value:
                if colour == "red":
                    colour = "blue" if number % 4 else "red"
                elif number % 5 == 0:
                    colour = "yellow" if colour == "green" else colour
                shape = "ring" if shape == "cross" else shape
            found.append(Reading(shape, colour, "white", "small", "left", 1.0))
        return found

    monkeypatch.setattr(compared, "ask", ask)
    monkeypatch.setattr(concepts.Measured, "_predictions", lambda *_: {})
    trained = Trained(None, network, tmp_path / "a.safetensors", tmp_path, 10, 5.0)
    figures = concepts.Measured("blue", Before())(trained)
    scenes = concepts.other_scenes(concepts.UNRELATED, 61)
    turned = sum(scene.colour == "green" for scene in scenes[::5])
    assert figures["reads blue"].value == 0.75 and figures["base reads blue"].value == 1.0
    assert figures["others changed"].hits == turned > 0 and figures["others changed"].trials == concepts.UNRELATED
    asked = concepts.asked_scenes(concepts.ASKED, 31)
    crosses = sum(scene.shape == "cross" for scene in asked)
    assert figures["shape kept"].hits == concepts.ASKED - crosses < concepts.ASKED
    removed = concepts.Measured("", Before())(trained)
    assert removed["reads red"].value == 0.25 and removed["base reads red"].value == 1.0


class Linear:
    """ε_κ(x, t, c) = b(c) + κ·d(c), the same in every element; pictures are encoded by taking means of 8×8 pixels."""

    latent_channels, latent_factor, device = 4, 8, torch.device("cpu")

    def __init__(self, network, shift):
        self.network, self.shift = network, shift
        self.process = Diffusion(scaled_linear_alphas(), "epsilon")

    def encode_prompts(self, prompts, clip_skip=1):
        return Conditioning(torch.tensor([[[float("red" in one), float("blue" in one)]] for one in prompts]))

    def encode_images(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels, 8)
        return torch.cat([small, small[:, :1]], 1), torch.zeros(())

    def time_ids(self, *sizes):
        return None

    def predict(self, x, t, text, ids=None):
        red, blue = text.context_BLD[:, 0].unbind(-1)
        value = 2 * blue + self.network.value * (self.shift * red + 0.1 * (1 - red))
        return value.view(-1, 1, 1, 1).expand_as(x)


def test_predictions_on_a_model_worked_out_by_hand(tmp_path, monkeypatch):
    """Of 2 from red to blue 1.5 is learned: M = 1 − (0.5/2)²; every other prompt moves by 0.1: K = (0.1/2)²."""
    network = Network()
    model = Linear(network, 1.5)
    states = [measure.State(torch.zeros(2, 4, 8, 8), t) for t in (500, 900)]
    monkeypatch.setattr(compared, "held_out_states", lambda *_, **__: states)
    (tmp_path / "job.json").write_text(json.dumps({"original prompt": "red\na red ring", "train_seed": 1}))
    for steps in (5, 10):
        (tmp_path / f"a_{steps}steps.safetensors").touch()
    monkeypatch.setattr(concepts, "read_lora", lambda path: (float("5steps" in path.stem), {}))
    network.load = lambda untrained: setattr(model, "shift", 0.2 if untrained else 1.4)
    network.load_state_dict = lambda values: setattr(model, "shift", 1.5)
    trained = Trained(model, network, tmp_path / "a.safetensors", tmp_path, 20, 8.0)
    found = concepts.Measured("blue", Before())._predictions(trained)
    assert found["map ratio"] == pytest.approx(1 - 0.25**2)
    assert found["median leak"] == found["worst leak"] == pytest.approx(0.05**2)
    assert found["noise gap"] == pytest.approx(0, abs=1e-6)
    assert found["steps to 0.8"] == 10 and found["seconds to 0.8"] == pytest.approx(4.0)  # 1 − (0.6/2)² = 0.91


def test_the_noise_of_a_run_is_the_one_its_first_step_drew(tmp_path):
    """The gap must compare the very noise of training: the kit's own draw of micro batch 0."""
    from trainer.engine.kit import Kit, LossSettings
    from trainer.modes.base import Batch

    model = SimpleNamespace(latent_channels=4, latent_factor=8, device="cpu", process=None)
    zeros = torch.zeros(2, 4, 8, 8)
    batch = Batch(index=7, samples=(0, 1), share=2, prompts=("", ""), mean=zeros, std=zeros)
    drawn = Kit(model, None, None, 3, LossSettings()).noise(batch, fixed=True)
    states = concepts.noises(SimpleNamespace(model=model), {"train_seed": 3}, "noise")
    assert all(torch.equal(state.x, drawn) for state in states)
    assert not torch.equal(concepts.noises(SimpleNamespace(model=model), {"train_seed": 3}, "new")[0].x, drawn)


def test_the_direction_of_a_pair_is_compared_with_its_difference(tmp_path):
    """A change by the same number everywhere: its cosine with z_t − z_o and its share outside, from the pictures."""
    network = Network()
    model = Linear(network, 0.1)  # the same for all prompts
    task = pairs.BACKGROUND
    trained = Trained(model, network, tmp_path / "a.safetensors", tmp_path, 10, 5.0)
    cosine, outside = pairs.Measured(task, Before())._direction(trained)
    cosines, outsides = [], []
    for number, old in enumerate(compared.pool(lambda scene: scene.background == "white", 4, 52)):
        new = world.Scene(old.shape, old.colour, "black", old.size, old.side)
        both = [world.render([scene], np.random.default_rng(900 + number))[0] / 127.5 - 1 for scene in (old, new)]
        small = [picture.reshape(8, 8, 8, 8, 3).mean((1, 3)) for picture in both]
        inside = np.abs(both[0] - both[1]).sum(-1).reshape(8, 8, 8, 8).max((1, 3)) * 127.5 > 10
        wanted = (small[1] - small[0])[inside]
        wanted = np.concatenate([wanted, wanted[:, :1]], 1)
        change = np.full(wanted.shape, -1.0)  # ε grows by 0.1, so the implied picture falls
        cosines.append((wanted * change).sum() / np.linalg.norm(wanted) / np.linalg.norm(change))
        outsides.append(1 - inside.mean())
    assert cosine == pytest.approx(np.mean(cosines), abs=1e-4) and cosine > 0.9
    assert outside == pytest.approx(np.mean(outsides), abs=1e-4)


def test_strengths_of_a_pair_and_the_steps_it_took(tmp_path, monkeypatch):
    """Black at 1, white at −1, red becomes green at 1; a file from the way is good enough after step 8. By words, the
    untouched model makes crosses of the circles.
    """
    network, learned = Network(), {"share": 1.0}

    def ask(model, prompts, settings):
        found = []
        for number, prompt in enumerate(prompts):
            colour = next(name for name in world.COLOURS if name in prompt)
            shape = next(name for name in world.SHAPES if name in prompt)
            shape = "cross" if shape == "circle" and "black" in prompt else shape
            new = "black" if (number % 10) / 10 < learned["share"] else "grey"
            ground = {0.0: "grey", 1.0: new, -1.0: "white" if number % 2 else None}[network.value]
            colour = "green" if colour == "red" and network.value == 1 else colour
            found.append(Reading(shape, colour, ground, "small", "left", 1.0))
        return found

    monkeypatch.setattr(compared, "ask", ask)
    monkeypatch.setattr(pairs.Measured, "_direction", lambda *_: (0.5, 0.25))
    monkeypatch.setattr(pairs, "read_lora", lambda path: (compared.step_of(path) / 10, {}))
    for steps in (4, 8, 12):
        (tmp_path / f"a_{steps}steps.safetensors").touch()
    network.load = lambda value: learned.update(share=min(1.0, value + 0.1))
    network.load_state_dict = lambda values: learned.update(share=1.0)
    trained = Trained(None, network, tmp_path / "a.safetensors", tmp_path, 20, 10.0)
    figures = pairs.Measured(pairs.BACKGROUND, Before())(trained)
    assert figures["black"].value == 1 and figures["base black"].value == 0
    assert figures["white at −1"].value == 0.5 and figures["base white"].value == 0
    scenes = compared.pool(lambda scene: True, pairs.ASKED, 51)
    reds, circles = sum(one.colour == "red" for one in scenes), sum(one.shape == "circle" for one in scenes)
    assert figures["base keeps colour"].value == 1
    assert figures["base keeps shape"].hits == pairs.ASKED - circles < pairs.ASKED
    assert figures["colour kept"].hits == pairs.ASKED - reds < pairs.ASKED and figures["shape kept"].value == 1
    assert figures["colour kept at −1"].value == figures["shape kept at −1"].value == 1
    assert figures["steps to 90%"] == 8 and figures["seconds to 90%"] == pytest.approx(4.0)
    assert learned["share"] == 1.0


def test_where_the_colour_changes_shape_and_size_are_what_should_stay(suite):
    goals = {one.variant: [goal.figure for goal in one.goals] for one in suite if one.task == pairs.COLOUR.name}
    assert goals == {"ADDifT, preset Style": ["cyan", "blue at −1", "shape kept", "size kept"]}
    assert pairs.COLOUR.prompt(world.Scene("ring", "blue", "white", "small", "left")) == "a small ring on the left"


def test_kept_counts_only_what_was_right_before():
    scene = world.Scene("circle", "red", "white", "small", "left")
    red, blue, none = (SimpleNamespace(colour=name) for name in ("red", "blue", None))
    rate = compared.kept("colour", [red, red, blue, none], [red, none, red, red], [scene] * 4)
    assert (rate.hits, rate.trials) == (1, 2)


# --------------------------------------------------------------------------------------------------- the runner


def test_what_is_solved_is_run_once_and_the_best_result_gets_its_picture(tmp_path, monkeypatch):
    drawn = []

    class Counted(Runner):
        calls = 0

        def _measured(self, scenario, raw):
            self.calls += 1
            path = self._places().loras / f"{raw['save_lora_name']}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            return {"good": 1.0}

        def _base_model(self):
            return None

    class Attached:
        @contextmanager
        def attached(self):
            yield

    monkeypatch.setattr("trainer.demo.evaluate.runner.written_network", lambda *_: Attached())

    def sheet(trained):
        drawn.append(trained.path)
        return Image.new("RGB", (8, 8))

    scenario = Scenario("a task", "a variant", {"mode": "Instant", "original prompt": "a", "target prompt": "b"},
                        measure=dict, value=lambda figures: figures["good"], grid=sheet)  # fmt: skip
    runner = Counted(tmp_path, EventLog())
    (summary,) = runner.summaries([scenario], quick=False)
    assert runner.calls == 1 and len(summary.best) == 1
    first, again = runner.picture(summary), runner.picture(summary)
    assert first == again and first.is_file() and len(drawn) == 1
    without = Scenario("a task", "another", {}, measure=dict, value=lambda figures: 0.0)
    assert runner.picture(Summary(without, (), (Result(0.0, 1, {}),))) is None
