import pytest
import torch
from torch import nn

from hyquant.calibration.histogram import histogram_of
from hyquant.calibration.observe import observe
from hyquant.calibration.stats import merge
from hyquant.clock import StepClock
from hyquant.errors import CalibrationError
from hyquant.models.base import Record
from hyquant.models.names import LayerGroup

GROUPS = (LayerGroup("a", ("first", "twin"), 3, (4, 4)), LayerGroup("b", ("second",), 4, (2,)))


class Denoiser(nn.Module):
    """Two members read x, a third layer reads the first one's output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twin, self.second = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(self.first(x)) + self.twin(x).sum()


@pytest.fixture
def denoiser() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser()


def record(step_index: int, seed: int) -> Record:
    x = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(seed))
    return Record(step_index, 0, {"x": x})


def test_each_group_sees_its_own_input_at_each_step(denoiser):
    records = [record(0, 1), record(2, 2), record(0, 3)]

    stats = observe(denoiser, GROUPS, records, StepClock())

    inputs = torch.cat([records[0].inputs["x"], records[2].inputs["x"]]).reshape(-1, 3)
    hidden = denoiser.first(records[1].inputs["x"]).detach()
    assert torch.equal(stats["a"].lo[0], inputs.amin(dim=0))
    torch.testing.assert_close(stats["b"].hi[2], hidden.reshape(-1, 4).amax(dim=0))
    assert stats["a"].calls.tolist() == [2, 0, 1]


def test_the_clock_follows_the_records(denoiser):
    heard: list[int] = []
    clock = StepClock()
    clock.subscribe(heard.append)

    observe(denoiser, GROUPS, [record(1, 1), record(0, 2)], clock)

    assert heard == [1, 0]


def test_merge_of_two_ranks_equals_one_rank_on_all_records(denoiser):
    records = [record(step, seed) for step in range(3) for seed in range(2)]

    whole = observe(denoiser, GROUPS, records, StepClock())
    halves = [observe(denoiser, GROUPS, records[start::2], StepClock()) for start in (0, 1)]

    for name in ("a", "b"):
        merged = merge(halves[0][name], halves[1][name])
        assert torch.equal(merged.lo, whole[name].lo)
        assert torch.equal(merged.sum_hi, whole[name].sum_hi)
        assert torch.equal(merged.calls, whole[name].calls)


def test_minmax_under_a_multiplier_equals_observing_the_multiplied_input(denoiser):
    mul = {"a": torch.tensor([0.5, 2.0, 1.0])}
    records = [record(0, 1), record(1, 2)]

    plain = observe(denoiser, GROUPS, records, StepClock())
    smoothed = observe(denoiser, GROUPS, records, StepClock(), mul=mul)

    assert torch.equal(smoothed["a"].lo, plain["a"].lo * mul["a"])
    assert torch.equal(smoothed["b"].lo, plain["b"].lo)


def test_histograms_hold_every_value_of_every_step_under_the_multiplier(denoiser):
    mul = {"a": torch.tensor([0.5, 2.0, 1.0])}
    records = [record(0, 1), record(2, 2), record(0, 3)]

    stats = observe(denoiser, GROUPS, records, StepClock(), mul=mul, histograms=True)

    seen = torch.cat([records[index].inputs["x"] for index in (0, 2)]) * mul["a"]
    assert stats["a"].histogram.counts.sum(dim=1).tolist() == [2 * 6 * 3, 0, 6 * 3]
    assert torch.equal(stats["a"].histogram.counts[0], histogram_of(seen).counts[0])
    assert stats["b"].histogram.counts.sum(dim=1).tolist() == [2 * 6 * 4, 0, 6 * 4]


def test_no_histogram_is_kept_unless_asked_for(denoiser):
    assert observe(denoiser, GROUPS, [record(0, 1)], StepClock())["a"].histogram is None


def test_no_hook_is_left_behind_even_after_an_error(denoiser):
    with pytest.raises(TypeError):
        observe(denoiser, GROUPS, [Record(0, 0, {"y": torch.zeros(1, 3)})], StepClock())

    assert all(not module._forward_pre_hooks for module in denoiser.modules())


def test_statistics_are_ordinary_tensors(denoiser):
    """Inference tensors could not be merged in place or saved outside inference mode."""
    stats = observe(denoiser, GROUPS, [record(0, 1)], StepClock())

    assert not stats["a"].lo.is_inference()


def test_no_records_is_an_error(denoiser):
    with pytest.raises(CalibrationError, match="must have records"):
        observe(denoiser, GROUPS, [], StepClock())


def test_a_non_finite_input_names_layer_and_step(denoiser):
    broken = record(1, 1)
    broken.inputs["x"][0, 0, 0] = float("nan")

    with pytest.raises(CalibrationError, match=r"input of a is not at steps \[1\]"):
        observe(denoiser, GROUPS, [record(0, 0), broken], StepClock(), histograms=True)
