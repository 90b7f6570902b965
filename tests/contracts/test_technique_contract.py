"""What every combination of techniques owes, in both layouts of HunyuanVideo: it runs, stays close, and saves whole."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from hyquant.calibration.calibrate import calibrate, quantize_calibrated_
from hyquant.calibration.calls import output_tensor, replay
from hyquant.config import M3, M4, M6, FA3Fp8, FA3Int8, QuantConfig, W8A8Dynamic, W8A8Static, W8A8Timestep
from hyquant.export import load_quantized, module_info, save_quantized
from hyquant.models.attentions import attention_blocks
from hyquant.models.names import layer_groups
from hyquant.observers import OBSERVERS
from hyquant.plan import build_plan
from hyquant.quantize import restore_
from tests.toys.both_layouts import AsDiffusers, recorded
from tests.toys.original_dit import ToySize, euler_loop, random_toy, toy_inputs

NUM_STEPS = 3
SMOOTHINGS = {
    "plain": None,
    "m3": M3(),
    "m4": M4(),
    "m6": M6(),
    "m4 folded": M4(placement="fold"),
}
LINEARS = {
    "dynamic": W8A8Dynamic(),
    **{f"static {name}": W8A8Static(act_method=name) for name in OBSERVERS},
    **{f"timestep {name}": W8A8Timestep(act_method=name, timestep_sep=1) for name in OBSERVERS},
}


def kind_of(attention) -> str:
    """Return the name of an attention scheme in a test's id."""
    return "float" if attention is None else attention.kind


CASES = [
    *((linear, smoothing, None) for linear in LINEARS for smoothing in SMOOTHINGS),
    *(
        (linear, smoothing, attention)
        for linear in ("dynamic", "static minmax", "timestep minmax")
        for smoothing in ("plain", "m3", "m4", "m6")
        for attention in (FA3Int8(statistic="absmax"), FA3Fp8())
    ),
]


@pytest.fixture(scope="module")
def layouts():
    """Each layout with its clock and records of one short loop of the same weights."""
    toy, inputs = random_toy(0, ToySize()), toy_inputs(ToySize(), seed=10)
    outer = AsDiffusers(toy)
    found = {}
    for name, denoiser, caller in (("original", toy, toy), ("diffusers", outer.denoiser, outer)):
        clock, records, _ = recorded(
            denoiser, partial(euler_loop, caller, num_steps=NUM_STEPS), inputs, num_steps=NUM_STEPS
        )
        found[name] = (denoiser, clock, records)
    return found


def outputs(denoiser, clock, records) -> torch.Tensor:
    """Return the denoiser's answers to all records, one after the other."""
    answers = []
    for record in records:
        clock.set(record.step_index)
        answers.append(output_tensor(replay(denoiser, record, torch.device("cpu"))).flatten())
    return torch.cat(answers)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize(
    ("linear", "smoothing", "attention"),
    CASES,
    ids=[
        f"{linear}, {smoothing}, {attention.kind if attention else 'float'}" for linear, smoothing, attention in CASES
    ],
)
def test_a_combination_runs_stays_close_and_loads_as_it_was_saved(
    layouts, tmp_path, layout, linear, smoothing, attention
):
    denoiser, clock, records = layouts[layout]
    config = QuantConfig(linear=LINEARS[linear], smoothing=SMOOTHINGS[smoothing], attention=attention)
    blocks = attention_blocks(denoiser)
    plan = build_plan(layer_groups(denoiser), config, num_steps=NUM_STEPS, attentions=blocks)
    info = module_info(denoiser, source="toy")
    try:
        expected = outputs(denoiser, clock, records)
        quantize_calibrated_(denoiser, plan, calibrate(denoiser, plan, records, clock), clock)
        actual = outputs(denoiser, clock, records)
        save_quantized(denoiser, plan, tmp_path / "export", model=info)
        restore_(denoiser)
        load_quantized(denoiser, tmp_path / "export", clock)
        loaded = outputs(denoiser, clock, records)
    finally:
        restore_(denoiser)

    assert 0.99 < F.cosine_similarity(actual.double(), expected.double(), dim=0).item() < 1.0
    assert torch.equal(loaded, actual)
    assert torch.equal(outputs(denoiser, clock, records), expected)
