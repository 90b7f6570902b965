import sys

import psutil
import pytest
import torch

from hyquant.memory import give_back


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_what_lies_free_below_a_living_tensor_is_given_back():
    """Blocks of 64 KiB come from the heap, which glibc shortens by itself only from its end."""
    process = psutil.Process()
    tensors = [torch.ones(2**14) for _ in range(3200)]
    last = torch.ones(2**14)
    del tensors
    held = process.memory_info().rss
    give_back()
    assert held - process.memory_info().rss > 100 * 2**20
    assert last.sum() == 2**14
