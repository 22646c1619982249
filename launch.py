#!/usr/bin/env python
"""Atelier without a WebUI: makes its own Python environment beside this file, then runs the command line inside it.

    python launch.py                 set up and start the app: open the address that it prints
    python launch.py --port 8000     the same on another port; --listen lets other machines reach it
    python launch.py demo            teach the shipped model a new word and measure the effect
    python launch.py train JOB.json  run a job (see: python launch.py train --help)
    python launch.py test [FILES]    run the checks and tests; --lock forge uses the package versions of WebUI Forge,
                                     --lock a1111 those around the page of AUTOMATIC1111 (tests of the page alone)

The first start installs pinned packages into .venv and needs the network; later starts do not.
TORCH_COMMAND, as WebUI users know it, replaces the installation of torch: TORCH_COMMAND="pip install torch==2.13.0".
"""

# This file runs before anything is installed and must at least be understood by every Python that a user may have:
# standard library only, and no syntax newer than Python 2.7.
from __future__ import print_function

import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

MINIMUM = (3, 10)
TORCH_COMMAND = "pip install torch==2.13.0"
STAMP = "atelier.json"

# Name of a set: folder of its environment, lock file of the app, lock files that its tests need on top.
SETS = {
    "newest": (".venv", "newest.txt", ("test.txt",)),
    "forge": (".venv-forge", "forge.txt", ()),
    "a1111": (".venv-a1111", "a1111.txt", ()),
}
# A set that has only what is around the page takes torch and everything else from the set that stands behind it.
BEHIND = {"a1111": "newest"}
PAGE_TESTS = ["tests/ui/test_%s.py" % name for name in ("api", "browser", "buttons", "form", "plot")]
# The newest packages no longer support the Python that most WebUIs bring.
FOR_PYTHON_310 = {"newest.txt": "python310.txt"}
# Packages of which only a data file is read; their own requirements would be hundreds of megabytes for nothing.
WITHOUT_REQUIREMENTS = "files.txt"


class Failure(Exception):
    """Something the user can act on; the text says what and how."""


class Machine(object):
    """What of the world around this file matters here; tests replace it."""

    windows = os.name == "nt"
    environ = os.environ

    def run(self, command, **options):
        """Run a command, wait for it and return its exit status; Ctrl+C is the child's to answer."""
        process = subprocess.Popen(command, **options)
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                pass

    def become(self, command, environ):
        """Run a command in place of this process, so that signals reach it; Windows has no such thing and waits."""
        if self.windows:
            return self.run(command, env=environ)
        os.execve(command[0], command, environ)

    def has_nvidia_card(self):
        """Whether the driver of an NVIDIA card is there."""
        if self.windows:
            system = os.path.join(os.environ.get("SystemRoot", "C:\\Windows"), "System32")
            return os.path.exists(os.path.join(system, "nvidia-smi.exe"))
        return bool(shutil.which("nvidia-smi")) or os.path.exists("/proc/driver/nvidia/version")


class Environment(object):
    """One virtual environment beside this file and the stamp that says what was installed into it."""

    def __init__(self, root, lock, machine):
        self.root = root
        self.machine = machine
        folder, self.app, self.extra = SETS[lock]
        self.folder = os.path.join(root, folder)
        self.behind = Environment(root, BEHIND[lock], machine) if lock in BEHIND else None
        scripts = ("Scripts", "python.exe") if machine.windows else ("bin", "python")
        self.python = os.path.join(self.folder, *scripts)
        self.stamp = os.path.join(self.folder, STAMP)

    def prepare(self, tests=False):
        """Make or complete the environment; does nothing when the stamp says that it is complete."""
        if self.behind:
            self.behind.prepare(tests)
        if not os.path.exists(self.python):
            self.create()
        wanted, found = self.wanted(tests), self.read_stamp()
        if all(found.get(name) == value for name, value in wanted.items()):
            return
        if found.get("torch") != wanted.get("torch"):
            self.install_torch(replace="torch" in found)
            found = self.write_stamp({"torch": wanted["torch"]})
        for name in self.locks(tests):
            if found.get(name) != wanted[name]:
                self.install(name)
                found = self.write_stamp(dict(found, **{name: wanted[name]}))
        if self.behind:
            self.stand_in_front()

    def wanted(self, tests):
        """What the stamp must say: the torch command and the hash of every lock file."""
        wanted = {} if self.behind else {"torch": self.machine.environ.get("TORCH_COMMAND") or TORCH_COMMAND}
        for name in self.locks(tests):
            with open(self.lock(name), "rb") as file:
                wanted[name] = hashlib.sha256(file.read().replace(b"\r\n", b"\n")).hexdigest()
        return wanted

    def locks(self, tests):
        """The names of the lock files, in the order of installation."""
        app = FOR_PYTHON_310.get(self.app, self.app) if self.version() < (3, 11) else self.app
        return (app,) + (() if self.behind else (WITHOUT_REQUIREMENTS,)) + (self.extra if tests else ())

    def version(self):
        """The Python of the environment, which need not be the one that runs this file."""
        try:
            with open(os.path.join(self.folder, "pyvenv.cfg")) as file:
                found = re.search(r"^version(?:_info)?\s*=\s*(\d+)\.(\d+)", file.read(), re.MULTILINE)
        except OSError:
            found = None
        return (int(found.group(1)), int(found.group(2))) if found else tuple(sys.version_info[:2])

    def lock(self, name):
        """The path of a lock file."""
        return os.path.join(self.root, "locks", name)

    def read_stamp(self):
        """What was installed; nothing when the stamp is missing or damaged."""
        try:
            with open(self.stamp) as file:
                found = json.load(file)
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_stamp(self, content):
        """Remember what is installed; after every step, so that an interrupted set-up goes on where it stopped."""
        with open(self.stamp + ".new", "w") as file:
            json.dump(content, file, indent=1, sort_keys=True)
        os.replace(self.stamp + ".new", self.stamp)
        return content

    def create(self):
        """Make the virtual environment."""
        say("Making a Python environment in %s" % self.folder)
        if self.machine.run([sys.executable, "-m", "venv", "--clear", self.folder]):
            raise Failure(
                "Python could not make a virtual environment in %s (see above).\n"
                "On Debian and Ubuntu install its module first: sudo apt install python3-venv\n"
                "Elsewhere install Python from python.org, or free some disk space, and start again." % self.folder
            )

    def packages(self):
        """The folders that packages are installed into."""
        patterns = (("lib", "python*", "site-packages"), ("Lib", "site-packages"))
        return [path for parts in patterns for path in glob.glob(os.path.join(glob.escape(self.folder), *parts))]

    def stand_in_front(self):
        """Let this environment find the packages of the one behind it, after its own."""
        for path in self.packages():
            with open(os.path.join(path, "behind.pth"), "w") as file:
                file.write("\n".join(self.behind.packages()) + "\n")

    def install_torch(self, replace):
        """Install torch as TORCH_COMMAND says, before everything that needs it."""
        command = self.machine.environ.get("TORCH_COMMAND") or TORCH_COMMAND
        # Outside POSIX rules backslashes stay what they are, and so do quotes.
        words = [word.strip('"') for word in shlex.split(command, posix=not self.machine.windows)]
        if words[:1] != ["pip"]:
            raise Failure('TORCH_COMMAND must be a pip command such as "%s", not "%s".' % (TORCH_COMMAND, command))
        if replace:
            # pip takes torch 2.13.0+cpu for torch 2.13.0: what another command installed has to go first.
            self.machine.run([self.python, "-m", "pip", "uninstall", "--yes", "--quiet", "torch"])
        say("Installing torch (%s); this is the largest download" % command)
        self.pip(words[1:], "torch")

    def install(self, name):
        """Install what a lock file pins."""
        say("Installing the packages of locks/%s" % name)
        alone = ["--no-deps"] if name == WITHOUT_REQUIREMENTS else []
        self.pip(["install"] + alone + ["-r", self.lock(name)], "the packages of locks/%s" % name)

    def pip(self, arguments, what):
        """Run pip inside the environment."""
        if arguments[:1] == ["install"]:
            # Compiling ten thousand files takes minutes; Python compiles those it imports by itself.
            arguments = ["install", "--no-compile"] + arguments[1:]
        status = self.machine.run([self.python, "-m", "pip", "--disable-pip-version-check", "--no-input"] + arguments)
        if status:
            raise Failure(
                "pip could not install %s (exit status %s, its message is above).\n"
                "The first start needs the network; behind a proxy set HTTPS_PROXY. A full disk looks the same.\n"
                "Start again when that is mended: what is already installed is kept." % (what, status)
            )

    def torch_has_gpu_support(self):
        """Whether the installed torch was built for a GPU; None when that cannot be told. Does not import it."""
        for path in self.packages():
            version = os.path.join(path, "torch", "version.py")
            if os.path.exists(version):
                with open(version) as file:
                    text = file.read()
                return bool(re.search(r"^(cuda|hip|xpu)\b[^=\n]*=\s*['\"]", text, re.MULTILINE))
        return None


def say(text):
    """Tell the user, apart from what the commands print."""
    print("launch.py: " + text, file=sys.stderr)
    sys.stderr.flush()


def warn_about_cpu_torch(environment):
    """A card that torch cannot use is the most common reason for training that takes days."""
    if environment.torch_has_gpu_support() is False and environment.machine.has_nvidia_card():
        setting = "set TORCH_COMMAND=%s" if environment.machine.windows else 'export TORCH_COMMAND="%s"'
        line = setting % (TORCH_COMMAND + " --index-url ADDRESS")
        say(
            "an NVIDIA card is here, but the installed torch can only use the CPU.\n"
            "  Mend it with this line, then start again:\n"
            "    %s\n"
            '  ADDRESS is the index for your CUDA version that PyTorch\'s "Get started" page shows.' % line
        )


def inside(root, environ):
    """The environment variables of our own process: finds this trainer, and no other folder of that name."""
    found = dict(environ)
    found["PYTHONPATH"] = os.pathsep.join(part for part in (root, environ.get("PYTHONPATH", "")) if part)
    found["PYTHONSAFEPATH"] = "1"
    return found


def test(environment, lock, arguments):
    """Run the checks and tests and return the first exit status that is not 0; arguments go to pytest alone."""
    environment.prepare(tests=True)
    checks = []
    if lock == "newest" and not arguments:
        checks += [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]]
    chosen = ["-m", "not newest and not everywhere"] if lock != "newest" else []
    # As many tests at once as there are cores, each with one thread: what they compute is too small for several.
    workers = [] if arguments else ["-n", str(min(os.cpu_count() or 1, 4)), "--dist", "worksteal"]
    files = PAGE_TESTS if lock in BEHIND and not arguments else []
    checks.append(["pytest"] + chosen + workers + files + arguments)
    failed = 0
    for check in checks:
        say("running " + " ".join(check))
        status = environment.machine.run(
            [environment.python, "-m"] + check,
            cwd=environment.root,
            env=dict(inside(environment.root, environment.machine.environ), OMP_NUM_THREADS="1"),
        )
        if status:
            say("%s failed (exit status %s)" % (check[0], status))
        failed = failed or status
    return failed


def options_of_test(arguments):
    """The lock set named in the arguments of test, and the arguments without it."""
    rest, lock = list(arguments), "newest"
    for i, word in enumerate(rest):
        if word == "--lock" or word.startswith("--lock="):
            value = word[len("--lock=") :] if "=" in word else (rest[i + 1 : i + 2] or [""])[0]
            if value not in SETS:
                raise Failure("--lock takes %s, not %r." % (" or ".join(sorted(SETS)), value))
            del rest[i : i + (1 if "=" in word else 2)]
            return value, rest
    return lock, rest


def main(arguments, root=None, machine=None):
    """Set up what is missing and run the command; returns its exit status."""
    root = root or os.path.dirname(os.path.abspath(__file__))
    machine = machine or Machine()
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        if arguments[:1] == ["test"]:
            lock, rest = options_of_test(arguments[1:])
            return test(Environment(root, lock, machine), lock, rest)
        environment = Environment(root, "newest", machine)
        environment.prepare()
        warn_about_cpu_torch(environment)
        if not arguments or arguments[0].startswith("-"):
            arguments = ["app"] + arguments
        command = [environment.python, "-m", "trainer"] + arguments
        return machine.become(command, inside(root, machine.environ))
    except Failure as failure:
        say(str(failure))
    except OSError as error:
        say("%s\nIf that is about .venv: delete this folder and start again, it is made anew." % error)
    return 1


if __name__ == "__main__":
    if sys.version_info < MINIMUM:
        print(
            "Atelier needs Python %d.%d or newer; this is Python %s (%s).\n"
            "Install a newer one from python.org and start it with that: python3 launch.py"
            % (MINIMUM + (sys.version.split()[0], sys.executable))
        )
        sys.exit(1)
    sys.exit(main(sys.argv[1:]))
