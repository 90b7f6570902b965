"""The NPU kernel without an NPU: its calls fit the operators' schemas and dtype tables, and give what others give."""

import importlib.metadata
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hyquant.errors import ConfigError
from hyquant.kernels import KERNELS
from hyquant.kernels.npu import NZ, OPERATORS, NpuKernel
from tests.reference import operators
from tests.reference.npu_schemas import SCHEMAS, bound
from tests.reference.operators import RefusedByOperator
from tests.reference.typed import Typed

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
N, K = 24, 40
DEFINITIONS = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"


def typed(tensor):
    """Return a tensor as the reference operators take it."""
    name = str(tensor.dtype).removeprefix("torch.")
    values = tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
    return Typed(values.numpy(), name)


def tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array.values)).to(getattr(torch, array.dtype))


def given(value):
    return None if value is None else typed(value)


class Executor:
    """Runs the operators in numpy, by their documented tables, and keeps the calls."""

    def __init__(self):
        self.calls = []

    def _bound(self, name, args, kwargs):
        self.calls.append(name)
        return bound(name, args, kwargs)

    def npu_dynamic_quant(self, *args, **kwargs):
        call = self._bound("npu_dynamic_quant", args, kwargs)
        x, smooth = typed(call["input"]), given(call["smooth_scales"])
        if smooth is not None:
            operators.demand(smooth.dtype == x.dtype, "npu_dynamic_quant", "smooth_scales in x's dtype", smooth.dtype)
            operators.demand(smooth.shape == x.shape[-1:], "npu_dynamic_quant", "one scale per channel", smooth.shape)
            x = Typed(x.values * smooth.values, x.dtype)
        codes, scale = operators.npu_dynamic_quant(x)
        return tensor(codes), tensor(scale)

    def npu_quantize(self, *args, **kwargs):
        call = self._bound("npu_quantize", args, kwargs)
        assert call["dtype"] == torch.qint8
        assert call["div_mode"] is True
        x, scales, zero_points = (typed(call[name]) for name in ("self", "scales", "zero_points"))
        return tensor(operators.npu_quantize(x, scales, zero_points, axis=call["axis"]))

    def npu_quant_matmul(self, *args, **kwargs):
        call = self._bound("npu_quant_matmul", args, kwargs)
        output = str(call["output_dtype"]).removeprefix("torch.")
        found = operators.npu_quant_matmul(
            *(typed(call[name]) for name in ("x1", "x2", "scale")),
            pertoken_scale=given(call["pertoken_scale"]),
            bias=given(call["bias"]),
            output=output,
        )
        return tensor(found)

    def npu_trans_quant_param(self, *args, **kwargs):
        call = self._bound("npu_trans_quant_param", args, kwargs)
        assert call["offset"] is None
        return tensor(operators.npu_trans_quant_param(typed(call["scale"])))

    def npu_format_cast(self, *args, **kwargs):
        call = self._bound("npu_format_cast", args, kwargs)
        assert call["acl_format"] == 29
        assert call["self"].is_contiguous()
        return call["self"]


@pytest.fixture
def executor():
    return Executor()


@pytest.fixture
def kernel(executor):
    return NpuKernel(operators=executor)


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int16).to(torch.int8)


def inputs(dtype, *leading, seed=1):
    """Values on the grid of bfloat16, so that the working dtype of float32 inputs loses nothing."""
    return torch.randn(*leading, K, generator=torch.Generator().manual_seed(seed)).bfloat16().to(dtype)


def dynamic(kernel, x, mul=None, bias=True, operand=None):
    scale = torch.linspace(0.001, 0.01, N)[:, None]
    return kernel.dynamic(
        x,
        kernel.prepare(weights()) if operand is None else operand,
        weight_scale=scale,
        bias=torch.linspace(-1, 1, N) if bias else None,
        mul_scale=mul,
    )


def static(kernel, x, mul=None, operand=None):
    return kernel.static(
        x,
        kernel.prepare(weights()) if operand is None else operand,
        input_scale=torch.tensor([0.03125]),
        input_offset=torch.tensor([-7.0]),
        deq_scale=torch.linspace(0.0001, 0.001, N),
        quant_bias=torch.arange(N, dtype=torch.int32) * 100,
        mul_scale=mul,
    )


@pytest.mark.parametrize("run", [dynamic, static])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(1,), (7,), (2, 9), (2, 0)], ids=str)
@pytest.mark.parametrize("is_smoothed", [False, True])
def test_calls_are_taken_and_results_are_the_reference_kernels(run, dtype, leading, is_smoothed, kernel):
    """Powers of two as multipliers keep products exact, so only the rounding of the output and of ties may differ."""
    x = inputs(dtype, *leading)
    mul = 2.0 ** (torch.arange(K) % 3 - 1) if is_smoothed else None

    found, expected = run(kernel, x, mul), run(KERNELS["reference"], x.float(), mul)
    one_code = 127 * 0.01 * float(x.float().abs().amax() * 2 if x.numel() else 0) / 127

    assert found.dtype == dtype
    assert found.shape == (*leading, N)
    assert torch.allclose(found.float(), expected, rtol=2**-7, atol=one_code)
    if x.numel():
        assert float((found.float() - expected).norm() / expected.norm()) < 0.004  # bfloat16 keeps 8 bits


def test_a_linear_without_bias_passes_none(kernel, executor):
    dynamic(kernel, inputs(torch.bfloat16, 3), bias=False)

    assert executor.calls == ["npu_dynamic_quant", "npu_quant_matmul"]


def test_tokens_of_four_bits_are_multiplied_as_int8(kernel, executor):
    x = inputs(torch.bfloat16, 5)
    options = {"weight_scale": torch.full((N, 1), 0.01), "bias": None, "mul_scale": None, "largest_code": 7}

    found = kernel.dynamic(x, kernel.prepare(weights()), **options)
    expected = KERNELS["reference"].dynamic(x, weights(), **options)

    assert torch.allclose(found.float(), expected.float(), rtol=2**-7)
    assert executor.calls == ["npu_quant_matmul"]


def test_weights_go_to_the_fractal_format_on_request(kernel, executor, monkeypatch):
    plain = dynamic(kernel, inputs(torch.bfloat16, 3))
    monkeypatch.setenv(NZ, "1")

    assert torch.equal(dynamic(kernel, inputs(torch.bfloat16, 3)), plain)
    assert executor.calls.count("npu_format_cast") == 1


def test_more_channels_than_the_operator_takes_are_refused(kernel):
    with pytest.raises(ConfigError, match="at most 65535 channels"):
        kernel.prepare(torch.zeros(65536, 8, dtype=torch.int8))


def test_it_is_a_candidate_on_an_npu_whose_package_has_all_operators():
    npu = SimpleNamespace(type="npu")
    older = SimpleNamespace(**dict.fromkeys(OPERATORS[1:]))

    assert NpuKernel(operators=Executor()).is_available(npu)
    assert not NpuKernel(operators=older).is_available(npu)
    assert not NpuKernel(operators=Executor()).is_available(torch.device("cpu"))
    assert not KERNELS["npu"].is_available(torch.device("cpu"))


def test_a_float32_input_meets_its_range_unrounded(kernel, executor):
    """Both would be off in bfloat16: the scale by 0.2 %, codes near 100 by as much as a half."""
    x = torch.randn(50, K, generator=torch.Generator().manual_seed(3))
    options = {
        "input_scale": torch.tensor([0.0301]),
        "input_offset": torch.tensor([0.0]),
        "deq_scale": torch.full((N,), 0.0301),
        "quant_bias": torch.zeros(N, dtype=torch.int32),
        "mul_scale": None,
    }

    found = kernel.static(x, kernel.prepare(weights()), **options)
    expected = KERNELS["reference"].static(x, weights(), **options)

    assert torch.equal(found, expected.bfloat16().float())


def test_half_precision_takes_its_scale_as_the_operator_that_packs_it_makes_it(kernel, executor):
    """Graph mode does not pack a float32 scale by itself as eager mode does."""
    static(kernel, inputs(torch.float16, 3))
    static(kernel, inputs(torch.bfloat16, 3))

    assert executor.calls == [
        *("npu_quantize", "npu_trans_quant_param", "npu_quant_matmul"),
        *("npu_quantize", "npu_quant_matmul"),
    ]


def by_codes(function):
    """Let an operator be called by torch's dispatcher, which hands over dtypes as their numbers."""
    dtypes = {5: torch.float16, 12: torch.qint8, 15: torch.bfloat16}

    def called(*args, **kwargs):
        if function.__name__ == "npu_quantize":
            args = (*args[:3], dtypes[args[3]], *args[4:])
        if "output_dtype" in kwargs:
            kwargs["output_dtype"] = dtypes[kwargs["output_dtype"]]
        return function(*args, **kwargs)

    return called


@pytest.fixture
def dispatched(executor):
    """Give torch's dispatcher the operators under their schemas, run by the executor and traced by their shapes."""
    if any(hasattr(torch.ops.npu, name) for name in OPERATORS):
        pytest.skip("torch_npu is loaded and has operators of its own")
    shapes = {
        "npu_dynamic_quant": lambda x, **_: (x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1]).float()),
        "npu_quantize": lambda x, *_: x.new_empty(x.shape, dtype=torch.int8),
        "npu_quant_matmul": lambda q, operand, scale, *, output_dtype, **_: q.new_empty(
            (q.shape[0], operand.shape[1]), dtype=torch.float16 if output_dtype == 5 else torch.bfloat16
        ),
        "npu_trans_quant_param": lambda scale, *_: scale.new_empty(scale.shape, dtype=torch.int64),
        "npu_format_cast": lambda x, *_, **__: torch.empty_like(x),
    }
    library = torch.library.Library("npu", "FRAGMENT")
    for name in OPERATORS:
        library.define(SCHEMAS[name])
        library.impl(name, by_codes(getattr(executor, name)), "CPU")
        torch.library.register_fake(f"npu::{name}", shapes[name], lib=library)
    yield KERNELS["npu"]
    library._destroy()


@pytest.mark.parametrize("run", [dynamic, static])
@pytest.mark.parametrize("dtype", DTYPES)
def test_calls_pass_torchs_dispatcher_and_compile_without_a_break(run, dtype, kernel, dispatched):
    x, mul = inputs(dtype, 2, 9), 2.0 ** (torch.arange(K) % 3 - 1)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)

    expected = run(kernel, x, mul)
    assert torch.equal(run(dispatched, x, mul), expected)
    assert torch.equal(compiled(dispatched, x, mul, operand=dispatched.prepare(weights())), expected)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("npu_dynamic_quant", (torch.zeros(1, 1), None), {}),
        ("npu_dynamic_quant", (torch.zeros(1, 1),), {"smooth": None}),
        ("npu_quant_matmul", (torch.zeros(1), torch.zeros(1)), {}),
        ("npu_quantize", (torch.zeros(1), torch.zeros(1), None, "qint8"), {}),
    ],
)
def test_the_schemas_refuse_wrong_calls(name, args, kwargs):
    with pytest.raises(TypeError):
        bound(name, args, kwargs)


def test_the_executor_refuses_what_devices_refuse(executor):
    x = torch.zeros(2, K)

    with pytest.raises(RefusedByOperator, match="bfloat16 or float16"):
        executor.npu_dynamic_quant(x)
    with pytest.raises(RefusedByOperator, match="scales for its x"):
        executor.npu_quantize(x.bfloat16(), torch.ones(1), torch.zeros(1), torch.qint8, axis=-1)


def installed_definitions():
    """Return torch_npu's operator definitions: of the wheel that HYQ_TORCH_NPU_WHEEL names, or of what is installed."""
    if wheel := os.environ.get("HYQ_TORCH_NPU_WHEEL"):
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(DEFINITIONS).decode()
    try:
        files = importlib.metadata.files("torch_npu") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())).read_text() for file in files if str(file) == DEFINITIONS), None)


def test_the_schemas_are_those_of_torch_npu():
    definitions = installed_definitions()
    if definitions is None:
        pytest.skip("no torch_npu here; name a wheel of it by HYQ_TORCH_NPU_WHEEL")
    lines = [line.partition("func:")[2].strip() for line in definitions.splitlines() if "func:" in line]

    for name, own in SCHEMAS.items():
        theirs = {str(torch._C.parse_schema(f"npu::{line}")) for line in lines if line.partition("(")[0] == name}
        assert str(torch._C.parse_schema(f"npu::{own}")) in theirs


def test_every_operator_the_kernel_needs_has_a_schema():
    assert set(OPERATORS) <= SCHEMAS.keys()
