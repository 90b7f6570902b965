"""Blocks of ports: many real processes claim them, some are killed, and no two live ones ever hold the same."""

import signal
import socket
import subprocess
import sys

import pytest

from search.errors import SearchError
from search.ports import BLOCK_SIZE, PortBlock, _firsts, claim_block

CLAIM = """
import pathlib, sys
from search.ports import claim_block
for line in sys.stdin:
    block, lock = claim_block(pathlib.Path(sys.argv[1]))
    print(block.first, flush=True)
"""
_NUM_OWNERS = 8


def test_hccl_is_told_of_two_halves_that_do_not_overlap():
    assert PortBlock(61_000).environment == {
        "HCCL_IF_BASE_PORT": "61000",
        "HCCL_HOST_SOCKET_PORT_RANGE": "61000-61031",
        "HCCL_NPU_SOCKET_PORT_RANGE": "61032-61063",
    }


def test_blocks_keep_off_the_kernels_own_ports_while_there_are_others():
    firsts = list(_firsts(32_768, 60_999))
    outside = [first for first in firsts if first + BLOCK_SIZE <= 32_768 or first > 60_999]

    assert firsts[: len(outside)] == outside
    assert len(outside) > 200
    assert all(first >= 20_000 and first + BLOCK_SIZE <= 65_536 for first in firsts)
    assert sorted(firsts) == list(range(20_000, 20_000 + BLOCK_SIZE * len(firsts), BLOCK_SIZE))


def test_a_block_with_a_port_in_use_is_passed_over(tmp_path):
    block, lock = claim_block(tmp_path)
    lock.release()
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", block.first + 7))
        busy.listen()
        other, lock = claim_block(tmp_path)
        lock.release()

    assert other != block


def test_without_a_free_block_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("search.ports._is_free", lambda port: False)

    with pytest.raises(SearchError, match="64 free ports in a row"):
        claim_block(tmp_path)


@pytest.mark.multiproc
def test_no_two_live_owners_share_a_block_and_a_killed_ones_is_free_at_once(tmp_path):
    command = [sys.executable, "-c", CLAIM, str(tmp_path)]
    owners = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(_NUM_OWNERS)
    ]
    try:
        for owner in owners:  # all at once, once they stand at the line
            owner.stdin.write("go\n")
        for owner in owners:
            owner.stdin.flush()
        held = [int(owner.stdout.readline()) for owner in owners]
        assert len(set(held)) == _NUM_OWNERS

        index = held.index(min(held))
        owners[index].send_signal(signal.SIGKILL)
        owners[index].wait()
        block, lock = claim_block(tmp_path)
        lock.release()
        assert block.first == min(held)
    finally:
        for owner in owners:
            owner.kill()
            owner.communicate()
