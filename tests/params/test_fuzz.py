"""Anything JSON can say loads or raises our own error; every job survives being written and read."""

from __future__ import annotations

import json
import math

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from params_table import catalogue

from trainer.errors import JobError
from trainer.params.cli import apply_overrides
from trainer.params.codec import load, load_file

TABLE = catalogue()
KEYS = sorted({*TABLE.by_name, "2nd pass", "traintrain"})
FAST = settings(max_examples=700, deadline=None, database=None, suppress_health_check=list(HealthCheck))

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["", "None", "16", "1.5", "5e-4", "nan", "1e999", "768,512", "LoRA", "Difference", "BASE,M00"]),
    st.sampled_from([400, 5000]).map(lambda digits: 10**digits),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4) | st.integers(), inner, max_size=4)
    ),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), VALUES, max_size=8)


def loads_or_refuses(raw):
    for complete in (True, False):
        try:
            job = load(raw, TABLE, complete).job
        except JobError as refusal:
            assert refusal.problems and str(refusal)
            assert all(isinstance(problem.field, str) and problem.message for problem in refusal.problems)
        else:
            assert load(json.loads(json.dumps(job.to_dict())), TABLE, complete).job == job


@FAST
@given(VALUES | OBJECTS)
def test_any_value(raw):
    loads_or_refuses(raw)


@FAST
@given(OBJECTS, st.booleans())
def test_any_object_with_a_second_pass(inner, traintrain):
    odd = {"train_fixed_timsteps_in_batch": False} if traintrain else {}
    loads_or_refuses({**odd, "mode": "Difference", "use_2nd_pass_settings": True, "2nd pass": inner})


@FAST
@given(st.sampled_from(TABLE.parameters), VALUES)
def test_any_value_of_any_parameter(parameter, value):
    loads_or_refuses({"lora_data_directory": "x", parameter.key: value})


@settings(FAST, max_examples=200)
@given(st.binary(max_size=60) | OBJECTS.map(lambda raw: json.dumps({str(k): None for k in raw}).encode()))
def test_any_file(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    path.write_bytes(content)
    try:
        load_file(path, TABLE)
    except JobError as refusal:
        assert str(refusal)


@settings(FAST, max_examples=200)
@given(OBJECTS, st.lists(st.text(max_size=20) | st.builds("{}={}".format, st.sampled_from(KEYS), st.text(max_size=5))))
def test_any_overrides(raw, pairs):
    try:
        loads_or_refuses(apply_overrides(raw, pairs, TABLE))
    except JobError as refusal:
        assert str(refusal)


def right_values(parameter):
    """Values of one parameter that are right by themselves."""
    spec, choices = parameter.spec, TABLE.choices_of(parameter)
    step = spec.multiple or 1
    whole = st.integers(math.ceil((spec.low or 0) / step), int(spec.high or 0) // step).map(lambda n: n * step)
    if parameter.kind == "bool":
        return st.booleans()
    if parameter.kind == "int":
        return whole
    if parameter.kind == "float":
        return st.floats(spec.low, spec.high)
    if parameter.kind == "size":
        return st.tuples(whole, whole).map(list)
    if parameter.kind == "list":
        return st.lists(st.sampled_from(choices), min_size=1)
    if choices:
        return st.sampled_from(choices)
    if parameter.attribute == "save_lora_name":
        return st.text("abc猫 -_1", max_size=10).map(str.strip)
    return st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)


RIGHT = st.fixed_dictionaries({}, optional={p.key: right_values(p) for p in TABLE.parameters})


@settings(FAST, max_examples=300)
@given(RIGHT, st.none() | RIGHT, st.booleans(), st.booleans())
def test_jobs_survive_writing_and_reading(raw, second, full, foreign):
    raw = {**raw, **({} if second is None else {"2nd pass": second})}
    raw.pop("format", None)
    if foreign:
        raw |= {"train_fixed_timsteps_in_batch": True, "novelty": {"a": [1.5, None, "x"]}}
    else:
        raw["format"] = 1
    try:
        loaded = load(raw, TABLE)
    except JobError as refusal:
        told = ("is 0", "above", "learns from", "BASE", "missing", "is empty", "UNet", "nothing to do", "more than the")
        assert all(any(word in problem.message for word in told) for problem in refusal.problems), refusal
        return
    written = json.loads(json.dumps(loaded.job.to_dict(full)))
    assert load(written, TABLE).job == loaded.job
    assert hash(loaded.job) == hash(load(written, TABLE).job)
