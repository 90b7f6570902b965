"""One trial on rank 0, from the choice of its config to its objective values.

It ends in one of four ways: values are returned (complete); TrialPruned, after the constraints that it violates were
set (infeasible) or with none violated (stopped); TrialFailed, one of our errors; anything else is a bug, which is
written into the trial and ends the worker.
"""

import time
from functools import partial
from math import ceil

import optuna
from optuna.trial import FrozenTrial

from hyquant.config import QuantConfig, digest
from hyquant.distributed import Group
from hyquant.latency import describe_device
from search.errors import OutOfMemory
from search.followers import Followers
from search.lean import CONFIG, WORKER
from search.objective import Evidence, out_of_memory_result, run_trial
from search.order import WorkOrder
from search.poison import POISONED, poisoned_by
from search.proposal import choose_config, claim
from search.provenance import Provenance
from search.recorder import Recorder
from search.result import TrialResult
from search.stages import Stages
from search.time_limits import StageLimits
from search.trials import scored_front, store_result, trial_result
from search.watchdog import Watchdog, end_hung_process
from search.workbench import Workbench


class Evaluator:
    """Evaluates trials of a study, one after the other, with a watchdog over their stages.

    Args:
        bench: Warm state of this rank.
        study: The study, opened with this worker's storage.
        order: What this slot is to do.
        followers: The other ranks of the slot.
        recorder: Where failures and float scores are told.

    Attributes:
        evidence: What the last trial leaves to look at; None if its config was not run.
    """

    def __init__(
        self, bench: Workbench, study: optuna.Study, order: WorkOrder, followers: Followers, recorder: Recorder
    ) -> None:
        self._bench = bench
        self._study = study
        self._order = order
        self._followers = followers
        self._recorder = recorder
        self._limits = StageLimits(bench.config.timeouts)
        for result in filter(None, map(trial_result, study.get_trials(deepcopy=False))):
            self._learn(result)
        self._watchdog = Watchdog(self._limits.limit_s, bench.lock.waited_until_now_s, self._end_hung)
        self._trial_in_hand: int | None = None
        self._cycle_started = time.perf_counter()
        self.evidence: Evidence | None = None
        self._stages = self.new_stages(bench.group)

    def new_stages(self, group: Group) -> Stages:
        """Return stages of a group of ranks under this slot's watchdog."""
        return Stages(group, lambda: self._bench.lock.waited_s, self._watchdog.watching)

    def stages_again(self, number: int) -> Stages:
        """Return stages for measuring a member of the front again: each does the work of `confirm.seeds` trials.

        Args:
            number: The member, of which the log tells if a stage hangs; its trial has long finished.
        """
        confirm, bench = self._bench.config.confirm, self._bench
        assert confirm is not None, "a study that measures nothing again has no such stages"
        limit_s = partial(self._limits.limit_s, trials=confirm.seeds)
        watchdog = Watchdog(
            limit_s,
            bench.lock.waited_until_now_s,
            lambda sentence: self._end_hung(f"measuring trial {number} again: {sentence}"),
        )
        return Stages(bench.group, lambda: bench.lock.waited_s, watchdog.watching)

    def objective(self, trial: optuna.Trial) -> tuple[float, ...]:
        """Run one trial and return its objective values; see the module's first lines for the other ways it ends."""
        trial.set_user_attr(WORKER, self._order.worker.model_dump())
        self.evidence, self._trial_in_hand = None, trial.number
        try:
            return self._evaluated(trial)
        finally:
            self._trial_in_hand = None

    def _evaluated(self, trial: optuna.Trial) -> tuple[float, ...]:
        self._stages = self.new_stages(self._bench.group)
        self._recorder.begin(trial.number)
        with self._recorder.failures_recorded(trial, lambda: self._stages.current):
            config = Stages(Group()).run("suggest", lambda: choose_config(trial, self._bench.config))
            self._refuse_poison(trial, config)
            with self._stages.waiting():
                record = claim(trial, config, while_waiting=self._followers.keep_alive)
            if record is None:
                self._refuse_poison(trial, config)  # whoever had it in hand may have ended with it
            result = self._evaluate(config) if record is None else _reuse(trial, record)
        for name, value in result.constraints.items():
            trial.set_constraint(name, value)
        store_result(trial, result)
        if result.values is None:
            raise optuna.TrialPruned(result.reason)
        return result.values

    def _evaluate(self, config: QuantConfig) -> TrialResult:
        self._followers.run_trial(config)
        try:
            measurement = run_trial(
                self._bench,
                config,
                self._stages,
                front=lambda: scored_front(self._study),
                agree=self._recorder.agree_on_floor,
            )
        except OutOfMemory as failure:
            unfit = out_of_memory_result(config, failure)
            if unfit is None:
                raise
        else:
            self._recorder.tell_of_float(self._bench)
            assert measurement is not None, "rank 0 measures"
            self.evidence = measurement.evidence
            result = measurement.result.model_copy(update={"stage_seconds": self._close_cycle()})
            self._learn(result)
            return result
        return unfit.model_copy(update={"stage_seconds": self._close_cycle()})

    def _learn(self, result: TrialResult) -> None:
        """Let limits follow the stage times of a result of slots like this one.

        One that ran out of memory says how long nothing takes.
        """
        ranks, num_pairs = self._bench.group.world_size, len(self._bench.pairs)
        if result.metrics and self._is_of_alike_slot(result.provenance):
            num_done = num_pairs if result.num_prompts is None else result.num_prompts
            self._limits.learn(result.stage_seconds, share=ceil(num_done / ranks) / ceil(num_pairs / ranks))

    def _is_of_alike_slot(self, found: Provenance | None) -> bool:
        """Say whether a result comes from as many ranks on such a device; who does not say so is believed to."""
        bench = self._bench
        if found is None:
            return True
        return found.device == describe_device(bench.model.device) and found.ranks in (None, bench.group.world_size)

    def _close_cycle(self) -> dict[str, float]:
        """Return the stage times since the end of the previous measurement, and as overhead what no stage took."""
        now = time.perf_counter()
        seconds = dict(self._stages.seconds)
        seconds["overhead"] = max(0.0, now - self._cycle_started - sum(seconds.values()))
        self._cycle_started = now
        return seconds

    def _refuse_poison(self, trial: optuna.Trial, config: QuantConfig) -> None:
        """End a trial at once whose config ended its worker before; samplers see a violated constraint.

        Raises:
            TrialPruned: If it did so too often.
        """
        tries = poisoned_by(self._study.user_attrs, digest(config))
        if tries:
            trial.set_user_attr(CONFIG, config.model_dump(mode="json"))
            trial.set_user_attr("reused_from", tries[-1])
            trial.set_user_attr(POISONED, list(tries))
            trial.set_constraint(POISONED, 1.0)
            raise optuna.TrialPruned

    def _end_hung(self, sentence: str) -> None:
        end_hung_process(self._order.folder, self._trial_in_hand, sentence)


def _reuse(trial: optuna.Trial, record: FrozenTrial) -> TrialResult:
    result = trial_result(record)
    assert result is not None, "an evaluated trial has a result"
    trial.set_user_attr("reused_from", record.number)
    return result
