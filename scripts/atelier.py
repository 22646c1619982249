"""The one file that WebUIs execute: loads the trainer, and registers its tab and routes.

Every extension shares one import namespace and another one brings a `trainer` too, so ours is loaded under a name of
its own. WebUIs run this file again at "Reload UI", while imported packages stay; everything here may happen twice.
"""

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path

from modules import script_callbacks

ROOT = Path(__file__).resolve().parent.parent
NAME = "atelier_trainer"
TITLE, ELEMENT = "Atelier", "atelier"


def load():
    """The module with everything a WebUI needs, from the package under its own name."""
    package = sys.modules.get(NAME)
    if package is None:
        folder = ROOT / "trainer"
        found = importlib.util.spec_from_file_location(
            NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        package = importlib.util.module_from_spec(found)
        sys.modules[NAME] = package
        found.loader.exec_module(package)
    if Path(package.__path__[0]).resolve() != ROOT / "trainer":
        raise ImportError(f"Atelier is installed twice: {package.__path__[0]} is already in use. Remove one of them.")
    return importlib.import_module(f"{NAME}.cli.extension")


def explanation(error):
    """A tab that says why there is no other: usually a package that could not be installed."""
    import gradio

    with gradio.Blocks(analytics_enabled=False) as blocks:
        gradio.Markdown(
            f"**Atelier cannot start.** {type(error).__name__}: {error}\n\n"
            "A missing package is installed by install.py when the WebUI starts, unless it was started with "
            f"--skip-install. With a network, start it again without that option, or run:\n\n"
            f'    "{sys.executable}" "{ROOT / "install.py"}"'
        )
    return [(blocks, TITLE, ELEMENT)]


try:
    extension = load()
except Exception as error:  # whatever it is, the WebUI must start and the user must see it
    traceback.print_exc()
    reason = error
    script_callbacks.on_ui_tabs(lambda: explanation(reason))
else:
    script_callbacks.on_ui_tabs(lambda: [(extension.tab(), TITLE, ELEMENT)])
    script_callbacks.on_app_started(lambda _, app: extension.add_routes(app))
