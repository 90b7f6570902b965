"""Sessions on two ranks that must agree: what one cannot do, or says otherwise, is an error on both and no deadlock."""

import json

import pytest

from tests.toys.ranks import run_ranks

RANK_PROGRAM = """
import json, sys
import torch
from torch import distributed as dist, nn
from hyquant import SaveProcessorConfig, SessionConfig, W8A8DynamicProcessorConfig, W8A8ProcessorConfig, quant_model
from hyquant import get_rank
from hyquant.distributed import run_together
from hyquant.errors import HyquantError
from hyquant.modules.swap import quantized_tensors, swapped
from hyquant.session.ranks import current_group

before = get_rank()
dist.init_process_group("gloo")
group, folder = current_group(), sys.argv[1]
rank = get_rank()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


def outcome(processors, calls):
    model = net()
    try:
        quant_model(model, SessionConfig(processor_cfg_map=processors, calib_data=calls))
    except HyquantError as error:
        return [type(error).__name__, str(error), swapped(model) is None]
    return "fine"


def call(value):
    return [[torch.full((2, 8), float(value))]]


static = {"w8a8": W8A8ProcessorConfig()}
dynamic = {"w8a8_dynamic": W8A8DynamicProcessorConfig()}
found = {
    "before": before,
    "sessions differ": outcome(static if rank == 0 else {"w8a8": W8A8ProcessorConfig(disable_names=["0"])}, call(1)),
    "folders differ": outcome({**dynamic, "save": SaveProcessorConfig(output_path=f"{folder}/{rank}")}, []),
    "folder is taken": outcome({**dynamic, "save": SaveProcessorConfig(output_path=f"{folder}/taken")}, []),
    "calls are not finite": outcome(static, call(1 if rank == 0 else float("inf"))),
    "name is wrong": outcome({"w8a8": W8A8ProcessorConfig(disable_names=["0"] if rank == 0 else ["x"])}, call(1)),
    "same name": outcome({**dynamic, "save": SaveProcessorConfig(output_path=f"{folder}/one")}, []),
}
model = net()
quant_model(model, SessionConfig(processor_cfg_map=static, calib_data=call(1 + rank)))
found["scale"] = quantized_tensors(model)["0"]["input_scale"].item()
found["together"] = run_together(group, lambda: rank)
dist.destroy_process_group()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "taken").mkdir()
    (folder / "taken" / "mine.txt").touch()
    outputs = run_ranks(["-c", RANK_PROGRAM, str(folder)])
    assert not (folder / "0").exists()
    assert sorted(path.name for path in (folder / "one").iterdir()) == [
        "hyq_manifest.json",
        "quant_model_description_w8a8_dynamic.json",
        "quant_model_weight_w8a8_dynamic.safetensors",
    ]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("sessions differ", "ConfigError", "that of rank 1 differs from that of rank 0"),
        ("folders differ", "ConfigError", "that of rank 1 differs from that of rank 0"),
        ("folder is taken", "ExportError", "holds other things"),
        ("calls are not finite", "CalibrationError", "must be finite"),
        ("name is wrong", "LayerMatchError", "'x' (1 in all) is none"),
    ],
)
def test_both_ranks_get_the_error_and_stay_in_float(ranks, case, kind, message):
    for found in ranks:
        assert found[case][0] == kind
        assert message in found[case][1]
        assert found[case][2]


@pytest.mark.multiproc
def test_who_cannot_is_named_to_the_other(ranks):
    assert ranks[0]["calls are not finite"][1].startswith("rank 1: ")
    assert ranks[1]["folder is taken"][1].startswith("rank 0: ")


@pytest.mark.multiproc
def test_ranks_that_give_one_name_write_one_pair(ranks):
    assert [found["same name"] for found in ranks] == ["fine", "fine"]


@pytest.mark.multiproc
def test_both_ranks_have_the_range_of_all_calls(ranks):
    """The largest input is 2, on rank 1; the scale is 2 / 255 as bfloat16 has it."""
    assert ranks[0]["scale"] == ranks[1]["scale"] == pytest.approx(2 / 255, rel=2**-8)
    assert [found["together"] for found in ranks] == [0, 1]
    assert [found["before"] for found in ranks] == [-1, -1]
