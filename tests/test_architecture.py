"""The house as code: who may import whom, and the few rules a reader would otherwise have to remember."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "trainer"
FILES = sorted(PACKAGE.rglob("*.py"))

# Row 0 is importable everywhere. A dotted name allows that module alone.
ROW_0 = {"errors", "places", "events", "lock", "writing", "paths", "jsontext", "contracts"}
ROW_2_BASE = {"maths", "registry", "params.field"}
DECLARING = {"params.field", "params.core", "params.job", "params.network", "params.rules", "params.spaces"}
ROW_3 = {"modes", "stages"}
BELOW_ENGINE = {"maths", "params", "registry", "models", "data", "adapters", "optim", *ROW_3}
BELOW_UI = {*BELOW_ENGINE, "engine", "jobs", "demo", "tools"}
TENSORS = {"torch", "safetensors", "numpy", "tqdm"}
LIBRARIES = {"diffusers", "transformers", "tokenizers"}

# Package or module of trainer/: what of ours it may import, which third parties.
MAY_IMPORT: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), set()),
    "places": (set(), set()),
    "events": (set(), set()),
    "lock": (set(), set()),
    "writing": (set(), set()),
    "paths": (set(), set()),
    "jsontext": (set(), set()),
    "contracts": (set(), {"torch"}),
    "registry": (set(), set()),
    "params": ({"registry"}, set()),
    "maths": (set(), {"torch"}),
    "models": (ROW_2_BASE, TENSORS | LIBRARIES),
    "data": (ROW_2_BASE, TENSORS | {"PIL"}),
    "adapters": (ROW_2_BASE | DECLARING, TENSORS | {"lycoris.functional"}),
    "optim": (ROW_2_BASE, TENSORS | LIBRARIES | {"pytorch_optimizer", "bitsandbytes"}),
    "modes": ({"maths", "registry", *DECLARING}, {"torch"}),
    "stages": ({"maths", "registry", "modes", "adapters.file", "adapters.checked", *DECLARING}, {"torch"}),
    "engine": (BELOW_ENGINE, TENSORS | {"PIL", "accelerate", "psutil", "tensorboard", "wandb"}),
    "jobs": ({"params"}, set()),
    "demo": (BELOW_ENGINE | {"engine"}, TENSORS | LIBRARIES | {"PIL"}),
    "tools": (BELOW_ENGINE | {"engine"}, TENSORS | LIBRARIES | {"PIL", "peft", "lycoris"}),
    "ui": (
        BELOW_UI - {"engine", "data", "optim", "models"},
        {"gradio", "fastapi", "starlette", "pandas", "matplotlib", "PIL"},
    ),
    "hosts": (
        {"jobs", "params", "registry", "tools", "demo", "engine.arguments"}
        | {"models.base", "models.detect", "models.live", "models.room"},
        {"torch", "modules", "modules_forge", "backend", "ldm_patched"},
    ),
    "cli": (BELOW_UI | {"ui", "hosts"}, {"tqdm", "torch", "PIL", "psutil", "fastapi", "gradio", "uvicorn"}),
    "__main__": ({"cli"}, set()),
    "__init__": (set(), set()),
}


def imports(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Line, dotted name and whether it is ours, of every import in the file, also those inside functions."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name, False) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, f"{node.module}.{name.name}", False) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else ()))
            yield from ((node.lineno, ".".join((*base[1:], name.name)), True) for name in node.names)


def allowed(name: str, these: set[str]) -> bool:
    return any(name == one or name.startswith(one + ".") for one in these)


def unit(path: Path) -> str:
    """The package or module directly below trainer/ that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_package_has_a_row() -> None:
    assert {unit(path) for path in FILES} <= set(MAY_IMPORT)


@pytest.mark.parametrize("name", sorted({unit(path) for path in FILES}))
def test_imports_go_downwards_only(name: str) -> None:
    ours, third = MAY_IMPORT[name]
    wrong = []
    for path in FILES:
        if unit(path) != name:
            continue
        for line, target, is_ours in imports(path):
            top = target.split(".")[0]
            if is_ours and not allowed(target, ours | ROW_0 | {name}):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports ours: {target}")
            if not is_ours and top == "trainer":
                wrong.append(f"{path.relative_to(ROOT)}:{line} must import {target} relatively: hosts share the name")
            if not is_ours and top != "trainer" and top not in sys.stdlib_module_names and not allowed(target, third):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def _defined(path: Path) -> set[str]:
    """The names that a module has at its top, in conditions and attempts too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return found


def test_imported_names_are_there() -> None:
    """Some modules are imported late, and those of hosts where a WebUI is: a name that is gone shows there alone."""
    missing = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            place = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            names = _defined(source)
            for alias in node.names:
                inside = (place / alias.name).is_dir() or (place / f"{alias.name}.py").is_file()
                if alias.name not in names and not inside:
                    missing.append(f"{path.relative_to(ROOT)}:{node.lineno} {alias.name} of {source.relative_to(ROOT)}")
    assert not missing, missing


def _module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def _targets(path: Path, known: set[str]) -> set[str]:
    """The modules of ours that a file imports, anywhere in it."""
    ours = (target for _, target, is_ours in imports(path) if is_ours)
    return {target if target in known else target.rpartition(".")[0] for target in ours} & known - {_module(path)}


def test_no_circle_of_imports() -> None:
    """Not among those within functions or for type checkers alone either: each module stands on those below it."""
    known = {_module(path) for path in FILES}
    left = {_module(path): _targets(path, known) for path in FILES}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"in circles, or on top of them: {sorted(left)}"


def test_files_and_functions_stay_small() -> None:
    """400 and 60 lines. Split by reason to change."""
    wrong = []
    for path in [*FILES, ROOT / "launch.py"]:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            wrong.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                count = sum(arg.arg not in ("self", "cls") for arg in [*node.args.args, *node.args.kwonlyargs])
                if length > 60:
                    wrong.append(f"{where}: {length} lines")
                if count > 9:
                    wrong.append(f"{where}: {count} parameters")
    assert not wrong, "\n".join(wrong)


def test_no_bare_except_and_no_assert() -> None:
    wrong = []
    for path in [*FILES, ROOT / "launch.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} catches everything")
            if isinstance(node, ast.Assert):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} asserts: python -O removes that, raise an error")
    assert not wrong, "\n".join(wrong)


def test_errors_of_the_system_are_put_into_words_in_one_place() -> None:
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = (
                node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else ""
            )
            if named == "strerror" and path.name != "writing.py":
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} words an error of the system: use writing.why")
    assert not wrong, "\n".join(wrong)


PARSERS = {"jsontext.py", "adapters/file.py", "engine/state.py"}
"""Where JSON may be parsed directly: the guarded place itself, and headers that we have just written."""


def test_strangers_meet_one_guarded_place_of_each_kind() -> None:
    """JSON, home folders and pickles are read in one place each, with limits; the demo's files are our own."""
    wrong = []
    for path in FILES:
        place = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called = f"{getattr(node.func.value, 'id', '')}.{node.func.attr}"
            if called in ("json.loads", "json.load") and place not in PARSERS and not place.startswith("demo/"):
                wrong.append(f"{place}:{node.lineno} parses JSON: use jsontext")
            if node.func.attr == "expanduser" and place != "paths.py":
                wrong.append(f"{place}:{node.lineno} expands a path: use paths.expanded")
            loads = ("torch.load", "serialization.load", "pickle.loads", "pickle.load")
            if called in loads and not place.startswith("demo/"):
                wrong.append(f"{place}:{node.lineno} unpickles: use models.checkpoints")
    assert not wrong, "\n".join(wrong)


def test_hosts_find_one_script_and_no_modules_among_the_data() -> None:
    scripts = list((ROOT / "scripts").glob("*.py"))
    assert len(scripts) == (1 if (ROOT / "scripts").exists() else 0), "hosts execute every file there"
    for folder in ("json", "logs", "presets", "locks"):
        found = [path for path in (ROOT / folder).rglob("*.py") if path.is_file()]
        assert not found, f"{folder}/ is data; a module there can shadow the standard library's: {found}"


# Unfinished work, and places that exist only where something was written: package indexes, absolute folders.
FORBIDDEN = re.compile(
    r"\b(TODO|FIXME|XXX)\b"
    r"|https?://\S*(/simple\b|/whl\b|pythonhosted)|(?<![\w.])/(work|root|opt)/\w"
)


def test_nothing_unfinished_and_no_private_places() -> None:
    known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    wrong = []
    for name in known.stdout.splitlines():
        path = ROOT / name
        if path == Path(__file__).resolve() or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        wrong += [f"{name}: {found.group()}" for found in FORBIDDEN.finditer(text)]
    assert not wrong, "\n".join(wrong)


WEIGHT_READERS = ("adapters", "stages", "modes", "engine", "tools")
READS_THE_STORED_WEIGHT = {
    "adapters/folded.py": "adds ΔW to the stored numbers themselves and puts them back",
}


def weight_reads(path: Path) -> Iterator[int]:
    """Lines that read the weight of a module other than one's own, by attribute or by name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Attribute(attr="weight", value=ast.Name(id="self")):
                continue
            case ast.Attribute(attr="weight"):
                yield node.lineno
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value="weight"), *_]):
                yield node.lineno


def test_base_weights_are_read_through_weight_of_alone():
    found = [
        f"{name}:{line}"
        for path in FILES
        if (name := path.relative_to(PACKAGE).as_posix()).split("/")[0] in WEIGHT_READERS
        and name not in READS_THE_STORED_WEIGHT
        for line in weight_reads(path)
    ]
    assert not found, f"read the weight of a base layer with maths.weights.weight_of instead: {found}"
    assert all(any(weight_reads(PACKAGE / name)) for name in READS_THE_STORED_WEIGHT), "an exception nobody needs"


ASKS_WHAT_IS_PREDICTED = {
    "maths/process.py": "the noise process itself",
    "models/noise.py": "reads what a file says of its model",
}
PREDICTIONS = {"epsilon", "v_prediction", "flow", "EPSILON", "V_PREDICTION", "FLOW"}


def prediction_comparisons(path: Path) -> Iterator[int]:
    """Lines that compare a prediction type, by the name of the variable or by what it is compared with."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
            sides = [node.func.value, *node.args]
        elif isinstance(node, ast.Compare) and not isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            sides = [node.left, *node.comparators]
        else:
            continue
        for side in sides:
            name = getattr(side, "attr", getattr(side, "id", getattr(side, "value", "")))
            if name in PREDICTIONS or str(name).endswith(("prediction", "prediction_type")):
                yield node.lineno


def test_nothing_but_the_noise_process_asks_what_a_model_predicts():
    """What depends on it is a method of `NoiseProcess`, so that another kind of process is one more class."""
    found = [
        f"{name}:{line}"
        for path in FILES
        if (name := path.relative_to(PACKAGE).as_posix()) not in ASKS_WHAT_IS_PREDICTED
        for line in prediction_comparisons(path)
    ]
    assert not found, f"make it a method of maths.process.NoiseProcess: {found}"
    needless = [name for name in ASKS_WHAT_IS_PREDICTED if not any(prediction_comparisons(PACKAGE / name))]
    assert not needless, f"an exception nobody needs: {needless}"
