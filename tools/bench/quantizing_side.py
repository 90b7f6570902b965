"""One side of `tools.bench.quantizing`, in a process of its own: SIDE (ours or peer), CASE and a folder to write to."""

import itertools
import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict

from tests.toys.original_dit import ToyOriginalDiT, ToySize, toy_inputs

SIZE = ToySize(
    num_attention_heads=8,
    attention_head_dim=128,
    num_layers=4,
    num_single_layers=8,
    text_embed_dim=4096,
    pooled_projection_dim=768,
    rope_axes_dim=(16, 56, 56),
)
PARAMETERS = ("x", "t", "text_states", "text_mask", "text_states_2", "freqs_cos", "freqs_sin", "guidance")
NUM_STEPS = 6
SEPARATOR = 2


class HYVideoDiffusionTransformer(ToyOriginalDiT):
    """The toy under the name and with the configuration that the peer looks for."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.config = FrozenDict(
            model_type="hunyuan_video",
            mm_double_blocks_depth=SIZE.num_layers,
            mm_single_blocks_depth=SIZE.num_single_layers,
            heads_num=SIZE.num_attention_heads,
            hidden_size=SIZE.channels,
        )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def main() -> None:
    side, case, folder = sys.argv[1:]
    api: Any
    if side == "ours":
        import hyquant as api
    else:
        from msmodelslim import quant as api
    # What runs as part of a first forward is imported and started before memory is looked at.
    torch.nn.functional.scaled_dot_product_attention(*torch.zeros(3, 1, 1, 1, 16)) @ torch.zeros(16, 16)
    imported = memory("VmRSS")
    torch.manual_seed(0)
    model = HYVideoDiffusionTransformer().eval().requires_grad_(False)
    float_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    records = calls(with_steps=case.endswith("timestep"))
    config = api.SessionConfig(
        processor_cfg_map=processors(api, case, folder, disabled(model)), calib_data=records, device="cpu"
    )
    started = perf_counter()
    with torch.no_grad():
        api.quant_model(model, config)
    seconds = perf_counter() - started
    assert any(Path(folder, "out").glob("*.safetensors"))
    print(
        json.dumps(
            {
                "seconds": seconds,
                "imported_bytes": imported,
                "peak_bytes": memory("VmHWM"),
                "float_bytes": float_bytes,
            }
        )
    )


def processors(api: Any, case: str, folder: str, disabled: list[str]) -> dict[str, Any]:
    """Return the processors of a case, named alike on both sides."""
    smoothing, _, scheme = case.rpartition("+")
    quantizer, quant, rest = {
        "w8a8": (api.W8A8ProcessorConfig, api.W8A8QuantConfig, {}),
        "w8a8_dynamic": (api.W8A8DynamicProcessorConfig, api.W8A8DynamicQuantConfig, {}),
        "w8a8_timestep": (api.W8A8TimeStepProcessorConfig, api.W8A8TimeStepQuantConfig, {"timestep_sep": SEPARATOR}),
    }[scheme]
    smoothings = {
        "m4": lambda: {"m4": api.M4ProcessorConfig()},
        "m6": lambda: {"m6": api.M6ProcessorConfig(cfg=api.M6Config(alpha=0.8, beta=0.2))},
        "m6_search": lambda: {"m6": api.M6ProcessorConfig(cfg=api.M6Config())},
    }
    return {
        scheme: quantizer(cfg=quant(act_method="minmax"), disable_names=disabled, **rest),
        **(smoothings[smoothing]() if smoothing else {}),
        "save": api.SaveProcessorConfig(output_path=str(Path(folder, "out"))),
    }


def disabled(model: torch.nn.Module) -> list[str]:
    """Return what the seed's scripts disable: Linears outside the blocks, and three kinds of them inside."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and ("_blocks." not in name or any(part in name for part in ("img_mod", "modulation", "fc2")))
    ]


def calls(*, with_steps: bool) -> list[Any]:
    """Return one call per step, 256 video and 32 text tokens each, as the peer's DumperManager gives them."""
    line = torch.linspace(1.0, 0.0, NUM_STEPS + 1).tolist()
    found: list[Any] = []
    for step_index, (sigma, _) in enumerate(itertools.pairwise(line)):
        inputs = toy_inputs(SIZE, seed=step_index, text_lengths=(32,), num_text=32, grid=(4, 8, 8))
        inputs["t"] = torch.full((1,), 1000 * sigma)
        args = [inputs[name] for name in PARAMETERS]
        found.append({"timestep_idx": step_index, "args": args, "kwargs": {}} if with_steps else args)
    return found


def memory(kind: str) -> int:
    """Return bytes of resident memory as the kernel counts them: now (VmRSS) or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


if __name__ == "__main__":
    main()
