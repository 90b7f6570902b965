"""What several ranks find out about themselves, as JSON: run by `test_parallel.py`, in a process of its own.

Everything heavy is imported and loaded once; ranks are forks of that, so the many combinations take seconds. Each case
compares with what the same process computed alone before, and reports the worst relative error over all ranks.
Attention on int8 is simulated on both sides, as it is wherever it spans ranks.
"""

import json
import multiprocessing
import os
import sys
from contextlib import contextmanager
from hashlib import sha256
from queue import Empty

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import distributed as dist

from hyquant.calibration.calibrate import calibrate, quantize_calibrated_
from hyquant.config import FA3Fp8, FA3Int8, QuantConfig, W8A8Dynamic, W8A8Static, W8A8Timestep
from hyquant.devices import resolve_device
from hyquant.distributed import init_group
from hyquant.errors import ConfigError
from hyquant.kernels.selection import FORCED
from hyquant.models import load_model
from hyquant.models.attentions import attention_blocks
from hyquant.models.base import RenderSettings
from hyquant.models.sampling import draw_noise
from hyquant.parallel import parallelize_, parallelize_vae_, unparallelize_, unparallelize_vae_
from hyquant.plan import build_plan
from hyquant.quantize import quantize_, restore_, structural_twin
from tests.toys.ports import free_port

os.environ[FORCED] = "reference"

PROMPTS = ["a cyan circle moving right on a white background", "a green cross standing still on a gray background"]
SETTINGS = RenderSettings(height=32, width=48, num_frames=9, num_steps=3)
CONFIGS = {
    "static": QuantConfig(linear=W8A8Static()),
    "dynamic": QuantConfig(linear=W8A8Dynamic()),
    "timestep": QuantConfig(linear=W8A8Timestep(timestep_sep=1)),
    "fa3_int8": QuantConfig(linear=None, attention=FA3Int8()),
    "dynamic and fa3_int8": QuantConfig(linear=W8A8Dynamic(), attention=FA3Int8()),
}
FP8 = QuantConfig(linear=None, attention=FA3Fp8())
EVEN, ODD, FEW = (2, 8, 12), (3, 6, 10), (1, 2, 2)
"""Latent frames, height and width: 48 tokens, 45, and fewer than there are ranks."""


def inputs_of(size, lengths, dtype=torch.float32):
    """A denoiser call on noise, with text of 16 tokens of which each sample has its own number of real ones."""
    mask = torch.arange(16) < torch.tensor(lengths)[:, None]
    drawn = {
        "hidden_states": draw_noise(range(len(lengths)), (8, *size)),
        "encoder_hidden_states": draw_noise(range(10, 10 + len(lengths)), (16, 128)),
        "encoder_attention_mask": mask,
        "pooled_projections": draw_noise(range(20, 20 + len(lengths)), (96,)),
        "guidance": torch.full((len(lengths),), 6000.0),
        "timestep": torch.full((len(lengths),), 500.0),
    }
    return {name: tensor.to(dtype) for name, tensor in drawn.items()}


@torch.no_grad()
def call(denoiser, inputs):
    (out,) = denoiser(**inputs, return_dict=False)
    return out


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@contextmanager
def parallel(denoiser, ulysses, ring, group):
    parallelize_(denoiser, ulysses=ulysses, ring=ring, group=group)
    try:
        yield
    finally:
        unparallelize_(denoiser)


def fingerprint(tensor):
    return sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@contextmanager
def watching(denoiser, seen):
    """Note what enters and leaves the last block: the strip's number of tokens, and the text."""

    def note(block, args, outputs):
        seen.append([args[0].shape[1], fingerprint(outputs[1])])

    handle = denoiser.single_transformer_blocks[-1].register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


def refusal(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except ConfigError as raised:
        return str(raised)
    return "nothing was refused"


class Prepared:
    """What is the same for all ranks, made before there are any."""

    def __init__(self):
        self.model = load_model("hunyuan_video", "mini", device="cpu")
        self.denoiser = self.model.denoiser
        records = []
        self.model.capture(PROMPTS[:1], [0], SETTINGS, records.append)
        self.model.clock.set(1)
        blocks = attention_blocks(self.denoiser)
        self.plans = {
            name: build_plan(self.model.groups(), config, num_steps=SETTINGS.num_steps, attentions=blocks)
            for name, config in {**CONFIGS, "fp8": FP8}.items()
        }
        self.calibrated = {
            name: calibrate(self.denoiser, self.plans[name], records, self.model.clock) for name in CONFIGS
        }

    def quantize(self, name):
        quantize_calibrated_(self.denoiser, self.plans[name], self.calibrated[name], self.model.clock)


def float_cases(prepared, ulysses, ring, group):
    """What single calls gave, by kind of input."""
    denoiser, found = prepared.denoiser, {}
    cases = {
        "full": inputs_of(EVEN, [16, 16]),
        "padded": inputs_of(EVEN, [16, 5]),
        "padded, odd number of tokens": inputs_of(ODD, [5, 16]),
        "fewer tokens than ranks": inputs_of(FEW, [3, 4]),
    }
    alone = {name: call(denoiser, inputs) for name, inputs in cases.items()}
    for name, inputs in cases.items():
        seen = []
        with parallel(denoiser, ulysses, ring, group), watching(denoiser, seen):
            together = call(denoiser, inputs)
        ((num_tokens, text),) = seen
        found[name] = {
            "error": error(together, alone[name]),
            "num_tokens": num_tokens,
            "text": text,
            "output": fingerprint(together),
        }
    return found


def two_ranks(prepared, ulysses, ring, group):
    """Everything about one way to use two ranks."""
    model, denoiser = prepared.model, prepared.denoiser
    found = {"calls": float_cases(prepared, ulysses, ring, group)}

    processors = [block.attn.processor for block in denoiser.transformer_blocks]
    inputs = inputs_of(ODD, [16, 5])
    expected = call(denoiser, inputs)
    alone = model.render(PROMPTS, [0, 1], SETTINGS)
    with parallel(denoiser, ulysses, ring, group):
        together = model.render(PROMPTS, [0, 1], SETTINGS)
        found["again"] = refusal(parallelize_, denoiser, ulysses=ulysses, ring=ring, group=group)
        found["twin"] = refusal(structural_twin, denoiser)
        found["fp8 after"] = refusal(quantize_, denoiser, prepared.plans["fp8"], {}, model.clock)
        found["still exact"] = error(call(denoiser, inputs), expected)
    found["rendered"] = max(error(a, b) for a, b in zip(together, alone, strict=True))
    found["undone"] = torch.equal(call(denoiser, inputs), expected) and processors == [
        block.attn.processor for block in denoiser.transformer_blocks
    ]
    quantize_(denoiser, prepared.plans["fp8"], {}, model.clock)
    found["fp8 before"] = refusal(parallelize_, denoiser, ulysses=ulysses, ring=ring, group=group)
    restore_(denoiser)
    return found


def quantized(prepared, ulysses, ring, group):
    """Relative errors of quantized denoisers, in double precision, so that no rounding to integers falls otherwise."""
    denoiser, found = prepared.denoiser, {}
    denoiser.double()
    inputs = inputs_of(ODD, [16, 5], torch.float64)
    expected_float = call(denoiser, inputs)
    for name in CONFIGS:
        prepared.quantize(name)
        expected = call(denoiser, inputs)
        with parallel(denoiser, ulysses, ring, group):
            found[name] = error(call(denoiser, inputs), expected)
            restore_(denoiser)
            found[f"{name}, restored"] = error(call(denoiser, inputs), expected_float)
            prepared.quantize(name)
            found[f"{name}, after"] = error(call(denoiser, inputs), expected)
        found[f"{name}, undone"] = error(call(denoiser, inputs), expected)
        found[f"{name} differs from float"] = error(expected, expected_float)
        restore_(denoiser)
    denoiser.float()
    return found


@torch.no_grad()
def decoders(prepared, group):
    """Whether shared decoders give what they give alone, bit by bit."""
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=True,
    ).eval()
    latents, codec = torch.randn(2, 4, 6, 5, 4), prepared.model.vae
    sizes = {
        "tile_sample_min_height": 24,
        "tile_sample_min_width": 24,
        "tile_sample_stride_height": 16,
        "tile_sample_stride_width": 16,
    }
    settings = {
        "frames": lambda: None,
        "frames and space": lambda: vae.enable_tiling(**sizes),
        "slices too": vae.enable_slicing,
        "space alone": lambda: setattr(vae, "use_framewise_decoding", False),
        "one piece": vae.disable_tiling,
    }
    found = {}
    for name, apply in settings.items():
        apply()
        alone = vae.decode(latents).sample
        parallelize_vae_(vae, group)
        found[name] = torch.equal(vae.decode(latents).sample, alone)
        unparallelize_vae_(vae)
    parallelize_vae_(vae, group)
    found["as a tuple"] = torch.equal(vae.decode(latents, return_dict=False)[0], alone)
    whole = codec.decode(draw_noise([0], (8, 3, 6, 5))).sample
    parallelize_vae_(codec, group)
    found["codec"] = torch.allclose(codec.decode(draw_noise([0], (8, 3, 6, 5))).sample, whole, rtol=0, atol=1e-6)
    found["again"] = refusal(parallelize_vae_, codec, group)
    unparallelize_vae_(codec)
    found["undone"] = torch.equal(codec.decode(draw_noise([0], (8, 3, 6, 5))).sample, whole)
    return found


def rank_of_two(prepared, group):
    return {
        "ulysses": two_ranks(prepared, 2, 1, group),
        "ring": two_ranks(prepared, 1, 2, group),
        "quantized ulysses": quantized(prepared, 2, 1, group),
        "quantized ring": quantized(prepared, 1, 2, group),
        "decoders": decoders(prepared, group),
        "disagreeing": refusal(
            parallelize_, prepared.denoiser, ulysses=1 + group.rank, ring=2 - group.rank, group=group
        ),
    }


def rank_of_four(prepared, group):
    return {
        f"{ulysses}x{ring}": float_cases(prepared, ulysses, ring, group) for ulysses, ring in ((2, 2), (4, 1), (1, 4))
    }


def run_rank(prepared, work, rank, num_ranks, port, queue):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group = init_group(resolve_device("cpu"), timeout_s=60)
    queue.put(work(prepared, group))
    group.close()


def run(prepared, work, num_ranks):
    port = free_port()
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    ranks = [
        fork.Process(target=run_rank, args=(prepared, work, rank, num_ranks, port, queue)) for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    found = []
    while len(found) < num_ranks:
        try:
            found.append(queue.get(timeout=0.2))
        except Empty:
            if any(process.exitcode not in (None, 0) for process in ranks):
                sys.exit("a rank failed")
    for process in ranks:
        process.join()
    return found


def main():
    torch.set_num_threads(1)
    assert not dist.is_initialized()
    prepared = Prepared()
    print(json.dumps({"two": run(prepared, rank_of_two, 2), "four": run(prepared, rank_of_four, 4)}))


if __name__ == "__main__":
    main()
