"""Rank 0 of a slot: asks Optuna for trials, leads the other ranks through them, tells Optuna and logs to MLflow.

While it has a trial in hand it renews the trial's lease (`search.lease`). A trial ends in one of four ways: values are
returned (complete); TrialPruned, after the constraints that it violates were set (infeasible) or with none violated
(stopped); TrialFailed, one of our errors, which fails the trial while the study goes on; anything else is a bug, which
is written into the trial and ends the worker. What became of a trial that was meanwhile taken away, because its lease
could not be renewed, is dropped. When the budget is used, the members of the front are measured again.
"""

import logging
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState

from hyquant.config import QuantConfig, digest
from hyquant.distributed import Group
from search.blame import blame_within
from search.confirmation import Confirmation, store_confirmation
from search.confirming import bench_for_again, measure_again, pending
from search.databases import open_storage
from search.earlier import FINGERPRINT, enqueue_earlier
from search.errors import OutOfMemory, StoreError, StudyMismatch, TrialFailed
from search.lease import LeaseWatch, leased
from search.locks import FileLock
from search.logged import floor_metrics
from search.media import written_trial_files
from search.objective import Evidence, out_of_memory_result, release_memory, run_trial
from search.order import SlotState, WorkOrder, is_asked_to_leave, mlflow_lock_path, slot_folder, write_state
from search.pace import must_wait, next_draw, stop_reason, trouble
from search.poison import POISONED, poisoned_by
from search.processes import this_worker
from search.profiling import ceiling_sentence, stored_profile
from search.proposal import choose_config, claim
from search.result import TrialResult
from search.resume import reclaim_lost_trials
from search.samplers import build_sampler, derived_seed
from search.sharing import MemberClaims
from search.stages import Stages
from search.stall import study_stall
from search.time_limits import StageLimits
from search.tracking import Tracker
from search.trials import scored_front, trial_config, trial_reason, trial_result, trial_state
from search.watchdog import Watchdog, end_hung_process
from search.workbench import Workbench

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 60.0
"""Other ranks wait for work in a collective call that times out; a sign of life is sent to them this often."""

_POLL_S = 1.0
_LOG_LINES = 20


class Leader:
    """One slot's rank 0 over the life of its process.

    Args:
        bench: Warm state of this rank.
        study: The study, opened with this worker's storage.
        order: What this slot is to do.
        restart_count: How often torchrun has restarted this slot's workers.
    """

    def __init__(self, bench: Workbench, study: optuna.Study, order: WorkOrder, *, restart_count: int) -> None:
        self._bench = bench
        self._study = study
        self._order = order
        self._restart_count = restart_count
        self._tracker = Tracker(order.store, order.study, order.tracking)
        self._is_tracking = False
        self._has_told_of_float = False
        self._evidence: Evidence | None = None
        self._again: Workbench | None = None
        self._sign_of_life = time.monotonic()
        self._cycle_started = time.perf_counter()
        trials = study.get_trials(deepcopy=False)
        self._limits = StageLimits(bench.config.timeouts)
        for result in filter(None, map(trial_result, trials)):
            self._limits.learn(result.stage_seconds)
        self._trial_in_hand: int | None = None
        self._watchdog = Watchdog(self._limits.limit_s, bench.lock.waited_until_now_s, self._end_hung)
        self._stages = self._new_stages()
        self._sampler = build_sampler(bench.config, slot=order.lane, num_trials=len(trials))
        self._watch = LeaseWatch()
        self._num_done = 0
        self._knows_model = False
        self._blame = blame_within(
            order.crew, lambda slot: slot_folder(order.store, order.study, slot, crew=order.crew)
        )

    def run(self) -> str:
        """Run trials until there is a reason to stop; release the other ranks and return the reason.

        Raises:
            SearchError: If this host's model is not the study's, or the database stays away for too long.
        """
        try:
            reason = self._run()
        except (StudyMismatch, StoreError):
            self._bench.group.broadcast({"command": "stop"})
            raise
        self._bench.group.broadcast({"command": "stop"})
        return reason

    def _run(self) -> str:
        if self._order.slot == 0 and self._order.until_trial is None and not self._order.crew:
            storage = open_storage(self._order.store, url=self._order.url, is_known=True)
            enqueue_earlier(self._study, self._bench.config, self._bench.model.fingerprint(), storage)
        self._profile()
        while (reason := self._wait_for_turn()) is None:
            self._require_same_model()
            self._study.sampler = self._next_sampler()
            self._run_trial()
        if self._order.until_trial is None and self._may_confirm():
            self._confirm_front()
        return reason

    def _require_same_model(self) -> None:
        """Refuse to add trials of other weights to a study; nothing is known before its first slot has loaded some."""
        stored = None if self._knows_model else self._study.user_attrs.get(FINGERPRINT)
        if stored is None:
            return
        own = self._bench.model.fingerprint()
        if own != stored:
            raise StudyMismatch(
                f"every worker of a study needs the same weights, but study {self._order.study!r} is about model "
                f"{stored}, and {self._bench.config.model.source} on this host is {own}; copy the study's weights here"
            )
        self._knows_model = True

    def _run_trial(self) -> None:
        """Run one trial and tell Optuna, unless the trial was taken away meanwhile."""
        trial = self._study.ask()
        try:
            with leased(trial):
                state, values = self._outcome(trial)
            told = self._study.tell(trial, values, state=state, skip_if_finished=True)
        except UpdateFinishedTrialError:
            told = None
        if told is None or told.state != state:
            logger.warning("trial %d was taken back while this worker was cut off; its result is dropped", trial.number)
            return
        self._num_done += 1
        self._finish(told)

    def _outcome(self, trial: optuna.Trial) -> tuple[TrialState, tuple[float, ...] | None]:
        try:
            return TrialState.COMPLETE, self._objective(trial)
        except optuna.TrialPruned:
            return TrialState.PRUNED, None
        except TrialFailed:
            return TrialState.FAIL, None

    def _may_confirm(self) -> bool:
        return trouble(self._study.get_trials(deepcopy=False), self._order) is None and self._reason_to_leave() is None

    def _confirm_front(self) -> None:
        """Measure the members of the front again that no slot has in hand; each is stored before the next begins."""
        while TrialState.RUNNING in {trial.state for trial in self._study.get_trials(deepcopy=False)}:
            self._rest()  # another slot's trial may still join the front
        claims = MemberClaims(self._study, this_worker(self._order.slot, crew=self._order.crew))
        while (members := pending(self._study, self._bench.config)) and self._reason_to_leave() is None:
            number = next((number for number in members if claims.claim(number)), None)
            if number is None:
                self._rest()  # other slots have them in hand; if one dies, its members are still pending
                continue
            with claims.held(number):
                if number in pending(self._study, self._bench.config):
                    store_confirmation(self._study, number, self._measure_again(number))
            self._write_sign_of_life()

    def _new_stages(self) -> Stages:
        return Stages(self._bench.group, lambda: self._bench.lock.waited_s, self._watchdog.watching)

    def _end_hung(self, sentence: str) -> None:
        end_hung_process(self._order.folder, self._trial_in_hand, sentence)

    def _measure_again(self, number: int) -> Confirmation:
        config = trial_config(self._study.get_trials(deepcopy=False)[number])
        assert config is not None, "a member of the front has a config"
        self._bench.group.broadcast({"command": "again", "config": config.model_dump(mode="json")})
        self._again = self._again or bench_for_again(self._bench)
        confirmation = measure_again(self._again, config, self._new_stages())
        assert confirmation is not None, "rank 0 measures"
        logger.info("measured again number=%d reason=%s", number, confirmation.reason)
        return confirmation

    def _profile(self) -> None:
        """Look where the float denoiser's time goes, unless no trial is to come; without it trials have no ceiling."""
        trials, config = self._study.get_trials(deepcopy=False), self._bench.config
        if self._reason_to_stop(trials) is not None and not pending(self._study, config):
            return
        try:
            profile = Stages(Group(), watching=self._watchdog.watching).run(
                "profile", lambda: stored_profile(self._bench)
            )
        except TrialFailed as failure:
            logger.warning("no ceilings: %s", failure)
            return
        self._bench.profile = profile
        if profile is not None:
            self._study.set_user_attr("ceiling", ceiling_sentence(profile, self._bench.config.valid_space))

    def _wait_for_turn(self) -> str | None:
        """Wait while the trials in flight may use up the budget; return why no further trial is begun, or None."""
        budget = self._bench.config.budget
        while True:
            trials = self._study.get_trials(deepcopy=False)
            reason = self._reason_to_stop(trials)
            if reason is not None or not must_wait(trials, budget, self._order):
                return reason
            self._rest()

    def _rest(self) -> None:
        """Wait a moment for other workers, and give up on those that are gone."""
        reclaim_lost_trials(self._study, self._watch, self._blame)
        self._keep_alive()
        time.sleep(_POLL_S)

    def _reason_to_stop(self, trials: Sequence[FrozenTrial]) -> str | None:
        reason = stop_reason(trials, self._bench.config.budget, self._order, now=time.monotonic())
        reason = reason or self._reason_to_leave()
        if reason is not None or self._order.until_trial is not None:
            return reason
        return study_stall(self._study, self._bench.config)

    def _reason_to_leave(self) -> str | None:
        """Return why this slot leaves a study that goes on, or None."""
        if is_asked_to_leave(self._order.folder):
            return "it was asked to leave"
        if self._order.max_trials is not None and self._num_done >= self._order.max_trials:
            return f"its {self._order.max_trials} trials are done"
        return None

    def _next_sampler(self) -> optuna.samplers.BaseSampler:
        trials = self._study.get_trials(deepcopy=False)
        if next_draw(trials, self._order) == "sampler":
            return self._sampler
        return RandomSampler(derived_seed(self._bench.config.sampler.seed, self._order.lane, len(trials)))

    def _objective(self, trial: optuna.Trial) -> tuple[float, ...]:
        """Run one trial and return its objective values; see the module's first lines for the other ways it ends."""
        trial.set_user_attr("worker", this_worker(self._order.slot, crew=self._order.crew).model_dump())
        self._evidence, self._stages, self._trial_in_hand = None, self._new_stages(), trial.number
        if self._may_track(wait=False):
            self._tracker.start_trial(trial.number)
        with self._failures_recorded(trial):
            config = Stages(Group()).run("suggest", lambda: choose_config(trial, self._bench.config))
            self._refuse_poison(trial, config)
            with self._stages.timed("wait"):
                record = claim(trial, config, while_waiting=self._keep_alive)
            result = self._evaluate(config) if record is None else self._reuse(trial, record)
        for name, value in result.constraints.items():
            trial.set_constraint(name, value)
        trial.set_user_attr("result", result.model_dump(mode="json"))
        if result.values is None:
            raise optuna.TrialPruned(result.reason)
        return result.values

    def _evaluate(self, config: QuantConfig) -> TrialResult:
        self._bench.group.broadcast({"command": "trial", "config": config.model_dump(mode="json")})
        try:
            measurement = run_trial(self._bench, config, self._stages, front=lambda: scored_front(self._study))
        except OutOfMemory as failure:
            unfit = out_of_memory_result(config, failure)
            if unfit is None:
                raise
        else:
            self._tell_of_float()
            assert measurement is not None, "rank 0 measures"
            self._evidence = measurement.evidence
            return measurement.result.model_copy(update={"stage_seconds": self._close_cycle()})
        release_memory(self._bench)  # the error, whose frames held tensors, is gone by now
        return unfit.model_copy(update={"stage_seconds": self._close_cycle()})

    def _tell_of_float(self) -> None:
        """Write into the study what the float videos score, and the noise floor, once; the floor into MLflow too."""
        if self._has_told_of_float:
            return
        self._has_told_of_float = True
        scores = {name: result.model_dump(mode="json") for name, result in self._bench.float_results.items()}
        self._study.set_user_attr("float_scores", scores)
        floor = self._bench.floor
        if floor is not None:
            self._study.set_user_attr("noise_floor", floor.model_dump(mode="json"))
            self._may_track(wait=True)
            self._tracker.log_study(floor_metrics(floor))

    def _close_cycle(self) -> dict[str, float]:
        """Return the stage times since the end of the previous measurement, and as overhead what no stage took."""
        now = time.perf_counter()
        seconds = dict(self._stages.seconds)
        seconds["overhead"] = max(0.0, now - self._cycle_started - sum(seconds.values()))
        self._cycle_started = now
        self._limits.learn(seconds)
        return seconds

    def _refuse_poison(self, trial: optuna.Trial, config: QuantConfig) -> None:
        """End a trial at once whose config ended its worker before; samplers see a violated constraint.

        Raises:
            TrialPruned: If it did so too often.
        """
        tries = poisoned_by(self._study.user_attrs, digest(config))
        if tries:
            trial.set_user_attr("config", config.model_dump(mode="json"))
            trial.set_user_attr("reused_from", tries[-1])
            trial.set_user_attr(POISONED, list(tries))
            trial.set_constraint(POISONED, 1.0)
            raise optuna.TrialPruned

    def _reuse(self, trial: optuna.Trial, record: FrozenTrial) -> TrialResult:
        result = trial_result(record)
        assert result is not None, "an evaluated trial has a result"
        trial.set_user_attr("reused_from", record.number)
        return result

    @contextmanager
    def _failures_recorded(self, trial: optuna.Trial) -> Iterator[None]:
        """Write into the trial why it failed, whatever the error is, and let the error go on."""
        try:
            yield
        except TrialFailed as failure:
            _record_failure(trial, failure.stage, failure.reason, failure.log)
            raise
        except (UpdateFinishedTrialError, StoreError, optuna.TrialPruned):
            raise  # the trial is not ours any more, cannot be reached, or has ended
        except BaseException as bug:
            stage = self._stages.current
            _record_failure(trial, stage, f"{type(bug).__name__}: {bug}", traceback.format_exc())
            if self._may_track(wait=True):
                self._tracker.finish_trial(trial.number, "failed", None, reason=f"stage {stage}: {bug!r}")
            self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            raise

    def _may_track(self, *, wait: bool) -> bool:
        """Say whether the runner has made MLflow's database, which it does under a lock while the workers start."""
        if not self._is_tracking:
            lock = FileLock(mlflow_lock_path(self._order.store))
            self._is_tracking = lock.acquire(shared=True, blocking=wait)
            lock.release()
        return self._is_tracking

    def _finish(self, trial: FrozenTrial) -> None:
        """Log a finished trial to MLflow, and remember that this slot is alive."""
        result, state = trial_result(trial), trial_state(trial)
        self._may_track(wait=True)
        with tempfile.TemporaryDirectory(prefix="hyq-trial-") as name:
            folder, files = Path(name), None
            if result is not None:
                plan, report, samples = (e.plan, e.report, e.samples) if (e := self._evidence) else (None, None, [])
                files = written_trial_files(folder, result, plan=plan, report=report, samples=samples)
            span = (trial.datetime_start, trial.datetime_complete)
            self._tracker.finish_trial(trial.number, state, result, reason=trial_reason(trial), files=files, span=span)
        self._evidence = None
        self._write_sign_of_life()
        logger.info("trial number=%d state=%s reason=%s", trial.number, state, trial_reason(trial))

    def _write_sign_of_life(self) -> None:
        write_state(self._order.folder, SlotState(restarts_at_last_finish=self._restart_count))

    def _keep_alive(self) -> None:
        if time.monotonic() - self._sign_of_life > KEEP_ALIVE_S:
            self._bench.group.broadcast({"command": "idle"})
            self._sign_of_life = time.monotonic()


def _record_failure(trial: optuna.Trial, stage: str, reason: str, log: str) -> None:
    trial.set_user_attr("stage", stage)
    trial.set_user_attr("reason", f"stage {stage}: {reason}")
    trial.set_user_attr("log", "\n".join(log.splitlines()[-_LOG_LINES:]))
