"""Laws that every entry of SCHEMES obeys."""

import pytest
import torch

from hyquant.modules.linear import quant_linears
from hyquant.numerics.qparams import QParams, choose_qparams
from hyquant.schemes import SCHEMES
from hyquant.schemes.base import WEIGHT_CODES, Scheme
from hyquant.schemes.contract import INPUT_TENSORS, ROW_DIMS
from hyquant.schemes.w4a16 import in_groups

NUM_STEPS, ROWS, COLUMNS = 3, 12, 40

KINDS = SCHEMES | {"w4a16 in groups of 8": in_groups(8)}

pytestmark = pytest.mark.parametrize("scheme", KINDS.values(), ids=KINDS)


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


def weight_steps_of(tensors, weight: torch.Tensor) -> torch.Tensor:
    """Return the distance of neighbouring values that the layer tells apart, for every weight, from the weights alone.

    Of int8 the 255 codes are symmetric; of int4 there is one more below 0 than above.
    """
    num_groups = tensors["weight_scale"].shape[1] if "weight_scale" in tensors else 1
    groups = weight.reshape(ROWS, num_groups, -1)
    lo, hi = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    is_int4 = tensors["weight"].abs().amax() <= 8
    steps = torch.maximum(hi / 7, -lo / 8) if is_int4 else torch.maximum(hi, -lo) / 127
    return steps.expand_as(groups).reshape(weight.shape)


def built(scheme: Scheme, deploy_dtype="bfloat16", bias: torch.Tensor | None = None):
    qparams = input_qparams(scheme, deploy_dtype)
    return scheme.build(normal(ROWS, COLUMNS), bias, qparams, deploy_dtype)


def test_the_table_key_is_the_name(scheme):
    assert SCHEMES[scheme.name].name == scheme.name


def test_only_contract_tensors_are_made_and_weights_have_the_bits_of_the_scheme(scheme):
    tensors = built(scheme, bias=normal(ROWS))

    assert set(tensors) <= {*ROW_DIMS, *INPUT_TENSORS}
    assert tensors["weight"].dtype == torch.int8
    assert tensors["weight"].shape == (ROWS, COLUMNS)
    lowest, highest = WEIGHT_CODES[scheme.weight_bits]
    assert tensors["weight"].amin().item() >= lowest
    assert tensors["weight"].amax().item() == highest
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
    """|error| <= sum_k ((|w| s_x + |x| s_w) / 2 + s_x s_w / 4), plus the output's own rounding.

    Weights and inputs are off by at most half a step each (inputs inside the range; for the asymmetric range that is
    all of them here), the static bias by half a deq_scale.
    """
    weight, bias = normal(ROWS, COLUMNS), normal(ROWS, seed=1) if has_bias else None
    tensors = scheme.build(weight, bias, input_qparams(scheme), "bfloat16")
    (layer,) = quant_linears([tensors], scheme=scheme.name)
    x = normal(2, 9, COLUMNS, seed=2).clamp(-3.9, 3.9).to(dtype)

    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    for step_index in range(NUM_STEPS):
        layer.set_step(step_index)
        actual = layer(x)

        input_step = input_step_of(scheme, x)
        steps = weight_steps_of(tensors, weight)
        bound = (input_step * weight.abs().sum(dim=1) + x.float().abs() @ steps.T) / 2
        bound = bound + input_step * (steps.sum(dim=1) / 4 + steps.amax(dim=1))
        rounding = expected.abs() * torch.finfo(dtype).eps + 1e-6
        assert actual.dtype == dtype
        assert ((actual.double() - expected).abs() <= bound * 1.01 + rounding).all()  # 1 %: scales rounded to bf16
