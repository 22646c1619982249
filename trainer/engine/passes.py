"""The passes of a run, one after the other: which they are, with which settings, and what an earlier one leaves.

Most modes have one. Where there are more, each trains an adapter of its own on top of the frozen ones of those before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data.cache import fingerprint
from ..errors import TrainingError
from ..events import Event, EventLog, Stage
from ..maths.process import NoiseProcess
from ..models.base import Model
from ..modes.base import MODES
from ..params import core
from ..params.catalogue import Catalogue
from ..params.job import Job
from ..params.table import Parameter
from ..writing import replace, why
from . import devices
from .build import PassPlan, build
from .catalogue import catalogue
from .disk import Share, shares
from .preflight import Found, lora_path, report
from .session import Session
from .site import Site

_NAMED = 20
"""So many images are named in a warning."""
_NOT_LEARNED = ("train_state_every", "network_strength", "network_resume")


def plan_passes(job: Job) -> tuple[PassPlan, ...]:
    """The passes of a job in order, with settings of which every one is in effect."""
    asked, job = job, catalogue().in_effect(job)
    kind = MODES.get(job[core.Task].mode)
    kinds = kind.passes()
    pair, own = job[core.Pair], "first_pass" in kind.needs
    if own and pair.diff_1st_pass_only:
        kinds = kinds[:1]
    plans = []
    for number, one in enumerate(kinds):
        final = number == len(kinds) - 1
        settings = later_settings(job, number) if number else job
        if not number and own and pair.diff_load_1st_pass:
            settings = job.replace(network_resume=pair.diff_load_1st_pass)
        plans.append(PassPlan(settings, asked, number, one, written=final or pair.diff_save_1st_pass, final=final))
    return tuple(plans)


def later_settings(job: Job, number: int) -> Job:
    """The settings of pass `number` > 0: the job's own, with those of its second pass where it has them.

    What concerns the run as a whole stays. A later pass starts anew, and without a seed of its own with one derived
    from the job's.
    """
    seed = (job[core.Train].train_seed + number) % 2**63
    if job.second is None:
        return job.replace(network_resume="", train_seed=seed)
    given = {one.attribute: job.second.value(one.attribute) for one in _of_second_pass(job.second, catalogue())}
    chosen = int(str(given["train_seed"]))
    return job.replace(**{**given, "network_resume": "", "train_seed": chosen if chosen >= 0 else seed})


def _of_second_pass(second: Job, table: Catalogue) -> list[Parameter]:
    tags = table.tags(table.modes[second[core.Task].mode], second[core.Network].network_type, second=True)
    return [one for one in table.parameters if one.section not in core.OF_THE_RUN and one.shown_in(tags)]


class Passes:
    """The passes of one run, and the networks that earlier ones left attached."""

    def __init__(self, plans: tuple[PassPlan, ...], model: Model, site: Site, found: Found, drawn: bool) -> None:
        """`drawn`: the seed was drawn for this run, so that any other would have done as well."""
        self.plans, self.model, self.site, self.found, self._drawn = plans, model, site, found, drawn
        self._process = model.process
        if plans[0].job[core.Train].model_zero_terminal_snr:
            model.process = self._ends_in_noise()
        self._sessions: list[Session] = []
        self._settled: list[Session] = []
        self.shares: list[Share] = []
        """What the run will write, once it is surveyed."""
        self._ready: Session | None = None

    def survey(self, resumed_pass: int, dry: bool) -> dict[str, object]:
        """What the run will do, told before its first step. A single pass stays built for `begin`, unless it is `dry`:
        then nothing is prepared, which can take as long as a training.

        `resumed_pass` is the pass at which the run goes on, −1 when it starts.
        """
        if len(self.plans) == 1:
            self._ready = self._build(self.plans[0], resumed_pass == 0, prepared=not dry)
            self._warn_of_white([self._ready])
            return self._report(self.plans[0], self._ready)
        site = self.site if dry else dataclasses.replace(self.site, log=EventLog(self._stages_only))
        reports, sessions = [], []
        try:
            for plan in self.plans:
                beneath = [session.network for session in sessions]
                known = plan.number <= resumed_pass
                sessions.append(build(plan, self.model, site, self.found, beneath, resumed=known, prepared=False))
                reports.append(self._report(plan, sessions[-1]))
            self._warn_of_white(sessions)
        finally:
            for session in reversed(sessions):
                session.network.eject()
        later = {key: value for key, value in reports[1].items() if value != reports[0][key]}
        return {**reports[0], "writes": reports[-1]["writes"], "second pass": later}

    def _report(self, plan: PassPlan, session: Session) -> dict[str, object]:
        places = self.site.places
        remembered = places.cache if self.site.estimates else None
        self.shares += shares(plan, session, places)
        return report(session, lora_path(plan.asked, places, plan.kind.suffix), remembered)

    def _warn_of_white(self, sessions: Sequence[Session]) -> None:
        """Say which images have transparent parts, and that these are learned as white."""
        names = tuple(dict.fromkeys(name for session in sessions for name in session.source.on_white()))
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            self.site.log.warn(
                f"Images with transparent parts: {len(names)} ({', '.join(names[:_NAMED])}{more}). They are trained on"
                " white, so that white is learned too; save them on the background you want where it is not that."
            )

    def _stages_only(self, event: Event) -> None:
        if isinstance(event, Stage):
            self.site.log.tell(event)

    def _build(self, plan: PassPlan, resumed: bool, prepared: bool = True) -> Session:
        beneath = [session.network for session in self._sessions]
        built = build(plan, self.model, self.site, self.found, beneath, resumed=resumed, prepared=prepared)
        self._sessions.append(built)
        return self._sessions[-1]

    def begin(self, plan: PassPlan, resumed: bool) -> Session:
        """The session of a pass, on top of those that are settled."""
        ready, self._ready = self._ready, None
        return ready or self._build(plan, resumed)

    def fill(self, plan: PassPlan, session: Session, resumed_pass: int) -> str:
        """Put an earlier pass's result into its session where there is one; says where it came from, "" for nowhere.

        `resumed_pass`: see `survey`.
        """
        if plan.number < resumed_pass:
            _assign(session, _read_result(session))
            return "this run"
        if plan.final or plan.number == resumed_pass:
            return ""
        if plan.number == 0 and plan.asked[core.Pair].diff_load_1st_pass:
            return os.path.basename(plan.asked[core.Pair].diff_load_1st_pass)
        known = self.site.cache.get(self._cache_key(session)) if self._may_be_cached(plan) else None
        hit = torch.tensor(float(known is not None and _fits(session, known)), device=self.model.device)
        session.process.sum([hit])
        if known is None or int(hit) < session.process.count:  # all processes, or none
            return ""
        _assign(session, known)
        return "an earlier run with the same image and settings"

    def settle(self, plan: PassPlan, session: Session, trained: bool) -> None:
        """A pass is over: its network stays attached, frozen, and its result is kept for resuming and for other runs.

        `trained`: it was trained just now.
        """
        may_follow = plan.number + 1 < len(MODES.get(plan.asked[core.Task].mode).passes())
        if may_follow and trained and session.process.leads and self._may_be_cached(plan):
            with session.flat.exact():
                self.site.cache.put(self._cache_key(session), session.network.state_dict())
        if plan.final:
            return
        self._settled.append(session)
        try:
            self.keep_results()
        except TrainingError as error:
            self.site.log.warn(f"{error} The run continues; it is tried again before each state.")
        session.network.requires_grad_(False)
        for parameter in session.network.parameters():
            parameter.grad = None

    def keep_results(self) -> None:
        """Write the results of earlier passes that are not in the run folder. Raises TrainingError."""
        for session in self._settled:
            if session.process.leads and not (session.folder / _result_name(session)).exists():
                _write_result(session)

    def close(self) -> None:
        """Give the model back as it was."""
        while self._sessions:
            self._sessions.pop().network.eject()
        self.model.set_gradient_checkpointing(False)
        self.model.process = self._process

    def _ends_in_noise(self) -> NoiseProcess:
        """The model's process with zero-terminal SNR, which makes no sense for ε: there pure noise is the answer."""
        process = self._process.ending_in_noise()
        if not process.shows_image(process.last):
            self.site.log.warn(
                "model_zero_terminal_snr is on, but the model predicts ε, which pure noise gives away: the last"
                " timesteps teach nothing. Set model_v_pred if it is a v-prediction model."
            )
        return process

    @staticmethod
    def _may_be_cached(plan: PassPlan) -> bool:
        return not plan.job[core.Network].network_resume  # a file that is not known by its name

    def _cache_key(self, session: Session) -> str:
        """Identifies model, pictures, prompt and everything that is learned with; the seed only when it was chosen."""
        settings: dict[str, Any] = {}
        for section in session.job.sections:
            if type(section) not in (*core.OF_THE_RUN, core.Save):
                settings |= dataclasses.asdict(section)  # type: ignore[call-overload]
        left = {*_NOT_LEARNED, *(("train_seed",) if self._drawn else ())}
        return fingerprint(
            kind="pass",
            number=session.number,
            model=devices.fingerprint(self.model.unet, *self.model.text_encoders),
            computed=str(self.model.compute),
            schedule=self.model.process.key,
            data=session.source.fingerprint(),
            settings={key: value for key, value in settings.items() if key not in left},
        )


def _fits(session: Session, tensors: Mapping[str, Tensor]) -> bool:
    own = session.network.state_dict()
    return own.keys() == tensors.keys() and all(own[key].shape == tensors[key].shape for key in own)


def _assign(session: Session, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad(), session.flat.exact():
        for key, value in session.network.state_dict(keep_vars=True).items():
            value.copy_(tensors[key])
    session.flat.publish()


def _result_name(session: Session) -> str:
    return f"pass{session.number + 1}.safetensors"


def _write_result(session: Session) -> None:
    """Keep a finished pass in the run folder, exactly as it is. Raises TrainingError."""
    target = session.folder / _result_name(session)
    beside = target.with_suffix(".tmp")
    with session.flat.exact():
        state = session.network.state_dict()
    try:
        save_file({key: value.detach().cpu().contiguous().clone() for key, value in state.items()}, beside)
        replace(beside, target)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise TrainingError(f"{target.name} cannot be written to {target.parent}: {why(error)}.") from error


def _read_result(session: Session) -> dict[str, Tensor]:
    path = session.folder / _result_name(session)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{path.name}, the result of an earlier pass, cannot be read in {session.folder.name} ({error}). Start the"
            " job again."
        ) from error
    if not _fits(session, tensors):
        raise TrainingError(f"{path.name} in {session.folder.name} is not of this job. Start the job again.")
    return tensors
