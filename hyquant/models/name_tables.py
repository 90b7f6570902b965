"""The name tables of HunyuanVideo: original modules and the diffusers modules they consist of, as data.

Sources: Tencent's hyvideo/modules/models.py and diffusers' scripts/convert_hunyuan_video_to_diffusers.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """Modules below a common prefix.

    Attributes:
        original: Prefix in original naming; `{}` is the block index.
        diffusers: Prefix in diffusers naming.
        modules: Original module -> the diffusers modules it consists of, in row order.
    """

    original: str
    diffusers: str
    modules: Mapping[str, tuple[str, ...]]


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")

SECTIONS = (
    Section(
        "double_blocks.{}.",
        "transformer_blocks.{}.",
        {
            "img_mod.linear": ("norm1.linear",),
            "img_attn_qkv": _QKV,
            "img_attn_q_norm": ("attn.norm_q",),
            "img_attn_k_norm": ("attn.norm_k",),
            "img_attn_proj": ("attn.to_out.0",),
            "img_mlp.fc1": ("ff.net.0.proj",),
            "img_mlp.fc2": ("ff.net.2",),
            "txt_mod.linear": ("norm1_context.linear",),
            "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "txt_attn_q_norm": ("attn.norm_added_q",),
            "txt_attn_k_norm": ("attn.norm_added_k",),
            "txt_attn_proj": ("attn.to_add_out",),
            "txt_mlp.fc1": ("ff_context.net.0.proj",),
            "txt_mlp.fc2": ("ff_context.net.2",),
        },
    ),
    Section(
        "single_blocks.{}.",
        "single_transformer_blocks.{}.",
        {
            "modulation.linear": ("norm.linear",),
            "linear1": (*_QKV, "proj_mlp"),
            "q_norm": ("attn.norm_q",),
            "k_norm": ("attn.norm_k",),
            "linear2": ("proj_out",),
        },
    ),
    Section(
        "",
        "",
        {
            "img_in.proj": ("x_embedder.proj",),
            "txt_in.input_embedder": ("context_embedder.proj_in",),
            "txt_in.t_embedder.mlp.0": ("context_embedder.time_text_embed.timestep_embedder.linear_1",),
            "txt_in.t_embedder.mlp.2": ("context_embedder.time_text_embed.timestep_embedder.linear_2",),
            "txt_in.c_embedder.linear_1": ("context_embedder.time_text_embed.text_embedder.linear_1",),
            "txt_in.c_embedder.linear_2": ("context_embedder.time_text_embed.text_embedder.linear_2",),
            "time_in.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
            "time_in.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
            "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
            "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
            "guidance_in.mlp.0": ("time_text_embed.guidance_embedder.linear_1",),
            "guidance_in.mlp.2": ("time_text_embed.guidance_embedder.linear_2",),
        },
    ),
    Section(
        "txt_in.individual_token_refiner.blocks.{}.",
        "context_embedder.token_refiner.refiner_blocks.{}.",
        {
            "norm1": ("norm1",),
            "self_attn_qkv": _QKV,
            "self_attn_proj": ("attn.to_out.0",),
            "norm2": ("norm2",),
            "mlp.fc1": ("ff.net.0.proj",),
            "mlp.fc2": ("ff.net.2",),
            "adaLN_modulation.1": ("norm_out.linear",),
        },
    ),
    Section("", "", {"final_layer.adaLN_modulation.1": ("norm_out.linear",), "final_layer.linear": ("proj_out",)}),
)

HALVES_SWAPPED = frozenset({"final_layer.adaLN_modulation.1"})
"""Original modules whose two halves of output rows are exchanged in diffusers: (shift, scale) <-> (scale, shift)."""
