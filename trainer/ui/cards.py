"""Where a parameter stands in the form: which card, by its group, its section and who carries its tag."""

from __future__ import annotations

from dataclasses import dataclass

from ..params import core
from ..params.catalogue import Catalogue
from ..params.table import Parameter


@dataclass(frozen=True)
class Card:
    """A box of the form with a heading. `name` is fit for an id."""

    name: str
    title: str


TASK = Card("task", "Model")
LEARN = Card("learn", "What to learn")
NETWORK = Card("network", "Network")
TRAIN = Card("train", "Training")
BLOCKS = Card("blocks", "Blocks")
SAVE = Card("save", "Saving and watching")
SECOND = Card("second", "2nd pass")

CARDS = (TASK, LEARN, NETWORK, TRAIN, BLOCKS, SAVE, SECOND)
"""In the order of the form."""

_BY_GROUP = {core.PROMPTS: LEARN, core.IMAGES: LEARN, core.BLOCK: BLOCKS, core.SECOND: SECOND, core.TASK: TASK}
_BY_SECTION: dict[type, Card] = {
    core.Network: NETWORK, core.Images: LEARN, core.Train: TRAIN, core.Pair: LEARN,
    core.Save: SAVE, core.Log: SAVE, core.Sample: SAVE,
}  # fmt: skip


EVERYBODYS = frozenset({"", "steps"})
"""Tags that say nothing about whose a parameter is."""


def card_of(parameter: Parameter, catalogue: Catalogue) -> Card:
    """The card a parameter belongs to. Sections of adapter types go to the network, those of modes to what is learnt,
    those of stages to the training; a name that begins with network_ or export_ is the network's.
    """
    if parameter.spec.group in _BY_GROUP:
        return _BY_GROUP[parameter.spec.group]
    if parameter.section in _BY_SECTION:
        return _BY_SECTION[parameter.section]
    if parameter.attribute.startswith(("network_", "export_")):
        return NETWORK
    own = {parameter.spec.needs} - EVERYBODYS
    beside = {one.spec.needs for one in catalogue.parameters if one.section is parameter.section} - EVERYBODYS
    if any((own or beside) & tags for tags in catalogue.types.values()):
        return NETWORK
    modes = [mode.needs | (mode.second or frozenset()) for mode in catalogue.modes.values()]
    return LEARN if any(own & tags for tags in modes) else TRAIN
