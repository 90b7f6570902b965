"""What the ranks of a slot do for as long as a run lasts: rank 0 leads, the others follow."""

import logging

import optuna

from hyquant.config import QuantConfig
from hyquant.devices import resolve_device
from hyquant.distributed import DEFAULT_TIMEOUT_S, init_group
from search.confirming import bench_for_again, measure_again
from search.errors import DiskTrouble, SearchError, StageBug, TrialFailed
from search.leader import Leader
from search.locks import HostLock
from search.objective import release_memory, run_trial
from search.order import WorkOrder
from search.pace import trouble
from search.prepare import prepare_workbench
from search.prompts import StudyPrompts
from search.stages import Stages
from search.storage import open_study, require_intact, store_errors, stored_config, stored_prompts
from search.study import StudyConfig
from search.watchdog import BACKSTOP_S
from search.workbench import Workbench

logger = logging.getLogger(__name__)


def work(order: WorkOrder, *, restart_count: int) -> None:
    """Join the group, prepare, and lead or follow until there is nothing more to do.

    Raises:
        SearchError: If the store, the model or the judge cannot be used, or the study cannot go on; one sentence says
            why.
    """
    optuna.logging.disable_default_handler()
    optuna.logging.enable_propagation()
    with store_errors(order.store):
        config, prompts = _stored(order)
        device = resolve_device(config.model.device)
        group = init_group(device, timeout_s=patience_s(config))
        cache = order.store / "cache"
        bench = prepare_workbench(
            config, prompts, group=group, device=device, cache=cache, lock=HostLock(), shared=order.shared
        )
        if group.rank == 0:
            study = open_study(order.store, order.study, url=order.url, is_known=True)
            reason = Leader(bench, study, order, restart_count=restart_count).run()
            logger.info("done: %s", reason)
            if reason == trouble(study.get_trials(deepcopy=False), order):
                raise SearchError(reason)
        else:
            follow(bench)
        group.close()


def patience_s(config: StudyConfig) -> float:
    """Return how long ranks wait for each other, in seconds: longer than the watchdog lets a first stage take."""
    timeouts = config.timeouts
    trials = 1 if config.confirm is None else config.confirm.seeds
    return max(DEFAULT_TIMEOUT_S, trials * max([timeouts.first_s, *timeouts.stages.values()])) + 2 * BACKSTOP_S


def _stored(order: WorkOrder) -> tuple[StudyConfig, StudyPrompts]:
    """Return the study's config and prompts; its connection is closed then, and rank 0 alone opens another."""
    study = open_study(order.store, order.study, url=order.url, is_known=True)
    require_intact(study)
    return stored_config(study), stored_prompts(study)


def follow(bench: Workbench) -> None:
    """Do what rank 0 says: evaluate configs until it says stop.

    After a bug it ends this process by its own end: who ended first would let torchrun end rank 0 too, before that has
    written down what happened.

    Raises:
        RankLost: When rank 0 is gone.
    """
    again: Workbench | None = None
    while (message := bench.group.broadcast()) != {"command": "stop"}:
        assert isinstance(message, dict)
        if message["command"] == "again":
            again = again or bench_for_again(bench)
            try:
                measure_again(again, QuantConfig.model_validate(message["config"]), Stages(bench.group))
            except (DiskTrouble, StageBug) as trouble_here:
                logger.info("left a measurement: %s", trouble_here)
        if message["command"] == "trial":
            _run_trial(bench, QuantConfig.model_validate(message["config"]))
        if message["command"] in ("again", "trial"):
            release_memory(bench)  # an error's frames, which held tensors, are gone by now


def _run_trial(bench: Workbench, config: QuantConfig) -> None:
    """Run a trial as rank 0 does, whatever becomes of it."""
    try:
        run_trial(bench, config, Stages(bench.group))
    except (TrialFailed, StageBug) as failure:
        logger.info("left a failed trial: %s", failure)
