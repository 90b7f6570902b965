"""One quantization for three layouts: HunyuanVideo in Tencent's modules and in diffusers', and any other module."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from hyquant.calibration.observe import observe
from hyquant.calibration.sequential import observe_sequential
from hyquant.clock import StepClock
from hyquant.compiling import _contiguous_inputs, blocks_of
from hyquant.config import M4, M6, LayerSelection, QuantConfig, W8A8Dynamic, W8A8Static, W8A8Timestep
from hyquant.errors import ConfigError, ExportError, LayerMatchError
from hyquant.export import load_quantized, module_info, save_quantized, verify_export
from hyquant.models.names import layer_groups, to_original
from hyquant.plan import build_plan
from hyquant.quantize import quantize_, quantized_tensors, restore_, structural_twin
from hyquant.smoothing.search import search_scales
from tests.toys.both_layouts import AsDiffusers, recorded
from tests.toys.original_dit import ToySize, euler_loop, random_toy, toy_inputs

SIZE = ToySize()
NUM_STEPS = 6
CONFIGS = {
    "static": (QuantConfig(linear=W8A8Static()), 0.999),
    "timestep": (QuantConfig(linear=W8A8Timestep(timestep_sep=2)), 0.999),
    "dynamic": (QuantConfig(linear=W8A8Dynamic()), 0.9997),
    "m4 static": (QuantConfig(linear=W8A8Static(), smoothing=M4()), 0.9997),
    "m4 folded": (QuantConfig(linear=W8A8Static(), smoothing=M4(placement="fold")), 0.9997),
    "m4 dynamic": (QuantConfig(linear=W8A8Dynamic(), smoothing=M4()), 0.9997),
}


class Mixed(nn.Module):
    """Linears with names of their own, one that only lends its weight, an integer buffer, nested arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 16)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
        self.head = nn.Linear(16, 8, bias=False)
        self.register_buffer("order", torch.arange(4))

    def forward(self, x: Tensor, pair: tuple[Tensor, list[Tensor]], *, times: int) -> Tensor:
        h = self.stem(x)[:, self.order] * pair[0] + pair[1][0]
        h = h + self.attend(h, h, h, need_weights=False)[0]
        for _ in range(times):
            for layer in self.layers:
                h = h + layer(h)
        return self.head(h)


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def inputs():
    return toy_inputs(SIZE, seed=10)


@pytest.fixture(scope="module")
def original(inputs):
    """The toy in the original layout with its clock, records, statistics and float result."""
    toy = random_toy(0, SIZE)
    loop = partial(euler_loop, toy, num_steps=NUM_STEPS)
    clock, records, result = recorded(toy, loop, inputs, num_steps=NUM_STEPS)
    return toy, clock, records, observe(toy, layer_groups(toy), records, clock), result


@pytest.fixture(scope="module")
def diffusers(original, inputs):
    """The diffusers class with the same weights, as `original`."""
    outer = AsDiffusers(original[0])
    loop = partial(euler_loop, outer, num_steps=NUM_STEPS)
    clock, records, result = recorded(outer.denoiser, loop, inputs, num_steps=NUM_STEPS)
    stats = observe(outer.denoiser, layer_groups(outer.denoiser), records, clock)
    return outer.denoiser, clock, records, stats, result


@pytest.fixture(scope="module")
def mixed():
    """A module that is no HunyuanVideo, with its clock, records, statistics and float result."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Mixed().eval().requires_grad_(False)
        x, a, b = torch.randn(1, 4, 8), torch.randn(1, 4, 16), torch.randn(1, 4, 16)
    loop = lambda x: [module(x * (step + 1), (a, [b]), times=2) for step in range(3)]  # noqa: E731
    clock, records, result = recorded(module, loop, x, num_steps=3)
    return module, clock, records, observe(module, layer_groups(module), records, clock), torch.cat(result), loop, x


@pytest.fixture(params=["original", "diffusers", "mixed"])
def any_layout(request):
    """Each layout in float: denoiser, clock, records, statistics, float result."""
    found = request.getfixturevalue(request.param)
    yield found[:5]
    restore_(found[0])


CASTS = ("time_in.mlp.0", "guidance_in.mlp.0", "txt_in.t_embedder.mlp.0")
"""Linears whose input the original code casts to the dtype of their weight; they cannot be quantized."""


def everything(denoiser: nn.Module, linear) -> QuantConfig:
    """Quantize every Linear that can be."""
    is_original = any(group.name in CASTS for group in layer_groups(denoiser))
    return QuantConfig(linear=linear, layers=LayerSelection(include=("*",), exclude=CASTS if is_original else ()))


@pytest.mark.parametrize(
    ("text_lengths", "num_text"), [((5,), 5), ((1,), 4), ((5, 3), 9)], ids=["whole text", "padded", "padded batch"]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_toy_computes_what_the_diffusers_class_computes_with_converted_weights(seed, text_lengths, num_text):
    """Toy and conversion prove each other: a wrong row order, half or name in either is an error of order 1."""
    toy = random_toy(seed, SIZE)
    inputs = toy_inputs(SIZE, seed=seed, text_lengths=text_lengths, num_text=num_text)

    ours, theirs = (denoiser(**inputs)["x"] for denoiser in (toy, AsDiffusers(toy)))

    assert relative_l2(ours, theirs) < 1e-5  # float32 sums in another order; 3e-7 seen
    assert theirs.std() > 0.1


def test_the_toy_has_exactly_the_original_tensors():
    toy = random_toy(0, SIZE)

    converted = to_original(AsDiffusers(toy).denoiser.state_dict())

    assert converted.keys() == toy.state_dict().keys()
    assert all(torch.equal(converted[key], tensor) for key, tensor in toy.state_dict().items())


def test_both_layouts_of_one_model_have_the_same_groups(original, diffusers):
    ours, theirs = layer_groups(original[0]), layer_groups(diffusers[0])

    assert [group.name for group in ours] == [group.name for group in theirs]
    assert all(group.modules == (group.name,) for group in ours)
    assert [group.out_features for group in ours] == [(sum(group.out_features),) for group in theirs]
    assert ours[1].name == "double_blocks.0.img_attn_qkv"
    assert {group.name for group in ours} == {
        name for name, module in original[0].named_modules() if isinstance(module, nn.Linear)
    }


def test_any_other_module_keeps_its_names(mixed):
    groups = layer_groups(mixed[0])

    assert [group.name for group in groups] == ["stem", "layers.0.0", "layers.0.2", "layers.1.0", "layers.1.2", "head"]
    assert all(group.modules == (group.name,) for group in groups)


def test_a_module_that_only_shares_block_names_keeps_its_own():
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer_blocks = nn.ModuleList(
                [nn.ModuleDict({"norm1": nn.ModuleDict({"linear": nn.Linear(4, 4)})})]
            )
            self.proj_out = nn.Linear(4, 4)

    assert [group.name for group in layer_groups(Other())] == ["transformer_blocks.0.norm1.linear", "proj_out"]


def test_a_module_without_linears_is_refused():
    with pytest.raises(LayerMatchError, match="must have Linears below it, but Conv3d has none"):
        layer_groups(nn.Conv3d(1, 1, 1))


@pytest.mark.parametrize(("config", "lowest"), CONFIGS.values(), ids=CONFIGS)
def test_a_quantized_original_model_renders_what_float_renders(original, inputs, config, lowest):
    """End to end over the loop, so that errors of early steps move the inputs of later ones."""
    toy, clock, _, stats, expected = original
    plan = build_plan(layer_groups(toy), config, num_steps=NUM_STEPS)
    try:
        quantize_(toy, plan, stats, clock)
        actual = euler_loop(toy, inputs, num_steps=NUM_STEPS)
    finally:
        restore_(toy)

    cosine = F.cosine_similarity(actual.flatten().double(), expected.flatten().double(), dim=0).item()
    assert lowest <= cosine < 1.0
    assert torch.equal(euler_loop(toy, inputs, num_steps=NUM_STEPS), expected)


@pytest.mark.parametrize(("config", "lowest"), CONFIGS.values(), ids=CONFIGS)
def test_both_layouts_get_the_same_integers_and_write_the_same_export(original, diffusers, tmp_path, config, lowest):
    """From the same statistics; those of each layout's own records differ in the last bits of float32 (see below)."""
    written, stats = {}, original[3]
    for name, (denoiser, clock, *_) in {"ours": original, "theirs": diffusers}.items():
        plan = build_plan(layer_groups(denoiser), config, num_steps=NUM_STEPS)
        info = module_info(denoiser, source="toy")
        try:
            quantize_(denoiser, plan, stats, clock)
            save_quantized(denoiser, plan, tmp_path / name, model=info)
        finally:
            restore_(denoiser)
        (path,) = (tmp_path / name).glob("*.safetensors")
        written[name] = load_file(path)
    ours, theirs = written["ours"], written["theirs"]

    assert ours.keys() == theirs.keys()
    assert ours["double_blocks.0.img_mlp.fc2.weight"].dtype == torch.int8
    assert [key for key, tensor in ours.items() if not tensor.equal(theirs[key])] == []


def test_both_layouts_see_the_same_activations_in_their_own_records(original, diffusers):
    """So the same integers come of them, but for a value in millions that lies on the border of two codes."""
    ours, theirs = original[3], diffusers[3]

    assert list(ours) == list(theirs)
    for name, group in ours.items():
        assert group.calls.tolist() == [1] * NUM_STEPS
        size = torch.maximum(group.lo.abs(), group.hi.abs()).amax().item()
        torch.testing.assert_close(group.lo, theirs[name].lo, rtol=0, atol=1e-5 * size)
        torch.testing.assert_close(group.hi, theirs[name].hi, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("linear", [W8A8Static(), W8A8Timestep(timestep_sep=1), W8A8Dynamic()], ids=lambda c: c.kind)
def test_an_export_of_any_layout_loads_as_it_was_saved_and_verifies(any_layout, tmp_path, linear):
    denoiser, clock, records, stats, _ = any_layout
    plan = build_plan(layer_groups(denoiser), everything(denoiser, linear), num_steps=records[-1].step_index + 1)
    info = module_info(denoiser, source="weights of this test")
    quantize_(denoiser, plan, stats, clock)
    expected = {path: dict(tensors) for path, tensors in quantized_tensors(denoiser).items()}
    save_quantized(denoiser, plan, tmp_path / "export", model=info)
    restore_(denoiser)

    report = verify_export(tmp_path / "export", denoiser=denoiser, records=records)
    loaded = load_quantized(denoiser, tmp_path / "export", clock)
    actual = quantized_tensors(denoiser)

    assert report.problems == ()
    assert {check.step_index for check in report.forward} == {
        0,
        *(() if linear.kind != "w8a8_timestep" else (1,)),
        plan.num_steps - 1,
    }
    assert all(0.99 < check.cosine < 1 for check in report.forward)
    assert loaded == plan
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[path][kind], tensor) for path in expected for kind, tensor in expected[path].items())


def test_smoothing_scales_are_searched_in_both_layouts_alike(original, diffusers):
    """Positional calls with nested arguments are replayed for the search too."""
    config, found = QuantConfig(linear=W8A8Dynamic(), smoothing=M6()), []
    for denoiser, clock, records, stats, _ in (original, diffusers):
        plan = build_plan(layer_groups(denoiser), config, num_steps=NUM_STEPS)
        found.append(search_scales(denoiser, plan, stats, records, clock))
    ours, theirs = found

    assert list(ours) == list(theirs)
    assert len(ours) == 10  # 4 in each double block, 1 in each single block
    # Where two neighbours of the grid are as good as each other, rounding decides: a tenth of a scale apart.
    is_tied = {name: not torch.allclose(scale, theirs[name], rtol=1e-4, atol=0) for name, scale in ours.items()}
    assert sum(is_tied.values()) <= 1
    for name, scale in ours.items():
        torch.testing.assert_close(scale, theirs[name], rtol=0.1, atol=0)


def test_sequential_calibration_follows_the_original_blocks(original, inputs):
    toy, clock, records, stats, expected = original
    config = QuantConfig(linear=W8A8Static(), calibration="sequential")
    plan = build_plan(layer_groups(toy), config, num_steps=NUM_STEPS)

    found = observe_sequential(toy, plan, records, clock)
    quantize_(toy, plan, found.stats, clock)
    actual = euler_loop(toy, inputs, num_steps=NUM_STEPS)
    restore_(toy)

    first, last = "double_blocks.0.img_attn_qkv", "single_blocks.1.linear2"
    assert torch.equal(found.stats[first].hi, stats[first].hi)  # nothing before the first block is quantized
    assert not torch.equal(found.stats[last].hi, stats[last].hi)
    assert 0.999 <= F.cosine_similarity(actual.flatten(), expected.flatten(), dim=0).item() < 1


def test_an_export_does_not_load_into_other_weights(original, tmp_path):
    toy, clock, records, stats, _ = original
    plan = build_plan(layer_groups(toy), everything(toy, W8A8Dynamic()), num_steps=NUM_STEPS)
    info = module_info(toy, source="seed 0")
    quantize_(toy, plan, stats, clock)
    save_quantized(toy, plan, tmp_path / "export", model=info)
    restore_(toy)

    other = random_toy(1, SIZE)
    with pytest.raises(ExportError, match="was made from module seed 0"):
        load_quantized(other, tmp_path / "export", StepClock())
    report = verify_export(tmp_path / "export", denoiser=other, records=records)
    assert [problem for problem in report.problems if "was made from module seed 0" in problem]
    late = [record for record in records if record.step_index == 2]
    assert "no record is of them" in verify_export(tmp_path / "export", denoiser=toy, records=late).problems[0]


def test_only_diffusers_models_are_written_in_diffusers_names(original, tmp_path):
    toy, clock, _, stats, _ = original
    plan = build_plan(layer_groups(toy), everything(toy, W8A8Dynamic()), num_steps=NUM_STEPS)
    info = module_info(toy, source="toy")
    quantize_(toy, plan, stats, clock)
    try:
        with pytest.raises(ExportError, match="this denoiser has others; use layout original"):
            save_quantized(toy, plan, tmp_path / "export", model=info, layout="diffusers")
    finally:
        restore_(toy)


def test_a_quantized_twin_of_any_layout_computes_the_same_and_leaves_the_other_alone(any_layout):
    denoiser, clock, records, stats, _ = any_layout
    plan = build_plan(
        layer_groups(denoiser), everything(denoiser, W8A8Timestep(timestep_sep=1)), num_steps=records[-1].step_index + 1
    )
    quantize_(denoiser, plan, stats, clock)
    record, twin_clock = records[-1], StepClock()
    clock.set(record.step_index)

    twin = structural_twin(denoiser, twin_clock)
    twin_clock.set(record.step_index)
    ours, theirs = (_tensor(each.forward(*record.args, **record.inputs)) for each in (denoiser, twin))
    restore_(twin)
    again = _tensor(denoiser.forward(*record.args, **record.inputs))

    assert torch.equal(ours, theirs)
    assert torch.equal(ours, again)


def test_a_layer_whose_input_is_cast_to_its_weight_says_so(original, inputs):
    """Cast to int8, a sine is 0: without the check the model would run on and know no timestep."""
    toy, clock, _, stats, _ = original
    config = QuantConfig(linear=W8A8Dynamic(), layers=LayerSelection(include=CASTS))
    quantize_(toy, build_plan(layer_groups(toy), config, num_steps=NUM_STEPS), stats, clock)
    try:
        with pytest.raises(ConfigError, match=r"must be float, but is torch\.int8.*exclude the layer"):
            euler_loop(toy, inputs, num_steps=NUM_STEPS)
    finally:
        restore_(toy)


def test_blocks_get_contiguous_tensors_in_nested_arguments_too(original):
    toy = original[0]
    x = torch.randn(3, 4).T

    (args, kwargs) = _contiguous_inputs(toy, (x, 7, (x, [x, None])), {"freqs": (x, {"cos": x})})

    assert len(list(blocks_of(toy))) == SIZE.num_layers + SIZE.num_single_layers
    assert args[1] == 7
    assert args[2][1][1] is None
    tensors = (args[0], args[2][0], args[2][1][0], kwargs["freqs"][0], kwargs["freqs"][1]["cos"])
    assert all(tensor.is_contiguous() and torch.equal(tensor, x) for tensor in tensors)


def _tensor(output) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output["x"] if "x" in output else output["sample"]


def test_a_quantized_module_is_not_described_as_the_float_one(original):
    toy, clock, _, stats, _ = original
    plan = build_plan(layer_groups(toy), QuantConfig(linear=W8A8Static()), num_steps=NUM_STEPS)
    quantize_(toy, plan, stats, clock)
    try:
        with pytest.raises(ExportError, match="describe it before"):
            module_info(toy, source="toy")
    finally:
        restore_(toy)
