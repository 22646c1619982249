"""From plain JSON values to a job, or to the full list of what is wrong with them."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import JobError, Problem
from . import kohya
from .catalogue import Catalogue
from .core import FORMAT, OF_THE_RUN
from .field import ModeInfo
from .files import read_json
from .idle import IDLE_RULES
from .job import ALWAYS, NOTE, SECOND_PASS, TRAINTRAIN, Job
from .rules import CORE_RULES, Rule
from .table import Parameter, parameters_of
from .traintrain import DEFAULTS as TRAINTRAIN_DEFAULTS
from .traintrain import is_traintrain, z_image_key
from .values import FORBIDDEN, BadValueError, coerce, did_you_mean

__all__ = ["Catalogue", "Loaded", "ModeInfo", "load", "load_file"]

DEEPEST = 20


@dataclass(frozen=True)
class Loaded:
    """A job, and what its user should be told although it can start."""

    job: Job
    warnings: tuple[str, ...] = ()


def load_file(path: Path | str, catalogue: Catalogue, complete: bool = True) -> Loaded:
    """The job of a JSON file. Raises JobError, also when there is no such file or it is not JSON."""
    return load(read_json(path), catalogue, complete)


def load(raw: object, catalogue: Catalogue, complete: bool = True) -> Loaded:
    """The job that plain JSON values describe; `complete` is false for a preset, which may leave open what a run needs.

    Values with `format` are our own, and so are values with none of TrainTrain's odd keys: there, an unknown key is an
    error. In TrainTrain's files unknown keys are kept and told. Raises JobError with all problems.
    """
    if not isinstance(raw, Mapping):
        raise JobError([Problem("settings", raw, 'must be a JSON object, as in {"mode": "LoRA"}.')])
    if "format" in raw:  # our own files may carry a note for people
        raw = {key: value for key, value in raw.items() if key != NOTE}
    traintrain = is_traintrain(raw)
    _refuse_foreign(raw, traintrain)
    first = _Reading(catalogue, traintrain, complete)
    job = first.read(raw)
    if first.problems:
        raise JobError(first.problems)
    return Loaded(job, tuple(first.warnings))


def load_rest(raw: Mapping[str, object], problems: Iterable[Problem], catalogue: Catalogue) -> Job | None:
    """The job of what is right in settings with problems, for a look at its files: what is wrong stands as its default.

    None when nothing can be made of it: the settings are of something else, or their mode is wrong.
    """
    try:
        _refuse_foreign(raw, is_traintrain(raw))
    except JobError:
        return None
    left: dict[str, object] = dict(raw)
    while True:
        wrong = {problem.field for problem in problems}
        if "mode" in wrong:
            return None
        smaller = _without(left, wrong, catalogue)
        if smaller == left:
            return None
        try:
            return load(smaller, catalogue, complete=False).job
        except JobError as error:  # a rule between settings of which one is gone
            left, problems = smaller, error.problems


def _without(raw: Mapping[str, object], fields: Collection[str], catalogue: Catalogue) -> dict[str, object]:
    """Plain values without those of some fields, under whichever spelling they are given."""

    def kept(values: Mapping[str, object], prefix: str) -> dict[str, object]:
        spelt = {key: catalogue.by_name[key].key if key in catalogue.by_name else str(key)[:80] for key in values}
        return {key: value for key, value in values.items() if prefix + spelt[key] not in fields}

    left, second = kept(raw, ""), raw.get(SECOND_PASS)
    if isinstance(second, Mapping) and SECOND_PASS in left:
        left[SECOND_PASS] = kept(second, f"{SECOND_PASS}.")
    return left


def beside(found: Iterable[Problem], told: Iterable[Problem]) -> tuple[Problem, ...]:
    """The problems at other fields than those told already, where a default stood in for what is wrong."""
    fields = {problem.field for problem in told}
    return tuple(problem for problem in found if problem.field not in fields)


def _refuse_foreign(raw: Mapping[str, object], traintrain: bool) -> None:
    """Raise JobError at once for what was written for something else, where every other problem would only mislead."""
    version = raw.get("format")
    if isinstance(version, int) and not isinstance(version, bool) and version > FORMAT:
        message = f"was written by a newer version (format {FORMAT} is the newest known here); update this extension."
        raise JobError([Problem("format", version, message)])
    key = z_image_key(raw) if traintrain else ""
    if key:
        message = "is for Z-Image, which cannot be trained here yet; choose an SD 1, SD 2 or SDXL model."
        raise JobError([Problem(key, raw[key], message)])


@dataclass
class _Reading:
    """Collects the problems of one object: the settings, or those of the second pass inside them."""

    catalogue: Catalogue
    traintrain: bool
    complete: bool
    prefix: str = ""
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def read(self, raw: Mapping[str, object], mode: str = "") -> Job:
        """The job of `raw`; `mode` is the mode of a second pass that has none. Only valid when no problem was found."""
        given, rest = self._sort(raw)
        if mode and not given.get("mode"):
            given["mode"] = mode
        values, wrong = self._values(given)
        info = self.catalogue.modes.get(str(values.get("mode", "")), ModeInfo("", ""))
        second, unused = (None, None) if self.prefix else self._second(rest.pop(SECOND_PASS, None), values, info)
        unknown, traintrain = self._unknown(rest)
        job = Job(
            sections=tuple(self._section(section, values) for section in self.catalogue.sections),
            unknown=unknown,
            traintrain=traintrain,
            second=second,
            unused_second=unused,
        )
        self._check(job, info, wrong, self.catalogue.tags(info, str(values.get("network_type", ""))))
        if not traintrain and info.name and (self.complete or self.prefix):
            self._tell_hidden(given, values, info)
        return job

    def _sort(self, raw: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
        """What is given by attribute name, and the keys that are no parameter."""
        given: dict[str, object] = {}
        spelt: dict[str, str] = {}
        rest: dict[str, object] = {}
        for key, value in raw.items():
            parameter = self.catalogue.by_name.get(key) if isinstance(key, str) else None
            if parameter is None:
                rest[key] = value
            elif parameter.attribute in given:
                self._problem(key, value, f"is the same setting as {spelt[parameter.attribute]}; keep one of the two.")
            else:
                given[parameter.attribute], spelt[parameter.attribute] = value, key
        return given, rest

    def _values(self, given: Mapping[str, object]) -> tuple[dict[str, object], set[str]]:
        """Typed values by attribute name, and the attributes that have a problem."""
        values: dict[str, object] = {}
        wrong: set[str] = set()
        for parameter in self.catalogue.parameters:
            values[parameter.attribute] = self._default(parameter)
            if parameter.attribute not in given or self._left_open(parameter, given):
                continue
            try:
                values[parameter.attribute] = coerce(parameter, given[parameter.attribute], self.catalogue)
            except BadValueError as bad:
                wrong.add(parameter.attribute)
                self._problem(parameter.key, given[parameter.attribute], str(bad))
        self._imply(values, wrong)
        return values, wrong

    def _default(self, parameter: Parameter) -> object:
        return TRAINTRAIN_DEFAULTS.get(parameter.attribute, parameter.default) if self.traintrain else parameter.default

    def _left_open(self, parameter: Parameter, given: Mapping[str, object]) -> bool:
        """Whether a file of TrainTrain names a setting without a value where its default is not ours."""
        name = parameter.attribute
        return self.traintrain and name in TRAINTRAIN_DEFAULTS and given[name] in ("", None)

    def _imply(self, values: dict[str, object], wrong: set[str]) -> None:
        """Carry out switches that are another spelling of a value. One that contradicts what is given is a problem."""
        for switch in self.catalogue.parameters:
            if switch.spec.implies is None or values[switch.attribute] is not True:
                continue
            name, value = switch.spec.implies
            other = self.catalogue.by_name[name]
            if values[name] not in (other.default, value):
                wrong.add(switch.attribute)
                message = f"means {other.key} {value}, but {other.key} is {values[name]}; set one of the two back."
                self._problem(switch.key, True, message)
            elif name not in wrong:
                values[name] = value

    def _second(
        self, raw: object, values: Mapping[str, object], info: ModeInfo
    ) -> tuple[Job | None, dict[str, object] | None]:
        """The job of the second pass when it is used, else its object as it is."""
        used = bool(values.get("use_2nd_pass_settings")) and info.second is not None
        if raw is None or raw in ("", "None"):
            if used:
                message = "is missing although use_2nd_pass_settings is on; give its settings or switch that off."
                self._problem(SECOND_PASS, raw, message)
            return None, None
        if not isinstance(raw, Mapping):
            self._problem(SECOND_PASS, raw, "must be an object with settings of its own, or be left out.")
            return None, None
        if not used:
            fault = _not_plain(raw)
            if fault:
                self._problem(SECOND_PASS, raw, fault)
            return None, None if fault else copy.deepcopy(dict(raw))
        inner = _Reading(self.catalogue, self.traintrain, False, f"{SECOND_PASS}.", self.problems, self.warnings)
        return inner.read(raw, str(values["mode"])), None

    def _unknown(self, rest: dict[str, object]) -> tuple[dict[str, object], bool]:
        """The unknown keys that are kept, and whether the settings came from a TrainTrain file."""
        traintrain, kept = self.traintrain, rest
        if not traintrain:
            inside = rest.pop(TRAINTRAIN, None)
            traintrain = inside is not None
            self._refuse_unknown(rest)
            if inside is not None and not isinstance(inside, Mapping):
                self._problem(TRAINTRAIN, inside, "must be an object with kept TrainTrain settings; remove it.")
            kept = dict(inside) if isinstance(inside, Mapping) else {}
        fault = _not_plain(kept)
        if fault:
            self._problem(TRAINTRAIN, kept, fault)
            return {}, traintrain
        if kept:
            where = " of the second pass" if self.prefix else ""
            self.warnings.append(f"Kept from TrainTrain{where}, but without effect here: {', '.join(sorted(kept))}.")
        return copy.deepcopy(kept), traintrain

    def _refuse_unknown(self, rest: Mapping[str, object]) -> None:
        known = {name.lower(): parameter.key for name, parameter in self.catalogue.by_name.items()}
        for key, value in rest.items():
            known_there = kohya.hint(key) if isinstance(key, str) else ""
            near = known_there or (did_you_mean(key, known) if isinstance(key, str) else "")
            todo = kohya.advice(key) if known_there else "Correct its spelling or remove it."
            self._problem(str(key)[:80], value, f"is not a setting.{near} {todo}")

    def _section(self, section: type, values: Mapping[str, object]) -> object:
        return section(**{parameter.attribute: values[parameter.attribute] for parameter in parameters_of(section)})

    def _check(self, job: Job, info: ModeInfo, wrong: set[str], tags: frozenset[str]) -> None:
        """Apply the rules whose fields are all there and all right, and shown at all."""
        for rule in (*CORE_RULES, *IDLE_RULES, *self.catalogue.rules):
            known = all(name in self.catalogue.by_name for name in rule.fields)
            if known and info.name and not self.catalogue.by_name[rule.fields[0]].shown_in(tags):
                continue
            if not known or wrong & set(rule.fields) or (rule.complete and not self.complete):
                continue
            message = rule.check(job, info)
            if message:
                self._tell(rule, self.catalogue.by_name[rule.fields[0]], job, message)

    def _tell(self, rule: Rule, parameter: Parameter, job: Job, message: str) -> None:
        problem = Problem(self.prefix + parameter.key, job.value(parameter.attribute), message)
        if rule.warning:
            self.warnings.append(str(problem))
        else:
            self.problems.append(problem)

    def _tell_hidden(self, given: Mapping[str, object], values: Mapping[str, object], info: ModeInfo) -> None:
        """Warn of values that the mode does not use."""
        kind = str(values.get("network_type", ""))
        tags = self.catalogue.tags(info, kind, second=bool(self.prefix))
        owned = frozenset[str]().union(*self.catalogue.types.values())
        for parameter in self.catalogue.parameters:
            name = parameter.attribute
            shown = parameter.shown_in(tags) and not (self.prefix and parameter.section in OF_THE_RUN)
            if name in given and values[name] != parameter.default and name not in ALWAYS and not shown:
                if self.prefix:
                    told = f"{self.prefix}{parameter.key} has no effect: the first pass's counts for both."
                    self.warnings.append(told)
                    continue
                by_type = parameter.spec.needs in owned and "steps" in info.needs
                where = f"with network_type {kind}" if by_type else f"in mode {info.name}"
                self.warnings.append(f"{parameter.key} has no effect {where}.")

    def _problem(self, key: str, value: object, message: str) -> None:
        self.problems.append(Problem(self.prefix + key, value, message))


def _not_plain(value: object, depth: int = 0) -> str:
    """Why a value that is only kept could not be written back, "" when it could."""
    if depth > DEEPEST:
        return f"is nested more than {DEEPEST} deep; remove it."
    if isinstance(value, str):
        return "holds a character that cannot be stored; remove it." if FORBIDDEN.search(value) else ""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            return "has a key that is not a text; remove it."
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    else:
        return _not_plain_scalar(value)
    return next((fault for part in parts if (fault := _not_plain(part, depth + 1))), "")


def _not_plain_scalar(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isfinite(value) else "holds a number that is not finite, which JSON cannot say; remove it."
    if isinstance(value, int):
        return "" if value.bit_length() <= 400 else "holds a number with more than 100 digits; remove it."
    return "" if value is None else f"holds a {type(value).__name__}, which JSON cannot say; remove it."
