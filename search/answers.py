"""What commands answer: JSON for programs, whose shapes docs/cli.md promises, and table rows and lines for people."""

from typing import TYPE_CHECKING, Any

from hyquant.latency_report import LatencyReport
from hyquant.latents import mean_curve
from search.float_layers import in_words
from search.logged import config_params
from search.metric_names import LATENT_L2, worse
from search.noise_floor import NoiseFloor
from search.overview import Overview, TrialRow
from search.plain import plain
from search.provenance import Provenance
from search.readable import readable, with_interval
from search.result import TrialResult
from spaces.space import SearchSpace

if TYPE_CHECKING:
    from hyquant.export import VerifyReport
    from search.rerun import Rerun

_CONFIG_COLUMNS = ("linear.act_method", "linear.timestep_sep", "smoothing.placement")


def table_row(row: TrialRow, space: SearchSpace) -> dict[str, str]:
    """Return one trial as short texts by column; what it does not have is empty."""
    params = {} if row.config is None else config_params(row.config)
    return {
        "trial": str(row.number),
        "state": row.state,
        "front": ", ".join(row.picks) or ("yes" if row.is_on_front else ""),
        "strategy": row.strategy or "",
        **{name: with_interval(value, row.interval(name)) for name, value in (row.values or {}).items()},
        "latency": "" if row.result is None else row.result.latency_kind or "",
        **{name.split(".")[-1]: params.get(name, "") for name in _CONFIG_COLUMNS},
        "in float": "" if row.config is None else in_words(row.config, space),
        "measured again": _again(row),
        "seconds": "" if row.duration_s is None else f"{row.duration_s:.1f}",
        "reason": row.reason or "",
    }


def status_json(overview: Overview) -> dict[str, Any]:
    """Return the answer of `hyq-search status --json`; documented in docs/cli.md."""
    from search.samplers import kind_of_study

    budget = overview.config.budget
    return {
        "study": overview.config.name,
        "trials": dict(overview.counts),
        "evaluated": overview.num_evaluated,
        "budget": budget.model_dump(),
        "front_size": len(overview.front),
        "picks": {name: row.number for row in overview.front for name in row.picks},
        "sampler": kind_of_study(overview.config),
        "median_trial_s": overview.time_per_trial_s,
        "measurement_errors": [row.number for row in overview.rows if row.measurement_error is not None],
        "noise_floor": None if overview.floor is None else plain(overview.floor),
        "front_timed_on": timed_on(overview),
    }


def timed_on(overview: Overview) -> dict[str, list[int]]:
    """Return by device which members of the front were timed on it; latencies of two are two quantities."""
    found: dict[str, list[int]] = {}
    for row in overview.front:
        if row.timed_on is not None:
            found.setdefault(row.timed_on, []).append(row.number)
    return found


def devices_note(overview: Overview) -> str | None:
    """Return in words that members of the front were timed on different devices, and on which; None if on one."""
    if not any(objective.metric.startswith("latency") for objective in overview.config.objectives):
        return None
    found = timed_on(overview)
    if len(found) < 2:
        return None
    listed = "; ".join(f"{device}: trials {', '.join(map(str, numbers))}" for device, numbers in found.items())
    return f"the front holds trials timed on different devices, whose latencies are not the same quantity: {listed}"


def floor_lines(floor: NoiseFloor) -> list[str]:
    """Return what a study's noise floor is, as lines for people."""
    left_out = f"; left out: {'; '.join(floor.left_out)}" if floor.left_out else ""
    lines = [f"noise floor, of float under {', '.join(floor.changes)}{left_out}"]
    if floor.is_perfect:
        return [*lines, "  none: every neutral change gives the same videos bit for bit on this machine"]
    if floor.identical:
        lines.append(f"  the same videos bit for bit under {', '.join(floor.identical)}")
    for name, one in floor.metrics.items():
        at = f"{one.mean:.3g} (worst prompt {one.worst:.3g}), float scores {readable(one.score)} under {one.change}"
        lines.append(f"  {name}: {at if one.mean > 0 else 'none, no change moves it'}")
    return lines


def front_json(overview: Overview) -> list[dict[str, Any]]:
    """Return the answer of `hyq-search front --json`; documented in docs/cli.md."""
    keys = (
        "number",
        "picks",
        "values",
        "intervals",
        "confirmed",
        "config",
        "config_digest",
        "strategy",
        "metrics",
        "latency",
    )
    return [{key: row[key] for key in keys} for row in map(trial_json, overview.front)]


def trials_json(overview: Overview) -> list[dict[str, Any]]:
    """Return all trials as in `hyq-search show --json`."""
    return [trial_json(row) for row in overview.rows]


def trial_json(row: TrialRow) -> dict[str, Any]:
    """Return the answer of `hyq-search show --json`; documented in docs/cli.md."""
    result = row.result
    answer = {
        "number": row.number,
        "state": row.state,
        "reason": row.reason,
        "picks": list(row.picks),
        "on_front": row.is_on_front,
        "values": row.values,
        "intervals": {name: row.interval(name) for name in row.values or ()},
        "strategy": row.strategy,
        "preset": row.preset,
        "config": row.config,
        "config_digest": None if result is None else result.config_digest,
        "metrics": {} if result is None else result.metrics,
        "constraints": {} if result is None else result.constraints,
        "latency": None if result is None else result.latency,
        "weight_bytes": None if result is None else result.weight_bytes,
        "peak_memory_bytes": None if result is None else result.peak_memory_bytes,
        "latent_l2": [] if result is None else mean_curve(result.latent_l2),
        "confirmed": row.confirmation,
        "num_prompts": None if result is None else result.num_prompts,
        "stopped_by": None if result is None else result.stopped_by,
        "stage_seconds": {} if result is None else result.stage_seconds,
        "duration_s": row.duration_s,
        "provenance": None if result is None else result.provenance,
    }
    return {key: plain(value) for key, value in answer.items()}


def report_json(report: "VerifyReport") -> dict[str, Any]:
    """Return the answer of `hyq-search verify --json`; documented in docs/cli.md."""
    answer: dict[str, Any] = plain(report)
    return answer


def trial_lines(row: TrialRow, floor: NoiseFloor | None = None) -> list[str]:
    """Return what there is to know about one trial, as lines for people."""
    offered = f", offered as {' and '.join(row.picks)}" if row.picks else ""
    lines = [f"trial {row.number}: {row.state}{', on the front' if row.is_on_front else ''}{offered}"]
    if row.reason:
        lines.append(f"reason: {row.reason}")
    if row.preset:
        lines.append(f"preset: {row.preset}")
    if row.config is not None:
        lines += ["config:", *(f"  {key}: {value or '-'}" for key, value in config_params(row.config).items())]
    if row.result is not None:
        count = row.result.num_prompts
        lines += ["scores over the prompts:" if count is None else f"scores over the first {count} prompts:"]
        lines += [
            f"  {name}: {with_interval(m.mean, m.interval)} (std {m.std:.2g}, worst {readable(worse(name)(m.values))})"
            for name, m in row.result.metrics.items()
        ]
        lines += [f"  bound on {name} is exceeded by {v:.3g}" for name, v in row.result.constraints.items() if v > 0]
        lines += _latency_lines(row.result.latency)
        lines += _provenance_lines(row.result.provenance)
        lines += _latent_lines(row)
        lines.append(_memory_line(row.result))
        if (again := row.confirmation) is not None and again.result is not None:
            lines += ["measured again with fresh seeds:"]
            lines += [f"  {name}: {readable(m.mean)}" for name, m in again.result.metrics.items()]
            lines += _latency_lines(again.result.latency)
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in row.result.stage_seconds.items())
        lines.append(f"time: {stages}")
    if row.result is not None and floor is not None:
        lines += floor_lines(floor)
    return lines


def _latent_lines(row: TrialRow) -> list[str]:
    curve = () if row.result is None else mean_curve(row.result.latent_l2)
    if not curve:
        return []
    last = with_interval(curve[-1], row.interval(LATENT_L2))
    return [f"latents: relative L2 error {last} after the last of {len(curve)} steps, {curve[0]:.3g} after the first"]


def _memory_line(result: TrialResult) -> str:
    peak = "not measured" if result.peak_memory_bytes is None else f"{result.peak_memory_bytes / 2**20:.4g} MiB"
    return f"memory: weights {result.weight_bytes / 2**20:.4g} MiB, peak {peak}"


def _again(row: TrialRow) -> str:
    """Return the objectives of a member that was measured again."""
    if row.confirmation is None:
        return ""
    values = row.confirmation.values
    return "not held" if values is None else ", ".join(map(readable, values))


def rerun_json(rerun: "Rerun") -> dict[str, Any]:
    """Return the answer of `hyq-search trial --from --json`; documented in docs/cli.md."""
    metrics = [{**plain(metric), "agrees": metric.agrees} for metric in rerun.metrics]
    return {**plain(rerun), "metrics": metrics, "agrees": rerun.agrees}


def rerun_lines(rerun: "Rerun") -> list[str]:
    """Return what running a trial again has shown, as lines for people."""
    lines = [
        f"  {one.metric}: {readable(one.then)} then, {readable(one.now)} now; {one.distance:.2g} apart, "
        f"{'within' if one.agrees else 'beyond'} {one.allowance:.2g}"
        for one in rerun.metrics
    ]
    changed = ["where it was run is not known"] if rerun.changed is None else [f"changed: {x}" for x in rerun.changed]
    verdict = "agrees within the noise floor" if rerun.agrees else "does not agree"
    return [f"trial {rerun.number} run again {verdict}", *lines, *(changed or ["nothing changed in its provenance"])]


def _provenance_lines(provenance: Provenance | None) -> list[str]:
    if provenance is None:
        return []
    versions = ", ".join(f"{name} {value}" for name, value in (provenance.packages | provenance.drivers).items())
    digests = ", ".join(f"{name} {value[:12]}" for name, value in provenance.digests.items())
    return [
        f"made with: code {provenance.code[:12] or 'of the package'}, {versions}, on {provenance.device}",
        f"  seed {provenance.seed}; digests: {digests}",
    ]


def _latency_lines(latency: LatencyReport | None) -> list[str]:
    if latency is None:
        return ["latency: not measured"]
    if latency.kind == "predicted":
        return [
            f"latency: {latency.ratio:.3f} of float, {latency.loop_latency_s:.3g} s against "
            f"{latency.control_loop_latency_s:.3g} s a clip",
            f"  predicted for {latency.device}, {latency.shape}; nothing was timed",
        ]
    lines = [
        f"latency: {with_interval(latency.ratio, latency.ratio_interval)} of float (MAD {latency.ratio_mad:.2g}), "
        f"{latency.loop_latency_s:.3g} s against {latency.control_loop_latency_s:.3g} s a clip",
        f"  {latency.conditions}, {latency.shape}; {latency.rounds} rounds after {latency.warmup} of warm-up",
    ]
    if latency.ceiling is not None:
        lines.append(f"  speed-up {1 / latency.ratio:.2f} of at most {latency.ceiling:.2f}")
    if latency.measurement_error is not None:
        lines.append(f"  measurement error: {latency.measurement_error}")
    return lines
