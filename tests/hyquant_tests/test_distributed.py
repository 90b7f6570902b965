"""Groups of ranks: two real processes over gloo, and one process alone."""

import json

import pytest
import torch

from hyquant.calibration.histogram import histogram_of
from hyquant.calibration.stats import GroupStats
from hyquant.devices import resolve_device
from hyquant.distributed import Group, add_sums, init_group, merge_stats, shard
from hyquant.errors import ConfigError
from tests.toys.ranks import run_ranks

RANK_PROGRAM = """
import json, math, sys
import torch
from hyquant.calibration.stats import call_stats
from hyquant.devices import resolve_device
from hyquant.distributed import add_sums, init_group, merge_stats, shard

group = init_group(resolve_device("cpu"), timeout_s=60)
items = list(range(5))
mine = shard(items, group.rank, group.world_size)
x = torch.randn(4, 3, generator=torch.Generator().manual_seed(group.rank))
stats = merge_stats({"both": call_stats(x), f"only {group.rank}": call_stats(x)}, group)
counted = merge_stats({"both": call_stats(x * 100**group.rank, histogram=True)}, group)["both"].histogram
lone = merge_stats({"lone": call_stats(x)} if group.rank == 1 else {}, group)
found = {
    "rank": group.rank,
    "broadcast": group.broadcast({"who": group.rank, "pair": (1, 2), "nan": math.nan, "word": "größer"}),
    "gathered": group.gather({"rank": group.rank, "long": "x" * 1000 * group.rank}),
    "all_gathered": group.all_gather(group.rank),
    "in_order": group.gather_in_order([10 * item for item in mine]),
    "tensors": [part["t"].tolist() for part in group.all_gather_tensors({"t": torch.arange(1 + group.rank)})],
    "tensors_on_0": [
        part["t"].tolist() for part in group.gather_tensors({"t": torch.arange(1 + group.rank)}) or ()
    ],
    "lo": stats["both"].lo.tolist(),
    "calls": {name: part.calls.tolist() for name, part in sorted(stats.items())},
    "lone": sorted(lone),
    "sums": add_sums({"a": torch.tensor([1.0, 2.0 + group.rank], dtype=torch.float64)}, group)["a"].tolist(),
    "counted": [counted.exponent.tolist(), counted.first.tolist(), counted.counts.tolist()],
}
group.barrier()
group.close()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def ranks():
    """What each of two ranks found out."""
    outputs = run_ranks(["-c", RANK_PROGRAM])
    return [json.loads(output) for output in outputs]


@pytest.mark.multiproc
def test_every_rank_hears_what_rank_0_says(ranks):
    for found in ranks:
        assert found["broadcast"]["who"] == 0
        assert found["broadcast"]["pair"] == [1, 2]
        assert found["broadcast"]["nan"] != found["broadcast"]["nan"]
        assert found["broadcast"]["word"] == "größer"


@pytest.mark.multiproc
def test_gather_gives_rank_0_all_values_in_rank_order(ranks):
    assert [value["rank"] for value in ranks[0]["gathered"]] == [0, 1]
    assert [len(value["long"]) for value in ranks[0]["gathered"]] == [0, 1000]
    assert ranks[1]["gathered"] is None


@pytest.mark.multiproc
def test_all_gather_gives_everyone_all_values_and_tensors(ranks):
    for found in ranks:
        assert found["all_gathered"] == [0, 1]
        assert found["tensors"] == [[0], [0, 1]]


@pytest.mark.multiproc
def test_gathered_tensors_are_on_rank_0_alone(ranks):
    assert [found["tensors_on_0"] for found in ranks] == [[[0], [0, 1]], []]


@pytest.mark.multiproc
def test_results_of_sharded_items_come_back_in_order(ranks):
    assert all(found["in_order"] == [0, 10, 20, 30, 40] for found in ranks)


@pytest.mark.multiproc
def test_merged_statistics_are_equal_on_all_ranks_and_cover_all_records(ranks):
    inputs = [torch.randn(4, 3, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    lo = torch.cat(inputs).amin(dim=0)

    for found in ranks:
        assert torch.equal(torch.tensor(found["lo"]), lo[None])
        assert found["calls"] == {"both": [2], "only 0": [1], "only 1": [1]}
        assert found["lone"] == ["lone"]


@pytest.mark.multiproc
def test_sums_add_up_on_every_rank(ranks):
    assert [found["sums"] for found in ranks] == [[2.0, 5.0]] * 2


@pytest.mark.multiproc
def test_merged_histograms_are_on_all_ranks_the_one_of_all_values(ranks):
    inputs = [torch.randn(4, 3, generator=torch.Generator().manual_seed(rank)) * 100**rank for rank in range(2)]
    whole = histogram_of(torch.cat(inputs))

    for found in ranks:
        assert found["counted"] == [whole.exponent.tolist(), whole.first.tolist(), whole.counts.tolist()]


def test_one_process_alone_needs_no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    group = init_group(resolve_device("cpu"))
    stats = {"a": _stats()}
    group.barrier()

    assert group == Group(rank=0, world_size=1)
    assert not torch.distributed.is_initialized()
    assert group.broadcast({"pair": (1, 2)}) == {"pair": [1, 2]}
    assert group.gather(3) == [3]
    assert group.gather_in_order([1, 2]) == [1, 2]
    assert merge_stats(stats, group) == stats
    assert add_sums({"a": torch.ones(2)}, group)["a"].tolist() == [1.0, 1.0]
    group.close()


def test_a_torchrun_of_one_rank_needs_no_process_group(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)

    assert init_group(resolve_device("cpu")) == Group()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("environment", [{"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}])
def test_half_an_environment_is_refused(monkeypatch, environment):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(ConfigError, match="start it with torchrun"):
        init_group(resolve_device("cpu"))


@pytest.mark.parametrize("num_items", [0, 1, 2, 7, 8, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shards_are_complete_in_order_and_even(num_items, world_size):
    items = list(range(num_items))
    parts = [shard(items, rank, world_size) for rank in range(world_size)]
    lengths = [len(part) for part in parts]

    assert [item for part in parts for item in part] == items
    assert max(lengths) - min(lengths) <= 1


def test_a_rank_outside_the_group_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 2\), but got 2"):
        shard([1, 2], 2, 2)


def _stats(seed: int = 0) -> GroupStats:
    generator = torch.Generator().manual_seed(seed)
    lo = torch.randn(2, 3, generator=generator)
    return GroupStats(lo, lo + 1, lo.double().sum(1), lo.double().sum(1), torch.ones(2, dtype=torch.int64))


LOSS_PROGRAM = """
import os
from hyquant.devices import resolve_device
from hyquant.distributed import init_group
from hyquant.errors import RankLost

group = init_group(resolve_device("cpu"), timeout_s=60)
group.barrier()
if group.rank == 1:
    os._exit(0)
found = []
for verb in (group.barrier, lambda: group.all_gather(1), lambda: group.gather_tensors({}), lambda: group.broadcast(1)):
    try:
        verb()
    except RankLost as error:
        found.append(str(error))
print(len(found), found[0], flush=True)
os._exit(0)
"""


@pytest.mark.multiproc
def test_every_verb_says_that_a_rank_is_gone():
    told, nothing = run_ranks(["-c", LOSS_PROGRAM])

    assert told.startswith("4 every rank of a group must live and answer, but one did not: ")
    assert nothing == ""
