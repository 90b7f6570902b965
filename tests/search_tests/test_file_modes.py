import os
import subprocess
import sys


def test_what_a_command_makes_is_not_for_all_the_world_to_read(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; import search.cli as cli\n"
        "cli.exit_code_of = lambda _: Path('made').mkdir() or Path('made/log.txt').write_text('x') and 0\n"
        "os.umask(0)\n"
        "cli.main()"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()}, check=True
    )

    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "made" / "log.txt").stat().st_mode & 0o777 == 0o640
