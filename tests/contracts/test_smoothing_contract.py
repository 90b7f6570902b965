"""Laws that every entry of SMOOTHINGS obeys, whether its scale comes from a formula or from a search."""

import pytest
import torch

from hyquant.config import M3, M4, M6, DeployDtype, Smoothing
from hyquant.smoothing import SMOOTHINGS
from hyquant.smoothing.base import UnitFacts
from hyquant.smoothing.multiplier import fold, multiplier

CONFIGS: dict[str, Smoothing] = {
    "m3": M3(),
    "m4": M4(),
    "m6": M6(alpha=0.8, beta=0.2),
    "m6 searched": M6(),
}
ROUNDINGS: tuple[DeployDtype, ...] = ("float32", "bfloat16", "float16")

of_every_kind = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def outlier_case() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs with one channel a hundred times larger and one dead, and a weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 16, generator=generator)
    x[:, 3] *= 100
    x[:, 5] = 0
    return x, torch.randn(8, 16, generator=generator)


def scale_of(config: Smoothing, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Choose the scale of one layer, answering what a search asks from one call."""
    rule = SMOOTHINGS[config.kind]
    facts = UnitFacts(
        act_absmax=x.abs().amax(dim=0),
        weight_absmax=weight.abs().amax(dim=0),
        ranges={"layer": (x.amin(dim=0), x.amax(dim=0))},
    )
    if not rule.is_searched(config):
        return rule.choose_scale(config, facts)
    search = rule.search(config, facts)
    question = next(search)
    while True:
        answer = question.measure("layer", x, weight)
        assert answer.shape == (question.size,)
        assert answer.dtype == torch.float64
        try:
            question = search.send(answer)
        except StopIteration as end:
            return end.value


def test_every_smoothing_is_held_to_these_laws():
    assert {config.kind for config in CONFIGS.values()} == set(SMOOTHINGS)


@of_every_kind
def test_the_scale_is_positive_finite_and_one_for_dead_channels(config):
    x, weight = outlier_case()

    scale = scale_of(config, x, weight)

    assert scale.shape == (16,)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert scale[5].item() == 1


@of_every_kind
@pytest.mark.parametrize("deploy_dtype", ROUNDINGS)
def test_smoothing_leaves_the_float_output_unchanged(config, deploy_dtype):
    """Whatever rounding does to the multiplier: the weight is divided by the rounded one."""
    x, weight = outlier_case()
    mul = multiplier(scale_of(config, x, weight), deploy_dtype)

    smoothed = (x * mul) @ fold(weight, mul).t()
    expected = x @ weight.t()

    assert (smoothed - expected).norm() < 1e-5 * expected.norm()  # float32 rounds three times per term, by 2^-24
    assert torch.equal(mul.to(getattr(torch, deploy_dtype)).float(), mul)


@of_every_kind
def test_smoothing_brings_the_outlier_closer_to_the_other_channels(config):
    x, weight = outlier_case()
    before = x.abs().amax(dim=0)

    after = before * multiplier(scale_of(config, x, weight), "bfloat16")

    assert after.amax() / after.median() < before.amax() / before.median() / 3
