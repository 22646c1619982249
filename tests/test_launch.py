"""The start without a WebUI: what launch.py installs, when it does not, and what it says. No network, no real pip."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("launch", ROOT / "launch.py")
assert SPEC and SPEC.loader
launch = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(launch)

CPU_TORCH = "__version__ = '2.13.0+cpu'\ndebug = False\ncuda: Optional[str] = None\nhip: Optional[str] = None\n"
CUDA_TORCH = "__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"


class FakeMachine(launch.Machine):  # type: ignore[misc, name-defined]
    """Pretends to run commands: makes the environment's files, fails where a test says so, remembers everything."""

    def __init__(self, windows: bool = False, card: bool = False, python: str = "3.11.7", **environ: str) -> None:
        self.windows = windows
        self.environ = environ
        self.card, self.python, self.torch = card, python, CPU_TORCH
        self.commands: list[list[str]] = []
        self.options: list[dict[str, Any]] = []
        self.failing = ""

    def run(self, command: Sequence[str], **options: Any) -> int:
        command = list(command)
        self.commands.append(command)
        self.options.append(options)
        if self.failing and self.failing in " ".join(command):
            return 3
        if "venv" in command:
            folder = Path(command[-1])
            python = folder / ("Scripts/python.exe" if self.windows else "bin/python")
            python.parent.mkdir(parents=True)
            python.touch()
            (folder / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion = {self.python}\n")
        if "install" in command and any(word.startswith("torch") for word in command):
            site = "Lib/site-packages" if self.windows else "lib/python3.11/site-packages"
            version = Path(command[0]).parent.parent / site / "torch" / "version.py"
            version.parent.mkdir(parents=True, exist_ok=True)
            version.write_text(self.torch)
        return 0

    def become(self, command: Sequence[str], environ: dict[str, str]) -> int:
        return self.run(command, env=environ)

    def has_nvidia_card(self) -> bool:
        return self.card

    def said(self, *words: str) -> list[str]:
        """The commands with all of `words`, each as one line."""
        return [line for line in map(" ".join, self.commands) if all(word in line for word in words)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "my folder with spaces"
    shutil.copytree(ROOT / "locks", folder / "locks")
    return folder


def test_the_first_start_installs_everything_in_order_and_runs(root: Path) -> None:
    machine = FakeMachine()
    assert launch.main(["train", "job.json"], str(root), machine) == 0
    python = str(root / ".venv/bin/python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--no-compile"]
    assert machine.commands == [
        [sys.executable, "-m", "venv", "--clear", str(root / ".venv")],
        [*pip, "torch==2.13.0"],
        [*pip, "-r", str(root / "locks/newest.txt")],
        [*pip, "--no-deps", "-r", str(root / "locks/files.txt")],
        [python, "-m", "trainer", "train", "job.json"],
    ]
    environ = machine.options[-1]["env"]
    assert environ["PYTHONPATH"] == str(root) and environ["PYTHONSAFEPATH"] == "1"
    assert "cwd" not in machine.options[-1], "a path the user types is relative to where the user is"


def test_the_second_start_only_runs(root: Path) -> None:
    launch.main(["demo"], str(root), FakeMachine())
    machine = FakeMachine()
    launch.main([], str(root), machine)
    launch.main(["--port", "8000", "--listen"], str(root), machine)
    started = [str(root / ".venv/bin/python"), "-m", "trainer", "app"]
    assert machine.commands == [started, [*started, "--port", "8000", "--listen"]]


def test_windows_paths_and_quotes(root: Path) -> None:
    machine = FakeMachine(windows=True, TORCH_COMMAND='pip install "torch==2.13.0" --find-links C:\\wheels')
    launch.main(["demo"], str(root), machine)
    assert machine.commands[1][0] == str(root / ".venv" / "Scripts" / "python.exe")
    assert machine.commands[1][-3:] == ["torch==2.13.0", "--find-links", "C:\\wheels"]


def test_a_changed_lock_is_installed_again_and_torch_is_not(root: Path) -> None:
    launch.main(["demo"], str(root), FakeMachine())
    with (root / "locks/newest.txt").open("a") as file:
        file.write("# changed\n")
    machine = FakeMachine()
    launch.main(["demo"], str(root), machine)
    assert machine.said("install", "newest.txt") and not machine.said("torch==") and not machine.said("files.txt")
    lock = root / "locks/newest.txt"
    lock.write_bytes(lock.read_bytes().replace(b"\n", b"\r\n"))
    machine = FakeMachine()
    launch.main(["demo"], str(root), machine)
    assert not machine.said("-m pip"), "another line ending is not another lock"


def test_torch_command_is_honoured_and_a_new_one_replaces_torch(root: Path) -> None:
    other = FakeMachine(TORCH_COMMAND="pip install torch==2.1.2 torchvision==0.16.2")
    launch.main(["demo"], str(root), other)
    assert other.said("install", "torch==2.1.2", "torchvision==0.16.2") and not other.said("torch==2.13.0")
    assert not other.said("uninstall")
    machine = FakeMachine()
    launch.main(["demo"], str(root), machine)
    done = machine.said("torch")
    assert "uninstall" in done[0] and "torch==2.13.0" in done[1]
    assert machine.said("newest.txt"), "another torch may need other packages"


def test_a_torch_command_that_is_none_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = FakeMachine(TORCH_COMMAND="conda install pytorch")
    assert launch.main(["demo"], str(root), machine) == 1
    assert "TORCH_COMMAND must be a pip command" in capsys.readouterr().err
    assert not machine.said("trainer demo")


def test_python_3_10_gets_packages_that_support_it(root: Path) -> None:
    machine = FakeMachine(python="3.10.6")
    launch.main(["demo"], str(root), machine)
    assert machine.said("python310.txt") and not machine.said("newest.txt")


@pytest.mark.parametrize(
    ("failing", "words"),
    [
        ("venv --clear", "python3-venv"),
        ("--no-compile torch", "could not install torch"),
        ("newest.txt", "needs the network"),
    ],
)
def test_failures_say_what_to_do_and_the_next_start_goes_on(
    root: Path, capsys: pytest.CaptureFixture[str], failing: str, words: str
) -> None:
    machine = FakeMachine()
    machine.failing = failing
    assert launch.main(["demo"], str(root), machine) == 1
    assert words in capsys.readouterr().err and not machine.said("trainer demo")
    again = FakeMachine()
    assert launch.main(["demo"], str(root), again) == 0
    assert again.said("trainer demo")
    assert bool(again.said("install --no-compile torch")) == (failing != "newest.txt"), "what was installed is kept"


def test_a_damaged_stamp_or_environment_is_made_anew(root: Path) -> None:
    launch.main(["demo"], str(root), FakeMachine())
    stamp = root / ".venv" / launch.STAMP
    for damage in ("", "[]", '{"torch"'):
        stamp.write_text(damage)
        machine = FakeMachine()
        assert launch.main(["demo"], str(root), machine) == 0 and machine.said("newest.txt")
        json.loads(stamp.read_text())
    shutil.rmtree(root / ".venv")
    machine = FakeMachine()
    assert launch.main(["demo"], str(root), machine) == 0 and machine.said("venv --clear")


def test_an_idle_nvidia_card_is_told_with_the_line_that_mends_it(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch.main(["demo"], str(root), FakeMachine(card=True))
    told = capsys.readouterr().err
    assert "NVIDIA card" in told and 'export TORCH_COMMAND="pip install torch==2.13.0 --index-url' in told
    launch.main(["demo"], str(root), FakeMachine(card=False))
    assert "NVIDIA" not in capsys.readouterr().err
    (root / ".venv/lib/python3.11/site-packages/torch/version.py").write_text(CUDA_TORCH)
    launch.main(["demo"], str(root), FakeMachine(card=True))
    assert "NVIDIA" not in capsys.readouterr().err


def test_the_real_torch_is_understood() -> None:
    import torch

    environment = launch.Environment(str(ROOT), "newest", launch.Machine())
    environment.folder = str(Path(torch.__file__).parents[4])
    if Path(environment.folder, "pyvenv.cfg").exists():
        assert environment.torch_has_gpu_support() == bool(torch.version.cuda or torch.version.hip)


def test_test_runs_all_checks_and_reports_the_first_failure(root: Path) -> None:
    machine = FakeMachine()
    machine.failing = "mypy"
    assert launch.main(["test"], str(root), machine) == 3
    python = str(root / ".venv/bin/python")
    assert machine.said("-r", "test.txt")
    workers = ["-n", str(min(os.cpu_count() or 1, 4)), "--dist", "worksteal"]
    assert machine.commands[-4:] == [
        [python, "-m", "ruff", "check", "."], [python, "-m", "ruff", "format", "--check", "."], [python, "-m", "mypy"],
        [python, "-m", "pytest", *workers],
    ]  # fmt: skip
    assert machine.options[-1]["cwd"] == str(root)
    again = FakeMachine()
    launch.main(["test", "tests/test_launch.py", "-x"], str(root), again)
    assert again.commands == [[python, "-m", "pytest", "tests/test_launch.py", "-x"]]


@pytest.mark.parametrize("words", [["--lock", "forge"], ["--lock=forge"]])
def test_the_forge_set_has_its_own_environment(root: Path, words: list[str]) -> None:
    machine = FakeMachine()
    assert launch.main(["test", *words, "-q"], str(root), machine) == 0
    python = str(root / ".venv-forge/bin/python")
    assert machine.commands[-1] == [python, "-m", "pytest", "-m", "not newest and not everywhere", "-q"]
    assert machine.said("forge.txt") and not machine.said("newest.txt") and not machine.said("ruff")
    assert launch.main(["test", "--lock", "a1112"], str(root), FakeMachine()) == 1


def test_the_a1111_set_stands_in_front_of_the_newest(root: Path) -> None:
    machine = FakeMachine()
    assert launch.main(["test", "--lock", "a1111"], str(root), machine) == 0
    python = str(root / ".venv-a1111/bin/python")
    assert machine.commands[-1][:3] == [python, "-m", "pytest"]
    assert machine.commands[-1][-len(launch.PAGE_TESTS) :] == launch.PAGE_TESTS
    assert all((ROOT / name).is_file() for name in launch.PAGE_TESTS)
    installed = [command for command in machine.commands if "install" in command]
    assert [command[0] == python for command in installed] == [False] * (len(installed) - 1) + [True]
    assert installed[-1][-1].endswith("a1111.txt") and machine.said("newest.txt") and machine.said("test.txt")
    again = FakeMachine()
    assert launch.main(["test", "--lock=a1111", "tests/ui/test_plot.py"], str(root), again) == 0
    page_only = ["-m", "not newest and not everywhere", "tests/ui/test_plot.py"]
    assert again.commands == [[python, "-m", "pytest", *page_only]]


def test_the_packages_behind_are_found(root: Path, tmp_path: Path) -> None:
    for folder in (".venv", ".venv-a1111"):
        (root / folder / "lib" / "python3.11" / "site-packages").mkdir(parents=True, exist_ok=True)
    launch.Environment(str(root), "a1111", FakeMachine()).stand_in_front()
    (pth,) = (root / ".venv-a1111").rglob("*.pth")
    assert pth.read_text().splitlines() == [str(root / ".venv" / "lib" / "python3.11" / "site-packages")]


def test_help_installs_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = FakeMachine()
    assert launch.main(["--help"], str(root), machine) == 0
    assert "python launch.py demo" in capsys.readouterr().out and not machine.commands


def test_only_the_standard_library_and_old_syntax() -> None:
    tree = ast.parse((ROOT / "launch.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {name.name.split(".")[0] for name in node.names} <= sys.stdlib_module_names
        if isinstance(node, ast.ImportFrom):
            assert node.module in sys.stdlib_module_names
        assert not isinstance(node, (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.Nonlocal, ast.AsyncFunctionDef))
        assert not (isinstance(node, ast.arguments) and (node.kwonlyargs or any(a.annotation for a in node.args)))


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for the environment's Python")
def test_the_file_itself_starts_the_environments_python(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "locks", tmp_path / "locks")
    shutil.copy(ROOT / "launch.py", tmp_path)
    launch.main(["demo"], str(tmp_path), FakeMachine())
    python = tmp_path / ".venv/bin/python"
    python.write_text('#!/bin/sh\necho started "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "launch.py"), "demo"], capture_output=True, text=True, timeout=60, cwd="/"
    )
    assert done.stdout.split() == ["started", "-m", "trainer", "demo"], done.stderr


LOCKS = sorted((ROOT / "locks").glob("*.txt"))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_locks_are_exact_and_name_no_place(lock: Path) -> None:
    pins = [line for line in lock.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    for pin in pins:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*(; [a-z_]+ [<=>]+ \"[a-z0-9.]+\")?", pin), pin
    names = [pin.split("==")[0].lower().replace("_", "-") for pin in pins if ";" not in pin]
    assert len(names) == len(set(names)) and "torch" not in names
