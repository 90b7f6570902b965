"""Attention on an NPU without one: what diffusers' back end hands to the operator fits its schema and its rules."""

import pytest
import torch
from diffusers.models import attention_dispatch

from hyquant.errors import ConfigError
from hyquant.models import load_model
from hyquant.models.base import RenderSettings
from hyquant.models.npu_attention import attend_by_npu_operator_, require_within_window
from tests.reference.npu_schemas import bound

SETTINGS = RenderSettings(height=32, width=32, num_frames=5, num_steps=2, batch_size=2)
SHORT, LONG = "a red circle", "a red circle moving left on a black background"


class Operator:
    """npu_fusion_attention as documented, for BSND and without dropout; keeps the masks it got."""

    def __init__(self):
        self.masks = []

    def __call__(self, *args, **kwargs):
        call = bound("npu_fusion_attention", args, kwargs)
        q, k, v = (call[name].transpose(1, 2).float() for name in ("query", "key", "value"))
        batch, heads, num_queries, _ = q.shape
        assert call["input_layout"] == "BSND"
        assert call["head_num"] == heads
        assert (call["keep_prob"], call["sparse_mode"], call["pse"]) == (1.0, 0, None)
        hidden = call["atten_mask"]
        scores = q @ k.transpose(2, 3) * call["scale"]
        if hidden is not None:
            assert hidden.dtype == torch.bool
            assert hidden.shape in [(batch, count, num_queries, k.shape[2]) for count in (1, heads)]
            distance = torch.arange(k.shape[2]) - torch.arange(num_queries)[:, None]
            outside = (distance > call["next_tockens"]) | (-distance > call["pre_tockens"])
            scores = scores.masked_fill(hidden | outside, -torch.inf)
        self.masks.append(hidden)
        out = (scores.softmax(dim=-1) @ v).transpose(1, 2).to(call["query"].dtype)
        return out, None, None, None, 0, 0, 0


@pytest.fixture(scope="module")
def model():
    return load_model("hunyuan_video", "mini", device="cpu")


@pytest.mark.parametrize(
    ("prompts", "has_mask"), [((LONG, LONG), False), ((SHORT, LONG), True)], ids=["unpadded", "padded"]
)
def test_videos_are_those_of_torchs_attention(model, prompts, has_mask, monkeypatch):
    for module in model.denoiser.modules():
        if hasattr(getattr(module, "processor", None), "_attention_backend"):
            monkeypatch.setattr(module.processor, "_attention_backend", None)
    expected = model.render(prompts, [0, 1], SETTINGS)
    operator = Operator()
    monkeypatch.setattr(attention_dispatch, "npu_fusion_attention", operator)

    attend_by_npu_operator_(model.denoiser)
    videos = model.render(prompts, [0, 1], SETTINGS)

    config = model.denoiser.config
    assert len(operator.masks) == SETTINGS.num_steps * (config.num_layers + config.num_single_layers)
    assert {mask is not None for mask in operator.masks} == {has_mask}
    for video, other in zip(videos, expected, strict=True):
        assert torch.allclose(video, other, atol=1e-4)  # float32 sums in another order


def test_a_long_clip_with_padded_prompts_is_refused():
    mask = torch.tensor([[1, 1], [1, 0]])

    require_within_window(65534, mask)
    require_within_window(65535, torch.ones(2, 2))
    with pytest.raises(ConfigError, match=r"at most 65536 tokens far, but the clip has 65537; set batch_size to 1"):
        require_within_window(65535, mask)
