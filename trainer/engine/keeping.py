"""What a run leaves on the disk: states, LoRA files, previews, logs. Whatever the disk does not take is warned of, and
the run goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..adapters.file import name_note
from ..errors import AdapterError, AtelierError, MemoryShortageError, TrainingError
from ..events import Event, EventLog, Saved
from ..params import core
from ..places import Places
from ..writing import why
from .csvlog import CsvLog
from .devices import SpillWatch
from .folder import RunFolder
from .losses import LossRing
from .output import write_network
from .preflight import lora_path
from .resume import Weights
from .session import Session
from .shortage import SAVING, phase
from .state import STATE_FILE, write_state
from .trackers import TRACKERS


class Keeper:
    """Writes what one pass of a run leaves.

    `weights`: of the base model, for its states; `earlier` writes what of earlier passes is not on the disk, without
    which a state is of no use.
    """

    def __init__(
        self,
        session: Session,
        folder: RunFolder | None,
        weights: Weights,
        places: Places,
        log: EventLog,
        earlier: Callable[[], None] = lambda: None,
    ) -> None:
        self._session, self._folder, self._weights, self._places, self._log = session, folder, weights, places, log
        self._earlier = earlier
        self._told: set[str] = set()
        self._written = -1

    @property
    def cache(self) -> Path:
        """The folder of what can be worked out anew."""
        return self._places.cache

    def state(self, ring: LossRing) -> str:
        """Write the resume state; returns why that failed, "" when it did not. A warning tells it, once a reason."""
        if self._folder is None or self._written == self._session.step:
            return ""
        try:
            self._folder.ensure()
            self._earlier()
            write_state(self._session, ring, self._weights)
            self._written = self._session.step
            return ""
        except OSError as error:
            reason = f"The run folder {self._folder.path} cannot be written: {why(error)}."
        except TrainingError as error:
            reason = str(error)
        self._warn(f"{reason} The run continues, and tries again at the next state.")
        return reason

    def drop_state(self) -> None:
        """Remove a state that was written for the moment alone."""
        if self._folder is not None:
            with contextlib.suppress(OSError):  # it does no harm
                (self._folder.path / STATE_FILE).unlink()

    def copy(self) -> None:
        """Write an intermediate LoRA file."""
        try:
            self.lora(f"_{self._session.step}steps", final=False)
        except (AdapterError, MemoryShortageError) as error:
            self._warn(f"{error} The run continues without this file.")

    def lora(self, steps: str = "", final: bool = True) -> Path:
        """Write the LoRA file, with `steps` at the end of its name; returns where it is. Raises AdapterError."""
        session = self._session
        path = lora_path(session.job, self._places, session.suffix + steps)
        if self._folder is not None:
            with phase(SAVING, session.model.device, session.job), session.evaluating():
                written = write_network(session, path, self._log.note if final else lambda line: None)
            if written != path:
                self._log.warn(name_note(path, written))
            path = written
            self._log.tell(Saved(str(path), session.step, final))
        return path

    def last_lora(self, unkept: str, final: bool) -> Path:
        """Write the LoRA file at the end. Raises TrainingError, which says how to go on; `unkept` is why there is no
        state, "" when there is one.
        """
        try:
            return self.lora(final=final)
        except AdapterError as error:
            raise TrainingError(f"{error} {self._how_to_go_on(unkept)}") from error

    def _how_to_go_on(self, unkept: str) -> str:
        folder = self._folder.path if self._folder is not None else self._session.folder
        if unkept:
            return f"The state of the training is lost too: {unkept}"
        return f"The training itself is kept in {folder}: resume that run, and the file is written."

    def _warn(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._log.warn(text)

    @contextlib.contextmanager
    def listeners(self) -> Iterator[None]:
        """CSV and trackers of the pass, for its duration."""
        session, log = self._session, self._log
        settings = session.job.to_dict(full=True)
        opened: list[Any] = []
        if self._folder is not None:
            opened.append(SpillWatch(session.model.device, log))
            if session.job[core.Log].logging_save_csv:
                header = {**settings, "model_version": session.model.family.base_version}
                opened.append(CsvLog(session.folder / f"{session.name}.csv", header, session.step, log.warn))
            for name in session.job[core.Log].logging_trackers:
                made = (session.folder, session.name, settings, session.network.mean_abs_weight)
                opened.append(_Careful(name, lambda name=name, made=made: TRACKERS[name](*made), log))
        for listener in opened:
            log.listen(listener)
        try:
            yield
        finally:
            for listener in opened:
                log.forget(listener)
                listener.close()


class _Careful:
    """A tracker whose faults are warned of; it hears nothing more then. Its library can raise anything."""

    def __init__(self, name: str, make: Callable[[], Any], log: EventLog) -> None:
        self._name, self._log, self._inner = name, log, None
        try:
            self._inner = make()
        except AtelierError:
            raise
        except Exception as error:
            self._end(error)

    def __call__(self, event: Event) -> None:
        """Hand on an event."""
        if self._inner is not None:
            try:
                self._inner(event)
            except Exception as error:
                self._end(error)

    def _end(self, error: Exception) -> None:
        self._inner = None
        self._log.warn(f"logging_trackers = {self._name}: it failed and gets nothing more of this run ({why(error)}).")

    def close(self) -> None:
        """Write what is pending."""
        if self._inner is not None:
            try:
                self._inner.close()
            except Exception as error:
                self._end(error)
