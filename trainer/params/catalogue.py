"""The catalogue that all views are made from: every parameter, mode and rule there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .field import ModeInfo
from .job import Job
from .rules import Rule
from .table import Parameter, parameters_of


@dataclass(frozen=True, eq=False)
class Catalogue:
    """All parameters and modes there are.

    `choices`: key or attribute → names, for parameters whose names come from a registry. `aliases`: key or attribute →
    (other spelling → name). `types`: adapter type → the tags it carries. `always`: tags that every mode carries.
    `rules`: what must hold beside the core rules. `notes`: attribute → name to choose → what it is. Raises ValueError
    when two parameters share a name, or a mode or type carries a tag that no parameter has.
    """

    sections: tuple[type, ...]
    modes: Mapping[str, ModeInfo] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    aliases: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    types: Mapping[str, frozenset[str]] = field(default_factory=dict)
    always: frozenset[str] = frozenset()
    rules: tuple[Rule, ...] = ()
    notes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    parameters: tuple[Parameter, ...] = field(init=False, repr=False)
    by_name: Mapping[str, Parameter] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parameters = tuple(parameter for section in self.sections for parameter in parameters_of(section))
        by_name: dict[str, Parameter] = {}
        for parameter in parameters:
            for name in {parameter.key, parameter.attribute}:
                if name in by_name:
                    raise ValueError(f"the parameter {name} is declared twice")
                by_name[name] = parameter
        tags = {parameter.spec.needs for parameter in parameters}
        carried = {f"mode {mode.name}": mode.needs | (mode.second or frozenset()) for mode in self.modes.values()}
        for carrier, needs in {**carried, **self.types, "every mode": self.always}.items():
            if needs - tags:
                raise ValueError(f"{carrier} needs {sorted(needs - tags)}; tags are {sorted(tags - {''})}")
        object.__setattr__(self, "parameters", parameters)
        object.__setattr__(self, "by_name", by_name)

    def tags(self, mode: ModeInfo, network_type: str, second: bool = False) -> frozenset[str]:
        """The tags of the parameters that matter for a mode (or its second pass) with an adapter type.

        Types and what every mode carries are about training by steps.
        """
        needs = (mode.second or frozenset()) if second else mode.needs
        if "steps" not in needs:
            return needs
        return needs | self.types.get(network_type, frozenset()) | self.always

    def in_effect(self, job: Job) -> Job:
        """The job with the default in place of every value that its mode and adapter type do not show.

        What a form does not show has no effect. Only the seed stays: it was drawn for the whole run.
        """
        mode, kind = str(job.value("mode")), str(job.value("network_type"))
        tags = self.tags(self.modes[mode], kind)
        hidden = (one for one in self.parameters if not one.shown_in(tags) and one.attribute != "train_seed")
        return job.replace(**{one.attribute: one.default for one in hidden})

    def choices_of(self, parameter: Parameter) -> tuple[str, ...]:
        """The names a parameter chooses from; empty when any value in range is right."""
        if parameter.attribute == "mode":
            return tuple(self.modes)
        given = self.choices.get(parameter.attribute, self.choices.get(parameter.key))
        return tuple(parameter.spec.choices if given is None else given)

    def aliases_of(self, parameter: Parameter) -> Mapping[str, str]:
        """Other spellings of the names, in lower case."""
        given = self.aliases.get(parameter.attribute, self.aliases.get(parameter.key, {}))
        return {alias.lower(): name for alias, name in given.items()}
