"""Preview pictures during a run. One that cannot be drawn or written costs a warning, never the run."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from ..errors import MemoryShortageError
from ..events import EventLog, Sampled
from ..writing import why
from . import arguments
from .estimate import needed
from .samples import Drawing, draw, write_samples
from .session import Session
from .shortage import PREVIEW, phase


class Previewer:
    """Draws and writes the previews of a session when it is called; `cache` is where figures of memory are kept."""

    def __init__(self, session: Session, log: EventLog, cache: Path) -> None:
        self._session, self._log, self._cache = session, log, cache
        self._failed = 0

    def __call__(self) -> None:
        """All previews of the job, as the session stands."""
        session = self._session
        wanted = arguments.previews(session.job)
        if not wanted or not session.process.leads:
            return
        try:
            with phase(PREVIEW, session.model.device, session.job, partial(needed, session, self._cache, PREVIEW)):
                pictures = self._draw(wanted)
        except MemoryShortageError as error:
            self._failed += 1
            more = f"The training continues. {error}" if self._failed == 1 else "Memory ran out again."
            self._log.warn(f"No preview was generated at step {session.step}. {more}")
            return
        try:
            paths = write_samples(pictures, session.folder / f"samples{session.suffix}", f"{session.step:06d}")
        except OSError as error:
            told = f"The sample images of step {session.step} cannot be written: {why(error)}. The run continues."
            self._log.warn(told)
            return
        self._log.tell(Sampled(session.step, tuple(map(str, paths))))

    def _draw(self, wanted: Sequence[Drawing]) -> list[Tensor]:
        session = self._session
        with contextlib.ExitStack() as stack:
            stack.enter_context(session.evaluating())
            for network in session.beneath:  # whoever uses the file will not have them
                stack.enter_context(network.at_strength(0.0))
            return draw(session.model, wanted, text=session.kit.text)
