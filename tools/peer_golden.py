"""What msModelSlim 26.1.0 makes of a small HunyuanVideo, as golden values for the tests of the session API.

    python -m venv peer && peer/bin/pip install msmodelslim==26.1.0 transformers diffusers
    PYTHONPATH=. peer/bin/python -m tools.peer_golden tests/golden/msmodelslim-26.1.0.safetensors

Runs from the root of the repository, on a CPU, in an environment that has msModelSlim (licence Mulan PSL v2) beside
this repository's own requirements. The model and its records are those of `tests.toys.peer`, so the tests make the very
same ones. Nothing of msModelSlim itself ends up in the file: only the tensors that it computes.

    CASE/TENSOR    what the peer saved in a case, of the quantized layers alone
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.toys.peer import CASES, DISABLED, NUM_STEPS, Case, peer_model, peer_records

KEPT = (".weight_scale", ".input_scale", ".input_offset", ".mul_scale")


def main() -> None:
    target = Path(sys.argv[1]).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    golden: dict[str, Tensor] = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o700)
            os.chdir(folder)  # the peer writes features.npy where it runs
            saved = run_peer(case, Path(folder))
        golden |= {f"{name}/{key}": tensor for key, tensor in kept(saved, with_weights=case.keeps_weights).items()}
    save_file(golden, target)
    print(f"{len(golden)} tensors, {target.stat().st_size} bytes")


def run_peer(case: Case, folder: Path) -> dict[str, Tensor]:
    """Quantize a fresh model as the seed's scripts do and return the tensors of the file that the peer writes."""
    from msmodelslim import quant as peer

    quantizers = {
        "w8a8": (peer.W8A8ProcessorConfig, peer.W8A8QuantConfig, {}),
        "w8a8_dynamic": (peer.W8A8DynamicProcessorConfig, peer.W8A8DynamicQuantConfig, {}),
        "w8a8_timestep": (peer.W8A8TimeStepProcessorConfig, peer.W8A8TimeStepQuantConfig, {"timestep_sep": 2}),
    }
    smoothings = {
        "m3": lambda: peer.M3ProcessorConfig(),
        "m4": lambda: peer.M4ProcessorConfig(),
        "m6": lambda: peer.M6ProcessorConfig(cfg=peer.M6Config(alpha=0.8, beta=0.2)),
        "m6_search": lambda: peer.M6ProcessorConfig(cfg=peer.M6Config()),
    }
    processor, quant, rest = quantizers[case.quantizer]
    processors = {case.quantizer: processor(cfg=quant(act_method="minmax"), disable_names=list(DISABLED), **rest)}
    if case.smoothing is not None:
        processors[case.smoothing.partition("_")[0]] = smoothings[case.smoothing]()
    processors["save"] = peer.SaveProcessorConfig(output_path=str(folder / "out"))
    model = peer_model(case.dtype)
    records = peer_records(case.dtype, with_steps=case.quantizer == "w8a8_timestep")
    config = peer.SessionConfig(processor_cfg_map=processors, calib_data=records, device="cpu")
    with torch.no_grad():
        peer.quant_model(model, config)
    return load_file(folder / "out" / f"quant_model_weight_{case.quantizer}.safetensors")


def kept(saved: dict[str, Tensor], *, with_weights: bool) -> dict[str, Tensor]:
    """Return what the tests compare: scales and smoothing vectors, and int8 weights where a case asks for them."""
    return {
        key: tensor.contiguous()
        for key, tensor in saved.items()
        if key.endswith(KEPT) or (with_weights and tensor.dtype == torch.int8)
    }


if __name__ == "__main__":
    assert NUM_STEPS > 2
    main()
