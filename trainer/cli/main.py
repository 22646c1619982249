"""The commands. Each imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import AtelierError
from ..events import EventLog
from ..paths import expanded, is_dir
from ..places import ROOT, Places
from .spaces import add_basis, add_curvature
from .streams import steady_streams
from .terminal import Terminal, json_lines

STOPPED = 130
"""The exit status of a run that was stopped and can go on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 refused or failed, 2 wrong usage, 130 stopped."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    options.rest = rest
    if rest and not options.takes_flags:
        parser.error(f"unknown words: {' '.join(rest)}")
    with steady_streams():
        try:
            return int(options.run(options))
        except AtelierError as error:
            print(f"{type(error).__name__}: {error}" if options.verbose else str(error), file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("Ended immediately.", file=sys.stderr)
            return STOPPED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trainer", description="Train LoRA-type adapters for Stable Diffusion.")
    parser.set_defaults(verbose=False, takes_flags=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    _add_app(commands)
    _add_train(commands)

    presets = commands.add_parser("presets", help="list the presets, or show one")
    presets.add_argument("name", nargs="?")
    presets.set_defaults(run=_presets)

    docs = commands.add_parser("docs", help="write the reference of all parameters")
    docs.add_argument("--out", type=Path, default=ROOT / "docs" / "reference" / "parameters.md")
    docs.set_defaults(run=_docs)

    demo = commands.add_parser("demo", help="teach the shipped model a new word and measure the effect")
    demo.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting (repeatable)")
    _add_places(demo)
    demo.set_defaults(run=_demo)

    _add_bench(commands)
    _add_evaluate(commands)
    add_basis(commands)
    add_curvature(commands, _add_places, _places)

    test = commands.add_parser("test", help="run the tests", add_help=False)
    test.set_defaults(run=_test)
    test.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def _add_app(commands: Any) -> None:
    app = commands.add_parser("app", help="the tab as a page of its own, on this machine")
    app.add_argument("--port", type=_port, default=0, help="port to listen on; the first free one from 7860 on if left")
    app.add_argument("--listen", action="store_true", help="let other machines reach it too")
    app.add_argument("--data-root", type=Path, default=None, help="with --listen: the folder training data may lie in")
    app.add_argument("--auth", default="", metavar="NAME:PASSWORD", help="ask for a password (or ATELIER_AUTH)")
    app.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="name it is reached by (proxy)")
    _add_places(app)
    app.set_defaults(run=_app)


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="time a training step against PEFT, LyCORIS and the bare UNet")
    bench.add_argument(
        "--size",
        nargs="+",
        default=["small"],
        choices=("small", "sd15"),
        help="sizes of the UNet, one after the other: 5.5 M and 860 M parameters",
    )
    bench.add_argument("--steps", type=int, default=12, help="measured repeats (two more warm up)")
    bench.add_argument("--batch", type=int, default=None, help="samples per step (small: 8, sd15: 1)")
    bench.add_argument("--latents", type=int, default=8, help="side of the square latents")
    bench.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="wall, or CPU seconds of the process")
    bench.add_argument("--types", default="", help="adapter types against plain LoRA, as in loha,lokr+use_dora, or all")
    bench.set_defaults(run=_bench)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="measure modes or adapter types on the painted world")
    evaluate.add_argument("suite", choices=("modes", "adapters"))
    evaluate.add_argument("--quick", action="store_true", help="one seed at the shipped settings")
    evaluate.add_argument("--json", action="store_true", help="one JSON object per line")
    evaluate.add_argument("--only", default="", metavar="TEXT", help="only scenarios whose name holds this text")
    evaluate.add_argument("--write", action="store_true", help="write the tables into docs/lab/")
    evaluate.add_argument(
        "--workers",
        type=_workers,
        default=min(os.cpu_count() or 1, 8),
        metavar="N",
        help="processes that share the work, one thread each (default: one per core)",
    )
    evaluate.add_argument("--output-dir", type=Path, default=ROOT / "logs" / "evaluate", help="where results are kept")
    evaluate.set_defaults(run=_evaluate)


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train", help="run a job, or resume one", epilog="Every parameter is a flag too: --network-rank 8."
    )
    train.add_argument("job", nargs="?", help="settings JSON, the name of a preset, or the run folder with --resume")
    train.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in the given run folder; --set may make it longer or say where its data are now",
    )
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting (repeatable)"
    )
    train.add_argument("--dry-run", action="store_true", help="check everything and show what would happen")
    train.add_argument("--json", action="store_true", help="events as JSON lines on standard output")
    _add_places(train)
    train.set_defaults(run=_train, takes_flags=True)


def _add_places(parser: argparse.ArgumentParser) -> None:
    for flag, text in (
        ("--models-dir", "folder with Stable-diffusion, VAE and Lora in it"),
        ("--ckpt-dir", "folder of base models"),
        ("--vae-dir", "folder of VAE files"),
        ("--lora-dir", "folder the LoRA is written to"),
        ("--output-dir", "one folder for everything that is written: Lora, logs, json"),
    ):
        parser.add_argument(flag, type=Path, default=None, help=text)


def _places(options: argparse.Namespace) -> Places:
    places = Places.standalone(options.models_dir) if options.models_dir else Places.standalone()
    if options.output_dir:
        places = places.under(options.output_dir)
    chosen = {"checkpoints": options.ckpt_dir, "vaes": options.vae_dir, "loras": options.lora_dir}
    return places.replace(**{name: path for name, path in chosen.items() if path})


def _stop_on_interrupt() -> Any:
    """A control that Ctrl+C, a polite kill or the end of the terminal asks to stop after the step. Ctrl+C a second time
    ends at once; the other signals are often sent more than once and change nothing then.
    """
    from ..engine.control import Control

    control = Control()

    def stop(number: int, frame: FrameType | None) -> None:
        again = control.stopping
        control.stop()
        if again and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        if not again:
            with contextlib.suppress(RuntimeError):  # it can come in the middle of another line
                print("Stopping after this step; the state is kept for --resume.", file=sys.stderr)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:  # nohup wants it ignored
        signal.signal(hangup, stop)
    return control


def _port(text: str) -> int:
    port = int(text)
    if not 0 < port < 65536:
        raise argparse.ArgumentTypeError("a port is a number from 1 to 65535")
    return port


def _workers(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError("the number of processes is at least 1")
    return int(text)


def _app(options: argparse.Namespace) -> int:
    from .app import AppOptions, serve

    root = None if options.data_root is None else expanded(options.data_root).absolute()
    if root is not None and not is_dir(root):
        raise AtelierError(f"--data-root {root}: there is no such folder. Make it, or give another.")
    login = options.auth or os.environ.get("ATELIER_AUTH", "")
    names = tuple(options.allow_host)
    return serve(AppOptions(_places(options), options.port, options.listen, root, login, names))


def _train(options: argparse.Namespace) -> int:
    if not options.job:
        print("train needs a settings JSON, a preset name, or --resume with a run folder.", file=sys.stderr)
        return 2
    terminal = Terminal()
    log = EventLog(json_lines(sys.stdout) if options.json else terminal)
    log.note(f"Checking {options.job}.")
    from . import jobs

    given = jobs.Given(options.set, options.rest)
    request = jobs.request(options.job, given, _places(options), resume=options.resume, dry=options.dry_run, log=log)
    from ..engine.run import run

    result = run(request, log, _stop_on_interrupt())
    if options.dry_run:
        return 0
    if result.path is None:
        print(f"No file was written. Continue with: train --resume {result.folder}", file=sys.stderr)
        return STOPPED
    return 0


def _presets(options: argparse.Namespace) -> int:
    from . import jobs

    print(jobs.preset_text(options.name))
    return 0


def _docs(options: argparse.Namespace) -> int:
    from ..engine.catalogue import catalogue
    from ..params.docs import markdown

    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(markdown(catalogue()), encoding="utf-8")
    print(options.out)
    return 0


def _demo(options: argparse.Namespace) -> int:
    from .demo import demo

    return demo(_places(options), options.set, _stop_on_interrupt())


def _bench(options: argparse.Namespace) -> int:
    import json

    from ..tools.bench import run

    types = tuple(name for name in options.types.split(",") if name)
    for size in options.size:
        report = run(size, options.steps, options.batch, options.latents, options.clock, types)
        print(json.dumps(report, indent=2), flush=True)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from .evaluate import How, evaluate

    how = How(options.quick, options.json, options.only, options.write, options.workers)
    return evaluate(options.suite, options.output_dir, how)


def _test(options: argparse.Namespace) -> int:
    import subprocess

    return subprocess.call([sys.executable, "-m", "pytest", *options.arguments], cwd=ROOT)
