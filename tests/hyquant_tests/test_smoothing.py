import pytest
import torch

from hyquant.errors import ConfigError
from hyquant.smoothing.m4 import smoothing_scale
from hyquant.smoothing.multiplier import fold, multiplier


def test_the_scale_of_a_hand_worked_case():
    """sqrt(16 / 4) = 2 and sqrt(9 / 1) = 3."""
    scale = smoothing_scale(torch.tensor([16.0, 9.0]), torch.tensor([4.0, 1.0]), alpha=0.5)

    assert scale.tolist() == [2.0, 3.0]


def test_alpha_one_flattens_activations_and_alpha_zero_flattens_weights():
    act, weight = torch.tensor([8.0, 2.0]), torch.tensor([0.5, 0.1])

    assert (act / smoothing_scale(act, weight, alpha=1.0)).tolist() == [1.0, 1.0]
    assert (weight * smoothing_scale(act, weight, alpha=0.0)).tolist() == pytest.approx([1.0, 1.0])


def test_a_dead_channel_has_scale_one():
    scale = smoothing_scale(torch.tensor([0.0, 5.0, 0.0]), torch.tensor([1.0, 0.0, 0.0]), alpha=0.5)

    assert scale.tolist() == [1.0, 1.0, 1.0]


def test_alpha_outside_its_range_is_refused():
    with pytest.raises(ConfigError, match=r"\[0, 1\], but got 1.5"):
        smoothing_scale(torch.ones(1), torch.ones(1), alpha=1.5)


def test_different_channel_counts_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        smoothing_scale(torch.ones(2), torch.ones(3), alpha=0.5)


@pytest.mark.parametrize("deploy_dtype", ["float32", "bfloat16", "float16"])
def test_an_extreme_scale_still_has_a_finite_multiplier_and_a_finite_weight(deploy_dtype):
    mul = multiplier(torch.tensor([1e-30, 1e30]), deploy_dtype)

    assert torch.equal(mul.to(getattr(torch, deploy_dtype)).float(), mul)
    assert torch.isfinite(fold(torch.tensor([[1.0, 1.0]]), mul)).all()
