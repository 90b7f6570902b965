"""Laws that every entry of SCHEMES obeys."""

import pytest
import torch

from hyquant.modules.linear import quant_linears
from hyquant.numerics.qparams import QParams, choose_qparams
from hyquant.schemes import SCHEMES
from hyquant.schemes.base import Scheme
from hyquant.schemes.contract import INPUT_TENSORS, ROW_DIMS

NUM_STEPS, ROWS, COLUMNS = 3, 12, 40

pytestmark = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def input_qparams(scheme: Scheme, deploy_dtype="bfloat16") -> QParams | None:
    if not scheme.needs_range:
        return None
    bounds = torch.full((NUM_STEPS, 1) if scheme.is_per_step else (1,), 4.0)
    return choose_qparams(-bounds, bounds, symmetric=False, deploy_dtype=deploy_dtype)


def input_step_of(scheme: Scheme, x: torch.Tensor) -> torch.Tensor:
    """Return the distance of neighbouring inputs that the layer tells apart; 0 where inputs stay in float."""
    if scheme.input_bits is None:
        return torch.tensor(0.0)
    largest_code = 2 ** (scheme.input_bits - 1) - 1
    per_token = x.float().abs().amax(dim=-1, keepdim=True) / largest_code
    return torch.tensor(8 / 255) if scheme.needs_range else per_token


def built(scheme: Scheme, deploy_dtype="bfloat16", bias: torch.Tensor | None = None):
    qparams = input_qparams(scheme, deploy_dtype)
    return scheme.build(normal(ROWS, COLUMNS), bias, qparams, deploy_dtype)


def test_the_table_key_is_the_name(scheme):
    assert SCHEMES[scheme.name] is scheme


def test_only_contract_tensors_are_made_and_weights_avoid_minus_128(scheme):
    tensors = built(scheme, bias=normal(ROWS))

    assert set(tensors) <= {*ROW_DIMS, *INPUT_TENSORS}
    assert tensors["weight"].dtype == torch.int8
    assert tensors["weight"].shape == (ROWS, COLUMNS)
    assert tensors["weight"].amin().item() >= -127
    assert all(tensor.dtype == torch.float32 for name, tensor in tensors.items() if name.endswith(("scale", "offset")))


def test_row_tensors_count_output_channels_where_the_contract_says(scheme):
    tensors = built(scheme, bias=normal(ROWS))

    assert all(tensors[name].shape[dim] == ROWS for name, dim in ROW_DIMS.items() if name in tensors)


def test_dtypes_and_shapes_are_known_before_anything_is_built(scheme):
    tensors = built(scheme, bias=normal(ROWS))
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    assert found.pop("bias") == (torch.float32, (ROWS,))
    assert found == scheme.specs(ROWS, COLUMNS, NUM_STEPS)


@pytest.mark.parametrize("deploy_dtype", ["bfloat16", "float16"])
def test_scales_the_engine_casts_are_unchanged_by_the_cast(scheme, deploy_dtype):
    tensors = built(scheme, deploy_dtype)

    for name in ("weight_scale", "input_scale", "input_offset"):
        if name in tensors:
            assert torch.equal(tensors[name].to(getattr(torch, deploy_dtype)).float(), tensors[name])


def test_no_bias_in_means_no_bias_out(scheme):
    assert "bias" not in built(scheme)


def test_splitting_rows_between_members_changes_nothing(scheme):
    """A fused Linear and its parts must be interchangeable, or names could not be converted."""
    weight, bias = normal(ROWS, COLUMNS), normal(ROWS, seed=1)
    qparams = input_qparams(scheme)

    whole = scheme.build(weight, bias, qparams, "bfloat16")
    parts = [scheme.build(weight[rows], bias[rows], qparams, "bfloat16") for rows in (slice(0, 5), slice(5, None))]

    for name, dim in ROW_DIMS.items():
        if name in whole:
            assert torch.equal(torch.cat([part[name] for part in parts], dim=dim), whole[name]), name


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_equals_the_float_linear_within_half_a_step_of_weights_and_inputs(scheme, has_bias, dtype):
    """|error| <= sum_k (|w| s_x + |x| s_w) / 2 + K s_x s_w / 4, plus the output's own rounding.

    Weights and inputs are off by at most half a step each (inputs inside the range; for the asymmetric range that is
    all of them here), the static bias by half a deq_scale.
    """
    weight, bias = normal(ROWS, COLUMNS), normal(ROWS, seed=1) if has_bias else None
    (layer,) = quant_linears([scheme.build(weight, bias, input_qparams(scheme), "bfloat16")], scheme=scheme.name)
    x = normal(2, 9, COLUMNS, seed=2).clamp(-3.9, 3.9).to(dtype)

    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    for step_index in range(NUM_STEPS):
        layer.set_step(step_index)
        actual = layer(x)

        input_step = input_step_of(scheme, x)
        weight_step = weight.abs().amax(dim=1) / 127
        bound = (input_step * weight.abs().sum(dim=1) + x.float().abs().sum(dim=-1, keepdim=True) * weight_step) / 2
        bound = bound + (COLUMNS / 4 + 1) * input_step * weight_step
        rounding = expected.abs() * torch.finfo(dtype).eps + 1e-6
        assert actual.dtype == dtype
        assert ((actual.double() - expected).abs() <= bound * 1.01 + rounding).all()  # 1 %: scales rounded to bf16
