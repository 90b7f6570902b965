"""`quant_model`: everything that a session says, done to a model in place."""

import logging
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pydantic import JsonValue
from torch import nn

from hyquant.calibration.calibrate import calibrate, quantize_calibrated_
from hyquant.clock import StepClock, attach_clock
from hyquant.config import W8A8Timestep, digest
from hyquant.distributed import Group, run_together
from hyquant.errors import ConfigError
from hyquant.export.layout import model_quant_type
from hyquant.export.manifest import ModelInfo, module_info_later
from hyquant.export.names import FileNames
from hyquant.export.writer import require_writable, save_quantized
from hyquant.models.attentions import attention_blocks
from hyquant.models.names import layer_groups
from hyquant.modules.swap import restore_
from hyquant.plan import QuantPlan, build_plan
from hyquant.quantize import QuantReport
from hyquant.session.configs import SessionConfig
from hyquant.session.ranks import current_group
from hyquant.session.records import said_once
from hyquant.session.timestep import TimestepManager
from hyquant.session.translate import quant_config

logger = logging.getLogger(__name__)

_HANDLE = "_hyquant_session_clock"


def quant_model(model: nn.Module, session_cfg: SessionConfig, *, clock: StepClock | None = None) -> QuantReport:
    """Quantize a model in place as a session says, and save it if the session does.

    In a torch.distributed run every rank calls it with the same config but for its own calibration data and file names.
    Statistics are merged over ranks, so all end with the same model; rank 0 writes the files of all.

    Args:
        model: The denoiser: HunyuanVideo in Tencent's or diffusers' layout, or any module with Linears. One that is
            quantized is restored first.
        session_cfg: The session.
        clock: What tells the model its denoising step; None for `TimestepManager`.

    Returns:
        What was done to every layer and attention.

    Raises:
        ConfigError: If the session does not fit the model or its device, or ranks have different sessions.
        LayerMatchError: If a name or pattern matches no layer of the model.
        CalibrationError: If calls are missing, or what they give is not finite.
        ExportError: If the result cannot be saved; before anything is calibrated wherever that can be known.
    """
    group = current_group()
    _detach(model)
    restore_(model)
    num_steps = _num_steps(session_cfg, group)
    plan = run_together(group, lambda: _plan(model, session_cfg, num_steps=num_steps))
    _require_equal_sessions(plan, session_cfg, group)
    names = _prepare_export(plan, session_cfg, group)
    _warn(plan, session_cfg, group)
    own_clock = StepClock() if clock is None else clock
    with ThreadPoolExecutor(max_workers=1) as beside:
        # Another thread hashes the float weights meanwhile; quantizing puts other modules in and changes none of them.
        info = (
            beside.submit(module_info_later(model, source=type(model).__name__)) if _is_writer(names, group) else None
        )
        records = said_once(session_cfg.calls().records, model)
        found = calibrate(model, plan, records, own_clock, group=group)
        report = quantize_calibrated_(model, plan, found, own_clock)
        if clock is None:
            vars(model)[_HANDLE] = attach_clock(model, own_clock, TimestepManager.get_timestep_idx)
        if names is not None:
            run_together(group, lambda: None if info is None else _save(model, plan, session_cfg, info.result, names))
    return report


def _is_writer(names: list[FileNames] | None, group: Group) -> bool:
    return names is not None and group.rank == 0


def _detach(model: nn.Module) -> None:
    """Let a model that an earlier session quantized follow no clock while it is calibrated again."""
    handle = vars(model).pop(_HANDLE, None)
    if handle is not None:
        handle.remove()


def _num_steps(session: SessionConfig, group: Group) -> int:
    return max(int(str(number)) for number in group.all_gather(session.calls().num_steps))


def _plan(model: nn.Module, session: SessionConfig, *, num_steps: int) -> QuantPlan:
    device = next(model.parameters()).device.type
    if session.device is not None and session.device.partition(":")[0] != device:
        raise ConfigError(
            f"the model must be on the session's device, but it is on {device} and the session says "
            f"{session.device!r}; move the model, or say device={device!r}."
        )
    groups = layer_groups(model)
    return build_plan(
        groups,
        quant_config(session, model, groups),
        num_steps=num_steps,
        model=type(model).__name__,
        target="hyquant" if session.save is None else session.save.target,
        attentions=attention_blocks(model) if session.has_attention else (),
    )


def _require_equal_sessions(plan: QuantPlan, session: SessionConfig, group: Group) -> None:
    save = session.save
    rest = None if save is None else save.model_dump(mode="json", exclude={"safetensors_name", "json_name"})
    if group.world_size == 1:
        return
    own: JsonValue = {"plan": digest(plan), "save": rest}
    found = group.all_gather(own)
    for rank, other in enumerate(found):
        if other != found[0]:
            raise ConfigError(
                f"every rank must have the same session but for calib_data and file names, but that of rank {rank} "
                "differs from that of rank 0; give all ranks one config."
            )


def _prepare_export(plan: QuantPlan, session: SessionConfig, group: Group) -> list[FileNames] | None:
    """Return the file names of all ranks after everything that could be refused; None if nothing is saved."""
    save = session.save
    if save is None:
        return None
    own_names = run_together(group, lambda: save.names(model_quant_type(plan)))
    all_names = [FileNames.model_validate(names) for names in group.all_gather(own_names.model_dump())]
    names = list(dict.fromkeys(all_names))

    def check() -> None:
        if group.rank == 0:
            require_writable(
                plan,
                save.output_path,
                layout=save.layout,
                target=save.target,
                overwrite=save.overwrite,
                names=names,
                part_size_bytes=save.part_size_bytes,
            )

    run_together(group, check)
    return names


def _warn(plan: QuantPlan, session: SessionConfig, group: Group) -> None:
    if group.rank > 0:
        return
    linear = plan.config.linear
    if isinstance(linear, W8A8Timestep) and linear.timestep_sep >= plan.num_steps:
        warnings.warn(
            f"timestep_sep {linear.timestep_sep} lies beyond the {plan.num_steps} recorded steps, so every step is "
            "dynamic; give a smaller one for static steps.",
            stacklevel=3,
        )
    if session.save is None:
        logger.warning("the session has no 'save' processor: the model is quantized in memory and nothing is written")


def _save(
    model: nn.Module,
    plan: QuantPlan,
    session: SessionConfig,
    info: Callable[[], ModelInfo],
    names: Sequence[FileNames],
) -> None:
    save = session.save
    assert save is not None
    save_quantized(
        model,
        plan,
        save.output_path,
        model=info,
        layout=save.layout,
        target=save.target,
        overwrite=save.overwrite,
        names=names,
        part_size_bytes=save.part_size_bytes,
    )
