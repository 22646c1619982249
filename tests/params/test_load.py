"""Values in, a job or all problems out."""

from __future__ import annotations

import json
import math

import pytest
from params_table import catalogue

from trainer.errors import JobError, brief
from trainer.params.codec import load, load_file
from trainer.params.core import Images, Log, Network, Save, Task, Train
from trainer.params.names import BLOCKS, OPTIMIZERS, SCHEDULERS

TABLE = catalogue()
GOOD = {"lora_data_directory": "pictures"}


def value(name, given):
    return load({**GOOD, name: given}, TABLE).job.value(name)


def problems(raw, complete=True):
    with pytest.raises(JobError) as caught:
        load(raw, TABLE, complete)
    return {problem.field: problem for problem in caught.value.problems}


def problem(name, given):
    found = problems({**GOOD, name: given})
    assert list(found) == [TABLE.by_name[name].key]
    return str(next(iter(found.values())))


@pytest.mark.parametrize("given", [16, "16", " 16 ", 16.0, "16.0", "1.6e1", "１６", "+16"])
def test_whole_numbers_come_in_many_spellings(given):
    found = value("network_rank", given)
    assert found == 16 and type(found) is int


@pytest.mark.parametrize("given", [0.0005, "5e-4", "0.0005", ".0005", "５ｅ－４"])
def test_numbers_come_in_many_spellings(given):
    found = value("train_learning_rate", given)
    assert found == 0.0005 and type(found) is float


@pytest.mark.parametrize("name", [parameter.attribute for parameter in TABLE.parameters])
@pytest.mark.parametrize("unset", [None, "", "None"])
def test_unset_is_the_default_for_every_type(name, unset):
    if (name, unset) == ("save_metadata", "None"):
        assert value(name, unset) == "none"
    elif name != "lora_data_directory":
        assert value(name, unset) == TABLE.by_name[name].default


@pytest.mark.parametrize(("given", "right"), [
    (True, True), (False, False), ("true", True), ("True", True), ("false", False), ("False", False), ("", False),
    (0, False), (1, True), ("0", False), ("1", True),
])  # fmt: skip
def test_truth(given, right):
    assert value("image_mirroring", given) is right


@pytest.mark.parametrize("given", [2, -1, 1.0, 0.5, "yes", "on", [], {}, "２"])
def test_what_is_not_truth(given):
    assert "must be true or false" in problem("image_mirroring", given)


@pytest.mark.parametrize("given", [1.5, "1.5", "15e-1"])
def test_fractions_are_refused_where_whole_numbers_belong(given):
    message = problem("network_rank", given)
    assert "whole number from 1 to 1024" in message and "write 2" in message


@pytest.mark.parametrize("given", [math.nan, math.inf, -math.inf, "nan", "inf", "-Infinity", "1e999", 10**400])
@pytest.mark.parametrize("name", ["train_learning_rate", "network_rank", "image_size"])
def test_not_a_finite_number(name, given):
    assert problem(name, given)


@pytest.mark.parametrize(
    "given", ["sixteen", "16 px", "1_6", "0x10", "1,5", True, False, [16], {}, "²", "--1", "1e", "."]
)
def test_what_is_not_a_number(given):
    message = problem("network_rank", given)
    assert message.startswith("network_rank = ") and "whole number" in message


def test_ranges_name_the_limits_once_and_the_unit():
    for given in (0, "2048"):
        message = problem("network_rank", given)
        assert message.endswith("is out of range: it must be a whole number from 1 to 1024.")
    assert "from 0 to 1000 timesteps" in problem("train_max_timesteps", 1001)
    assert "at least -1." in problem("train_seed", -2)
    assert value("train_seed", "-1") == -1
    assert value("train_seed", "9007199254740993") == 9007199254740993


@pytest.mark.parametrize(("given", "size"), [
    (512, (512, 512)), ("512", (512, 512)), ("768,512", (768, 512)), ([768, 512], (768, 512)),
    (["768", 512.0], (768, 512)),
    (" 768 , 512 ", (768, 512)), ("768，512", (768, 512)), ((64, 64), (64, 64)), ([64], (64, 64)),
])  # fmt: skip
def test_image_size_is_height_then_width(given, size):
    assert value("image_size", given) == size


def test_lengths_are_multiples_of_eight():
    assert "multiple of 8; the nearest is 504" in problem("image_size", 501)
    assert "the nearest is 512" in problem("image_size", "768,511")
    assert "the nearest is 104" in problem("image_buckets_step", "100.0") or "nearest is 96" in problem(
        "image_buckets_step", 100
    )
    assert "the nearest is 504" in problem("image_min_length", 505)
    assert "for example 512 or 768,512" in problem("image_size", "1,2,3")
    assert problem("image_size", []) and problem("image_size", "512,") and problem("image_size", {"height": 512})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_ignore_case(name):
    assert value("train_optimizer", name.lower()) == value("train_optimizer", name.upper()) == name


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_ignore_case(name):
    rules = {"train_lr_step_rules": "1"} if name == "piecewise_constant" else {}
    raw = {"lora_data_directory": "pictures", "train_lr_scheduler": name.title(), **rules}
    assert load(raw, TABLE).job[Train].train_lr_scheduler == name


def test_choices_suggest_the_nearest():
    assert "Did you mean AdamW8bit?" in problem("train_optimizer", "AdamW8bits")
    message = problem("train_lr_scheduler", "cosin")
    assert "Did you mean cosine?" in message and "one of: cosine_annealing, " in message
    assert "must be a text" in problem("train_optimizer", 3)


def test_names_of_a_registry_come_from_the_catalogue():
    assert value("network_type", "LoRA") == "lierla" and value("network_type", "LoCon") == "c3lier"
    assert value("network_type", "LOHA") == "loha"
    assert "one of: lierla, c3lier, loha" in problem("network_type", "dreambooth")


def test_blocks():
    assert value("network_blocks", "out00, base,IN03") == ("BASE", "IN03", "OUT00")
    assert value("network_blocks", ["M00", "M00"]) == ("M00",)
    assert value("network_blocks", list(reversed(BLOCKS))) == BLOCKS
    message = problem("network_blocks", ["BSE", "M00", 3])
    assert "'BSE' is not known. Did you mean BASE?" in message and "3 is not known" in message
    assert "select at least one" in problem("network_blocks", [])
    assert "a list of names" in problem("network_blocks", 5)


def test_lists_without_any_name():
    assert value("logging_trackers", []) == ()
    assert value("logging_trackers", "wandb,TensorBoard") == ("tensorboard", "wandb")
    assert "Did you mean tensorboard?" in problem("logging_trackers", ["tensorbord"])


def test_text_is_kept_as_it_is():
    assert value("lora_trigger_word", "  猫 cat\n") == "  猫 cat\n"
    assert "put it in quotation marks" in problem("lora_trigger_word", 5)
    assert "cannot be stored" in problem("lora_trigger_word", "a\x00b")
    assert "cannot be stored" in problem("lora_trigger_word", "\ud800")


def test_all_problems_at_once():
    found = problems({
        "network_rnak": 8, "network_rank": "1.5", "image_size": 500, "train_optimizer": "adamv", "train_seed": [],
        "network_blocks": [], "save_lora_name": "a/b", "lora_data_directory": "",
    })  # fmt: skip
    assert set(found) == {
        "network_rnak", "network_rank", "image_size(height, width)", "train_optimizer", "train_seed",
        "network_blocks(BASE = TextEncoder)", "save_lora_name", "lora_data_directory",
    }  # fmt: skip
    assert "Did you mean network_rank?" in found["network_rnak"].message
    assert found["network_rank"].value == "1.5"


def test_unknown_keys_of_our_own_are_errors():
    assert "Did you mean train_fixed_timsteps_in_batch?" in str(
        problems({**GOOD, "format": 1, "train_fixed_timesteps_in_batch": True})["train_fixed_timesteps_in_batch"]
    )
    assert "Did you mean" not in str(problems({**GOOD, "zzz": 1})["zzz"])
    assert "is not a setting" in str(problems({**GOOD, 5: 1})["5"])


def test_one_parameter_in_two_spellings():
    found = problems({**GOOD, "format": 1, "image_size": 512, "image_size(height, width)": 640})
    assert "same setting as image_size; keep one" in str(found["image_size(height, width)"])


def test_newer_formats():
    assert "newer version" in str(problems({"format": 2, "a key of the future": 1})["format"])
    assert list(problems({"format": 2, "a key of the future": 1})) == ["format"]
    assert "whole number" in str(problems({**GOOD, "format": "one"})["format"])
    assert "out of range" in str(problems({**GOOD, "format": 0})["format"])


@pytest.mark.parametrize("raw", [None, [], "text", 5, True, [{}]])
def test_not_an_object(raw):
    assert "JSON object" in str(problems(raw)["settings"])


def test_unknown_mode():
    assert "Did you mean iLECO?" in str(problems({**GOOD, "mode": "iLEC"})["mode"])
    assert load({"mode": "ileco"}, TABLE).job[Task].mode == "iLECO"


def test_defaults_are_the_documented_ones():
    job = load(GOOD, TABLE).job
    assert (job[Network].network_rank, job[Network].network_alpha) == (16, 8.0)
    assert (job[Images].image_size, job[Images].image_buckets_step) == ((512, 512), 256)
    assert (job[Train].train_iterations, job[Train].train_seed, job[Train].train_state_every) == (1000, -1, 100)
    assert (job[Save].save_metadata, job[Log].logging_trackers) == ("full", ())
    with pytest.raises(KeyError):
        job[int]
    with pytest.raises(KeyError):
        job.value("nothing")


def test_replace():
    job = load(GOOD, TABLE).job
    changed = job.replace(network_rank=4, train_seed=7)
    assert (changed[Network].network_rank, changed[Train].train_seed, job[Network].network_rank) == (4, 7, 16)
    assert changed[Images] is job[Images]
    with pytest.raises(TypeError, match="network_rnak"):
        job.replace(network_rnak=4)


def test_to_dict_holds_what_differs():
    job = load({**GOOD, "network_rank": "4", "image_size": "768,512", "network_blocks": "M00"}, TABLE).job
    assert job.to_dict() == {
        "format": 1, "mode": "LoRA", "network_rank": 4, "network_blocks(BASE = TextEncoder)": ["M00"],
        "lora_data_directory": "pictures", "image_size(height, width)": "768,512",
    }  # fmt: skip
    full = job.to_dict(full=True)
    assert set(full) == {parameter.key for parameter in TABLE.parameters}
    assert load(json.loads(json.dumps(full)), TABLE).job == job
    assert load(json.loads(json.dumps(job.to_dict())), TABLE).job == job


def test_values_the_mode_does_not_use_are_told():
    told = load({**GOOD, "diff_alt_ratio": 2, "diff_target_name": "", "network_rank": 4}, TABLE).warnings
    assert told == ("diff_alt_ratio has no effect in mode LoRA.",)


def test_files(tmp_path):
    path = tmp_path / "設定.json"
    path.write_text(json.dumps({**GOOD, "network_rank": 4}), encoding="utf-8-sig")
    assert load_file(path, TABLE).job[Network].network_rank == 4


@pytest.mark.parametrize(("content", "told"), [
    (b"{", "line 1"), (b'{"a": 1,\n "b": }', "line 2, column 7"), (b'{"network_rank": NaN}', "NaN"),
    (b'{"network_rank": 1, "network_rank": 2}', "'network_rank' more than once"), (b"\xff\xfe{}", "UTF-8"),
    (b"[" * 200_000, "nested too deep"), (b'{"network_rank": ' + b"9" * 5000 + b"}", "too long"),
    (b"[1]", "JSON object"),
    (b"", "line 1"), (b" " * (16 * 1024 * 1024 + 1), "larger than"),
])  # fmt: skip
def test_broken_files(tmp_path, content, told):
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    with pytest.raises(JobError, match=told):
        load_file(path, TABLE)


@pytest.mark.parametrize("name", ["absent.json", "a\x00b", "x" * 5000, "."])
def test_files_that_are_not_there(tmp_path, name):
    with pytest.raises(JobError, match="cannot be read"):
        load_file(f"{tmp_path}/{name}", TABLE)


def test_huge_values_are_shown_short():
    assert len(brief("x" * 10**6)) < 300
    assert len(brief([[["x" * 1000] * 100] * 100] * 100)) < 300
    assert brief(10**5000).startswith("a whole number of about 50")
    assert brief({"a": [10**5000]}) == "dict of 1"
    nested: list[object] = []
    for _ in range(5000):
        nested = [nested]
    assert len(brief(nested)) < 300
