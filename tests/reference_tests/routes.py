"""From a float model through an export to the model that the reference loader quantizes, in every layout.

A route has a source, which hyquant calibrates and saves, and a deployed model with the same weights, which only ever
sees the files. Both sides run one short loop on inputs that the deployment dtype represents exactly: embedded guidance
is 8.0 * 1000, timesteps and latents are rounded before every call.
"""

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hyquant.calibration.calibrate import calibrate, quantize_calibrated_
from hyquant.clock import StepClock
from hyquant.config import QuantConfig
from hyquant.export import load_quantized, module_info, save_quantized
from hyquant.models.attentions import attention_blocks
from hyquant.models.base import Record
from hyquant.models.names import layer_groups, to_original
from hyquant.models.tiny import random_denoiser
from hyquant.plan import build_plan
from hyquant.quantize import restore_
from tests.toys.both_layouts import recorded
from tests.toys.original_dit import ToyOriginalDiT, ToySize, random_toy, toy_inputs

NUM_STEPS, GRID = 4, (2, 6, 8)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
TINY_SIZE = ToySize(attention_head_dim=16, num_refiner_layers=1, rope_axes_dim=(4, 6, 6))
"""The original layout of `hyquant.models.tiny`'s transformer."""


@dataclass(frozen=True)
class Route:
    """A source with records of it, the layout it is saved in, and the float model that the files are loaded into."""

    source: nn.Module
    layout: str
    deployed: nn.Module
    dtype: str
    inputs: dict[str, Tensor]
    clock: StepClock
    records: list[Record]


def build_route(name: str, dtype: str, grid: tuple[int, int, int] = GRID) -> Route:
    """Build a route for a deployment dtype, with records of inputs that were rounded to it.

    Names are "original" (toy to toy), "diffusers" (tiny to tiny) and "converted" (tiny to a toy of its weights).
    """
    if name == "original":
        source = deployed = random_toy(0)
        size = source.size
    else:
        source, size = random_denoiser(0, torch.float32), TINY_SIZE
        deployed = source
        if name == "converted":
            deployed = ToyOriginalDiT(size).eval().requires_grad_(False)
            deployed.load_state_dict(to_original(source.state_dict()))
    inputs = toy_inputs(size, seed=10, grid=grid) | {"guidance": torch.full((1,), 8.0 * 1000)}
    clean = copy.deepcopy(deployed)

    def loop(start: dict[str, Tensor]) -> Tensor:
        return denoised(source, start, dtype=dtype)

    clock, records, _ = recorded(source, loop, inputs, num_steps=NUM_STEPS)
    return Route(source, "diffusers" if name == "diffusers" else "original", clean, dtype, inputs, clock, records)


def rounded(x: Tensor, dtype: str) -> Tensor:
    """Return float32 that the deployment dtype represents."""
    return x.to(DTYPES[dtype]).float()


def velocity(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Call either layout with the original's inputs."""
    if isinstance(model, ToyOriginalDiT):
        return model(**inputs)["x"]
    return model(
        hidden_states=inputs["x"],
        timestep=inputs["t"],
        encoder_hidden_states=inputs["text_states"],
        encoder_attention_mask=inputs["text_mask"],
        pooled_projections=inputs["text_states_2"],
        guidance=inputs["guidance"],
    ).sample


@torch.no_grad()
def denoised(
    model: nn.Module, inputs: dict[str, Tensor], *, dtype: str, set_step: Callable[[int], None] = lambda step: None
) -> Tensor:
    """Follow the model's velocity from noise to latents; what the model reads is rounded at every step."""
    line = torch.linspace(1.0, 0.0, NUM_STEPS + 1)
    sigmas = 7.0 * line / (1 + 6.0 * line)
    x = inputs["x"]
    for step, (sigma, following) in enumerate(itertools.pairwise(sigmas.tolist())):
        set_step(step)
        now = {"x": rounded(x, dtype), "t": rounded(torch.full((1,), 1000 * sigma), dtype)}
        x = x + (following - sigma) * velocity(model, inputs | now)
    return x


def write_export(route: Route, config: QuantConfig, folder: Path, **options: object) -> Path:
    """Calibrate, quantize and save the source; it is float again afterwards."""
    plan = build_plan(
        layer_groups(route.source), config, num_steps=NUM_STEPS, attentions=attention_blocks(route.source)
    )
    info = module_info(route.source, source="weights of this test")
    calibrated = calibrate(route.source, plan, route.records, route.clock)
    try:
        quantize_calibrated_(route.source, plan, calibrated, route.clock)
        save_quantized(route.source, plan, folder, model=info, layout=route.layout, **options)
    finally:
        restore_(route.source)
    return folder


@contextmanager
def loaded_by_hyquant(route: Route, folder: Path) -> Iterator[nn.Module]:
    """Load the export into the source by hyquant; it is float again afterwards."""
    load_quantized(route.source, folder, route.clock)
    try:
        yield route.source
    finally:
        restore_(route.source)


@contextmanager
def rounding(model: nn.Module, names: Iterable[str], dtype: str) -> Iterator[None]:
    """Round what the named modules read and return to a dtype, as a device does that holds activations in it."""
    handles: list[RemovableHandle] = []
    for name in names:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda _, args: (rounded(args[0], dtype), *args[1:])))
        handles.append(module.register_forward_hook(lambda _, args, y: rounded(y, dtype)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def planned(folder: Path) -> list[tuple[list[str], list[str]]]:
    """Return of every layer that the manifest's plan quantizes: its names in the files, its modules in the source."""
    read = manifest(folder)
    layers = [layer for layer in read["plan"]["layers"] if layer["scheme"] not in (None, "float")]
    is_original = read["layout"] == "original"
    return [([layer["name"]] if is_original else layer["modules"], layer["modules"]) for layer in layers]


def manifest(folder: Path) -> dict:
    return json.loads((folder / "hyq_manifest.json").read_text())


def description_of(folder: Path) -> Path:
    (path,) = folder.glob("quant_model_description_*.json")
    return path


def weights_of(folder: Path) -> Path:
    (path,) = folder.glob("quant_model_weight_*.safetensors")
    return path
