"""The page of a certificate: complete, self-contained, and what its bars show."""

import re

import pytest

from hyquant.config import QuantConfig, W8A8Dynamic
from hyquant.export import ModelInfo
from hyquant.models.base import RenderSettings
from search.certificate import Certificate, Pair, Software
from search.certificate_page import certificate_page, used_share
from search.judging import Scores, judged
from search.margins import Margin
from search.study import JudgeConfig

MARGINS = (
    Margin(metric="clip_prompt", loss=0.02),
    Margin(metric="motion_energy_ratio", min=0.8, max=1.5),
    Margin(metric="collapsed", max=0.25),
)


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    pairs = tuple(Pair(prompt=f"a <b>cat</b> & {index // 2}", seed=index) for index in range(12))
    values = {
        "clip_prompt": [0.89 + 0.001 * index for index in range(12)],
        "motion_energy_ratio": [1.08, 1.08, 1.12, 1.12] * 3,
        "collapsed": [0.0] * 12,
    }
    floats = {"clip_prompt": [0.9] * 12, "motion_energy_ratio": [1.0] * 12, "collapsed": [0.0] * 12}
    unjudged = Certificate(
        verdict="INCONCLUSIVE",
        new_prompts=None,
        metrics=(),
        alpha=0.05,
        study="demo",
        created="2026-01-02T03:04:05+00:00",
        pairs=pairs,
        prompts_digest="0123456789abcdef",
        settings=RenderSettings(height=16, width=32, num_frames=5, num_steps=4),
        judge=JudgeConfig(model="hashing"),
        model=ModelInfo(kind="tiny", source="0", fingerprint="f00-tiny", dtype="float32"),
        config=QuantConfig(linear=W8A8Dynamic()),
        software=Software(packages={"torch": "9.9"}, device="cpu", kernels=("reference",)),
        files={"weights.safetensors": "ab" * 32},
    )
    return judged(unjudged, MARGINS, Scores(values=values, float_values=floats, kernels=("reference",)))


def test_the_page_says_everything_and_needs_nothing_else(certificate):
    page = certificate_page(certificate)

    assert certificate.headline() in page
    for metric in certificate.metrics:
        assert f"<td>{metric.metric}" in page
        assert metric.reason in page
    for text in (
        "32x16, 5 frames, 4 steps",
        "torch 9.9",
        "ab" * 32,
        "0123456789abcdef",
        "2 seeds each",
        "w8a8_dynamic",
    ):
        assert text in page
    assert not re.search(r"https?:|<script|<link|src=", page)
    assert "<b>cat</b>" not in page
    assert "a &lt;b&gt;cat&lt;/b&gt; &amp; 0" in page  # where clip_prompt is worst


def test_an_open_certificate_says_how_many_new_prompts_one_needs(certificate):
    """Six spotless prompts bound a share of 0.25 by p = 0.178; eleven are needed."""
    assert (certificate.verdict, certificate.new_prompts) == ("INCONCLUSIVE", 11)
    assert certificate.headline() == (
        "INCONCLUSIVE on 6 held-out prompts, 12 pairs; a certificate on 11 new prompts (22 pairs) should do"
    )


def test_the_page_gives_error_rates_below_one_per_cent(certificate):
    page = certificate_page(certificate.model_copy(update={"alpha": 0.001}))

    assert "at most 0.1% pass" in page
    assert "99.9% interval" in page


@pytest.mark.parametrize(
    ("index", "difference", "share"),
    [(0, -0.01, 0.5), (0, 0.01, -0.5), (1, -0.1, 0.5), (1, 0.25, 0.5), (1, -0.2, 1.0), (2, 0.25, 1.0)],
)
def test_a_share_of_the_margin_is_the_distance_from_float_to_it(certificate, index, difference, share):
    assert used_share(certificate.metrics[index], difference) == pytest.approx(share)


def test_where_float_itself_is_beyond_the_margin_there_is_no_share(certificate):
    metric = certificate.metrics[0].model_copy(update={"margin": Margin(metric="clip_prompt", min=0.95)})

    assert used_share(metric, 0.0) is None
