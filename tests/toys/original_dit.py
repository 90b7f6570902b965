"""A toy HunyuanVideo in Tencent's own layout: its module names, its positional block calls, its dictionary as output.

Written from the published description of the model (Kong et al., arXiv:2412.03603) and from its table of layer names;
it stands in for the original code, which the tests must not need. As there, blocks call the attention of this module
with tokens of all samples in one row and cumulative lengths that cut it: each sample's video and real text attend to
each other, and so does its padding.

    B batch   S tokens   I video tokens of them   C channels   A heads   D head dim   T, H, W grid of video tokens
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ToySize:
    """Sizes of a toy, named as diffusers names them where they shape `HunyuanVideoTransformer3DModel`."""

    in_channels: int = 4
    num_attention_heads: int = 2
    attention_head_dim: int = 32
    num_layers: int = 2
    num_single_layers: int = 2
    num_refiner_layers: int = 2
    patch_size: int = 2
    text_embed_dim: int = 24
    pooled_projection_dim: int = 16
    rope_axes_dim: tuple[int, int, int] = (8, 12, 12)

    @property
    def channels(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attend within the segments that int32 cumulative lengths cut [B, S, A, D] into, or by a mask; [B, S, A * D]."""
    if cu_seqlens_q is None:
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
        return out.transpose(1, 2).flatten(2)
    assert cu_seqlens_kv is not None
    rows = [x.flatten(0, 1).transpose(0, 1) for x in (q, k, v)]
    segments = [
        F.scaled_dot_product_attention(rows[0][:, i:j], rows[1][:, m:n], rows[2][:, m:n])
        for (i, j), (m, n) in zip(
            itertools.pairwise(cu_seqlens_q.tolist()), itertools.pairwise(cu_seqlens_kv.tolist()), strict=True
        )
        if j > i
    ]
    return torch.cat(segments, dim=1).transpose(0, 1).reshape(*q.shape[:2], -1)


def cumulative_lengths(text_mask: Tensor, num_video_tokens: int) -> Tensor:
    """Return int32 [2 B + 1]: where each sample's video and real text end, and where its padding ends."""
    total = text_mask.shape[1] + num_video_tokens
    ends = [0]
    for index, length in enumerate(text_mask.sum(dim=1).tolist()):
        ends += [index * total + num_video_tokens + int(length), (index + 1) * total]
    return torch.tensor(ends, dtype=torch.int32, device=text_mask.device)


def rotary_tables(grid: tuple[int, int, int], dims: tuple[int, int, int], theta: float = 256.0) -> Rotary:
    """Return cos and sin [T * H * W, D] of the rotation of every pair of channels, axes t, h, w one after another."""
    positions = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in grid), indexing="ij")
    angles = [
        torch.outer(position.flatten(), theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        for position, dim in zip(positions, dims, strict=True)
    ]
    whole = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)
    return whole.cos(), whole.sin()


def rotate(x: Tensor, freqs: Rotary) -> Tensor:
    """Rotate neighbouring channels of [B, S, A, D] as complex numbers."""
    cos, sin = (table[None, :, None] for table in freqs)
    even, odd = x[..., ::2], x[..., 1::2]
    return x * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class MLP(nn.Module):
    def __init__(self, size: int, act: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, 4 * size)
        self.act = act
        self.fc2 = nn.Linear(4 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Modulation(nn.Module):
    """`num` vectors per sample: shifts, scales and gates."""

    def __init__(self, size: int, num: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, num * size)
        self.num = num

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return tuple(part[:, None] for part in self.linear(F.silu(vec)).chunk(self.num, dim=-1))


class TimestepEmbedder(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, t: Tensor) -> Tensor:
        # The cast is the original's own: it makes a quantized first Linear see int8.
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.mlp[0].weight.dtype))


class TextProjection(nn.Module):
    def __init__(self, in_size: int, size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_size, size)
        self.linear_2 = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class MLPEmbedder(nn.Module):
    def __init__(self, in_size: int, size: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_size, size)
        self.out_layer = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


def normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Return q, k, v [B, S, A, D] of [B, S, 3 C]."""
    return tuple(part.unflatten(-1, (num_heads, -1)) for part in qkv.chunk(3, dim=-1))


class RefinerBlock(nn.Module):
    def __init__(self, size: ToySize) -> None:
        super().__init__()
        self.num_heads = size.num_attention_heads
        self.norm1 = nn.LayerNorm(size.channels, eps=1e-6)
        self.self_attn_qkv = nn.Linear(size.channels, 3 * size.channels)
        self.self_attn_proj = nn.Linear(size.channels, size.channels)
        self.norm2 = nn.LayerNorm(size.channels, eps=1e-6)
        self.mlp = MLP(size.channels, nn.SiLU())
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size.channels, 2 * size.channels))

    def forward(self, x: Tensor, c: Tensor, mask: Tensor) -> Tensor:
        gate_attn, gate_mlp = (gate[:, None] for gate in self.adaLN_modulation(c).chunk(2, dim=-1))
        q, k, v = split_heads(self.self_attn_qkv(self.norm1(x)), self.num_heads)
        x = x + gate_attn * self.self_attn_proj(attention(q, k, v, mask=mask))
        return x + gate_mlp * self.mlp(self.norm2(x))


class TokenRefiner(nn.Module):
    def __init__(self, size: ToySize) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(size.text_embed_dim, size.channels)
        self.t_embedder = TimestepEmbedder(size.channels)
        self.c_embedder = TextProjection(size.text_embed_dim, size.channels)
        self.individual_token_refiner = nn.Module()
        self.individual_token_refiner.blocks = nn.ModuleList(RefinerBlock(size) for _ in range(size.num_refiner_layers))

    def forward(self, x: Tensor, t: Tensor, text_mask: Tensor) -> Tensor:
        weight = text_mask[..., None].float()
        mean = ((x * weight).sum(dim=1) / weight.sum(dim=1)).to(x.dtype)
        c = self.t_embedder(t) + self.c_embedder(mean)
        real = text_mask.bool()
        mask = real[:, None, :, None] & real[:, None, None, :]
        mask[..., 0] = True  # a padded row must see something
        x = self.input_embedder(x)
        for block in self.individual_token_refiner.blocks:
            x = block(x, c, mask)
        return x


class DoubleBlock(nn.Module):
    def __init__(self, size: ToySize) -> None:
        super().__init__()
        self.num_heads = size.num_attention_heads
        for stream in ("img", "txt"):
            setattr(self, f"{stream}_mod", Modulation(size.channels, 6))
            setattr(self, f"{stream}_attn_qkv", nn.Linear(size.channels, 3 * size.channels))
            setattr(self, f"{stream}_attn_q_norm", RMSNorm(size.attention_head_dim))
            setattr(self, f"{stream}_attn_k_norm", RMSNorm(size.attention_head_dim))
            setattr(self, f"{stream}_attn_proj", nn.Linear(size.channels, size.channels))
            setattr(self, f"{stream}_mlp", MLP(size.channels, nn.GELU(approximate="tanh")))

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        freqs_cis: Rotary,
    ) -> tuple[Tensor, Tensor]:
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)
        img_q, img_k, img_v = split_heads(
            self.img_attn_qkv(normed(img) * (1 + img_scale1) + img_shift1), self.num_heads
        )
        txt_q, txt_k, txt_v = split_heads(
            self.txt_attn_qkv(normed(txt) * (1 + txt_scale1) + txt_shift1), self.num_heads
        )
        img_q, img_k = rotate(self.img_attn_q_norm(img_q), freqs_cis), rotate(self.img_attn_k_norm(img_k), freqs_cis)
        txt_q, txt_k = self.txt_attn_q_norm(txt_q), self.txt_attn_k_norm(txt_k)
        attn = attention(
            torch.cat((img_q, txt_q), dim=1),
            torch.cat((img_k, txt_k), dim=1),
            torch.cat((img_v, txt_v), dim=1),
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_kv=cu_seqlens_kv,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_kv=max_seqlen_kv,
        )
        img_attn, txt_attn = attn[:, : img.shape[1]], attn[:, img.shape[1] :]
        img = img + img_gate1 * self.img_attn_proj(img_attn)
        img = img + img_gate2 * self.img_mlp(normed(img) * (1 + img_scale2) + img_shift2)
        txt = txt + txt_gate1 * self.txt_attn_proj(txt_attn)
        txt = txt + txt_gate2 * self.txt_mlp(normed(txt) * (1 + txt_scale2) + txt_shift2)
        return img, txt


class SingleBlock(nn.Module):
    def __init__(self, size: ToySize) -> None:
        super().__init__()
        self.num_heads = size.num_attention_heads
        self.channels = size.channels
        self.modulation = Modulation(size.channels, 3)
        self.linear1 = nn.Linear(size.channels, 7 * size.channels)
        self.linear2 = nn.Linear(5 * size.channels, size.channels)
        self.q_norm = RMSNorm(size.attention_head_dim)
        self.k_norm = RMSNorm(size.attention_head_dim)

    def forward(
        self,
        x: Tensor,
        vec: Tensor,
        txt_len: int,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        freqs_cis: Rotary,
    ) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(normed(x) * (1 + scale) + shift).split((3 * self.channels, 4 * self.channels), dim=-1)
        q, k, v = split_heads(qkv, self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = (torch.cat((rotate(y[:, :-txt_len], freqs_cis), y[:, -txt_len:]), dim=1) for y in (q, k))
        attn = attention(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_kv=cu_seqlens_kv,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_kv=max_seqlen_kv,
        )
        return x + gate * self.linear2(torch.cat((attn, F.gelu(mlp, approximate="tanh")), dim=-1))


class FinalLayer(nn.Module):
    def __init__(self, size: ToySize) -> None:
        super().__init__()
        self.linear = nn.Linear(size.channels, size.patch_size**2 * size.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size.channels, 2 * size.channels))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = (part[:, None] for part in self.adaLN_modulation(vec).chunk(2, dim=-1))
        return self.linear(normed(x) * (1 + scale) + shift)


class ToyOriginalDiT(nn.Module):
    """HunyuanVideo's denoiser by its original names; see the module's docstring."""

    def __init__(self, size: ToySize) -> None:
        super().__init__()
        self.size = size
        self.img_in = nn.Module()
        self.img_in.proj = nn.Conv3d(
            size.in_channels,
            size.channels,
            kernel_size=(1, size.patch_size, size.patch_size),
            stride=(1, size.patch_size, size.patch_size),
        )
        self.txt_in = TokenRefiner(size)
        self.time_in = TimestepEmbedder(size.channels)
        self.vector_in = MLPEmbedder(size.pooled_projection_dim, size.channels)
        self.guidance_in = TimestepEmbedder(size.channels)
        self.double_blocks = nn.ModuleList(DoubleBlock(size) for _ in range(size.num_layers))
        self.single_blocks = nn.ModuleList(SingleBlock(size) for _ in range(size.num_single_layers))
        self.final_layer = FinalLayer(size)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text_states: Tensor,
        text_mask: Tensor,
        text_states_2: Tensor,
        freqs_cos: Tensor,
        freqs_sin: Tensor,
        guidance: Tensor | None = None,
        return_dict: bool = True,
    ) -> dict[str, Tensor] | Tensor:
        vec = self.time_in(t) + self.vector_in(text_states_2) + self.guidance_in(guidance)
        patches = self.img_in.proj(x)
        img, txt = patches.flatten(2).transpose(1, 2), self.txt_in(text_states, t, text_mask)
        num_img, num_txt = img.shape[1], txt.shape[1]
        cu_seqlens, total = cumulative_lengths(text_mask, num_img), num_img + num_txt
        freqs = (freqs_cos, freqs_sin)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, cu_seqlens, cu_seqlens, total, total, freqs)
        both = torch.cat((img, txt), dim=1)
        for block in self.single_blocks:
            both = block(both, vec, num_txt, cu_seqlens, cu_seqlens, total, total, freqs)
        rows = self.final_layer(both[:, :num_img], vec)
        size = self.size
        parts = rows.unflatten(1, patches.shape[2:]).unflatten(-1, (size.in_channels, size.patch_size, size.patch_size))
        video = parts.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)  # B T H W C p q -> B C T (H p) (W q)
        return {"x": video} if return_dict else video


def random_toy(seed: int, size: ToySize | None = None) -> ToyOriginalDiT:
    """Build a toy with weights drawn from `seed`, all of them representable in bfloat16.

    Linears keep the variance of what passes through them. Modulation amplifies two channels in front of the Linears it
    feeds, and those take it back, so that activations have the outlier channels that trained transformers are known
    for; as modulation comes from the timestep, they also move with it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        toy = ToyOriginalDiT(size or ToySize())
        for name, parameter in toy.named_parameters():
            if name.endswith("weight") and parameter.dim() > 1:
                parameter.data *= 3**0.5  # torch draws with variance 1 / (3 fan_in)
            if "_norm" in name or ".norm" in name:
                parameter.data += 0.2 * torch.randn_like(parameter)
    for block in toy.double_blocks:
        for mod, qkv, mlp in (
            (block.img_mod, block.img_attn_qkv, block.img_mlp),
            (block.txt_mod, block.txt_attn_qkv, block.txt_mlp),
        ):
            amplify_(mod, qkv, first=0)
            amplify_(mod, mlp.fc1, first=3)
    for block in toy.single_blocks:
        amplify_(block.modulation, block.linear1, first=0)
    for parameter in toy.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return toy.eval().requires_grad_(False)


def amplify_(modulation: Modulation, reader: nn.Linear, *, first: int, channels: tuple[int, ...] = (3, 17)) -> None:
    """Multiply channels of what a Linear reads, in its modulation (shift at chunk `first`, scale after it).

    n (1 + scale) + shift becomes g (n (1 + scale) + shift), and the reader's columns become 1 / g of what they were.
    """
    gain, size = 16.0, reader.in_features
    for chunk in (first, first + 1):
        rows = [chunk * size + channel for channel in channels]
        modulation.linear.weight.data[rows] *= gain
        modulation.linear.bias.data[rows] *= gain
    modulation.linear.bias.data[rows] += gain - 1
    reader.weight.data[:, list(channels)] /= gain


def toy_inputs(
    size: ToySize,
    *,
    seed: int,
    text_lengths: tuple[int, ...] = (5,),
    num_text: int = 5,
    grid: tuple[int, ...] = (2, 4, 4),
) -> dict[str, Tensor]:
    """Return keyword inputs of the toy, one sample per text length, all of them representable in bfloat16.

    Args:
        size: Of the toy.
        seed: Of latents and text.
        text_lengths: Real text tokens of each sample.
        num_text: Text tokens with padding, which is noise, as a text encoder leaves it.
        grid: Video tokens along time, height and width.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, (frames, height, width) = len(text_lengths), grid

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).bfloat16().float()

    cos, sin = rotary_tables((frames, height, width), size.rope_axes_dim)
    return {
        "x": noise(size.in_channels, frames, height * size.patch_size, width * size.patch_size),
        "t": torch.full((batch,), 1000.0),
        "text_states": noise(num_text, size.text_embed_dim),
        "text_mask": (torch.arange(num_text) < torch.tensor(text_lengths)[:, None]).long(),
        "text_states_2": noise(size.pooled_projection_dim),
        "freqs_cos": cos,
        "freqs_sin": sin,
        "guidance": torch.full((batch,), 6016.0),
    }


@torch.no_grad()
def euler_loop(toy: nn.Module, inputs: dict[str, Tensor], *, num_steps: int = 6, shift: float = 7.0) -> Tensor:
    """Follow the toy's velocity from noise to latents with a schedule of its own, as the original pipeline does."""
    line = torch.linspace(1.0, 0.0, num_steps + 1)
    sigmas = shift * line / (1 + (shift - 1) * line)
    x = inputs["x"]
    rest = {name: value for name, value in inputs.items() if name not in ("x", "t")}
    for sigma, following in itertools.pairwise(sigmas.tolist()):
        t = torch.full((x.shape[0],), 1000 * sigma)
        x = x + (following - sigma) * toy(x, t, **rest)["x"]
    return x
