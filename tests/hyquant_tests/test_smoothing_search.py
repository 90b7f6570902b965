"""Searched smoothing scales against a brute force in numpy over inputs that were kept."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

from hyquant.calibration.calibrate import calibrate
from hyquant.calibration.capture import capture_in_memory
from hyquant.calibration.kept import KeptInputs
from hyquant.calibration.observe import observe
from hyquant.config import M3, M4, M6, QuantConfig, W8A8Dynamic, W8A8Static, W8A8Timestep
from hyquant.errors import CalibrationError
from hyquant.models.base import RenderSettings
from hyquant.models.tiny import TinyVideoModel
from hyquant.plan import build_plan
from hyquant.quantize import needs_search, quantize_, restore_, smoothing_multipliers
from hyquant.smoothing import m3, m6
from hyquant.smoothing.base import first_minimum, last_minimum
from hyquant.smoothing.loss import weight_and_input_errors, weight_errors
from hyquant.smoothing.search import PlanSearch, search_scales

NUM_STEPS = 3
SETTINGS = RenderSettings(height=32, width=32, num_frames=1, num_steps=NUM_STEPS)
PATTERNS = ("*img_attn_qkv", "*0.txt_mlp.fc1", "*attn_proj", "single_blocks.1.linear1")
CONFIGS = {"m3": M3(layers=PATTERNS), "m3 first": M3(layers=PATTERNS, records="first"), "m6": M6(layers=PATTERNS)}


@pytest.fixture(scope="module")
def loaded():
    """A model whose modulations give some channels 30 times the others, records of two prompts, and their inputs."""
    model = TinyVideoModel(dtype=torch.float32)
    for block in (*model.denoiser.transformer_blocks, *model.denoiser.single_transformer_blocks):
        norms = [block.norm1.linear, block.norm1_context.linear] if hasattr(block, "norm1") else [block.norm.linear]
        for linear in norms:
            linear.bias.data[[3, 32 + 3]] += 30.0
    records = capture_in_memory(model, ["a red square", "two"], [0, 1], SETTINGS)
    return model, records, observe(model.denoiser, model.groups(), records, model.clock)


@pytest.fixture(scope="module")
def kept(loaded):
    """The inputs of every group by name, one array [M, C] per record."""
    model, records, _ = loaded
    inputs: dict[str, list[np.ndarray]] = {group.name: [] for group in model.groups()}
    handles = [
        model.denoiser.get_submodule(group.modules[0]).register_forward_pre_hook(
            lambda module, args, name=group.name: inputs[name].append(
                args[0].reshape(-1, args[0].shape[-1]).double().numpy()
            )
        )
        for group in model.groups()
    ]
    with torch.inference_mode():
        for record in records:
            model.denoiser(**record.inputs)
    for handle in handles:
        handle.remove()
    return inputs


def plan_of(model, smoothing, linear=None):
    config = QuantConfig(linear=linear or W8A8Dynamic(), smoothing=smoothing)
    return build_plan(model.groups(), config, num_steps=NUM_STEPS)


def weight_of(model, layer) -> np.ndarray:
    return torch.cat([model.denoiser.get_submodule(path).weight for path in layer.modules]).double().numpy()


def rows_in_int8(weight: np.ndarray) -> np.ndarray:
    scale = np.abs(weight).max(axis=1, keepdims=True) / 127
    return np.round(weight / scale) * scale


def input_in_int8(x: np.ndarray) -> np.ndarray:
    lo, hi = min(x.min(), 0), max(x.max(), 0)
    scale = (hi - lo) / 255
    zero_point = -128 - np.round(lo / scale)
    return (np.clip(np.round(x / scale + zero_point), -128, 127) - zero_point) * scale


def m3_losses(inputs: list[np.ndarray], weight: np.ndarray) -> tuple[np.ndarray, list[float]]:
    x = np.concatenate(inputs)
    mean = np.abs(x).mean(axis=0)
    scales = [mean ** (step / 20) for step in range(20)]
    scales = np.array([scale / np.sqrt(scale.max() * scale.min()) for scale in scales])
    losses = [np.mean((x @ (rows_in_int8(weight * scale) / scale).T - x @ weight.T) ** 2) for scale in scales]
    return scales, losses


def m6_loss(inputs: list[np.ndarray], weight: np.ndarray, alpha: float, beta: float) -> tuple[np.ndarray, float]:
    x = np.concatenate(inputs)
    scale = np.abs(x).max(axis=0) ** alpha / np.abs(weight).max(axis=0) ** beta
    expected = x @ weight.T
    actual = input_in_int8(x / scale) @ rows_in_int8(weight * scale).T
    return scale, np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("records_rule", ["all", "first"])
def test_m3_finds_the_power_that_brute_force_finds(loaded, kept, records_rule):
    model, records, stats = loaded
    plan = plan_of(model, M3(layers=PATTERNS, records=records_rule))

    scales = search_scales(model.denoiser, plan, stats, records, model.clock)

    assert set(scales) == {layer.name for layer in plan.smoothed}
    for layer in plan.smoothed:
        inputs = kept[layer.name] if records_rule == "all" else kept[layer.name][:1]
        candidates, losses = m3_losses(inputs, weight_of(model, layer))
        np.testing.assert_allclose(scales[layer.name], candidates[np.argmin(losses)], rtol=1e-5)


def test_m6_finds_the_exponents_that_brute_force_finds(loaded, kept):
    model, records, stats = loaded
    plan = plan_of(model, M6(layers=PATTERNS))

    scales = search_scales(model.denoiser, plan, stats, records, model.clock)

    for layer in plan.smoothed:
        inputs, weight = kept[layer.name], weight_of(model, layer)
        grid = [step / 20 for step in range(21)]
        stage_one = [m6_loss(inputs, weight, alpha, 1 - alpha)[1] for alpha in grid]
        alpha = grid[np.argmin(stage_one)]
        stage_two = [m6_loss(inputs, weight, alpha, beta) for beta in grid]
        expected, _ = min(stage_two, key=lambda pair: pair[1])
        np.testing.assert_allclose(scales[layer.name], expected, rtol=1e-5)


def test_the_searched_loss_is_below_the_unsmoothed_one_where_channels_stick_out(loaded, kept):
    model, records, stats = loaded
    plan = plan_of(model, M6(layers=("*img_attn_qkv",)))

    scales = search_scales(model.denoiser, plan, stats, records, model.clock)

    for layer in plan.smoothed:
        x, weight = torch.from_numpy(np.concatenate(kept[layer.name])).float(), weight_of(model, layer)
        bounds = x.amin(dim=0), x.amax(dim=0)
        tried = torch.stack((torch.ones(x.shape[1]), scales[layer.name]))
        plain, smoothed = weight_and_input_errors(x, torch.from_numpy(weight).float(), tried, *bounds)
        assert smoothed < plain / 4


@pytest.mark.parametrize("smoothing", CONFIGS.values(), ids=CONFIGS)
def test_two_ranks_find_what_one_rank_finds(loaded, smoothing):
    """The records are cut after the fourth; the rank without the first record gives none where only that counts."""
    model, records, stats = loaded
    plan = plan_of(model, smoothing)
    shards = [records[:4], records[4:]]
    if smoothing is CONFIGS["m3 first"]:
        shards = [records, []]
    alone = search_scales(model.denoiser, plan, stats, records, model.clock)

    ranks = [PlanSearch(model.denoiser, plan, stats) for _ in shards]
    while not ranks[0].is_done:
        parts = [rank.measure(shard, model.clock) for rank, shard in zip(ranks, shards, strict=True)]
        total = {name: parts[0][name] + parts[1][name] for name in parts[0]}
        for rank in ranks:
            rank.tell(total)

    for name, scale in alone.items():
        assert torch.equal(ranks[0].scales[name], ranks[1].scales[name])
        torch.testing.assert_close(ranks[0].scales[name], scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("smoothing", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("limit_bytes", [2**28, 1000], ids=["all inputs kept", "too many inputs"])
def test_inputs_that_were_kept_answer_as_another_pass_does(loaded, monkeypatch, smoothing, limit_bytes):
    model, records, _ = loaded
    plan = plan_of(model, smoothing)
    stats = observe(model.denoiser, model.groups(), records, model.clock)
    expected = search_scales(model.denoiser, plan, stats, records, model.clock)
    calls = []
    handle = model.denoiser.register_forward_pre_hook(lambda module, args: calls.append(1))
    monkeypatch.setattr("hyquant.calibration.calibrate.KeptInputs", partial(KeptInputs, limit_bytes=limit_bytes))

    found = calibrate(model.denoiser, plan, records, model.clock).scales

    handle.remove()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    has_one_pass = limit_bytes > 1000 and smoothing != CONFIGS["m3 first"]
    assert (len(calls) == len(records)) is has_one_pass


def test_layers_that_are_folded_together_share_a_scale_found_on_both(loaded, kept):
    model, records, stats = loaded
    plan = plan_of(model, M3(layers=("double_blocks.0.*attn_proj",), placement="fold"))

    scales = search_scales(model.denoiser, plan, stats, records, model.clock)

    (unit,) = plan.smoothing_units
    img, txt = (layer.name for layer in unit)
    assert torch.equal(scales[img], scales[txt])
    x = np.concatenate(kept[img] + kept[txt])
    mean = np.abs(x).mean(axis=0)
    candidates = [mean ** (step / 20) for step in range(20)]
    losses = []
    for scale in candidates:
        weights = [weight_of(model, layer) for layer in unit]
        errors = [rows_in_int8(weight * scale) / scale - weight for weight in weights]
        inputs = (np.concatenate(kept[name]) for name in (img, txt))
        losses.append(sum(((each @ error.T) ** 2).sum() for each, error in zip(inputs, errors, strict=True)))
    best = candidates[np.argmin(losses)]
    np.testing.assert_allclose(scales[img], best / np.sqrt(best.max() * best.min()), rtol=1e-5)


def test_fixed_m6_is_its_formula(loaded, kept):
    model, _, stats = loaded
    plan = plan_of(model, M6(layers=("*txt_attn_qkv",), alpha=0.8, beta=0.3))

    multipliers = smoothing_multipliers(model.denoiser, plan, stats)

    for layer in plan.smoothed:
        act = np.abs(np.concatenate(kept[layer.name])).max(axis=0)
        scale = act**0.8 / np.abs(weight_of(model, layer)).max(axis=0) ** 0.3
        np.testing.assert_allclose(multipliers[layer.name], 1 / scale, rtol=2**-8)  # bfloat16


def test_only_searched_kinds_need_a_search(loaded):
    model, _, _ = loaded
    kinds = {"m3": M3(), "m4": M4(), "m6 given": M6(alpha=0.5, beta=0.5), "m6 searched": M6()}

    assert {name: needs_search(plan_of(model, smoothing)) for name, smoothing in kinds.items()} == {
        "m3": True,
        "m4": False,
        "m6 given": False,
        "m6 searched": True,
    }


def test_quantizing_without_the_searched_scales_names_the_way_out(loaded):
    model, _, stats = loaded

    with pytest.raises(
        CalibrationError, match=r"m3 must have a searched .*double_blocks.0.img_attn_qkv.*search_scales"
    ):
        quantize_(model.denoiser, plan_of(model, M3()), stats, model.clock)


def test_a_search_without_records_is_an_error(loaded):
    model, _, stats = loaded

    with pytest.raises(CalibrationError, match="must see records"):
        search_scales(model.denoiser, plan_of(model, M6()), stats, [], model.clock)


def test_activations_that_are_not_finite_are_an_error(loaded):
    model, records, stats = loaded
    broken = dataclasses.replace(
        records[0], inputs={**records[0].inputs, "hidden_states": records[0].inputs["hidden_states"] * float("nan")}
    )

    with pytest.raises(CalibrationError, match="must be finite, but is not for double_blocks"):
        search_scales(model.denoiser, plan_of(model, M6()), stats, [broken], model.clock)


@pytest.fixture(scope="module", params=["multiplier", "fold"])
def searched(request, loaded):
    """A smoothing, and its scales: they do not depend on the scheme."""
    model, records, stats = loaded
    smoothing = M6(placement=request.param, layers=("*attn_proj", "*img_attn_qkv", "*linear1"))
    return smoothing, search_scales(model.denoiser, plan_of(model, smoothing), stats, records, model.clock)


@pytest.mark.parametrize(
    "linear",
    [
        W8A8Dynamic(),
        W8A8Static(),
        W8A8Static(act_method="mean_minmax"),
        W8A8Timestep(timestep_sep=1),
        W8A8Timestep(timestep_sep=0, act_method="mean_minmax"),
    ],
    ids=["dynamic", "static", "static mean", "timestep", "timestep mean"],
)
def test_a_searched_smoothing_goes_with_every_scheme(loaded, searched, linear):
    """Static scales of the whole tensor suffer most from the outlier channel, so there smoothing must help."""
    model, records, stats = loaded
    smoothing, scales = searched
    plan, plain = plan_of(model, smoothing, linear), plan_of(model, None, linear)
    mul = smoothing_multipliers(model.denoiser, plan, stats, scales=scales)
    groups = [group for group in model.groups() if group.name in mul]
    smoothed_stats = observe(model.denoiser, groups, records, model.clock, mul=mul)
    expected = outputs(model, records)

    quantize_(model.denoiser, plain, stats, model.clock)
    unsmoothed_error = (outputs(model, records) - expected).norm()
    report = quantize_(model.denoiser, plan, stats, model.clock, smoothed_stats=smoothed_stats, scales=scales)
    error = (outputs(model, records) - expected).norm()
    restore_(model.denoiser)

    assert {layer.name for layer in report.layers if layer.smoothed} == set(mul)
    assert error < unsmoothed_error
    assert torch.equal(outputs(model, records), expected)


def outputs(model, records) -> torch.Tensor:
    results = []
    with torch.inference_mode():
        for record in records:
            model.clock.set(record.step_index)
            results.append(model.denoiser(**record.inputs, return_dict=False)[0].flatten())
    return torch.stack(results)


def test_ties_go_to_the_first_in_m3_and_to_the_last_in_m6():
    losses = torch.tensor([2.0, 1.0, 1.0 + 1e-13, 3.0], dtype=torch.float64)

    assert (first_minimum(losses), last_minimum(losses)) == (1, 2)


def test_errors_do_not_depend_on_how_rows_are_cut_into_blocks(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(37, 8, generator=generator), torch.randn(5, 8, generator=generator)
    scales = torch.rand(3, 8, generator=generator) + 0.5
    whole = [weight_errors(x, weight, scales), weight_and_input_errors(x, weight, scales, x.amin(0), x.amax(0))]

    monkeypatch.setattr("hyquant.smoothing.loss._BLOCK_ELEMENTS", 20)
    cut = [weight_errors(x, weight, scales), weight_and_input_errors(x, weight, scales, x.amin(0), x.amax(0))]

    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=0)  # float32 products


def test_candidates_of_m3_start_with_no_change_and_leave_dead_channels_alone():
    candidates = m3.candidate_scales(torch.tensor([4.0, 0.0, 1.0]))

    assert candidates.shape == (20, 3)
    assert candidates[0].tolist() == [1.0, 1.0, 1.0]
    assert candidates[10].tolist() == pytest.approx([2**0.5, 1.0, 2**-0.5])  # (2, 1) over the root of 2 * 1


def test_m6_with_exponents_that_add_up_to_one_is_m4():
    act, weight = torch.tensor([16.0, 9.0]), torch.tensor([4.0, 1.0])

    assert m6.smoothing_scale(act, weight, alpha=0.5, beta=0.5).tolist() == [2.0, 3.0]
