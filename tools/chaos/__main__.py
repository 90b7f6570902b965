"""Start a chaos run: `python -m tools.chaos --faults 50 --seed 0`; exit 0 if nothing was lost, 1 otherwise."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

INSIDE = "HYQ_CHAOS_INSIDE"
NEEDED = ("unshare", "ip", "mount", "runuser", "initdb", "postgres")
POSTGRES_FOLDERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


def main() -> None:
    """Enter namespaces of our own, and run there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pace", type=float, default=12.0, help="mean seconds between two faults")
    parser.add_argument("--minutes", type=float, default=20.0, help="after which no fault begins any more")
    parser.add_argument("--only", default="", help="comma-separated kinds of faults [default: all]")
    parser.add_argument("--keep", type=Path, help="copy logs and study file here afterwards")
    args = parser.parse_args()
    if INSIDE in os.environ:
        from tools.chaos.run import run_chaos

        only = tuple(filter(None, args.only.split(",")))
        sys.exit(run_chaos(Path(os.environ[INSIDE]), args.faults, args.seed, args.pace, only, args.minutes))
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin", *map(str, POSTGRES_FOLDERS)])
    if reason := _why_not(path):
        sys.exit(f"a chaos run needs Linux, root, iproute2 and PostgreSQL, but {reason}")
    folder = Path(tempfile.mkdtemp(prefix="hyq-chaos-"))
    folder.chmod(0o755)  # PostgreSQL runs as a user of its own
    try:
        sys.exit(_inside(folder, path))
    finally:
        if args.keep is not None:
            shutil.copytree(folder / "kept", args.keep, dirs_exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _inside(folder: Path, path: str) -> int:
    """Run this module again as the first processes of new namespaces; bash is their init and reaps orphans."""
    new = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = [*new, "bash", "-c", '"$@"; exit $?', "bash", sys.executable, "-m", "tools.chaos", *sys.argv[1:]]
    environment = {**os.environ, "PATH": path, INSIDE: str(folder), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment)
    try:
        return process.wait()
    finally:
        process.kill()  # with --kill-child the kernel ends every process inside
        process.wait()


def _why_not(path: str) -> str | None:
    if sys.platform != "linux":
        return f"this is {sys.platform}"
    if os.geteuid() != 0:
        return "this user is not root"
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    return f"{', '.join(missing)} is not there" if missing else None


if __name__ == "__main__":
    main()
