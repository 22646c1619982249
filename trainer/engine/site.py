"""Where a run happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..data.cache import TensorCache
from ..events import EventLog
from ..places import Places
from .process import Process


@dataclass(frozen=True)
class Site:
    """Folders, processes, the log, the run's own folder, the cache its passes share, whether it is asked to end, and
    whether it estimates its memory.
    """

    places: Places
    process: Process
    log: EventLog
    folder: Path
    cache: TensorCache
    stopping: Callable[[], bool] = lambda: False
    estimates: bool = True
