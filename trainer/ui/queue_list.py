"""The queue as the page and the routes list it: made once for each change, whoever asks and however many."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..jobs.entry import DONE, Entry
from ..jobs.queue import Queue
from .http import Encoded, encoded

View = Callable[[Entry, int, bool], dict[str, object]]
"""(entry, position, whether it can go on) → what is listed of it."""
Rows = list[tuple[Entry, bool]]
"""Entries, and whether there is a state to go on from."""


class QueueList:
    """The list of a queue as JSON: `running`, `waiting` (next first), `ended` (latest first), `going`, `revision`.

    Of what waits or is over the JSON is kept: of each entry until it changes, of the whole until the queue changes.
    Those who ask at once wait for one of them to make it.
    """

    def __init__(self, queue: Queue, view: View) -> None:
        self._queue, self._view = queue, view
        self._lock = threading.Lock()
        self._revision = -1
        self._rest = b""
        self._held: dict[str, tuple[Entry, bool, bytes]] = {}

    def json(self) -> Encoded:
        """The list as it is now."""
        with self._lock:
            now = self._queue.snapshot()
            if now.revision != self._revision:
                ended = [(entry, self._queue.can_resume(entry, finished=True)) for entry in now.ended]
                self._rest, self._revision = self._make([(entry, False) for entry in now.waiting], ended), now.revision
            rest = self._rest
        running = None if now.running is None else self._view(now.running, 0, False)
        head = encoded({"revision": now.revision, "going": self._queue.going, "running": running})
        return Encoded(head[:-1] + b", " + rest)

    def _make(self, waiting: Rows, ended: Rows) -> bytes:
        held, self._held = self._held, {}
        lists = []
        for rows, places in ((waiting, range(1, len(waiting) + 1)), (ended, [-1] * len(ended))):
            for entry, has_state in rows:
                known = held.get(entry.id)
                if known is None or known[0] is not entry or known[1] != has_state:
                    view = self._view(entry, 0, has_state and entry.state != DONE) | {"extendable": has_state}
                    del view["position"]  # it changes with the others': it is added to the text
                    known = entry, has_state, encoded(view)
                self._held[entry.id] = known
            texts = (self._held[entry.id][2] for entry, _ in rows)
            placed = (b'%b, "position": %d}' % (text[:-1], at) for text, at in zip(texts, places, strict=True))
            lists.append(b", ".join(placed))
        return b'"waiting": [%b], "ended": [%b]}' % (lists[0], lists[1])
