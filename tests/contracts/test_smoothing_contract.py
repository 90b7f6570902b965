"""Laws that every entry of SMOOTHINGS obeys, with its default configuration."""

import pytest
import torch

from hyquant.config import M4, DeployDtype
from hyquant.smoothing import SMOOTHINGS
from hyquant.smoothing.multiplier import fold, multiplier

DEFAULTS = {"m4": M4()}
ROUNDINGS: tuple[DeployDtype, ...] = ("float32", "bfloat16", "float16")

pytestmark = pytest.mark.parametrize("kind", SMOOTHINGS)


def outlier_case() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs with one channel a hundred times larger and one dead, and a weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 16, generator=generator)
    x[:, 3] *= 100
    x[:, 5] = 0
    return x, torch.randn(8, 16, generator=generator)


def scale_of(kind: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return SMOOTHINGS[kind](DEFAULTS[kind], x.abs().amax(dim=0), weight.abs().amax(dim=0))


def test_the_scale_is_positive_finite_and_one_for_dead_channels(kind):
    x, weight = outlier_case()

    scale = scale_of(kind, x, weight)

    assert scale.shape == (16,)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert scale[5].item() == 1


@pytest.mark.parametrize("deploy_dtype", ROUNDINGS)
def test_smoothing_leaves_the_float_output_unchanged(kind, deploy_dtype):
    """Whatever rounding does to the multiplier: the weight is divided by the rounded one."""
    x, weight = outlier_case()
    mul = multiplier(scale_of(kind, x, weight), deploy_dtype)

    smoothed = (x * mul) @ fold(weight, mul).t()

    torch.testing.assert_close(smoothed, x @ weight.t(), rtol=1e-4, atol=1e-4)  # float32, terms up to 300
    assert torch.equal(mul.to(getattr(torch, deploy_dtype)).float(), mul)


def test_smoothing_brings_the_outlier_closer_to_the_other_channels(kind):
    x, weight = outlier_case()
    before = x.abs().amax(dim=0)

    after = before * multiplier(scale_of(kind, x, weight), "bfloat16")

    assert after.amax() / after.median() < before.amax() / before.median() / 3
