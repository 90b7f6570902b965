import shutil
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

from hyquant.config import M4, W8A16, LayerSelection, QuantConfig, W8A8Dynamic, W8A8Static, W8A8Timestep, digest
from hyquant.export import model_info, save_quantized
from hyquant.latency_report import LatencyReport
from hyquant.models import load_model
from hyquant.models.base import DeploymentShape, RenderSettings
from hyquant.plan import build_plan
from hyquant.quantize import quantize_, restore_
from search.mlflow_client import prepare_store
from search.prompts import StudyPrompts
from search.result import MetricResult, TrialResult
from search.storage import create_study
from search.study import Budget, JudgeConfig, LatencyConfig, ModelConfig, Objective, StudyConfig, Workload
from spaces.space import load_space

CONFIGS = {
    "static": QuantConfig(linear=W8A8Static()),
    "dynamic": QuantConfig(linear=W8A8Dynamic()),
    "timestep": QuantConfig(linear=W8A8Timestep(timestep_sep=2), layers=LayerSelection(exclude=("*fc2*",))),
    "m4": QuantConfig(linear=W8A8Dynamic(), smoothing=M4(alpha=0.75)),
}


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory) -> Path:
    """A store whose empty mlflow.db was migrated once; creating one takes seconds, copying it does not."""
    template = tmp_path_factory.mktemp("template") / "mlruns"
    prepare_store(template)
    return template


@pytest.fixture
def mlflow_store(mlflow_template, tmp_path) -> Path:
    """A fresh store with an empty MLflow database."""
    store = tmp_path / "mlruns"
    shutil.copytree(mlflow_template, store)
    return store


@pytest.fixture(scope="session")
def small_study() -> StudyConfig:
    """A study over the tiny model that the hashing judge scores; nothing measures the floor of stored results."""
    return StudyConfig(
        name="demo",
        model=ModelConfig(kind="tiny", source="0", device="cpu"),
        space=load_space("mini"),
        workload=Workload(
            calibration_prompts="mini:calibration",
            search_prompts="mini:search",
            num_calibration_prompts=1,
            num_search_prompts=2,
            settings=RenderSettings(height=32, width=32, num_frames=5, num_steps=4),
        ),
        deployment=DeploymentShape(height=32, width=32, num_frames=5, num_steps=4),
        judge=JudgeConfig(model="hashing"),
        objectives=(
            Objective(metric="clip_reference", direction="maximize"),
            Objective(metric="latency_ratio", direction="minimize"),
        ),
        latency=LatencyConfig(rounds=3, warmup=1, compile=False),
        budget=Budget(trials=4),
    )


@pytest.fixture(scope="session")
def make_result() -> Callable[..., TrialResult]:
    """Make the result of one trial from its strategy and its two objective values."""

    def make(strategy: str = "dynamic", quality: float = 0.9, ratio: float = 0.8, **changes: object) -> TrialResult:
        config = CONFIGS[strategy]
        result = TrialResult(
            config=config,
            config_digest=digest(config),
            outcome="complete",
            values=(quality, ratio),
            metrics={
                "clip_reference": MetricResult(values=(quality - 0.01, quality + 0.01), mean=quality, std=0.01),
                "psnr_db": MetricResult(values=(30.0, 32.0), mean=31.0, std=1.0),
            },
            latency=LatencyReport(
                loop_latency_s=2.0 * ratio,
                control_loop_latency_s=2.0,
                ratio=ratio,
                ratio_mad=0.01,
                step_latency_s={"float": 0.5, "dynamic": 0.4},
                rounds=9,
                warmup=2,
                shape="64x64x13",
                kind="native",
                compiled=False,
                device="cpu",
            ),
            constraints={"collapsed": 0.0},
            weight_bytes=1000,
            stage_seconds={"quantize": 0.1, "render": 1.0},
        )
        return result.model_copy(update=changes)

    return make


@pytest.fixture
def filled_study(small_study, make_result) -> optuna.Study:
    """A stored study of twelve complete trials, one infeasible, one failed, one reused, one running and one waiting."""
    study = optuna.create_study(study_name="demo", directions=["maximize", "minimize"])
    study.set_user_attr("study_config", small_study.model_dump(mode="json"))
    kinds = ("timestep", "dynamic", "static", "m4")

    def add(number: int, state: TrialState, **attrs: object) -> None:
        kind = kinds[number % 4]
        quality, ratio = 0.99 - 0.03 * (number % 4) - 0.002 * number, 0.98 - 0.1 * (number % 4) + 0.01 * number
        result = make_result(kind, quality, ratio)
        constraints = {"collapsed": 0.0}
        if state == TrialState.PRUNED:
            result = make_result(kind, 0.3, ratio, outcome="infeasible", values=None, reason="collapsed is 1, above 0")
            constraints = {"collapsed": 1.0}
        stored = {"config": result.config.model_dump(mode="json"), "config_digest": result.config_digest, **attrs}
        if state != TrialState.FAIL:
            stored["result"] = result.model_dump(mode="json")
        study.add_trial(
            create_trial(
                state=state,
                params={"strategy": kind},
                distributions={"strategy": CategoricalDistribution(kinds)},
                values=[quality, ratio] if state == TrialState.COMPLETE else None,
                user_attrs=stored,
                constraints=constraints,
            )
        )

    for number in range(12):
        add(number, TrialState.COMPLETE)
    add(12, TrialState.PRUNED)
    add(13, TrialState.FAIL, stage="render", reason="stage render on rank 0: out of memory")
    add(0, TrialState.COMPLETE, reused_from=0)
    study.ask()
    study.enqueue_trial({"strategy": "m4"})
    return study


@pytest.fixture(scope="session")
def study_config() -> StudyConfig:
    """A study of the tiny model that a trial of takes a second."""
    return StudyConfig(
        name="tiny-study",
        model=ModelConfig(kind="tiny", source="0", device="cpu"),
        space=load_space("mini"),
        workload=Workload(
            calibration_prompts="calibration.txt",
            search_prompts="search.txt",
            num_calibration_prompts=2,
            num_search_prompts=2,
            settings=RenderSettings(height=16, width=16, num_frames=5, num_steps=2),
        ),
        deployment=DeploymentShape(height=32, width=32, num_frames=5, num_steps=2),
        judge=JudgeConfig(model="hashing"),
        latency=LatencyConfig(rounds=3, warmup=1, compile=False),
        confirm=None,
    )


@pytest.fixture
def stored_store(tmp_path, small_study, filled_study) -> Path:
    """A store on disk that holds the study of `filled_study` under the name demo."""
    store = tmp_path / "store"
    store.mkdir()
    prompts = StudyPrompts(calibration=("a red circle",), search=("a blue square", "a green ring"))
    study, _ = create_study(store, small_study.model_copy(update={"store": str(store)}), prompts)
    study.add_trials(filled_study.get_trials())
    return store


@pytest.fixture(scope="session")
def almost_float(tmp_path_factory) -> Path:
    """An export of the tiny model that is almost float: the weights of one layer in 8 bits."""
    folder = tmp_path_factory.mktemp("almost float") / "weights"
    model = load_model("tiny", "0", device="cpu")
    config = QuantConfig(linear=W8A16(), layers=LayerSelection(include=("*single_blocks.0.linear2*",)))
    plan = build_plan(model.groups(), config, num_steps=2)
    quantize_(model.denoiser, plan, {}, model.clock)
    save_quantized(model.denoiser, plan, folder, model=model_info(model))
    restore_(model.denoiser)
    return folder


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a video, as it goes with the log of a trial."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "videos.mp4").write_bytes(b"a video")
    return folder
