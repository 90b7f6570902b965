import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from hyquant.errors import CalibrationError, ConfigError
from hyquant.kernels import KERNELS
from hyquant.modules.linear import FusedLinear, QuantLinear, quant_linears
from hyquant.numerics.qparams import choose_qparams
from hyquant.schemes import SCHEMES

NUM_STEPS = 4
SEP = 2
LOWS = torch.tensor([[-1.0], [-2.0], [-3.0], [-4.0]])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def group(scheme: str, *, smoothed: bool = False) -> tuple[QuantLinear, ...]:
    """Two members of 6 and 10 rows over 8 inputs."""
    entry = SCHEMES[scheme]
    lo, hi = (LOWS, -LOWS) if entry.is_per_step else (LOWS[0], -LOWS[0])
    qparams = choose_qparams(lo, hi, symmetric=False, deploy_dtype="bfloat16") if entry.needs_range else None
    members = [
        dict(entry.build(normal(rows, 8, seed=rows), normal(rows, seed=1), qparams, "bfloat16")) for rows in (6, 10)
    ]
    if smoothed:
        members = [{**tensors, "mul_scale": torch.linspace(0.5, 2.0, 8)} for tensors in members]
    return quant_linears(members, scheme=scheme, timestep_sep=SEP if entry.is_per_step else 0)


@pytest.mark.parametrize("step_index", range(SEP))
def test_steps_below_timestep_sep_equal_the_dynamic_path_bit_for_bit(step_index):
    (layer, _), (dynamic, _) = group("w8a8_timestep"), group("w8a8_dynamic")
    x = normal(3, 5, 8)

    layer.set_step(step_index)

    assert torch.equal(layer(x), dynamic(x))


@pytest.mark.parametrize("step_index", range(SEP, NUM_STEPS))
def test_later_steps_equal_the_static_path_with_that_steps_range(step_index):
    layer, _ = group("w8a8_timestep")
    qparams = choose_qparams(LOWS[step_index], -LOWS[step_index], symmetric=False, deploy_dtype="bfloat16")
    tensors = SCHEMES["w8a8_static"].build(normal(6, 8, seed=6), normal(6, seed=1), qparams, "bfloat16")
    (static,) = quant_linears([tensors], scheme="w8a8_static")
    x = normal(3, 5, 8)

    layer.set_step(step_index)

    assert torch.equal(layer(x), static(x))


def test_going_back_to_a_dynamic_step_forgets_the_static_one():
    layer, _ = group("w8a8_timestep")
    x = normal(2, 8)
    layer.set_step(0)
    before = layer(x)
    layer.set_step(3)
    static = layer(x)
    layer.set_step(0)

    assert torch.equal(layer(x), before)
    assert not torch.equal(static, before)


def test_a_timestep_layer_refuses_to_run_before_its_clock_is_set():
    layer, _ = group("w8a8_timestep")

    with pytest.raises(CalibrationError, match="clock was never set"):
        layer(normal(2, 8))


def test_a_static_step_beyond_the_table_is_an_error():
    layer, _ = group("w8a8_timestep")

    layer.set_step(0)
    with pytest.raises(CalibrationError, match="step 4 is beyond the 4 rows"):
        layer.set_step(4)

    assert layer.fused.is_static_step is False


@pytest.mark.parametrize("scheme", SCHEMES)
def test_members_share_the_objects_that_describe_their_input(scheme):
    first, second = group(scheme, smoothed=True)

    first.double()
    second.double()

    assert first.fused is second.fused
    assert first.fused.mul_scale is not None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_casting_moves_no_number(scheme):
    layer, _ = group(scheme, smoothed=True)
    before = {name: tensor.clone() for name, tensor in layer.tensors().items()}

    layer.to(torch.bfloat16)

    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.tensors().items())
    assert all(tensor.dtype == before[name].dtype for name, tensor in layer.tensors().items())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_rebuilt_from_their_tensors_compute_the_same_bits(scheme):
    layers = group(scheme, smoothed=True)
    rebuilt = quant_linears([layer.tensors() for layer in layers], scheme=scheme, timestep_sep=SEP)
    x = normal(4, 8)

    for layer, twin in zip(layers, rebuilt, strict=True):
        layer.set_step(3)
        twin.set_step(3)

        assert torch.equal(layer(x), twin(x))


def test_a_step_can_be_set_in_inference_mode():
    layer, _ = group("w8a8_timestep")

    with torch.inference_mode():
        layer.set_step(2)
        layer(normal(2, 8))
    layer.set_step(3)

    assert torch.equal(layer.fused.input_scale, layer.fused.input_scale_table[3])


class Block(nn.Module):
    """Calls every member of a group with one input, as an attention does."""

    def __init__(self, members: tuple[QuantLinear, ...]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([member(x) for member in self.members], dim=-1)


def test_under_compile_a_group_is_one_graph_per_mode_whatever_the_step():
    """Four steps of two modes give two graphs; a step index inside would give four."""
    block = Block(group("w8a8_timestep", smoothed=True))
    counter = CompileCounter()
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    x = normal(2, 5, 8)
    block.members[0].fused.prepare()

    for step_index in range(NUM_STEPS):
        block.members[0].set_step(step_index)
        assert torch.equal(compiled(x), block(x))

    assert counter.frame_count == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [None, "reference"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_under_autocast_the_dtype_is_that_of_a_linear_and_integers_stay_exact(scheme, kernel, dtype):
    """Integer kernels give what they give without, rounded once; the product of weight-only schemes is torch's own."""
    layer, _ = group(scheme)
    layer.set_step(3)
    if kernel is not None:
        layer.fused.use_kernel(KERNELS[kernel])
    x = normal(3, 5, 8).to(dtype)
    plain = layer(x)

    with torch.autocast("cpu", torch.bfloat16):
        expected = nn.Linear(8, 6)(x).dtype
        y = layer(x)

    assert y.dtype == expected == torch.bfloat16
    if not layer.fused.is_weight_only:
        assert torch.equal(y, plain.bfloat16())


def test_under_compile_autocast_is_seen():
    block = Block(group("w8a8_dynamic"))
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    x = normal(2, 5, 8)
    block.members[0].fused.prepare()

    plain = compiled(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)

    assert torch.equal(y, plain.bfloat16())
    assert plain.dtype == compiled(x).dtype == torch.float32


@pytest.mark.parametrize("scheme", SCHEMES)
def test_members_make_one_product_of_one_input(scheme, monkeypatch):
    members = group(scheme)
    members[0].set_step(3)
    fused, products = members[0].fused, []
    monkeypatch.setattr(fused, "forward", lambda x: products.append(x) or FusedLinear.forward(fused, x))
    x = normal(3, 5, 8)

    first, second = (member(x) for member in members)

    assert len(products) == 1
    assert (first.shape, second.shape) == ((3, 5, 6), (3, 5, 10))
    assert fused._pending is None


def test_another_input_or_a_second_question_makes_a_new_product():
    first, second = group("w8a8_dynamic")
    x, other = normal(3, 8), normal(3, 8, seed=1)
    expected = [alone(x) for alone in group("w8a8_dynamic")]

    assert torch.equal(first(other), group("w8a8_dynamic")[0](other))
    assert torch.equal(second(x), expected[1])
    assert torch.equal(second(x), expected[1])
    assert torch.equal(first(x), expected[0])


def test_an_input_that_was_changed_in_place_makes_a_new_product():
    first, second = group("w8a8_dynamic")
    x = normal(3, 8)

    first(x)
    x.mul_(-2)

    assert torch.equal(second(x), group("w8a8_dynamic")[1](x.clone()))


def test_members_that_disagree_about_their_input_are_refused():
    members = [dict(layer.tensors()) for layer in group("w8a8_static")]
    members[1]["input_scale"] = members[1]["input_scale"] * 2

    with pytest.raises(ConfigError, match="share one input_scale"):
        quant_linears(members, scheme="w8a8_static")


def test_an_unknown_scheme_lists_the_known_ones():
    with pytest.raises(ConfigError, match="w8a8_dynamic"):
        quant_linears([{}], scheme="w4a4")
