"""The service of a host: its table, queue, engine and folders put together."""

from __future__ import annotations

from typing import Any

from ..engine.catalogue import catalogue
from ..jobs.queue import Queue
from ..jobs.store import open_store
from ..ui.service import Service
from ..ui.shelf import Shelf
from ..writing import sweep
from .worker import Bench

QUEUE_FOLDER = "queue"


def make_service(host: Any) -> Service:
    """A service with the queue of the host's logs folder. One for each process: whoever makes it keeps it, also when
    the pages are loaded anew. Raises AtelierError when the queue cannot be kept there.
    """
    places = host.places()
    for folder in (places.loras, places.presets, places.json, *places.json.glob("*/")):
        sweep(folder)
    bench = Bench(host)
    queue = Queue(open_store(host.places().logs / QUEUE_FOLDER), bench)
    return Service(catalogue(), host, queue, bench, Shelf(catalogue(), host.places))
