"""torchrun's agent of one slot, which does not outlive the runner.

    python -m search.agent RUNNER_PID GRACE_S CORES TORCHRUN_ARGUMENTS

CORES is "all" or a list such as "0,1"; the workers inherit what the agent may run on.

On Linux the kernel sends it SIGTERM when the runner dies, and torchrun then ends its workers.
"""

import os
import signal
import sys

from search.parent import AGENT_VARIABLE, send_when_parent_ends


def main() -> None:
    """Tie this process to the runner, then be torchrun."""
    runner_pid = int(sys.argv[1])
    send_when_parent_ends(signal.SIGTERM)
    if os.getppid() != runner_pid:
        sys.exit("the runner ended before its agent began")
    if (cores := sys.argv[3]) != "all":
        os.sched_setaffinity(0, set(map(int, cores.split(","))))
    os.environ[AGENT_VARIABLE] = str(os.getpid())
    from torch.distributed import run

    from search import rendezvous

    rendezvous.register()
    grace_s, arguments = sys.argv[2], sys.argv[4:]
    arguments = [f"--rdzv-backend={rendezvous.NAME}", f"--rdzv-endpoint={rendezvous.LOOPBACK}", *arguments]
    # Older torchrun has no such option; there workers get its fixed 30 seconds to end.
    if "--shutdown-timeout" in run.get_args_parser().format_help():
        arguments = [f"--shutdown-timeout={grace_s}", *arguments]
    run.main(arguments)


if __name__ == "__main__":
    main()
