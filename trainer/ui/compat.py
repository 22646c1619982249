"""The one file that knows a version of gradio: 3.41 (AUTOMATIC1111), 4.40 (Forge) and the newest behave alike here."""

from __future__ import annotations

import inspect
from typing import Any

import gradio


def page_block(markup: str) -> Any:
    """An HTML component that shows markup as it is, inside the Blocks that are open."""
    known = inspect.signature(gradio.HTML.__init__).parameters
    wanted: dict[str, Any] = {"apply_default_css": False, "padding": False, "js_on_load": None}
    return gradio.HTML(markup, elem_id="atelier_host", **{key: wanted[key] for key in wanted if key in known})


def blocks(title: str) -> Any:
    """Empty Blocks that report nothing to anybody."""
    return gradio.Blocks(title=title, analytics_enabled=False)


def mount(app: Any, block: Any, head: str, path: str = "/") -> Any:
    """The app with Blocks as the page at `path` and `head` in its head. Raises RuntimeError for a gradio older than
    those standing alone needs; WebUIs put scripts and styles of extensions into the page themselves."""
    known = inspect.signature(gradio.mount_gradio_app).parameters
    if "head" in known:
        options = {"ssr_mode": False, "footer_links": ["settings"], "show_error": False, "run_history": False}
        return gradio.mount_gradio_app(app, block, path, head=head, **{k: v for k, v in options.items() if k in known})
    if "head" in inspect.signature(gradio.Blocks.__init__).parameters:
        block.head = head
        return gradio.mount_gradio_app(app, block, path)
    raise RuntimeError(f"gradio {gradio.__version__} cannot put a script into a page; standing alone needs gradio 4.")
