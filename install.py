"""Run by WebUIs at every start: installs the packages Atelier needs, and leaves every installed one as it is.

Looks at names and versions only, so that a start with everything in place costs next to nothing and needs no network.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile

# Distribution: what to ask pip for, lowest version that will do.
NEEDED = {
    "diffusers": ("diffusers>=0.31,<0.38", "0.31"),
    "lycoris-lora": ("lycoris-lora>=4.1,<4.2", "4.1"),
    "pytorch-optimizer": ("pytorch-optimizer>=4.1,<5", "4.0"),
}
# Later ones import names that the transformers of AUTOMATIC1111's WebUI does not have, though pip lets them in.
DIFFUSERS_FOR_OLD_TRANSFORMERS = "diffusers==0.31.0"
OLD_TRANSFORMERS = "4.41"


def plain(name):
    """A distribution's name as pip compares them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def number(version):
    """The leading numbers of a version, to compare with."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def installed():
    """Name → version of every installed distribution; the one Python would import, where there are two."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name, version = distribution.metadata["Name"], distribution.version
        if name and version:
            found.setdefault(plain(name), version)
    return found


def missing(there):
    """What to ask pip for."""
    wanted = [ask for name, (ask, _) in NEEDED.items() if name not in there]
    if number(there.get("transformers", "99")) < number(OLD_TRANSFORMERS):
        wanted = [DIFFUSERS_FOR_OLD_TRANSFORMERS if ask.startswith("diffusers") else ask for ask in wanted]
    return wanted


def outdated(there):
    """A line about each package that is installed but too old; it belongs to somebody else and is not touched."""
    return [
        f"Atelier needs {name} {least} or newer; {there[name]} is installed and was left as it is. "
        "Some trainings may fail."
        for name, (_, least) in NEEDED.items()
        if name in there and number(there[name]) < number(least)
    ]


def pip(wanted, there):
    """The command that installs what is wanted, and the lines of a constraints file that keep all others."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--prefer-binary"]
    command += ["--retries", "1", "--timeout", "20"]
    if os.environ.get("INDEX_URL"):
        command += ["--index-url", os.environ["INDEX_URL"]]
    return command + wanted, [f"{name}=={version}" for name, version in sorted(there.items())]


def install(wanted, there):
    """Run pip; returns its exit status and the end of what it said."""
    command, lines = pip(wanted, there)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "installed.txt")
        with open(path, "w") as file:
            file.write("\n".join(lines))
        command += ["--constraint", path]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
        )
    return done.returncode, done.stdout[-2000:]


def main():
    """Install what is missing and say so; a failure is told, never fatal to the WebUI."""
    there = installed()
    for line in outdated(there):
        print(line)
    wanted = missing(there)
    if not wanted:
        return
    print(f"Atelier: installing {', '.join(wanted)}")
    status, said = install(wanted, there)
    if status:
        quoted = " ".join(f'"{ask}"' for ask in wanted)
        print(
            f"{said}\nAtelier could not install {quoted} (pip ended with status {status}, its words are above). "
            "Its tab will say what is missing.\n"
            f"With a network, start the WebUI again, or run: {sys.executable} -m pip install {quoted}"
        )


if __name__ == "__main__":
    main()
