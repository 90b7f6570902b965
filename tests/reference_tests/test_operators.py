"""The numpy operators against hand-worked cases and torch's own dtypes: what judges exports must be right itself."""

import numpy as np
import pytest
import torch

from tests.reference.attentions import Float8Attention
from tests.reference.operators import (
    RefusedByOperator,
    npu_dynamic_block_quant,
    npu_dynamic_quant,
    npu_quant_matmul,
    npu_quantize,
    of_blocks,
    to_e4m3,
)
from tests.reference.typed import Typed, cast


def typed(values, dtype):
    return cast(np.asarray(values, np.float32), dtype)


def random(*shape, scale=1.0):
    return (np.random.default_rng(0).standard_normal(shape) * scale).astype(np.float32)


@pytest.mark.parametrize(("ours", "theirs"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_casts_round_as_torch_does(ours, theirs):
    values = np.concatenate([random(1000), random(1000, scale=1e-6), [0.0, -0.0, 1.00390625, 1.01171875]])
    values = values.astype(np.float32)

    assert np.array_equal(cast(values, ours).values, torch.from_numpy(values).to(theirs).float().numpy())


def test_float8_rounds_as_torch_does():
    values = np.concatenate(
        [random(2000, scale=100), random(2000, scale=0.01), [0.0, 448.0, -448.0, 2.0**-9, 2.0**-10]]
    )
    values = np.clip(values, -448, 448).astype(np.float32)

    assert np.array_equal(to_e4m3(values), torch.from_numpy(values).to(torch.float8_e4m3fn).float().numpy())


def test_quantize_divides_shifts_rounds_to_even_and_saturates():
    x = typed([[0.5, 1.5, -1.25, 500.0, -500.0]], "bfloat16")

    codes = npu_quantize(x, typed([1.0], "bfloat16"), typed([2.0], "bfloat16"))

    assert codes.values.tolist() == [[2, 4, 1, 127, -128]]


def test_dynamic_quantization_gives_every_token_its_own_scale():
    codes, scale = npu_dynamic_quant(typed([[1.0, -2.0], [0.0, 0.0], [0.25, 0.125]], "float16"))

    assert codes.values.tolist() == [[64, -127], [0, 0], [127, 64]]
    assert np.allclose(scale.values, [2 / 127, 0, 0.25 / 127], rtol=1e-7)


def test_an_integer_bias_is_added_before_the_scale_and_a_float_one_after_it():
    x, w = Typed(np.array([[1, 2]], np.int8), "int8"), Typed(np.array([[3, -1], [4, 5]], np.int8), "int8")
    scale = typed([0.5, 0.25], "float32")

    before = npu_quant_matmul(x, w, scale, bias=Typed(np.array([1, -1], np.int32), "int32"), output="bfloat16")
    after = npu_quant_matmul(
        x, w, scale, pertoken_scale=typed([2.0], "float32"), bias=typed([1.0, -1.0], "bfloat16"), output="bfloat16"
    )

    assert before.values.tolist() == [[6.0, 2.0]]  # (3 + 8 + 1) / 2, (-1 + 10 - 1) / 4
    assert after.values.tolist() == [[12.0, 3.5]]  # 11 + 1, 9 / 4 * 2 - 1


def test_float16_products_keep_19_bits_of_the_scale_whether_integer_or_float():
    x, w = Typed(np.array([[1]], np.int8), "int8"), Typed(np.array([[1]], np.int8), "int8")
    scale = np.array([1 + 2.0**-10 - 2.0**-20], np.float32)  # cut to 1; rounded, it would be 1 + 2^-10
    packed = Typed(scale.view(np.uint32).astype(np.int64), "int64")

    for given in (Typed(scale, "float32"), packed):
        assert npu_quant_matmul(x, w, given, output="float16").values.tolist() == [[1.0]]


def test_blocks_have_the_scale_of_their_largest_value():
    x = random(2, 300, 130)
    x[:, 128:256] *= 50

    values, scales = npu_dynamic_block_quant(typed(x, "float16"), row_block=128)
    restored = of_blocks(values, scales, row_block=128)

    assert scales.shape == (2, 3, 2)
    largest = np.abs(cast(x, "float16").values[1, 128:256, 128:]).max()
    assert scales[1, 1, 1] == np.float32(largest) / np.float32(448)
    assert np.abs(values).max() == 448
    # half a step of 3 fraction bits, and the least subnormal step of the block
    assert (np.abs(restored - x) <= np.abs(x) * 2.0**-4 + 2.0**-10 * scales.max() + 1e-3).all()


def test_one_orthogonal_rotation_of_q_and_k_cancels():
    hadamard = np.array([[1.0]])
    for _ in range(5):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    rotation, identity = (typed(matrix, "bfloat16") for matrix in (hadamard / np.sqrt(32), np.eye(32)))
    q, k, v = (typed(random(2, 300, 32) + part, "bfloat16") for part in range(3))

    def answer(rotations):
        tensors = {f"block.{part}_rot": rotation if part in rotations else identity for part in "qk"}
        return Float8Attention(tensors, "block", "bfloat16")(q, k, v).values

    weights = torch.softmax(torch.from_numpy(q.values @ k.values.transpose(0, 2, 1) / np.sqrt(32)), dim=-1)
    expected = weights.numpy() @ v.values
    errors = {names: np.linalg.norm(answer(names) - expected) / np.linalg.norm(expected) for names in ("", "qk", "q")}

    assert errors["qk"] < 0.02
    assert errors[""] < 0.02
    assert errors["q"] > 0.1


INT8 = Typed(np.ones((2, 4), np.int8), "int8")
WEIGHT = Typed(np.ones((4, 3), np.int8), "int8")
VECTOR = np.ones(3, np.float32)
OUTSIDE_OF_THE_TABLE = {
    "float32 activations": lambda: npu_dynamic_quant(typed(np.ones((2, 2)), "float32")),
    "one dimension": lambda: npu_dynamic_quant(typed(np.ones(2), "bfloat16")),
    "2-D scales": lambda: npu_quantize(
        typed(np.ones((2, 4)), "bfloat16"), typed(np.ones((1, 4)), "bfloat16"), typed([0], "bfloat16")
    ),
    "float32 scales of bfloat16": lambda: npu_quantize(
        typed(np.ones((2, 4)), "bfloat16"), typed([1], "float32"), typed([0], "bfloat16")
    ),
    "a bfloat16 offset of float16": lambda: npu_quantize(
        typed(np.ones((2, 4)), "float16"), typed([1], "float32"), typed([0], "bfloat16")
    ),
    "int64 scale of bfloat16": lambda: npu_quant_matmul(INT8, WEIGHT, cast(VECTOR, "int64"), output="bfloat16"),
    "float bias of float16": lambda: npu_quant_matmul(
        INT8, WEIGHT, cast(VECTOR, "float32"), bias=cast(VECTOR, "float16"), output="float16"
    ),
    "a scale of another length": lambda: npu_quant_matmul(INT8, WEIGHT, typed(np.ones(4), "float32"), output="float16"),
    "a 2-D scale": lambda: npu_quant_matmul(INT8, WEIGHT, typed(np.ones((3, 1)), "float32"), output="bfloat16"),
    "float weights": lambda: npu_quant_matmul(
        INT8, typed(np.ones((4, 3)), "float32"), typed(VECTOR, "float32"), output="float16"
    ),
    "sums beyond int32": lambda: npu_quant_matmul(
        INT8, WEIGHT, typed(VECTOR, "float32"), bias=Typed(np.full(3, 2**31 - 1, np.int32), "int32"), output="float16"
    ),
}


@pytest.mark.parametrize("name", OUTSIDE_OF_THE_TABLE)
def test_calls_outside_of_the_documented_table_are_refused(name):
    with pytest.raises(RefusedByOperator):
        OUTSIDE_OF_THE_TABLE[name]()
