"""One rank of a slot: `python -m search.worker ORDER`, started by torchrun, ORDER being a `WorkOrder` as JSON.

The ranks of a slot live as long as the run. Rank 0 leads; the others wait for its commands. A rank that meets a bug
ends, and torchrun's agent restarts the whole slot; after three deaths in a row without a finished trial the slot
stops instead and says why. Known errors before the first trial (missing weights, an unknown judge) would be met again
after a restart, so they stop the slot at once.
"""

import logging
import os
import sys
from pathlib import Path

import optuna

from hyquant.config import QuantConfig
from hyquant.devices import resolve_device
from hyquant.distributed import init_group
from search.errors import SearchError, TrialFailed
from search.leader import Leader
from search.locks import HostLock
from search.objective import run_trial
from search.order import MAX_DEATHS_IN_A_ROW, WorkOrder, read_state, slot_folder, write_state
from search.pace import trouble
from search.prepare import prepare_workbench
from search.processes import exit_with_parent
from search.stages import Stages
from search.storage import open_study, store_errors, stored_config, stored_prompts
from search.workbench import Workbench

logger = logging.getLogger(__name__)


def main(argument: str) -> None:
    """Work until the study is done or the slot must stop; the runner reads why from the slot's state."""
    exit_with_parent(os.getppid())
    order = WorkOrder.model_validate_json(argument)
    restart_count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank{rank} %(name)s %(message)s", stream=sys.stderr)
    optuna.logging.disable_default_handler()
    optuna.logging.enable_propagation()
    folder = slot_folder(order.store, order.study, order.slot)
    deaths = restart_count - read_state(folder).restarts_at_last_finish
    if deaths >= MAX_DEATHS_IN_A_ROW:
        stop_slot(
            folder, rank, f"its worker died {deaths} times in a row without finishing a trial; see {folder / 'log.txt'}"
        )
        return
    try:
        work(order, restart_count=restart_count)
    except SearchError as error:
        stop_slot(folder, rank, str(error))


def work(order: WorkOrder, *, restart_count: int) -> None:
    """Join the group, prepare, and lead or follow until there is nothing more to do.

    Raises:
        SearchError: If the store, the model or the judge cannot be used, or the study cannot go on; one sentence says
            why.
    """
    with store_errors(order.store):
        study = open_study(order.store, order.study, url=order.url)
        config, prompts = stored_config(study), stored_prompts(study)
        device = resolve_device(config.model.device)
        group = init_group(device)
        bench = prepare_workbench(
            config, prompts, group=group, device=device, cache=order.store / "cache", lock=HostLock()
        )
        if group.rank == 0:
            reason = Leader(bench, study, order, restart_count=restart_count).run()
            logger.info("done: %s", reason)
            if reason == trouble(study.get_trials(deepcopy=False), order):
                raise SearchError(reason)
        else:
            follow(bench)
        group.close()


def follow(bench: Workbench) -> None:
    """Do what rank 0 says: evaluate configs until it says stop."""
    while (message := bench.group.broadcast()) != {"command": "stop"}:
        assert isinstance(message, dict)
        if message["command"] == "trial":
            config = QuantConfig.model_validate(message["config"])
            try:
                run_trial(bench, config, Stages(bench.group))
            except TrialFailed as failure:
                logger.info("left a failed trial: %s", failure)


def stop_slot(folder: Path, rank: int, reason: str) -> None:
    """Leave word for the runner why this slot stops."""
    logger.error("slot stops: %s", reason)
    if rank == 0:
        write_state(folder, read_state(folder).model_copy(update={"stopped": reason}))


if __name__ == "__main__":
    main(sys.argv[1])
