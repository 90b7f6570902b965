"""Two hosts in network namespaces, joined to the servers by a bridge; all of it inside the run's own namespaces.

10.77.0.1   the run itself: PostgreSQL, MLflow          bridge hyq0
10.77.0.2   host hyq-a, 10.77.0.3 host hyq-b            veth pairs
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path

SERVERS = "10.77.0.1"
HOSTS = {"hyq-a": "10.77.0.2", "hyq-b": "10.77.0.3"}


def call(*command: str) -> None:
    """Run a short command that must succeed."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def build_network(folder: Path) -> None:
    """Make bridge and hosts; names of namespaces live in a /run of this mount namespace only."""
    call("mount", "-t", "tmpfs", "hyq", "/run")
    Path("/run/netns").mkdir()
    names = folder / "hosts"
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in HOSTS.items()))
    call("mount", "--bind", str(names), "/etc/hosts")
    call("ip", "link", "set", "lo", "up")
    call("ip", "link", "add", "hyq0", "type", "bridge")
    call("ip", "addr", "add", f"{SERVERS}/24", "dev", "hyq0")
    call("ip", "link", "set", "hyq0", "up")
    for host, address in HOSTS.items():
        call("ip", "netns", "add", host)
        call("ip", "link", "add", _link(host), "type", "veth", "peer", "name", "eth0", "netns", host)
        call("ip", "link", "set", _link(host), "master", "hyq0", "up")
        call("ip", "-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
        call("ip", "-n", host, "link", "set", "eth0", "up")
        call("ip", "-n", host, "link", "set", "lo", "up")


def on_host(host: str, command: Sequence[str]) -> list[str]:
    """Return a command that runs another on a host, under its host name; the process ids are the same."""
    named = ["unshare", "--uts", "bash", "-c", 'hostname "$0"; exec "$@"', host]
    return ["ip", "netns", "exec", host, *named, *command]


def cut(host: str) -> None:
    """Let no packet in or out of a host, as an unplugged cable does: nothing is answered, nothing refused."""
    call("ip", "link", "set", _link(host), "nomaster")


def mend(host: str) -> None:
    """Plug the cable in again."""
    call("ip", "link", "set", _link(host), "master", "hyq0")


def _link(host: str) -> str:
    return f"v{host}"
