"""Attention of whole denoisers: intercepted in both layouts, observed, quantized, compiled, restored."""

import types
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from hyquant.attention.fp8 import Fp8Attention, fp8_tensors
from hyquant.attention.int8 import PARTS, Int8Attention
from hyquant.attention.observe import observe_attention
from hyquant.attention.stats import HeadStats
from hyquant.clock import StepClock
from hyquant.compiling import can_compile, compile_blocks_
from hyquant.config import FA3Fp8, FA3Int8, QuantConfig, W8A8Dynamic
from hyquant.errors import CalibrationError, ConfigError, LayerMatchError
from hyquant.kernels.selection import FORCED
from hyquant.kernels.x86_attention import attends_natively
from hyquant.latency import LatencyBench
from hyquant.models.attentions import (
    AttentionBlock,
    attention_blocks,
    hook_attention_,
    hook_attentions_,
    hooked,
    put_back_attentions_,
    replace_attentions_,
    unhook_attention_,
)
from hyquant.models.base import DeploymentShape, Record, RenderSettings
from hyquant.models.tiny import TinyVideoModel
from hyquant.modules.swap import attention_kinds, swapped
from hyquant.plan import build_plan
from hyquant.quantize import attention_tensors, needs_attention_stats, quantize_, restore_, structural_twin
from hyquant.targets import attention_problem
from tests.reference.int8_attention import attention_on_codes

NUM_STEPS = 2
SETTINGS = RenderSettings(height=32, width=32, num_frames=5, num_steps=NUM_STEPS)
INT8 = FA3Int8()
BLOCKS = ["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"]


def identity(q, k, v, valid):
    return q, k, v


@pytest.fixture(scope="module")
def loaded():
    model = TinyVideoModel(3)
    records = []
    model.capture(["a red square", "two"], [0, 1], SETTINGS, records.append)
    blocks = attention_blocks(model.denoiser)
    return model, records, observe_attention(model.denoiser, blocks, records, model.clock, INT8)


@pytest.fixture
def model(loaded):
    yield loaded[0]
    restore_(loaded[0].denoiser)


@pytest.fixture
def simulated(monkeypatch):
    """No attention has a kernel where one of a Linear is forced that has none for it."""
    monkeypatch.setenv(FORCED, "reference")


needs_native = pytest.mark.skipif(not attends_natively(torch.device("cpu"), 64), reason="no kernel for int8 attention")


@pytest.fixture
def graphs(monkeypatch):
    """Blocks are traced and guarded as ever, but their graphs, which are counted, run as they are: that is quick."""
    counter = CompileCounter()
    monkeypatch.setattr("hyquant.compiling.torch.compile", partial(torch.compile, backend=counter, fullgraph=True))
    return counter


def plan_of(model, attention, *, linear=None, num_steps=NUM_STEPS, **kwargs):
    config = QuantConfig(linear=linear, attention=attention, **kwargs)
    blocks = attention_blocks(model.denoiser)
    return build_plan(model.groups(), config, num_steps=num_steps, attentions=blocks)


def padded_inputs(model):
    """Two prompts of which one is padded."""
    latents = torch.randn(2, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    return model._inputs(latents, 500.0, model.embed(["one", "six words that are some more"]), guidance_scale=6.0)


@torch.no_grad()
def call(denoiser, inputs):
    return denoiser(**inputs, return_dict=False)[0]


def test_the_blocks_of_a_denoiser_have_their_original_names(model):
    assert [block.name for block in attention_blocks(model.denoiser)] == BLOCKS
    assert attention_blocks(model.denoiser)[2] == AttentionBlock(
        "single_blocks.0", "single_transformer_blocks.0", 2, 16
    )
    assert attention_blocks(nn.Sequential(nn.Linear(2, 2))) == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hook_that_changes_nothing_leaves_the_output_bit_by_bit(dtype):
    model = TinyVideoModel(3, dtype=dtype)
    inputs = padded_inputs(model)
    expected = call(model.denoiser, inputs)

    with hooked(model.denoiser, {block.module: identity for block in attention_blocks(model.denoiser)}):
        found = call(model.denoiser, inputs)

    assert torch.equal(found, expected)


def test_a_hook_sees_what_diffusers_attends_over(model, monkeypatch):
    """The attention of torch itself is watched as the independent witness."""
    seen, attended = [], []
    attend = F.scaled_dot_product_attention

    def watch(query, key, value, attn_mask=None, **kwargs):
        attended.append((query, key, value, attn_mask))
        return attend(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    hooks = {
        block.module: lambda q, k, v, valid: seen.append((q, k, v, valid)) or (q, k, v)
        for block in attention_blocks(model.denoiser)
    }
    with hooked(model.denoiser, hooks):
        call(model.denoiser, padded_inputs(model))

    assert len(seen) == 4
    for (q, k, v, valid), (query, key, value, mask) in zip(seen, attended[-4:], strict=True):
        for given, used in ((q, query), (k, key), (v, value)):
            assert torch.equal(given.transpose(1, 2), used)
        assert valid.sum(dim=1).tolist() == [33, 38]
        assert torch.equal(valid, mask[:, 0, 0])


def test_hooks_come_and_go_without_a_trace(model):
    processors = [module.processor for module in model.denoiser.modules() if hasattr(module, "processor")]
    keys = list(model.denoiser.state_dict())

    with hooked(model.denoiser, {"transformer_blocks.0": identity}):
        with pytest.raises(ConfigError, match=r"transformer_blocks\.0 must have one hook at most"):
            hook_attention_(model.denoiser, "transformer_blocks.0", identity)
        assert list(model.denoiser.state_dict()) == keys

    assert [m.processor for m in model.denoiser.modules() if hasattr(m, "processor")] == processors
    unhook_attention_(model.denoiser, "transformer_blocks.0")


def test_of_hooks_that_do_not_all_fit_none_is_left(model):
    block = model.denoiser.transformer_blocks[0]
    before = block.attn.processor

    with pytest.raises(LayerMatchError, match=r"block transformer_blocks\.9 must be one of the denoiser"):
        hook_attentions_(model.denoiser, {"transformer_blocks.0": identity, "transformer_blocks.9": identity})

    assert block.attn.processor is before


def test_a_processor_of_another_kind_is_refused(model):
    attention = model.denoiser.transformer_blocks[0].attn
    own = attention.processor
    attention.processor = object()
    try:
        with pytest.raises(ConfigError, match="HunyuanVideoAttnProcessor2_0 to be intercepted, but has object"):
            hook_attention_(model.denoiser, "transformer_blocks.0", identity)
    finally:
        attention.processor = own
    with hooked(model.denoiser, {"transformer_blocks.0": identity}):
        assert attention.processor is not own


def test_padded_text_does_not_enter_the_statistics(model):
    """A batch with padding has the extremes of its prompts alone."""
    inputs = padded_inputs(model)
    alone = []
    for index, length in ((0, 1), (1, 6)):
        one = {name: value[index : index + 1] for name, value in inputs.items()}
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            one[name] = one[name][:, :length]
        alone.append(Record(0, index, one))
    # Padded rows of text are not zeros once they pass the context embedder's biases.
    inputs["encoder_hidden_states"][0, 1:] = 50.0
    absmax, blocks = FA3Int8(statistic="absmax"), attention_blocks(model.denoiser)[:1]

    together = observe_attention(model.denoiser, blocks, [Record(0, 0, inputs)], model.clock, absmax)
    apart = observe_attention(model.denoiser, blocks, alone, model.clock, absmax)

    torch.testing.assert_close(together["double_blocks.0"].lo, apart["double_blocks.0"].lo, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together["double_blocks.0"].hi, apart["double_blocks.0"].hi, rtol=1e-5, atol=1e-6)


def test_observing_needs_records_and_finite_values(model, loaded):
    blocks, (record, *_) = attention_blocks(model.denoiser), loaded[1]
    with pytest.raises(CalibrationError, match="must have records, but got none"):
        observe_attention(model.denoiser, blocks, [], model.clock, INT8)
    broken = {**record.inputs, "hidden_states": torch.full_like(record.inputs["hidden_states"], torch.nan)}
    with pytest.raises(CalibrationError, match=r"finite, but q of double_blocks\.0 is not in heads \[0, 1\]"):
        observe_attention(model.denoiser, blocks, [Record(0, 0, broken)], model.clock, INT8)

    assert type(model.denoiser.transformer_blocks[0].attn.processor).__name__ == "HunyuanVideoAttnProcessor2_0"


@pytest.mark.usefixtures("simulated")
def test_simulated_int8_attention_equals_a_reference_that_quantizes_what_torch_attends_over(model, loaded, monkeypatch):
    _, records, stats = loaded
    plan = plan_of(model, INT8)
    scales = {
        part: torch.maximum(stats["double_blocks.0"].lo[row].abs(), stats["double_blocks.0"].hi[row].abs())
        for row, part in enumerate("qkv")
    }
    attend = F.scaled_dot_product_attention
    calls = []

    def quantized(query, key, value, attn_mask=None, **kwargs):
        calls.append(query.shape)
        if len(calls) == 2:  # after the token refiner's, the first block's
            query, key, value = (
                (x / (s := (scales[part] / 127).bfloat16().float()[:, None, None])).round().clamp(-128, 127) * s
                for part, x in zip("qkv", (query, key, value), strict=True)
            )
        return attend(query, key, value, attn_mask=attn_mask, **kwargs)

    only_first = plan.model_copy(update={"attentions": plan.attentions[:1]})
    quantize_(model.denoiser, only_first, {}, model.clock, attention_stats=stats)
    found = call(model.denoiser, records[0].inputs)
    restore_(model.denoiser)
    plain = call(model.denoiser, records[0].inputs)
    monkeypatch.setattr(F, "scaled_dot_product_attention", quantized)
    expected = call(model.denoiser, records[0].inputs)

    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (found - plain).abs().max() > 1e-4


@pytest.mark.parametrize("attention", [INT8, FA3Fp8(), FA3Fp8(rotate=False)], ids=["int8", "fp8", "fp8 unrotated"])
@pytest.mark.parametrize("linear", [None, W8A8Dynamic()], ids=["attention alone", "with linears"])
def test_quantized_attention_is_near_float_and_restored_exactly(model, loaded, attention, linear):
    _, records, stats = loaded
    plain = call(model.denoiser, records[0].inputs)
    plan = plan_of(model, attention, linear=linear)

    report = quantize_(model.denoiser, plan, {}, model.clock, attention_stats=stats)
    quantized = call(model.denoiser, records[0].inputs)
    again = call(structural_twin(model.denoiser, StepClock()), records[0].inputs)
    restore_(model.denoiser)

    kind = "native" if attention is INT8 and attends_natively(torch.device("cpu"), 64) else "simulated"
    assert [(block.name, block.kernel_kind) for block in report.attentions] == [(name, kind) for name in BLOCKS]
    assert bool(report.layers) is (linear is not None)
    assert 1e-4 < (quantized - plain).norm() / plain.norm() < 0.1
    assert torch.equal(again, quantized)
    assert torch.equal(call(model.denoiser, records[0].inputs), plain)


def test_a_report_says_how_far_int8_reaches(model, loaded):
    _, _, stats = loaded

    report = quantize_(model.denoiser, plan_of(model, INT8), {}, model.clock, attention_stats=stats)

    bounds = stats["double_blocks.0"]
    widest = [max(-bounds.lo[row].min().item(), bounds.hi[row].max().item()) for row in range(3)]
    assert report.attentions[0].act_absmax == pytest.approx(widest, rel=2**-8)
    assert report.attentions[0].scheme == "fa3_int8"


def test_restoring_a_twin_leaves_the_quantized_denoiser(model, loaded):
    _, records, stats = loaded
    quantize_(model.denoiser, plan_of(model, INT8), {}, model.clock, attention_stats=stats)
    quantized = call(model.denoiser, records[0].inputs)

    twin = structural_twin(model.denoiser, StepClock())
    stored = attention_tensors(twin)["transformer_blocks.0"]["fa_q.scale"]
    restore_(twin)

    assert stored is attention_tensors(model.denoiser)["transformer_blocks.0"]["fa_q.scale"]
    assert torch.equal(call(model.denoiser, records[0].inputs), quantized)
    assert not torch.equal(call(twin, records[0].inputs), quantized)


@pytest.mark.parametrize("attention", [INT8, FA3Fp8()], ids=["int8", "float8"])
def test_a_quantized_denoiser_can_be_moved_and_restored(loaded, attention):
    """To the meta device, which every machine has; it refuses operands of another device as others do."""
    moved = TinyVideoModel(3)
    plan, (block, *_) = plan_of(moved, attention, linear=W8A8Dynamic()), attention_blocks(moved.denoiser)
    quantize_(moved.denoiser, plan, {}, moved.clock, attention_stats=loaded[2])

    moved.denoiser.to("meta")
    q = torch.empty(1, 8, block.heads, block.head_dim, device="meta")
    outputs = [block.attn.processor._attended(q, q, q, None) for block in moved.denoiser.transformer_blocks]

    assert {(out.device.type, out.shape) for out in outputs} == {("meta", q.shape)}
    assert set(attention_kinds(moved.denoiser).values()) == {"simulated"}
    restore_(moved.denoiser)
    assert {parameter.device.type for parameter in moved.denoiser.parameters()} == {"meta"}


def test_int8_without_statistics_is_an_error_that_says_what_to_do(model):
    plan = plan_of(model, INT8)
    few = {"double_blocks.0": HeadStats(torch.zeros(3, 7), torch.ones(3, 7), torch.ones(1, dtype=torch.int64))}

    with pytest.raises(CalibrationError, match=r"int8 attention of double_blocks\.0 must have statistics"):
        quantize_(model.denoiser, plan, {}, model.clock)
    with pytest.raises(CalibrationError, match=r"double_blocks\.0 must be of 2 heads, but are of 7"):
        quantize_(model.denoiser, plan, {}, model.clock, attention_stats=few)

    assert needs_attention_stats(plan)
    assert not needs_attention_stats(plan_of(model, FA3Fp8()))
    assert attention_tensors(model.denoiser) == {}


def test_a_plan_says_what_happens_to_every_attention(model):
    plan = plan_of(model, FA3Int8(layers=("*single_blocks.1",)))

    schemes = {block.name: block.scheme for block in plan.attentions}
    assert schemes == {**dict.fromkeys(BLOCKS), "single_blocks.1": "fa3_int8"}
    assert [block.reason for block in plan.attentions[-2:]] == [
        "not included by any pattern",
        "included by '*single_blocks.1'",
    ]
    assert plan.layers[0].reason == "the configuration keeps Linears in float"
    assert plan_of(model, None).attentions[0].reason == "the configuration keeps attention in float"


def test_a_plan_refuses_patterns_without_a_block_and_models_without_blocks(model):
    with pytest.raises(
        LayerMatchError, match=r"attention pattern '\*singel_blocks\*' .* did you mean '\*single_blocks\*'"
    ):
        plan_of(model, FA3Int8(layers=("*singel_blocks*",)))
    with pytest.raises(ConfigError, match="needs blocks that own an attention"):
        build_plan(model.groups(), QuantConfig(linear=None, attention=INT8), num_steps=1)


@pytest.mark.parametrize(
    ("attention", "fitting"),
    [
        (INT8, {"hyquant", "mindie-sd-2.3/910b"}),
        (FA3Fp8(), {"hyquant", "mindie-sd-3.1/950"}),
        (None, {"hyquant", "mindie-sd-2.3/910b", "mindie-sd-3.1/910b", "mindie-sd-3.1/950"}),
    ],
)
def test_targets_that_cannot_run_an_attention_say_so(model, attention, fitting):
    plan = plan_of(model, attention)
    targets = ("hyquant", "mindie-sd-2.3/910b", "mindie-sd-3.1/910b", "mindie-sd-3.1/950")

    assert {target for target in targets if attention_problem(plan, target) is None} == fitting


@pytest.mark.parametrize("attention", [INT8, FA3Fp8()], ids=["int8", "fp8"])
def test_compiled_blocks_of_a_class_share_one_graph_and_give_what_eager_ones_give(model, loaded, attention, graphs):
    quantize_(model.denoiser, plan_of(model, attention), {}, model.clock, attention_stats=loaded[2])
    inputs = padded_inputs(model)
    expected = call(model.denoiser, inputs)
    twin = structural_twin(model.denoiser, StepClock())

    compile_blocks_(twin)

    assert torch.equal(call(twin, inputs), expected)
    assert graphs.frame_count == 2


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler")
def test_the_compiler_knows_what_hooks_compute():
    q, k, v = torch.randn(3, 1, 130, 2, 16, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([[0.03], [0.01]])

    for hook in (
        Int8Attention({f"{part}.scale": scale for part in PARTS}),
        Fp8Attention(fp8_tensors(16, "bfloat16", rotate=True)),
    ):
        for found, expected in zip(torch.compile(hook)(q, k, v, None), hook(q, k, v, None), strict=True):
            # A product summed in another order may fall on the other side of a code's border: one step of float8.
            torch.testing.assert_close(found, expected, rtol=2**-3, atol=1e-5)
            assert (found != expected).float().mean() < 0.02


@needs_native
def test_native_int8_attention_is_that_of_a_reference_on_integers(model, loaded, monkeypatch):
    """What the first block's attention gets is noted, and its output replaced by that of plain torch on integers."""
    _, _, stats = loaded
    plan = plan_of(model, INT8)
    only_first = plan.model_copy(update={"attentions": plan.attentions[:1]})
    quantize_(model.denoiser, only_first, {}, model.clock, attention_stats=stats)
    found = call(model.denoiser, padded_inputs(model))
    hook = swapped(model.denoiser).attentions["transformer_blocks.0"]
    scales = [hook.q_scale[:, 0], hook.k_scale[:, 0], hook.v_scale[:, 0]]

    def on_integers(q, k, v, valid):
        assert valid is not None
        samples = [attention_on_codes(q[i], k[i], v[i], scales, valid[i]) for i in range(len(q))]
        return torch.stack(samples).to(q.dtype)

    monkeypatch.setattr(hook, "attend", on_integers)
    expected = call(model.denoiser, padded_inputs(model))

    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@needs_native
def test_attention_that_spans_ranks_is_simulated(model, loaded):
    quantize_(model.denoiser, plan_of(model, INT8), {}, model.clock, attention_stats=loaded[2])
    assert set(attention_kinds(model.denoiser).values()) == {"native"}
    native = call(model.denoiser, padded_inputs(model))

    replace_attentions_(model.denoiser, lambda q, k, v, valid, own: own(q, k, v, valid))
    replaced = call(model.denoiser, padded_inputs(model))
    assert set(attention_kinds(model.denoiser).values()) == {"simulated"}
    put_back_attentions_(model.denoiser)

    assert 0 < (replaced - native).norm() / native.norm() < 0.02
    assert torch.equal(call(model.denoiser, padded_inputs(model)), native)


@pytest.mark.parametrize(
    ("attention", "forced", "kind"),
    [
        pytest.param(INT8, None, "native", marks=needs_native),
        (INT8, "reference", "simulated"),
        (FA3Fp8(), None, "simulated"),
    ],
)
def test_latency_says_how_attention_ran(model, loaded, monkeypatch, attention, forced, kind):
    if forced is not None:
        monkeypatch.setenv(FORCED, forced)
    plan = plan_of(model, attention)
    quantize_(model.denoiser, plan, {}, model.clock, attention_stats=loaded[2])
    bench = LatencyBench(model, DeploymentShape(height=32, width=32, num_frames=1, num_steps=2), compile=False)

    assert bench.prepare(plan, warmup=1).kind == kind
    restore_(model.denoiser)
    assert bench.prepare(plan_of(model, None), warmup=1).kind == "native"


# The original layout: blocks that call a function `attention` of their own module.


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None = None) -> Tensor:
    """Attend over [B, S, A, D] and return [B, S, A * D]."""
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2).flatten(2)


def parallel_attention(group: object, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None = None) -> Tensor:
    return attention(q, k, v)


class MMSingleStreamBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(32, 96)
        self.linear2 = nn.Linear(32, 32)
        self.q_norm = nn.LayerNorm(16)
        self.hybrid_seq_parallel_attn = None

    def forward(self, x: Tensor, cu_seqlens_q: Tensor | None = None) -> Tensor:
        return x + self.attend(x, cu_seqlens_q)

    def attend(self, x: Tensor, cu_seqlens_q: Tensor | None) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 16)) for part in self.linear1(x).chunk(3, dim=-1))
        if self.hybrid_seq_parallel_attn is None:
            attn = attention(self.q_norm(q), k, v, cu_seqlens_q=cu_seqlens_q)
        else:
            attn = parallel_attention(self.hybrid_seq_parallel_attn, self.q_norm(q), k, v, cu_seqlens_q=cu_seqlens_q)
        return self.linear2(attn)


class OriginalDenoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.single_blocks = nn.ModuleList(MMSingleStreamBlock() for _ in range(2))

    def forward(self, x: Tensor, cu_seqlens_q: Tensor | None = None) -> Tensor:
        for block in self.single_blocks:
            x = block(x, cu_seqlens_q)
        return x


@pytest.fixture
def original():
    with torch.random.fork_rng(devices=[]):
        return OriginalDenoiser().eval().requires_grad_(False)


def quantized_original(original, x, cu=None):
    clock = StepClock()
    config = FA3Int8(layers=("*",))
    blocks = attention_blocks(original)
    inputs = {"x": x} if cu is None else {"x": x, "cu_seqlens_q": cu}
    stats = observe_attention(original, blocks, [Record(0, 0, inputs)], clock, config)
    plan = build_plan([], QuantConfig(linear=None, attention=config), num_steps=1, attentions=blocks)
    quantize_(original, plan, {}, clock, attention_stats=stats)
    return stats


@pytest.mark.parametrize("is_parallel", [False, True])
def test_the_original_layouts_attention_is_intercepted_per_block(original, is_parallel):
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    for block in original.single_blocks:
        block.hybrid_seq_parallel_attn = object() if is_parallel else None
    plain = original(x)

    with hooked(original, {"single_blocks.0": identity}):
        assert torch.equal(original(x), plain)
    with hooked(original, {"single_blocks.1": lambda q, k, v, valid: (q, k, torch.zeros_like(v))}):
        changed = original(x)
    first = original.single_blocks[0](x)

    assert torch.allclose(changed, first + original.single_blocks[1].linear2.bias)
    assert torch.equal(original(x), plain)
    assert attention.__module__ == __name__
    assert [name for block in original.single_blocks for name in vars(block) if name in ("forward", "attend")] == []


def test_the_original_layout_is_quantized_and_restored(original):
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    plain = original(x)

    stats = quantized_original(original, x)
    quantized, twins = original(x), structural_twin(original, StepClock())(x)

    assert stats["single_blocks.0"].lo.shape == (3, 2)
    assert 1e-5 < (quantized - plain).norm() / plain.norm() < 0.05
    assert torch.equal(twins, quantized)
    restore_(original)
    assert torch.equal(original(x), plain)


def test_cumulative_lengths_tell_padding_in_the_original_layout(original):
    """Two samples of 5 tokens: 3 and 5 of them are no padding."""
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    x[0, 3:] *= 100.0
    seen = []

    with hooked(original, {"single_blocks.0": lambda q, k, v, valid: seen.append(valid) or (q, k, v)}):
        original(x, torch.tensor([0, 3, 5, 10, 10]))

    assert seen[0].tolist() == [[True, True, True, False, False], [True] * 5]


def test_compiled_original_blocks_use_their_own_scales(original, graphs):
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    plain = original(x)
    quantized_original(original, x)
    expected = original(x)
    twin = structural_twin(original, StepClock())

    compile_blocks_(twin)

    assert (expected - plain).abs().max() > 1e-3
    assert torch.equal(twin(x), expected)
    assert torch.equal(twin(x), expected)
    assert graphs.frame_count == 2


def test_a_block_without_an_attention_that_is_known_is_refused(original):
    block = original.single_blocks[0]
    block.__class__ = type("Other", (nn.Module,), {"forward": types.FunctionType((lambda self, x: x).__code__, {})})

    with pytest.raises(ConfigError, match=r"call of attention or parallel_attention .* but Other has neither"):
        hook_attention_(original, "single_blocks.0", identity)


def test_q_k_and_v_by_name_are_refused(original, monkeypatch):
    def named(self, x, cu_seqlens_q=None):
        return attention(q=x, k=x, v=x)

    monkeypatch.setattr(MMSingleStreamBlock, "forward", named)

    with (
        hooked(original, {"single_blocks.0": identity}),
        pytest.raises(ConfigError, match="given to attention by position"),
    ):
        original(torch.zeros(1, 2, 32))
