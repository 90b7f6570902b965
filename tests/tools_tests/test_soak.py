import subprocess
import sys

import psutil
import pytest

from tools.soak.run import Soaked
from tools.soak.sample import Held, Sample, taken
from tools.soak.verdict import judged, slope

MIB = 2**20


def samples(*, worker_mib_per_hour=0.0, worker_handles=lambda index: 20 + index % 3, pid=lambda index: 3):
    """Two hours of a worker of 1000 MiB, looked at every minute, with a peak now and then."""
    found = []
    for index in range(120):
        peak = 400 if index % 7 == 0 else 0
        rss = int((1000 + peak + worker_mib_per_hour * index / 60) * MIB)
        roles = {role: _held(1, 100 * MIB, 5) for role in ("run", "agent")}
        roles["worker"] = _held(pid(index), rss, worker_handles(index))
        found.append(Sample(at_s=60.0 * index, roles=roles, disk_bytes={"store/artifacts": index * MIB}))
    return found


def _held(pid, rss_bytes, handles):
    return Held(pids=(pid,), rss_bytes=rss_bytes, pss_bytes=rss_bytes, handles=handles, threads=4)


def failed(found, *, finished_s=tuple(range(0, 7200, 60)), videos=frozenset({3, 4})):
    verdict = judged(Soaked(found, list(finished_s), set(videos), {3, 4}), warmup_s=600.0)
    assert verdict["passed"] is all(row["ok"] == "yes" for row in verdict["rows"])
    return [row["what"] for row in verdict["rows"] if row["ok"] != "yes"]


def test_a_run_that_goes_up_and_down_passes():
    assert failed(samples()) == []


def test_memory_may_grow_by_less_than_a_hundredth_an_hour():
    assert failed(samples(worker_mib_per_hour=5.0)) == []
    assert failed(samples(worker_mib_per_hour=15.0)) == ["worker rss"]


def test_one_handle_lost_every_half_hour_is_seen():
    assert failed(samples(worker_handles=lambda index: 20 + index // 30)) == ["worker handles"]


def test_a_worker_that_was_restarted_fails():
    assert failed(samples(pid=lambda index: 3 + index // 100)) == ["worker processes"]


def test_disk_is_held_against_the_trials_that_finished():
    assert failed(samples(), finished_s=[1000.0, 2000.0]) == ["disk"]


@pytest.mark.parametrize("videos", [{3}, {3, 4, 5}])
def test_videos_are_those_of_the_policy(videos):
    assert failed(samples(), videos=videos) == ["videos"]


def test_the_slope_is_the_median_over_pairs():
    assert slope([0.0, 1.0, 2.0, 3.0], [0.0, 2.0, 4.0, 100.0]) == pytest.approx((2.0 + 100 / 3) / 2)
    assert slope([0.0, 1.0, 2.0], [5.0, 5.0, 5.0]) == 0.0


@pytest.mark.multiproc
def test_a_sample_sees_processes_by_role_and_files_by_part(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "entry").write_bytes(b"x" * 1000)
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()', 'search.worker'])"
    with psutil.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as run:
        try:
            while not run.children() or "search.worker" not in run.children()[0].cmdline():
                pass
            sample = taken(run, 1.0, {"store": tmp_path, "none": tmp_path / "none"})
            assert sample.disk_bytes == {"store/cache": 1000}
            assert sample.roles["run"].pids == (run.pid,)
            assert sample.roles["worker"].pids == (run.children()[0].pid,)
            assert sample.roles["worker"].rss_bytes >= sample.roles["worker"].pss_bytes > MIB
        finally:
            run.stdin.close()
