import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hyquant.models import load_model
from hyquant.models.base import DeploymentShape, RenderSettings
from metrics.statistics.non_inferiority import p_below
from search.cli import exit_code_of
from search.margins import CertificateConfig
from search.planning import WIDEST_MARGIN, StepCosts, certificate_step_s, half_width, phases, precision, shown_margin
from search.study import ConfirmConfig, Slot

COSTS = StepCosts(step_s=2.0, overhead_s=10.0, deployment_step_s=5.0)


def test_phases_of_a_study_worked_out_by_hand(small_study):
    """1 calibration and 2 search prompts of 4 steps, 4 trials, 3 rounds after 1 of warm-up, 2 members again."""
    certificate = CertificateConfig(prompts="mini:heldout", num_prompts=3, seeds_per_prompt=2)
    again = ConfirmConfig(members=2, seeds=3)
    found = {
        phase.name: phase
        for phase in phases(small_study.model_copy(update={"certificate": certificate, "confirm": again}), COSTS)
    }

    assert found["calibration"].total_s == 2 * 1 * 4 * 2
    assert found["float renders"].total_s == 2 * (10 + 4 * 2)
    assert (found["trial: renders"].seconds, found["trial: renders"].times) == (36, 4)
    assert found["trial: latency"].total_s == 4 * (3 + 1) * 3 * 5
    assert found["noise floor"].total_s == 3 * 2 * 18
    assert found["measured again: float"].total_s == 3 * 2 * 18
    assert found["measured again: renders"].total_s == 2 * 3 * 2 * 18
    assert found["measured again: latency"].total_s == 2 * (3 + 1) * 3 * 5
    assert found["certificate"].total_s == 2 * 6 * 18


MINI_CLIP = RenderSettings(height=64, width=64, num_frames=13, num_steps=4)


@pytest.fixture(scope="module")
def mini():
    return load_model("hunyuan_video", "mini", device="cpu")


def with_certificate(study, clip):
    workload = study.workload.model_copy(update={"settings": MINI_CLIP})
    certificate = CertificateConfig(prompts="mini:heldout", num_prompts=3, seeds_per_prompt=2, settings=clip)
    deployment = DeploymentShape(height=96, width=96, num_frames=13, num_steps=4, batch_size=2)
    return study.model_copy(update={"workload": workload, "certificate": certificate, "deployment": deployment})


def test_a_certificate_at_the_deployment_size_takes_deployment_steps(small_study, mini):
    """Those were timed with two samples; what is beside the steps grows with the pixels, 2.25 times as many."""
    study = with_certificate(small_study, MINI_CLIP.model_copy(update={"height": 96, "width": 96}))
    costs = replace(COSTS, certificate_step_s=certificate_step_s(mini, study, COSTS))
    found = {phase.name: phase for phase in phases(study, costs)}

    assert costs.certificate_step_s == 2.5
    assert found["certificate"].total_s == pytest.approx(2 * 6 * (2.25 * 10 + 4 * 2.5))


def test_a_certificate_of_another_size_is_scaled_by_operations_counted_in_a_float_step(small_study, mini):
    """The oracle is torch's counter, which knows attention as plain products; it counts the patch embedding too."""
    large = MINI_CLIP.model_copy(update={"height": 256, "width": 256})
    counted = []
    for clip in (MINI_CLIP, large):
        shape = DeploymentShape(height=clip.height, width=clip.width, num_frames=clip.num_frames, num_steps=1)
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            mini.denoiser(**mini.deployment_inputs(shape))
        counted.append(counter.get_total_flops())

    found = certificate_step_s(mini, with_certificate(small_study, large), COSTS)

    assert found == pytest.approx(2.0 * counted[1] / counted[0], rel=0.05)
    assert found > 1.1 * 2.0 * 16  # more than pixels say


def test_ranks_share_prompts_and_slots_share_trials(small_study):
    shared = small_study.model_copy(update={"slots": (Slot(ranks=2), Slot(ranks=2))})
    found = {phase.name: phase for phase in phases(shared, COSTS)}

    assert (found["trial: renders"].seconds, found["trial: renders"].times) == (18, 2)


def test_a_mean_lies_within_its_half_width_in_95_of_100_samples():
    samples = np.random.default_rng(0).normal(size=(20_000, 8))
    scaled = np.abs(samples.mean(axis=1)) / samples.std(axis=1, ddof=1)

    assert (scaled <= half_width(8)).mean() == pytest.approx(0.95, abs=0.006)


def test_the_margin_shown_is_what_the_evaluation_page_says_of_normal_losses():
    """24 prompts for half a deviation, 12 for one, at 80 %.

    Two seeds each and half of the variance between prompts: a mean of two seeds has 0.75 of the variance of a clip.
    """
    of_clips = 0.75**0.5

    assert of_clips * shown_margin(24, alpha=0.05) == pytest.approx(0.5, abs=0.03)
    assert of_clips * shown_margin(12, alpha=0.05) == pytest.approx(1.0, abs=0.1)


def test_prompts_too_few_for_any_margin_are_told_to_be_so(small_study):
    few, enough = (
        small_study.model_copy(update={"certificate": CertificateConfig(prompts="mini:heldout", num_prompts=number)})
        for number in (3, 24)
    )

    losses = np.random.default_rng(0).normal(size=(20_000, 3))

    assert (p_below(losses, WIDEST_MARGIN) <= 0.05).mean() < 0.75
    assert shown_margin(3, alpha=0.05) is None
    assert precision(few, {"ssim": 0.1})[-1] == (
        "3 held-out prompts show no margin of up to 4 deviations in 80% of tries for a model equal to float; take more"
    )
    assert "24 held-out prompts show a margin of 0." in precision(enough, {"ssim": 0.1})[-1]


def test_the_command_measures_and_answers(stored_store, capsys):
    assert exit_code_of(["plan", "demo", "--store", str(stored_store), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)

    assert answer["costs"]["deployment_step_s"] > 0
    assert answer["layouts"][0]["name"] in answer["reasoning"]
    assert answer["total_s"] == pytest.approx(sum(phase["total_s"] for phase in answer["phases"]))
    assert exit_code_of(["plan", "demo", "--store", str(stored_store), "--spread", "ssim"]) == 1
    assert "METRIC=DEVIATION" in capsys.readouterr().err


class Cores:
    """The tiny model on a clock of its own, if a step took 24 s of one core and n threads had n cores."""

    def __init__(self, model):
        self._model = model
        self.now = 0.0

    def __getattr__(self, name):
        return getattr(self._model, name)

    def perf_counter(self):
        return self.now

    def denoiser(self, **inputs):
        self.now += 24.0 / torch.get_num_threads()

    def render(self, prompts, seeds, settings):
        for _ in range(settings.num_steps):
            self.denoiser()


@pytest.fixture
def plan_on_eight_cores(stored_store, monkeypatch, capsys):
    """Plan on such a machine of eight cores; the study has one slot of one rank."""
    cores = Cores(load_model("tiny", "0", device="cpu"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("hyquant.models.load_model", lambda *_, **__: cores)
    for module in ("search.planning", "hyquant.devices.cpu"):
        monkeypatch.setattr(f"{module}.time", cores)
    for module in ("search.slot_devices", "search.slots"):
        monkeypatch.setattr(f"{module}.cores_here", lambda: tuple(range(8)))
    monkeypatch.setattr("hyquant.latency.structural_twin", lambda denoiser, _: denoiser)
    monkeypatch.setattr("hyquant.latency.restore_", lambda _: None)

    def answer(*options):
        assert exit_code_of(["plan", "demo", "--store", str(stored_store), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    return answer


@pytest.mark.parametrize(("num_devices", "cores"), [(None, 1), (4, 2), (64, 1)])
def test_a_rank_of_a_layout_of_cores_is_timed_on_as_many_as_it_gets(plan_on_eight_cores, num_devices, cores):
    before = torch.get_num_threads()
    answer = plan_on_eight_cores(*([] if num_devices is None else ["--devices", str(num_devices)]))
    phases_s = {phase["name"]: phase["seconds"] for phase in answer["phases"]}
    layouts_s = {layout["name"]: layout for layout in answer["layouts"]}

    assert phases_s["trial: renders"] == 2 * 4 * 24 / 8  # 2 prompts of 4 steps
    assert phases_s["trial: latency"] == 4 * 3 * 24 / 8  # 4 rounds of 3 modes
    alone = layouts_s[f"{num_devices or 8} x 1"]
    assert alone["trial_s"] == 2 * 4 * 24 / cores + alone["slots"] * 4 * 3 * 24 / cores
    assert answer["layout_costs"]["step_s"] == answer["layout_costs"]["deployment_step_s"] == 24 / cores
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("spread", "said"),
    [
        ("ssim=inf", "a number above 0, but got 'ssim=inf'"),
        ("clip_promt=0.02", "a metric of the study (clip_prompt, clip_reference, psnr_db, ssim,"),
        ("clip_promt=0.02", "but got 'clip_promt'; did you mean 'clip_prompt'?"),
    ],
)
def test_a_spread_of_no_metric_of_the_study_or_without_end_is_refused(spread, said, stored_store, capsys):
    assert exit_code_of(["plan", "demo", "--store", str(stored_store), "--spread", spread]) == 1
    assert said in capsys.readouterr().err
