"""What video models share: noise, batches, padding, guidance, digests."""

import pytest
import torch
from torch import nn

from hyquant.errors import ConfigError
from hyquant.models.embedding import TextEmbedding, pad_together
from hyquant.models.fingerprint import denoiser_digest, denoiser_part, tensors_digest
from hyquant.models.sampling import (
    batches,
    draw_noise,
    guidance_input,
    is_guidance_exact,
    latent_size,
    nearest_exact_guidance,
    round_inputs,
)


def test_noise_belongs_to_its_seed_alone():
    together = draw_noise([1, 2, 3], (4, 2, 3, 3))

    assert together.dtype == torch.float32
    assert torch.equal(together[1:2], draw_noise([2], (4, 2, 3, 3)))
    assert not torch.equal(together[0], together[1])


def test_noise_of_one_seed_is_what_a_pipeline_draws():
    """Diffusers draws torch.randn(1, ...) with the caller's generator."""
    expected = torch.randn(1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(9))

    assert torch.equal(draw_noise([9], (4, 2, 3, 3)), expected)


@pytest.mark.parametrize(
    ("num_frames", "latent_frames"), [(1, 1), (5, 2), (13, 4), (33, 9), (129, 33)], ids=lambda value: str(value)
)
def test_latent_sizes_are_those_of_a_causal_codec(num_frames, latent_frames):
    size = latent_size(720, 1280, num_frames, spatial_ratio=8, temporal_ratio=4)

    assert size == (latent_frames, 90, 160)


def test_batches_keep_order_and_lose_nothing():
    cut = list(batches(["a", "b", "c", "d", "e"], [1, 2, 3, 4, 5], 2))

    assert cut == [(["a", "b"], [1, 2]), (["c", "d"], [3, 4]), (["e"], [5])]
    assert list(batches([], [], 4)) == []


def test_prompts_and_seeds_must_pair_up():
    with pytest.raises(ConfigError, match="2 prompts and 1 seeds"):
        list(batches(["a", "b"], [1], 2))


@pytest.mark.parametrize(
    ("guidance_scale", "dtype", "is_exact"),
    [
        pytest.param(6.0, torch.float32, True, id="float32"),
        pytest.param(6.0, torch.bfloat16, False, id="6000 becomes 6016"),
        pytest.param(8.0, torch.bfloat16, True, id="8000 is 125 * 64"),
        pytest.param(6.0, torch.float16, True, id="float16 has 11 bits, 6000 is 375 * 16"),
    ],
)
def test_guidance_that_a_dtype_rounds_is_known(guidance_scale, dtype, is_exact):
    assert is_guidance_exact(guidance_scale, dtype) is is_exact


def test_bfloat16_guidance_of_6_is_6016():
    """The published rounding of embedded guidance: bfloat16 steps are 32 wide at 6000, so 5984 or 6016."""
    value = guidance_input(6.0, 2, dtype=torch.bfloat16, device=torch.device("cpu"))

    assert value.tolist() in ([6016.0, 6016.0], [5984.0, 5984.0])


def test_text_is_padded_to_the_longest_of_its_batch():
    short = TextEmbedding(tokens=torch.ones(2, 3), pooled=torch.zeros(4))
    long = TextEmbedding(tokens=torch.full((5, 3), 2.0), pooled=torch.ones(4))

    tokens, pooled, mask = pad_together([short, long])

    assert tokens.shape == (2, 5, 3)
    assert tokens[0].sum() == 6
    assert mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert mask.dtype == tokens.dtype
    assert torch.equal(pooled, torch.stack([short.pooled, long.pooled]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_a_digest_sees_every_dtype_and_scalars(dtype):
    tensors = {
        "a": torch.ones(3, dtype=dtype),
        "scalar": torch.tensor(1, dtype=dtype),
        "none": torch.ones(0, dtype=dtype),
    }

    assert len(tensors_digest(tensors, None)) == 16
    assert tensors_digest(tensors, None) == tensors_digest(
        {name: t.clone() for name, t in reversed(tensors.items())}, None
    )


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(({"a": torch.tensor([1.0, 3.0])}, {"heads": 2}), id="value"),
        pytest.param(({"b": torch.tensor([1.0, 2.0])}, {"heads": 2}), id="name"),
        pytest.param(({"a": torch.tensor([[1.0, 2.0]])}, {"heads": 2}), id="shape"),
        pytest.param(({"a": torch.tensor([1.0, 2.0]).double()}, {"heads": 2}), id="dtype"),
        pytest.param(({"a": torch.tensor([1.0, 2.0])}, {"heads": 4}), id="configuration"),
    ],
)
def test_a_digest_changes_with_anything_it_covers(other):
    assert tensors_digest(*other) != tensors_digest({"a": torch.tensor([1.0, 2.0])}, {"heads": 2})


def test_memory_layout_does_not_change_a_digest():
    matrix = torch.arange(6.0).reshape(2, 3)

    assert tensors_digest({"a": matrix.T.contiguous().T}, None) == tensors_digest({"a": matrix}, None)


def test_the_denoisers_digest_is_the_first_half_of_a_fingerprint():
    layer = nn.Linear(2, 2)

    assert denoiser_part(f"{denoiser_digest(layer)}-0123") == denoiser_digest(layer)


@pytest.mark.parametrize(
    ("guidance_scale", "dtype", "expected"),
    [(6.0, torch.bfloat16, 8.0), (5.0, torch.bfloat16, 4.0), (6.0, torch.float16, 6.0), (1.9, torch.bfloat16, 2.0)],
)
def test_the_nearest_exact_guidance_is_exact_and_nothing_nearer_is(guidance_scale, dtype, expected):
    assert nearest_exact_guidance(guidance_scale, dtype) == expected
    assert is_guidance_exact(expected, dtype)
    between = [value for value in torch.linspace(guidance_scale, expected, 99).to(dtype).tolist() if value != expected]
    assert not any(is_guidance_exact(value, dtype) for value in between)


def test_rounded_inputs_are_guidance_and_timestep_alone():
    inputs = {
        "guidance": torch.tensor([6000.0]),
        "timestep": torch.tensor([513.0]),
        "hidden_states": torch.tensor(513.0),
    }

    rounded = round_inputs(inputs)

    assert rounded["guidance"].tolist() == [6016.0]
    assert rounded["timestep"].tolist() == [512.0]
    assert rounded["hidden_states"] is inputs["hidden_states"]
    assert rounded["guidance"].dtype == torch.float32
