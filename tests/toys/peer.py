"""The model and the records on which msModelSlim and this library are compared, and the cases of the comparison.

msModelSlim treats a model as HunyuanVideo by the name of its class and by entries of its `config`; its smoothing looks
for the layers by their original names.
"""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.configuration_utils import FrozenDict

from tests.toys.original_dit import ToyOriginalDiT, ToySize, random_toy, toy_inputs

SIZE = ToySize(num_attention_heads=1, num_refiner_layers=1)
NUM_STEPS = 4
NUM_CLIPS = 2
PARAMETERS = ("x", "t", "text_states", "text_mask", "text_states_2", "freqs_cos", "freqs_sin", "guidance")

DISABLED = tuple(
    name
    for name, module in ToyOriginalDiT(SIZE).named_modules()
    if isinstance(module, torch.nn.Linear)
    and ("_blocks." not in name or any(part in name for part in ("img_mod", "modulation", "fc2")))
)
"""What the seed's scripts disable: Linears outside the blocks, and three kinds of them inside."""


@dataclass(frozen=True)
class Case:
    """One run of the peer; the golden file has int8 weights of the cases that keep them."""

    quantizer: Literal["w8a8", "w8a8_dynamic", "w8a8_timestep"]
    smoothing: Literal["m3", "m4", "m6", "m6_search"] | None = None
    dtype: torch.dtype = torch.float32
    keeps_weights: bool = False


CASES = {
    "w8a8": Case("w8a8"),
    "w8a8_dynamic": Case("w8a8_dynamic", keeps_weights=True),
    "w8a8_timestep": Case("w8a8_timestep"),
    "m3_w8a8_dynamic": Case("w8a8_dynamic", "m3"),
    "m4_w8a8_dynamic": Case("w8a8_dynamic", "m4", keeps_weights=True),
    "m6_w8a8": Case("w8a8", "m6"),
    "m6_search_w8a8_dynamic": Case("w8a8_dynamic", "m6_search"),
    "bfloat16_w8a8_dynamic": Case("w8a8_dynamic", dtype=torch.bfloat16, keeps_weights=True),
}


class HYVideoDiffusionTransformer(ToyOriginalDiT):
    """The toy under the name and with the configuration that the peer looks for."""

    def __init__(self, size: ToySize = SIZE) -> None:
        super().__init__(size)
        self.config = FrozenDict(
            model_type="hunyuan_video",
            mm_double_blocks_depth=size.num_layers,
            mm_single_blocks_depth=size.num_single_layers,
            heads_num=size.num_attention_heads,
            hidden_size=size.channels,
        )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def peer_model(dtype: torch.dtype = torch.float32) -> HYVideoDiffusionTransformer:
    """Return the model with the weights of a seeded toy."""
    model = HYVideoDiffusionTransformer()
    model.load_state_dict(random_toy(3, SIZE).state_dict())
    return model.eval().requires_grad_(False).to(dtype)


@torch.no_grad()
def peer_records(dtype: torch.dtype = torch.float32, *, with_steps: bool) -> list[Any]:
    """Return the calls of a short float loop over several clips, as the peer's DumperManager gives them."""
    model, records = peer_model(), []
    line = torch.linspace(1.0, 0.0, NUM_STEPS + 1).tolist()
    for clip in range(NUM_CLIPS):
        inputs = toy_inputs(SIZE, seed=10 + clip)
        for step_index, (sigma, following) in enumerate(itertools.pairwise(line)):
            inputs["t"] = torch.full((1,), 1000 * sigma)
            args = [inputs[name] for name in PARAMETERS]
            taken = [value.to(dtype) if value.is_floating_point() else value.clone() for value in args]
            records.append({"timestep_idx": step_index, "args": taken, "kwargs": {}} if with_steps else taken)
            inputs["x"] = (inputs["x"] + (following - sigma) * model(*args)["x"]).bfloat16().float()
    return records
