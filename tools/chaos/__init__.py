"""A study under fifty faults: processes killed and stopped, networks cut, servers killed, disks filled, caches damaged.

    python -m tools.chaos --faults 50 --seed 0

Everything happens inside Linux namespaces (network, mounts, process ids, host names) that the kernel removes with the
last process of the run, however it ends: nothing of the host's own network, mounts or processes is touched, and nothing
is left behind.
"""
