import math

import numpy as np
import pytest
import torch

from hyquant.errors import CalibrationError
from hyquant.numerics.affine import dequantize, fake_quantize, quantize
from hyquant.numerics.error import cosine, sqnr_db
from hyquant.numerics.granularity import PerChannel, PerTensor, PerToken, extremes
from hyquant.numerics.qparams import QParams, choose_qparams, round_to


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_symmetric_qparams_of_a_hand_worked_range():
    scale, zero_point = choose_qparams(torch.tensor(-2.54), torch.tensor(1.0), symmetric=True)

    assert scale.item() == pytest.approx(0.02)
    assert zero_point.item() == 0


def test_asymmetric_qparams_of_a_hand_worked_range():
    """[-1, 1.55] has 255 steps of 0.01; -1 becomes code -128, so 0 becomes -28."""
    scale, zero_point = choose_qparams(torch.tensor(-1.0), torch.tensor(1.55), symmetric=False)

    assert scale.item() == pytest.approx(0.01)
    assert zero_point.item() == -28


@pytest.mark.parametrize(("lo", "hi", "zero_point"), [(1.0, 2.0, -128), (-2.0, -1.0, 127)])
def test_an_asymmetric_range_is_widened_to_contain_zero(lo, hi, zero_point):
    qparams = choose_qparams(torch.tensor(lo), torch.tensor(hi), symmetric=False)

    assert qparams.scale.item() == pytest.approx(2.0 / 255)
    assert qparams.zero_point.item() == zero_point
    assert fake_quantize(torch.zeros(1), qparams).item() == 0


def test_quantize_agrees_with_a_numpy_loop():
    x = normal(7, 5) * 3
    qparams = choose_qparams(x.amin(), x.amax(), symmetric=False)

    actual = quantize(x, qparams).numpy()

    scale, zero_point = np.float32(qparams.scale.item()), np.float32(qparams.zero_point.item())
    expected = np.clip(np.rint(x.numpy() / scale + zero_point), -128, 127).astype(np.int8)
    np.testing.assert_array_equal(actual, expected)


def test_quantize_agrees_with_torchs_own_operator():
    x = normal(64, seed=3)
    qparams = choose_qparams(x.amin(), x.amax(), symmetric=False)

    expected = torch.fake_quantize_per_tensor_affine(x, qparams.scale.item(), int(qparams.zero_point.item()), -128, 127)

    torch.testing.assert_close(fake_quantize(x, qparams), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("deploy_dtype", ["float32", "bfloat16", "float16"])
def test_a_symmetric_round_trip_is_within_half_a_scale(deploy_dtype):
    """Also at the extremes: the rounded scale may put absmax at 127.5, which still costs at most half a step."""
    x = normal(200, 16)
    lo, hi = extremes(x, PerToken())
    qparams = choose_qparams(lo, hi, symmetric=True, deploy_dtype=deploy_dtype)

    error = (fake_quantize(x, qparams) - x).abs() / qparams.scale

    assert error.amax().item() <= 0.5 + 1e-4  # float32 division at 127


@pytest.mark.parametrize(("deploy_dtype", "bound"), [("float32", 1.0), ("bfloat16", 1.5)])
def test_an_asymmetric_round_trip_is_within_half_a_scale_but_for_the_clamped_end(deploy_dtype, bound):
    x = normal(200, 16)
    lo, hi = extremes(x, PerToken())
    qparams = choose_qparams(lo, hi, symmetric=False, deploy_dtype=deploy_dtype)

    error = (fake_quantize(x, qparams) - x).abs() / qparams.scale

    assert error.amax().item() <= bound + 1e-4
    assert error[(x > lo) & (x < hi)].median().item() < 0.5


@pytest.mark.parametrize("deploy_dtype", ["bfloat16", "float16"])
def test_scales_are_representable_in_the_deployment_dtype(deploy_dtype):
    x = normal(50, 8).abs()
    scale = choose_qparams(-x, x, symmetric=True, deploy_dtype=deploy_dtype).scale

    assert torch.equal(scale.to(getattr(torch, deploy_dtype)).float(), scale)


def test_the_zero_point_belongs_to_the_rounded_scale():
    """The extreme that fixes the zero point must get its code under the scale that is deployed."""
    lo, hi = torch.tensor(-1.003), torch.tensor(0.517)
    scale, zero_point = choose_qparams(lo, hi, symmetric=False, deploy_dtype="bfloat16")

    assert zero_point.item() == -128 - round(-1.003 / scale.item())


def test_an_all_zero_range_has_scale_one():
    scale, zero_point = choose_qparams(torch.zeros(3), torch.zeros(3), symmetric=False, deploy_dtype="bfloat16")

    assert scale.tolist() == [1.0] * 3
    assert zero_point.tolist() == [-128.0] * 3


@pytest.mark.parametrize("deploy_dtype", ["float32", "bfloat16", "float16"])
def test_a_tiny_range_keeps_a_scale_above_zero(deploy_dtype):
    scale, _ = choose_qparams(torch.tensor(-1e-30), torch.tensor(1e-30), symmetric=True, deploy_dtype=deploy_dtype)

    assert scale.item() == 2.0**-23


@pytest.mark.parametrize(("lo", "hi"), [(math.nan, 1.0), (0.0, math.inf), (1.0, -1.0)])
def test_a_broken_range_is_an_error(lo, hi):
    with pytest.raises(CalibrationError, match="finite with lo <= hi"):
        choose_qparams(torch.tensor(lo), torch.tensor(hi), symmetric=True)


def test_a_scale_that_overflows_float16_is_an_error():
    with pytest.raises(CalibrationError, match="representable in float16"):
        round_to(torch.tensor([1e6]), "float16")


def test_per_channel_equals_a_loop_over_per_tensor():
    weight = normal(6, 9)

    lo, hi = extremes(weight, PerChannel())
    rows = [extremes(row, PerTensor()) for row in weight]

    assert lo.flatten().tolist() == [row[0].item() for row in rows]
    assert hi.flatten().tolist() == [row[1].item() for row in rows]


def test_dequantize_inverts_quantize_on_the_grid():
    qparams = QParams(torch.tensor(0.5), torch.tensor(3.0))
    q = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8)

    assert torch.equal(quantize(dequantize(q, qparams), qparams), q)


def test_sqnr_of_a_tenth_of_noise_is_twenty_decibels():
    signal = torch.ones(100)

    assert sqnr_db(signal, signal * 1.1) == pytest.approx(20, abs=1e-3)
    assert sqnr_db(signal, signal) == math.inf
    assert sqnr_db(torch.zeros(2), torch.ones(2)) == -math.inf


def test_cosine_agrees_with_numpy():
    a, b = normal(30), normal(30, seed=1)
    expected = np.dot(a.numpy(), b.numpy()) / (np.linalg.norm(a.numpy()) * np.linalg.norm(b.numpy()))

    assert cosine(a, b) == pytest.approx(float(expected), abs=1e-5)
    assert cosine(a, torch.zeros(30)) == 0
