"""The Triton kernels around the product on cards: interpreted they give the reference kernel's bits; they compile."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyquant.kernels import KERNELS

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(1, 8, 8), (16, 40, 24), (5, 1, 1), (18, 1030, 7), (3, 2048, 1025)]
FLOAT_TENSORS = ("mul_scale", "input_scale", "input_offset", "row_scale", "out_scale", "bias")
COUNTS = ("num_rows", "num_inputs", "num_outputs", "x_stride", "q_stride", "product_stride")
CARDS = {"Turing": 75, "Ampere": 80, "Hopper": 90}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton here")


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int16).to(torch.int8)


def call(form, size, dtype, *, is_full):
    """Return a call with all optional tensors or none; a zero token and outliers are among the inputs."""
    rows, inputs, outputs = size
    x = normal(rows, 2 * inputs, seed=rows)[:, ::2] if is_full else normal(rows, inputs, seed=rows)
    x[rows // 2] = 0
    x[:: rows // 3 + 1, inputs // 2] = 2000.0
    scale = normal(outputs, 1, seed=3).abs() * 1e-3
    options = {"mul_scale": normal(inputs, seed=4).abs() + 0.1 if is_full else None}
    if form == "dynamic":
        options |= {"weight_scale": scale, "bias": normal(outputs, seed=5) if is_full else None}
        options |= {"largest_code": 7 if is_full else 127}
    else:
        options |= {
            "input_scale": torch.tensor([0.021]),
            "input_offset": torch.tensor([-3.0]),
            "deq_scale": scale[:, 0],
            "quant_bias": torch.arange(outputs, dtype=torch.int32) * 1000 - 5,
        }
    return {"form": form, "x": x.to(dtype), "weight": int8(outputs, inputs, seed=6), "options": options}


CALLS = {
    f"{form}-{size}-{dtype}-{'full' if is_full else 'bare'}": call(form, size, dtype, is_full=is_full)
    for form in ("static", "dynamic")
    for size in SIZES
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for is_full in (False, True)
}


def cut_to_bfloat16(x):
    """Return the upper half of each float32: the interpreter does not round where a card does."""
    return (x.view(torch.int32) & -(2**16)).view(torch.float32).bfloat16()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if not any(shutil.which(name) for name in ("gcc", "clang")) and "CC" not in os.environ:
        pytest.skip("no C compiler here, so the kernel does without triton")
    folder = tmp_path_factory.mktemp("interpreted")
    torch.save(CALLS, folder / "calls.pt")
    command = [sys.executable, "-m", "tests.hyquant_tests.interpreted_rows", folder / "calls.pt", folder / "results.pt"]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"})
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("name", CALLS)
def test_interpreted_kernels_give_the_reference_kernels_bits(name, results):
    one = CALLS[name]
    dtype = one["x"].dtype
    reference = KERNELS["reference"]

    expected = getattr(reference, one["form"])(one["x"].float(), reference.prepare(one["weight"]), **one["options"])

    assert results[name].dtype == dtype
    assert torch.equal(results[name], cut_to_bfloat16(expected) if dtype == torch.bfloat16 else expected.to(dtype))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("name", CALLS)
def test_a_card_gives_the_bits_of_the_reference_kernel_on_the_cpu(name):
    one = CALLS[name]

    def run(kernel, device):
        tensors = {key: value for key, value in one["options"].items() if isinstance(value, torch.Tensor)}
        options = one["options"] | {key: value.to(device) for key, value in tensors.items()}
        operand = kernel.prepare(one["weight"].to(device))
        return getattr(kernel, one["form"])(one["x"].to(device), operand, **options).cpu()

    assert torch.equal(run(KERNELS["cuda_int_mm"], "cuda"), run(KERNELS["reference"], "cpu"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("capability", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
def test_kernels_compile_for_cards_without_contracted_products(capability, dtype, is_static, tmp_path, monkeypatch):
    """A product contracted with a sum (fma) is rounded once instead of twice, which is other bits."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from hyquant.kernels import cuda_rows

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    floats, sizes = dict.fromkeys(FLOAT_TENSORS, "*fp32"), dict.fromkeys(COUNTS, "i32")
    constants = {"HAS_MUL": True, "HAS_BIAS": True, "IS_STATIC": is_static, "COLUMNS": 1024}
    others = {"x": f"*{dtype}", "y": f"*{dtype}", "q": "*i8", "product": "*i32", "quant_bias": "*i32"}
    types = (
        floats | sizes | others | {"largest_code": "fp32", "smallest": "fp32"} | dict.fromkeys(constants, "constexpr")
    )
    for kernel in (cuda_rows.quantize_rows_kernel, cuda_rows.dequantize_rows_kernel):
        names = kernel.arg_names

        compiled = compile(
            ASTSource(
                kernel,
                {name: types[name] for name in names},
                {name: value for name, value in constants.items() if name in names},
            ),
            target=GPUTarget("cuda", capability, 32),
            options={"enable_fp_fusion": False},
        )

        assert compiled.asm["cubin"]
        assert "fma.rn.f32" not in compiled.asm["ptx"]
        assert "div.full.f32" not in compiled.asm["ptx"]
