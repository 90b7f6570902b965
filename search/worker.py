"""One rank of a slot: `python -m search.worker`, started by torchrun; its `WorkOrder` is in the environment, as JSON.

A rank that meets a bug ends, and torchrun's agent restarts the whole slot; after three deaths in a row without a
finished trial, those that a marked config is to blame for left out, the slot stops instead and says why. That is why
this module imports little: a rank that dies of an import is counted too. Known errors before the first trial (missing
weights, an unknown judge) would be met again after a restart, so they stop the slot at once. One rank of several cannot
stop it by ending well, as torchrun would leave the others waiting: it ends as if it had died, and all ranks of the next
start find its word.
"""

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

from hyquant.errors import HyquantError
from search.concealment import conceal_passwords
from search.errors import SearchError
from search.order import MAX_DEATHS_IN_A_ROW, ORDER_VARIABLE, WorkOrder, read_state, write_state, write_worker
from search.parent import AGENT_VARIABLE
from search.processes import exit_with_parent

logger = logging.getLogger(__name__)


def main() -> None:
    """Work until the study is done or the slot must stop; the runner reads why from the slot's state."""
    conceal_passwords()
    exit_with_parent(int(os.environ.get(AGENT_VARIABLE, os.getppid())))
    order = WorkOrder.model_validate_json(os.environ[ORDER_VARIABLE])
    restart_count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank{rank} %(name)s %(message)s", stream=sys.stderr)
    folder = order.folder
    if rank == 0:
        with suppress(OSError):  # on a full disk; then it dies unseen until the runner next reads the study
            write_worker(folder)
    state = read_state(folder)
    if state.stopped is not None:
        return
    deaths = restart_count - state.restarts_at_last_finish - state.forgiven
    if deaths >= MAX_DEATHS_IN_A_ROW:
        reason = f"its worker died {deaths} times in a row without finishing a trial; see {folder / 'log.txt'}"
        stop_slot(folder, reason)
        return
    from search.ranks import work

    try:
        work(order, restart_count=restart_count)
    except (SearchError, HyquantError) as error:
        stop_slot(folder, str(error))


def stop_slot(folder: Path, reason: str) -> None:
    """Leave word for the runner, and for the other ranks, why this slot stops; the first word counts.

    Raises:
        SystemExit: If there are other ranks, which are to hear of it from torchrun.
    """
    logger.error("slot stops: %s", reason)
    state = read_state(folder)
    try:
        write_state(folder, state.model_copy(update={"stopped": state.stopped or reason}))
    except OSError as error:
        logger.error("the runner is not told, as %s needs room, but: %s", folder, error)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.exit(1)


if __name__ == "__main__":
    main()
