"""Run by WebUIs at every start: installs the packages Atelier needs, and leaves every installed one as it is.

Looks at names and versions only, so that a start with everything in place costs next to nothing and needs no network.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile

# Distribution: what to ask pip for, lowest version that will do. All of them are pure Python.
NEEDED = {
    "diffusers": ("diffusers>=0.31,<0.38", "0.31"),
    "lycoris-lora": ("lycoris-lora>=4.1,<4.2", "4.1"),
    "pytorch-optimizer": ("pytorch-optimizer>=4.1,<5", "4.0"),
}
WITHOUT = {
    "diffusers": "Without diffusers Atelier does not start.",
    "lycoris-lora": "Without lycoris-lora everything works, by formulas of Atelier's own.",
    "pytorch-optimizer": "Without pytorch-optimizer its optimizers (Prodigy, CAME, Lion and more) cannot be chosen.",
}
ROUNDS = 5  # of packages that packages need
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


def requirement(text):
    """A requirement as `packaging` reads it, which comes with pip at the least; None when nobody can read it."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        try:
            from pip._vendor.packaging.requirements import Requirement
        except ImportError:
            return None
    try:
        return Requirement(text)
    except Exception:  # pip's own class of error, whichever copy was imported: old packages write nonsense
        return None


def needs(name):
    """What an installed distribution requires in this environment, without its extras."""
    try:
        texts = importlib.metadata.requires(name) or ()
    except importlib.metadata.PackageNotFoundError:
        return []
    found = [one for one in map(requirement, texts) if one is not None]
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def conflicts(there):
    """Sentences about installed packages that contradict each other already; pip can satisfy no constraint on both."""
    return [
        f"{name} {version} requires {one}, and {there[plain(one.name)]} is installed"
        for name, version in sorted(there.items())
        for one in needs(name)
        if plain(one.name) in there and not one.specifier.contains(there[plain(one.name)], prereleases=True)
    ]


def pip(wanted, *options):
    """The command that installs what is wanted."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--prefer-binary"]
    command += ["--retries", "1", "--timeout", "20"]
    if os.environ.get("INDEX_URL"):
        command += ["--index-url", os.environ["INDEX_URL"]]
    return [*command, *options, *wanted]


def run(command):
    """(exit status, the end of what was said) of a command."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    return done.returncode, done.stdout[-2000:]


def install(wanted, there):
    """Run pip with every installed version held; returns its exit status and the end of what it said."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "installed.txt")
        with open(path, "w") as file:
            file.write("\n".join(f"{name}=={version}" for name, version in sorted(there.items())))
        return run(pip(wanted, "--constraint", path))


def install_alone(wanted, there):
    """Run pip without letting it look at what is installed; then the same for what those packages need and is absent.

    Returns the exit status of the first run that failed, else 0, and the end of what it said.
    """
    for _ in range(ROUNDS):
        status, said = run(pip(wanted, "--no-deps"))
        if status:
            return status, said
        now = installed()
        asked = [one for name in now if name not in there for one in needs(name)]
        wanted = sorted({str(one).partition(";")[0] for one in asked if plain(one.name) not in now})
        if not wanted:
            break
    return 0, ""


def shown(command):
    """A command as one types it."""
    return " ".join(f'"{part}"' if set(part) & set(" <>;,") else part for part in command)


def main():
    """Install what is missing and say so; a failure is told, never fatal to the WebUI."""
    there = installed()
    for line in outdated(there):
        print(line)
    wanted = missing(there)
    if not wanted:
        return
    print(f"Atelier: installing {', '.join(wanted)}")
    broken, said, status = conflicts(there), "", 0
    if broken:
        print(f"Installed packages contradict each other: {'; '.join(broken)}. They are left as they are.")
    else:
        status, said = install(wanted, there)
    if broken or status:
        status, alone = install_alone(missing(installed()), there)
        said = f"{said}\n{alone}" if status else ""
    left = missing(installed())
    if left:
        lacking = [WITHOUT[name] for name, (ask, _) in NEEDED.items() if any(plain(name) in plain(one) for one in left)]
        command = shown([sys.executable, "-m", "pip", "install", "--no-deps", *left])
        print(
            f"{said}\nAtelier could not install {', '.join(left)} (pip ended with status {status}, its words are "
            f"above). {' '.join(lacking)}\nWith a network, start the WebUI again, or run: {command}"
        )


if __name__ == "__main__":
    main()
