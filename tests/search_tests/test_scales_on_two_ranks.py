"""Smoothing scales and scales of attention on two real processes: they agree with each other and with one alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hyquant.config import M3, M6, FA3Int8, QuantConfig, W8A8Dynamic
from hyquant.devices import resolve_device
from hyquant.distributed import Group, init_group
from hyquant.models.attentions import attention_blocks
from hyquant.plan import build_plan
from search.attention import prepare_attention
from search.locks import HostLock
from search.prepare import calibrate, prepare_workbench
from search.prompts import StudyPrompts
from search.scales import prepare_scales
from search.stages import Stages
from search.study import StudyConfig
from tests.toys.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "m3": (("one red cube",), M3(layers=("*img_attn_qkv",), records="first")),
    "m6": (("one red cube", "two", "blue balls"), M6(layers=("*img_attn_qkv",))),
}


def search_as(group, config, folder):
    """Return what a rank finds by case: scales by layer, whether it has the first record of all, ranges of heads."""
    found = {}
    for name, (prompts, smoothing) in CASES.items():
        both = StudyPrompts(calibration=prompts, search=("a green cone", "a grey ring"))
        lock = HostLock(folder / "locks")
        bench = prepare_workbench(
            config, both, group=group, device=resolve_device("cpu"), cache=folder / "cache", lock=lock
        )
        stages = Stages(group)
        point = QuantConfig(linear=W8A8Dynamic(), smoothing=smoothing, attention=FA3Int8(ratio_qk=0.9))
        blocks = attention_blocks(bench.model.denoiser)
        plan = build_plan(bench.model.groups(), point, num_steps=2, attentions=blocks)
        calibrate(bench, stages, plan)
        scales = prepare_scales(bench, plan, stages)
        heads = prepare_attention(bench, plan, stages)
        found[name] = {
            "scales": {layer: scale.tolist() for layer, scale in scales.items()},
            "has_first_record": bench.has_first_record,
            "heads": {block: [*stats.lo.tolist(), *stats.hi.tolist()] for block, stats in heads.items()},
        }
    return found


@pytest.mark.multiproc
def test_two_ranks_search_what_one_process_searches(study_config, tmp_path):
    """With one prompt a rank has no records at all; the first record is then the other's."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, study_config.model_dump_json(), str(tmp_path / str(rank))],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    alone = search_as(Group(), study_config, tmp_path / "alone")
    finished = [process.communicate(timeout=120) for process in processes]
    for (_, errors), process in zip(finished, processes, strict=True):
        assert process.returncode == 0, errors
    first, second = (json.loads(output) for output, _ in finished)

    assert [found["m3"]["has_first_record"] for found in (first, second)] == [False, True]
    for name in CASES:
        assert first[name]["scales"] == second[name]["scales"]
        assert first[name]["heads"] == second[name]["heads"] == alone[name]["heads"]
        assert len(first[name]["heads"]) == 4
        assert first[name]["scales"].keys() == alone[name]["scales"].keys()
        for layer, scale in alone[name]["scales"].items():
            assert first[name]["scales"][layer] == pytest.approx(scale, rel=1e-6)


def main() -> None:
    """Be one rank: print what it finds."""
    group = init_group(resolve_device("cpu"), timeout_s=60)
    found = search_as(group, StudyConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
    print(json.dumps(found), flush=True)
    group.barrier()
    os._exit(0)  # now and then one of gloo's threads aborts a process that winds it down


if __name__ == "__main__":
    main()
