"""The command profile: where the time of a denoiser goes, measured here or on paper."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search.commands.options import AsJson, Storage, Store
from search.console import print_json, print_line, print_table, remark
from search.errors import SearchError

if TYPE_CHECKING:
    from hyquant.profile import DenoiserProfile
    from search.prompts import StudyPrompts
    from search.study import StudyConfig


def profile(
    study: Annotated[
        str | None,
        typer.Argument(
            metavar="[STUDY]", help="Measure this study's model at its deployment shape.", show_default=False
        ),
    ] = None,
    device_profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="Work out HunyuanVideo 13B on paper for this device instead."),
    ] = None,
    clip: Annotated[
        str, typer.Option(metavar="HEIGHTxWIDTHxFRAMES", help="The clip on paper: pixels and frames.")
    ] = "720x1280x129",
    steps: Annotated[int, typer.Option(help="Denoising steps on paper.", min=1)] = 50,
    store: Store = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Show where the time of the float denoiser goes, and how much faster int8 can make it at most."""
    if (study is None) == (device_profile is None):
        raise SearchError("profile takes a study or --device-profile, but got both or neither; give one of them")
    if device_profile is not None:
        _on_paper(device_profile, clip, steps, as_json)
        return
    from search.locate import config_to_run, locate_study, prompts_to_run

    assert study is not None
    ref = locate_study(study, store, storage)
    _measured(config_to_run(ref)[0], prompts_to_run(ref), as_json)


def _measured(config: "StudyConfig", prompts: "StudyPrompts", as_json: bool) -> None:
    from hyquant.latency import LatencyBench
    from hyquant.models import load_model
    from search.locks import HostLock
    from search.profiling import around_the_loop, ceilings, measured_profile

    remark("measuring alone on this host; runs that compute here wait for it")
    model = load_model(config.model.kind, config.model.source, device=config.model.device, dtype=config.model.dtype)
    bench = LatencyBench(model, config.deployment, compile=config.latency.compile)
    with HostLock().measuring():
        found = measured_profile(bench)
        around = around_the_loop(model, config.deployment, (prompts.calibration[0], prompts.search[0]))
    if as_json:
        answer = {**found.model_dump(mode="json"), "rest_s": found.rest_s, **around}
        print_json({**answer, "ceilings": ceilings(found, config.valid_space)})
        return
    print_table(_rows(found))
    print_line(
        f"one step {found.step_s * 1e3:.1f} ms, {'compiled' if found.compiled else 'not compiled'}, {found.shape}, "
        f"{found.device}; a clip {config.deployment.num_steps * found.step_s:.3g} s, and besides it text encoding "
        f"{around['text_s']:.3g} s and decoding {around['decode_s']:.3g} s"
    )
    print_line("int8 Linears alone can make a step at most this many times faster, by exclusion set:")
    for label, value in ceilings(found, config.valid_space).items():
        print_line(f"  {label}: {value:.2f}")


def _rows(found: "DenoiserProfile") -> list[dict[str, str]]:
    rows = [
        {
            "part": part.kind,
            "size": part.size,
            "layers": str(len(part.layers)),
            "GFLOP": f"{part.operations / 1e9:.3g}",
            "ms": f"{part.float_s * 1e3:.3f}",
            "share": f"{part.float_s / found.step_s:.1%}",
            "int8 speed-up": "" if part.kernel is None else f"{part.speedup:.2f}",
            "kernel": part.kernel or "none",
        }
        for part in found.parts
    ]
    rest = {"part": "norms, modulation, rest", "ms": f"{found.rest_s * 1e3:.3f}"}
    return [
        *rows,
        {**dict.fromkeys(rows[0] if rows else rest, ""), **rest, "share": f"{found.rest_s / found.step_s:.1%}"},
    ]


def _on_paper(path: Path, clip: str, steps: int, as_json: bool) -> None:
    from hyquant.cost import tokens_of, work_of
    from search.config_file import load_device_profile
    from search.profiling import FULL_TEXT_TOKENS, full_model, paper_rows, paper_steps

    device, shape = load_device_profile(path), _shape_of(clip, steps)
    tokens = tokens_of(shape, text=FULL_TEXT_TOKENS)
    groups, blocks = full_model()
    rows = paper_rows(work_of(groups, blocks, tokens), device)
    seconds = paper_steps(groups, blocks, tokens, device)
    if as_json:
        answer: dict[str, Any] = {"device": device.model_dump(mode="json"), "clip": clip, "steps": steps}
        answer |= {"video_tokens": tokens.video, "text_tokens": tokens.text, "step_s": seconds}
        print_json({**answer, "parts": [vars(row) for row in rows]})
        return
    print_table(
        [
            {
                "part": row.kind,
                "TFLOP": f"{row.operations / 1e12:.2f}",
                "share": f"{row.share:.1%}",
                f"{device.dtype} s": f"{row.float_s:.3f}",
                "int8 s": f"{row.int8_s:.3f}",
            }
            for row in rows
        ]
    )
    print_line(
        f"HunyuanVideo 13B, {clip}, {tokens.video} video tokens, predicted for {device.name}, {device.cards} card(s):"
    )
    for label, step_s in seconds.items():
        gain = "" if label == "float" else f"  {seconds['float'] / step_s:.2f} times as fast as float"
        print_line(f"  {label}: {step_s:.2f} s a step, {steps * step_s:.0f} s a clip{gain}")


def _shape_of(clip: str, steps: int) -> Any:
    from pydantic import ValidationError

    from hyquant.errors import ConfigError
    from hyquant.models.base import DeploymentShape
    from hyquant.models.sampling import require_whole_latents

    try:
        height, width, num_frames = (int(part) for part in clip.split("x"))
        require_whole_latents(num_frames)
        return DeploymentShape(height=height, width=width, num_frames=num_frames, num_steps=steps)
    except (ValueError, ValidationError, ConfigError) as error:
        raise SearchError(
            f"--clip must be HEIGHTxWIDTHxFRAMES with sides that are multiples of 16 and 1 + a multiple of 4 frames, "
            f"but got {clip!r}; for example 720x1280x129"
        ) from error
