"""Every word the page can show that is its own: in its HTML, and in the calls of its scripts that translate."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from trainer.params.catalogue import Catalogue
from trainer.places import ROOT
from trainer.ui.page import page

SHOWN = ("title", "placeholder", "aria-label")
# Numbers, signs, names of parameters and of things to choose: the same in every language.
SAME = re.compile(r"[\W\d_]*|EN|日本語|Atelier|LoRA|CFG scale|NaN")


class _Words(HTMLParser):
    def __init__(self, parameters: set[str]) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._skip = 0
        self._parameters = parameters

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        for name in SHOWN:
            if given.get(name) and not (name == "placeholder" and "data-key" in given):
                self.found.add(str(given[name]))
        self._skip = int(tag == "option" or "atelier-help" in (given.get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        self._skip = 0

    def handle_data(self, data: str) -> None:
        if not self._skip and data.strip() not in self._parameters:
            self.found.add(data.strip())


def of_page(catalogue: Catalogue) -> set[str]:
    """Texts, titles and placeholders of the page; not the helps and names of parameters, nor what can be chosen."""
    same = {parameter.key.replace("_", " ") for parameter in catalogue.parameters}
    same |= {parameter.spec.unit for parameter in catalogue.parameters} | {"image_size"}
    same |= {choice for parameter in catalogue.parameters for choice in catalogue.choices_of(parameter)}
    same |= {parameter.spec.help for parameter in catalogue.parameters}
    words = _Words(same | {"all", "none", "IN", "OUT"})
    words.feed(page(catalogue))
    return {word for word in words.found if not SAME.fullmatch(word) and not re.fullmatch(r"[≥≤\d].*", word)}


def of_scripts() -> set[str]:
    """What the scripts hand to `t` and `say`, and the tables they take words from."""
    found: set[str] = set()
    for path in sorted((ROOT / "javascript").glob("*.js")):
        text = path.read_text(encoding="utf-8")
        for call in re.finditer(r"\b(?:t|say)\(", text):
            found |= set(_literals(_arguments(text, call.end())))
        for table in re.findall(r"const (?:STATES|ENDINGS|WORDS|EMPTY|words) = (.*?);\n", text, re.DOTALL):
            found |= set(_literals(table))
    ids = re.compile(r"[a-z_-]+|#.*|\W*|\{\w+\}|.*\[data-.*|button, .*")
    return {word for word in found if not ids.fullmatch(word) or word in ("running", "failed", "stopped", "written")}


def _arguments(text: str, start: int) -> str:
    depth, at = 1, start
    while depth:
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
    return text[start : at - 1]


def _literals(code: str) -> list[str]:
    return [literal.replace('\\"', '"') for literal in re.findall(r'"((?:[^"\\\n]|\\.)*)"', code)]


def of_stages() -> set[str]:
    """What the engine calls the work before and between steps: the page translates it with the progress it shows."""
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "trainer").rglob("*.py"))
    return {name for text in texts for name in re.findall(r"\bprogress\(\s*\"([^\"]+)\"", text)}
