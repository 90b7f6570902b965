"""Rank 0 of a slot: asks Optuna for trials, leads the other ranks through them and tells Optuna what came of them.

While it has a trial in hand it renews the trial's lease (`search.lease`). How a trial is run and ends is in
`search.evaluating`, what is written down about it in `search.recorder`, what the other ranks are told in
`search.followers`. What became of a trial that was meanwhile taken away, because its lease could not be renewed, is
dropped. When the budget is used, the members of the front are measured again.
"""

import logging
import time
from collections.abc import Sequence

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState

from hyquant.distributed import Group
from hyquant.errors import HyquantError
from search.blame import blame_within
from search.confirmation import Confirmation, store_confirmation
from search.confirming import PendingMembers, bench_for_again, measure_again, pending
from search.databases import open_storage
from search.earlier import FINGERPRINT, enqueue_earlier
from search.errors import DiskTrouble, SearchError, StudyMismatch, TrialFailed
from search.evaluating import Evaluator
from search.followers import Followers
from search.grid import GridSampler, tried_out
from search.lease import LeaseWatch, leased
from search.objective import release_memory
from search.order import WorkOrder, is_asked_to_leave, slot_folder
from search.pace import must_wait, next_draw, stop_reason, trouble
from search.pauses import Pauses
from search.profiling import ceiling_sentence, stored_profile
from search.proposal import take
from search.recorder import Recorder
from search.resume import local_worker, reclaim_lost_trials
from search.retry import DISK_TROUBLE, queue_handed_back
from search.room import RoomWatch, cannot_be_written, trial_shortage
from search.samplers import build_sampler, derived_seed
from search.sharing import MemberClaims
from search.stall import study_stall
from search.storage import store_errors
from search.trials import count_states, num_evaluated, trial_config, trial_reason
from search.workbench import Workbench

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 1.0


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
        self._followers = Followers(bench.group)
        self._recorder = Recorder(study, order, restart_count=restart_count)
        self._evaluator = Evaluator(bench, study, order, self._followers, self._recorder)
        self._again: Workbench | None = None
        num_trials = len(study.get_trials(deepcopy=False))
        self._sampler = build_sampler(bench.config, slot=order.lane, num_trials=num_trials)
        self._grid = self._sampler if isinstance(self._sampler, GridSampler) else None
        self._watch = LeaseWatch()
        self._was_tried_out = False
        self._knows_model = False
        self._num_evaluated = 0
        self._room = RoomWatch(self._shortage, bench.config.timeouts.room_s)
        self._pauses = Pauses(_FIRST_PAUSE_S)
        self._blame = blame_within(
            order.runner, lambda slot: slot_folder(order.store, order.study, slot, crew=order.crew)
        )

    def run(self) -> str:
        """Run trials until there is a reason to stop; release the other ranks and return the reason.

        Raises:
            SearchError: If this host's model is not the study's, the database stays away, or there is no room on disk,
                for too long.
        """
        try:
            with store_errors(self._order.store):
                reason = self._run()
        except (SearchError, HyquantError):  # raised between stages, where the others wait for a word
            self._followers.stop()
            raise
        self._followers.stop()
        return reason

    def _run(self) -> str:
        if self._order.slot == 0 and self._order.until_trial is None and not self._order.crew:
            self._enqueue_earlier()
        self._profile()
        while (reason := self._wait_for_turn()) is None:
            self._require_same_model()
            self._study.sampler = self._next_sampler()
            self._run_trial()
        if self._order.until_trial is None and self._may_confirm():
            self._confirm_front()
        return reason

    def _enqueue_earlier(self) -> None:
        """Queue the best of earlier studies; what is read of these, and the connection, go when it is done."""
        storage = open_storage(self._order.store, url=self._order.url, is_known=True)
        enqueue_earlier(self._study, self._bench.config, self._bench.model.fingerprint(), storage)

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
        wanted = self._order.until_trial
        trial = self._study.ask() if wanted is None else take(self._study, wanted)
        if trial is None:
            return  # another worker was faster
        try:
            with leased(trial):
                state, values = self._outcome(trial)
            told = self._study.tell(trial, values, state=state, skip_if_finished=True)
        except UpdateFinishedTrialError:
            told = None
        if told is None or told.state != state:
            logger.warning("trial %d was taken back while this worker was cut off; its result is dropped", trial.number)
            return
        if DISK_TROUBLE in told.user_attrs:
            queue_handed_back(self._study, told)
            self._room.refused(str(trial_reason(told)))
        else:
            self._room.went_well()
        self._recorder.finish(told, self._evaluator.evidence)
        self._evaluator.evidence = None
        release_memory(self._bench)  # an error's frames, which held tensors, are gone by now

    def _outcome(self, trial: optuna.Trial) -> tuple[TrialState, tuple[float, ...] | None]:
        try:
            return TrialState.COMPLETE, self._evaluator.objective(trial)
        except optuna.TrialPruned:
            return TrialState.PRUNED, None
        except TrialFailed:
            return TrialState.FAIL, None

    def _may_confirm(self) -> bool:
        if self._bench.config.confirm is None:
            return False
        reason = trouble(self._study.get_trials(deepcopy=False), self._order, is_grid=self._grid is not None)
        return reason is None and self._reason_to_leave() is None

    def _confirm_front(self) -> None:
        """Measure the members of the front again that no slot has in hand; each is stored before the next begins."""
        while self._awaits_trials(trials := self._study.get_trials(deepcopy=False)) and self._reason_to_leave() is None:
            self._rest(trials)
        self._pauses.end()
        claims = MemberClaims(self._study, self._order.worker)
        still_pending = PendingMembers(self._study, self._bench.config)
        while (members := still_pending.among(trials)) and self._reason_to_leave() is None:
            number = claims.claim(members) if self._room.has_room() else None
            if number is None:  # no room, or other slots have them in hand; if one dies, its members are still pending
                self._rest(trials)
            else:
                self._confirm_held(number, claims)
                self._pauses.end()
            trials = self._study.get_trials(deepcopy=False)

    def _confirm_held(self, number: int, claims: MemberClaims) -> None:
        """Measure a claimed member again, unless somebody has meanwhile, and give it up."""
        with claims.held(number):
            if number in pending(self._study, self._bench.config):
                self._confirm(number)
        self._recorder.sign_of_life()

    def _awaits_trials(self, trials: Sequence[FrozenTrial]) -> bool:
        """Say whether a trial under way may still join the front; out of time, nobody waits for joined workers."""
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        if self._order.is_out_of_time(now=time.monotonic()):
            return any(local_worker(trial, self._order.crew) is not None for trial in running)
        return bool(running)

    def _confirm(self, number: int) -> None:
        try:
            store_confirmation(self._study, number, self._measure_again(number))
        except DiskTrouble as trouble_here:
            self._room.refused(str(trouble_here))
        else:
            self._room.went_well()
        release_memory(self._bench)

    def _measure_again(self, number: int) -> Confirmation:
        config = trial_config(self._study.get_trials(deepcopy=False)[number])
        assert config is not None, "a member of the front has a config"
        self._followers.measure_again(config)
        self._again = self._again or bench_for_again(self._bench)
        stages = self._evaluator.stages_again(number)
        confirmation = measure_again(self._again, config, stages, agree=self._recorder.agree_on_floor)
        assert confirmation is not None, "rank 0 measures"
        logger.info("measured again number=%d reason=%s", number, confirmation.reason)
        return confirmation

    def _profile(self) -> None:
        """Look where the float denoiser's time goes, unless no trial is to come; without it trials have no ceiling."""
        trials, config = self._study.get_trials(deepcopy=False), self._bench.config
        if self._reason_to_stop(trials) is not None and not pending(self._study, config):
            return
        try:
            profile = self._evaluator.new_stages(Group()).run("profile", lambda: stored_profile(self._bench))
        except TrialFailed as failure:
            logger.warning("no ceilings: %s", failure)
            return
        self._bench.profile = profile
        if profile is not None:
            self._study.set_user_attr("ceiling", ceiling_sentence(profile, self._bench.config.valid_space))

    def _wait_for_turn(self) -> str | None:
        """Wait while the trials in flight may use up the budget or the grid, and for room on disk.

        Returns:
            Why no further trial is begun; None if one is.
        """
        budget = self._bench.config.budget
        while True:
            trials = self._study.get_trials(deepcopy=False)
            self._num_evaluated = num_evaluated(count_states(trials))
            reason = self._reason_to_stop(trials)
            is_drained = self._grid is not None and self._grid.is_drained(trials)
            must_rest = is_drained or must_wait(trials, budget, self._order)
            if reason is not None or (not must_rest and self._room.has_room()):
                self._pauses.end()
                return reason
            self._rest(trials)

    def _shortage(self) -> str | None:
        return trial_shortage(self._bench.config, self._order.store, self._num_evaluated)

    def _rest(self, trials: Sequence[FrozenTrial]) -> None:
        """Wait a moment for other workers, and give up on those that are gone.

        Args:
            trials: All trials, as they were just read.
        """
        if not cannot_be_written(self._order.store, self._order.url):
            reclaim_lost_trials(self._study, self._watch, self._blame, trials=trials)
        self._followers.keep_alive()
        time.sleep(self._pauses.next_s())

    def _reason_to_stop(self, trials: Sequence[FrozenTrial]) -> str | None:
        budget, is_grid = self._bench.config.budget, self._grid is not None
        reason = stop_reason(trials, budget, self._order, now=time.monotonic(), is_grid=is_grid)
        reason = reason or self._reason_to_leave()
        if reason is not None or self._order.until_trial is not None:
            return reason
        return study_stall(trials, self._bench.config) or self._tried_out(trials)

    def _tried_out(self, trials: Sequence[FrozenTrial]) -> str | None:
        """Return that the grid is done, if the last look said so too: what is lost is failed first, then queued."""
        reason, was_so = tried_out(self._grid, trials), self._was_tried_out
        self._was_tried_out = reason is not None
        return reason if was_so else None

    def _reason_to_leave(self) -> str | None:
        """Return why this slot leaves a study that goes on, or None."""
        if is_asked_to_leave(self._order.folder):
            return "it was asked to leave"
        if self._order.max_trials is not None and self._recorder.num_done >= self._order.max_trials:
            return f"its {self._order.max_trials} trials are done"
        return None

    def _next_sampler(self) -> optuna.samplers.BaseSampler:
        trials = self._study.get_trials(deepcopy=False)
        if next_draw(trials, self._order, is_grid=self._grid is not None) == "sampler":
            return self._sampler
        return RandomSampler(derived_seed(self._bench.config.sampler.seed, self._order.lane, len(trials)))
