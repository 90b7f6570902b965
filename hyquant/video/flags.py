"""The command line of `hyquant.sample_video`: argv to `Arguments`, and mistakes to one sentence."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

from pydantic import ValidationError

from hyquant.config import ActMethod, Target
from hyquant.video.arguments import AntiMethod, Arguments, Dtype, Quantization, QuantType, Resolution, flag

USAGE_ERROR = 2


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with exit code 2."""
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(USAGE_ERROR)


def build_parser() -> Parser:
    """Return the parser; what a flag's default is when it is not given, `Arguments` says."""
    parser = Parser(
        prog="hyquant.sample_video",
        description="Render videos with HunyuanVideo in Tencent's layout, quantize it, and render with what came out.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )

    def add(group: Any, name: str, help_text: str, **options: Any) -> None:
        group.add_argument(flag(name), dest=name, help=help_text, **options)

    model = parser.add_argument_group("model")
    add(model, "model_base", "folder of everything; other paths are also looked up in it", metavar="DIR")
    add(model, "dit_weight", "weights of the denoiser: a file, or the folder it lies in", metavar="PATH")
    add(model, "vae_path", "folder of the autoencoder", metavar="DIR")
    add(model, "text_encoder_path", "folder of the first text encoder", metavar="DIR")
    add(model, "text_encoder_2_path", "folder of the second text encoder", metavar="DIR")
    add(model, "load_key", "which set of weights of a file that wraps several: module or ema", metavar="KEY")
    add(model, "device", "auto, cpu, cuda or npu", metavar="NAME")
    add(model, "dtype", "dtype of all weights", choices=get_args(Dtype))

    clip = parser.add_argument_group("videos")
    add(
        clip, "model_resolution", "which sizes are allowed, and which folder is looked up", choices=get_args(Resolution)
    )
    add(clip, "video_size", "height and width in pixels, multiples of 16", type=int, nargs=2, metavar=("H", "W"))
    add(clip, "video_length", "number of frames, 1 + a multiple of 4", type=int, metavar="N")
    add(clip, "infer_steps", "number of denoising steps", type=int, metavar="N")
    add(clip, "prompt", "a prompt, or a file with one a line and a mode within 0640", metavar="TEXT")
    add(clip, "neg_prompt", "what the video should not be; with --cfg-scale above 1", metavar="TEXT")
    add(clip, "seed", "seed of the first video of every prompt; drawn if not given", type=int, metavar="N")
    add(clip, "num_videos", "videos per prompt, with seeds that count up", type=int, metavar="N")
    add(clip, "flow_reverse", "sample from time 1 to time 0, as the model needs it", action="store_true")
    add(clip, "flow_shift", "shift of the noise levels", type=float, metavar="X")
    add(clip, "embedded_cfg_scale", "guidance that the model was distilled with", type=float, metavar="X")
    add(clip, "cfg_scale", "classifier-free guidance: two denoiser calls a step above 1", type=float, metavar="X")

    ranks = parser.add_argument_group("ranks")
    add(ranks, "ulysses_degree", "ranks that exchange heads for tokens", type=int, metavar="N")
    add(ranks, "ring_degree", "ranks around which keys and values travel", type=int, metavar="N")
    add(ranks, "vae_parallel", "share the decoding of a video among the ranks", action="store_true")

    out = parser.add_argument_group("output")
    add(out, "save_path", "folder of the videos", metavar="DIR")
    add(out, "do_save_video", "save videos, of the float model and of the quantized one", action="store_true")
    add(out, "overwrite", "replace videos and quantized weights that are there already", action="store_true")

    quant = parser.add_argument_group("quantization")
    add(quant, "do_quant", "quantize; the other flags of this group need it", action="store_true")
    add(quant, "quant_weight_save_folder", "folder of the quantized weights", metavar="DIR")
    add(quant, "quant_dump_calib_folder", "folder of the calibration records", metavar="DIR")
    add(quant, "quant_type", "what to quantize", choices=get_args(QuantType))
    add(quant, "anti_method", "how outliers are suppressed first", choices=get_args(AntiMethod))
    add(quant, "act_method", "how stored activation ranges are found", choices=get_args(ActMethod))
    add(quant, "timestep_sep", "first step with stored ranges; half of the steps if not given", type=int, metavar="N")
    add(quant, "target", "what is meant to execute the weights", choices=get_args(Target))
    return parser


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """Return what a command line asks for; leave with exit code 2 and one sentence if it contradicts itself.

    Args:
        argv: The words after the program's name; None for those of this process.
    """
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    try:
        return _arguments(given)
    except ValidationError as error:
        parser.error("; ".join(_sentence(problem) for problem in error.errors()))
    except ValueError as error:
        parser.error(str(error))


def _arguments(given: dict[str, Any]) -> Arguments:
    quant = {name: given.pop(name) for name in Quantization.model_fields if name in given}
    do_quant = given.pop("do_quant", False)
    if quant and not do_quant:
        raise ValueError(
            f"{flag(next(iter(quant)))} says how to quantize, but --do_quant is not given; add it or leave this out"
        )
    if do_quant:
        given["quantization"] = quant
    return Arguments.model_validate(given)


def _sentence(problem: Any) -> str:
    """Return one problem that pydantic found, in terms of the command line."""
    if "error" in problem.get("ctx", {}):
        return str(problem["ctx"]["error"])
    name = flag(next(str(part) for part in reversed(problem["loc"]) if isinstance(part, str)))
    if problem["type"] == "missing":
        return f"{name} must be given"
    return f"{name}: {problem['msg'].lower()}, but got {problem['input']!r}"
