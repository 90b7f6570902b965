import numpy as np
import pytest
import torch

from hyquant.numerics.qparams import QParams
from hyquant.schemes.weights import quantize_weight, static_constants


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_weights_agree_with_a_numpy_loop_over_rows():
    weight = normal(5, 11)

    q, scale = quantize_weight(weight, "float32")

    for row, codes, row_scale in zip(weight.numpy(), q.numpy(), scale[:, 0].numpy(), strict=True):
        expected_scale = np.abs(row).max() / np.float32(127)
        assert row_scale == expected_scale
        np.testing.assert_array_equal(codes, np.clip(np.rint(row / expected_scale), -127, 127))


def test_weights_are_quantized_with_the_rounded_scale():
    """Codes made with an unrounded scale would be dequantized by another one: a gain error on every output."""
    weight = normal(64, 32)

    q, scale = quantize_weight(weight, "bfloat16")

    assert torch.equal(scale.bfloat16().float(), scale)
    assert torch.equal(q, torch.round(weight / scale).clamp(-127, 127).to(torch.int8))
    gain = (weight * q * scale).sum() / weight.square().sum()
    assert gain.item() == pytest.approx(1, abs=5e-4)


def test_a_zero_row_becomes_zeros_with_scale_one():
    q, scale = quantize_weight(torch.zeros(2, 4), "bfloat16")

    assert q.abs().sum() == 0
    assert scale[:, 0].tolist() == [1.0, 1.0]


def test_static_constants_of_a_hand_worked_row():
    """s_x 0.5, z 3, s_w 0.25: deq 0.125; row sum 1 + 2 = 3; bias 1 / 0.125 - 3 * 3 = -1."""
    input_qparams = QParams(torch.tensor([0.5]), torch.tensor([3.0]))

    deq_scale, quant_bias = static_constants(
        torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([[0.25]]), torch.tensor([1.0]), input_qparams
    )

    assert deq_scale.tolist() == [0.125]
    assert quant_bias.tolist() == [-1]
    assert quant_bias.dtype == torch.int32


def test_scales_of_float16_products_are_what_the_operator_keeps_of_them():
    """It cuts a float32 after 10 fraction bits: there is nothing left to cut, and nothing too small on average."""
    weight = normal(2000, 8)
    input_qparams = QParams(torch.tensor([[0.3], [0.7]]), torch.zeros(2, 1))
    q, scale = quantize_weight(weight, "float16")

    exact, _ = static_constants(q, scale, None, input_qparams)
    kept, quant_bias = static_constants(q, scale, torch.full((2000,), 5.0), input_qparams, "float16")

    assert torch.equal(kept, torch.frexp(kept)[0].mul(2048).round().div(2048).mul(torch.exp2(torch.frexp(kept)[1])))
    assert ((kept / exact - 1).abs() <= 2**-11).all()
    assert (kept / exact - 1).mean().abs() < 2**-15  # cut off, it is -2^-11.5
    assert torch.equal(quant_bias, torch.round(5.0 / kept.double()).int())


def test_the_zero_point_term_is_exact_beyond_float32s_integers():
    """The term z * sum_k W_q is about 2^28 here and float32 would round it; Python integers do not."""
    weight = torch.full((1, 15361), 127, dtype=torch.int8)
    weight[0, 0] = 126
    input_qparams = QParams(torch.tensor([1.0]), torch.tensor([-127.0]))

    _, quant_bias = static_constants(weight, torch.tensor([[1.0]]), None, input_qparams)

    assert quant_bias.item() == 127 * (127 * 15360 + 126)


def test_a_bias_far_above_its_row_still_fits_the_accumulator():
    """A nearly dead row (1e-6) with bias 100 under a fine input scale: without care the bias has 1e13 steps."""
    weight = torch.full((1, 8), 1e-6)
    bias = torch.tensor([100.0])
    input_qparams = QParams(torch.tensor([1e-3]), torch.tensor([-128.0]))

    q, scale = quantize_weight(weight, "float32", bias=bias, input_scale=input_qparams.scale)
    deq_scale, quant_bias = static_constants(q, scale, bias, input_qparams)

    assert quant_bias.double().item() * deq_scale.double().item() == pytest.approx(100.0, rel=1e-6)
