import textwrap

import pytest

from metrics.errors import MetricError
from metrics.registry import METRICS, find_metric, known_metrics

PLUGIN = """
from metrics.base import MetricSpec

def brightness(sample, embedder):
    return float(sample.video.mean())

BRIGHTNESS = MetricSpec(
    "{name}", "maximize", "ratio", (0.0, 1.0), ("video",), "mean of pixels", "Everything but light.", "low", brightness
)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that puts a distribution with one entry point on the path, as `pip install` would."""

    def install_metric(module: str, *, entry: str, target: str, name: str) -> None:
        (tmp_path / f"{module}.py").write_text(PLUGIN.format(name=name))
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            textwrap.dedent(f"""
                [hyq.metrics]
                {entry} = {target}
            """)
        )
        monkeypatch.syspath_prepend(tmp_path)

    return install_metric


def test_another_distribution_adds_a_metric(install):
    install("acme_light", entry="brightness", target="acme_light:BRIGHTNESS", name="brightness")

    assert find_metric("brightness").unit == "ratio"
    assert list(known_metrics()) == [*METRICS, "brightness"]


def test_an_unknown_name_lists_the_known_ones_and_the_closest():
    with pytest.raises(MetricError, match=r"psnr_db, ssim.* but got 'psnr'; did you mean 'psnr_db'\?"):
        find_metric("psnr")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"entry": "ssim", "target": "{module}:BRIGHTNESS", "name": "ssim"}, "adds 'ssim' again"),
        ({"entry": "other", "target": "{module}:BRIGHTNESS", "name": "brightness"}, "MetricSpec of the same name"),
        ({"entry": "brightness", "target": "{module}:brightness", "name": "brightness"}, "MetricSpec of the same name"),
        ({"entry": "brightness", "target": "{module}:DARKNESS", "name": "brightness"}, "must be importable"),
        ({"entry": "brightness", "target": "no_such_module:X", "name": "brightness"}, "must be importable"),
    ],
    ids=["name in use", "other name", "no spec", "no attribute", "no module"],
)
def test_a_broken_entry_point_is_named(install, request, case, message):
    module = f"acme_{request.node.callspec.id.replace(' ', '_')}"
    install(module, **{**case, "target": case["target"].format(module=module)})

    with pytest.raises(MetricError, match=message):
        known_metrics()


def test_our_metrics_do_not_load_entry_points(install):
    install("acme_unused", entry="unused", target="no_such_module:X", name="unused")

    assert find_metric("ssim") is METRICS["ssim"]
