"""The form, made from the table of parameters: every parameter of every mode and adapter type, in cards.

What is seen at a moment follows from tags, which the page's script compares as `Parameter.shown_in` does.
"""

from __future__ import annotations

from ..params.catalogue import Catalogue
from ..params.widgets import Widget, widgets
from .cards import BLOCKS, CARDS, LEARN, SECOND, TASK, Card, card_of
from .fields import Place, button, field
from .html import Child, Html, element

FEWEST_TO_FOLD = 2


def tags(catalogue: Catalogue) -> dict[str, object]:
    """What decides which fields are seen. Mode → its help, and by adapter type the tags of its first and its second
    pass (None without one): a field is shown when its tag is among them, or when it has none.
    """
    return {
        name: {
            "help": mode.help,
            "first": {kind: sorted(catalogue.tags(mode, kind)) for kind in catalogue.types},
            "second": None
            if mode.second is None
            else {kind: sorted(catalogue.tags(mode, kind, second=True)) for kind in catalogue.types},
        }
        for name, mode in catalogue.modes.items()
    }


def form(catalogue: Catalogue) -> Html:
    """All cards. Fields of the second pass stand in the last one, under the switch that turns them on."""
    default = str(catalogue.by_name["mode"].default)
    described = widgets(catalogue, default)
    by_card: dict[str, list[Widget]] = {}
    for widget in described:
        by_card.setdefault(card_of(catalogue.by_name[widget.key], catalogue).name, []).append(widget)
    cards = [_card(card, by_card.get(card.name, []), catalogue) for card in CARDS if card is not SECOND]
    return element(
        "form",
        cards,
        _second(catalogue, by_card.get(SECOND.name, []), described),
        id="atelier_form",
        class_="atelier-form",
        novalidate=True,
        autocomplete="off",
    )


def _card(card: Card, held: list[Widget], catalogue: Catalogue) -> Html:
    everyday = [widget for widget in held if not widget.advanced]
    folded = [widget for widget in held if widget.advanced]
    if len(folded) < FEWEST_TO_FOLD:
        everyday, folded = held, []
    heading: Child = element("h3", card.title)
    if card is TASK:
        heading = element(
            "div",
            element("h3", card.title),
            button("", "lists_refresh", kind="small", sign="refresh", title="Refresh models and files"),
            class_="atelier-row",
        )
    tries = [_pairs(), _tries()] if card is LEARN else None
    inside: Child = [_fields(everyday, catalogue), tries, _fold(folded, catalogue)]
    if card is BLOCKS:
        inside = element("details", element("summary", card.title, element("b", data_count=True)), inside)
        heading = None
    return element("section", heading, inside, class_="atelier-card", id=f"atelier_card_{card.name}")


def _pairs() -> Html:
    """Original and target side by side, for modes that compare them; the script fills it."""
    return element(
        "div",
        element("p", id="atelier_pairs_note", class_="atelier-note", role="status"),
        element("div", id="atelier_pairs_grid", class_="atelier-pairs"),
        id="atelier_pairs",
        hidden=True,
    )


def _tries() -> Html:
    """Buttons that show what the model makes of the two prompts, for modes that have them."""
    names = {"original": "Generate Original", "target": "Generate Target", "both": "Generate Both"}
    title = "Generate this now, without training; seed and size are under Before and after"
    return element(
        "div",
        [button(text, f"draw_{name}", kind="small", title=title) for name, text in names.items()],
        class_="atelier-row atelier-wrap",
        data_prompts=True,
        hidden=True,
    )


def _fields(held: list[Widget], catalogue: Catalogue, second: bool = False) -> Html:
    places = [(widget, Place(catalogue.by_name[widget.key].spec.needs, second)) for widget in held]
    return element("div", [field(widget, place) for widget, place in places], class_="atelier-fields")


def _fold(held: list[Widget], catalogue: Catalogue, second: bool = False) -> Child:
    if not held:
        return None
    return element(
        "details",
        element("summary", "Options", element("b", data_count=True)),
        _fields(held, catalogue, second),
        class_="atelier-fold",
    )


def _second(catalogue: Catalogue, switches: list[Widget], described: tuple[Widget, ...]) -> Html:
    """The second pass: its switch belongs to the job itself, the fields under it to the job inside."""
    skipped = {"mode", *(widget.attribute for widget in switches)}
    own = [widget for widget in described if widget.attribute not in skipped and _fits_second(widget, catalogue)]
    copy = button(
        "Copy settings from 1st pass", "copy_first", sign="copy", title="Fill the 2nd pass with the settings above"
    )
    everyday = [widget for widget in own if not widget.advanced]
    folded = [widget for widget in own if widget.advanced]
    inside = element(
        "div",
        element("div", copy, class_="atelier-row"),
        _fields(everyday, catalogue, True),
        _fold(folded, catalogue, True),
        id="atelier_second",
        hidden=True,
    )
    return element(
        "section",
        element("h3", SECOND.title),
        _fields(switches, catalogue),
        inside,
        class_="atelier-card",
        id=f"atelier_card_{SECOND.name}",
    )


def _fits_second(widget: Widget, catalogue: Catalogue) -> bool:
    """Whether any mode could show the field in its second pass."""
    needs = catalogue.by_name[widget.key].spec.needs
    second = [mode.second for mode in catalogue.modes.values() if mode.second is not None]
    reachable = frozenset[str]().union(catalogue.always, *catalogue.types.values(), *second)
    return bool(second) and (not needs or needs in reachable)
