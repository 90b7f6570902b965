"""The command line of msModelSlim's HunyuanVideo example: `torchrun --nproc_per_node=N -m hyquant.sample_video ...`.

It renders videos on N ranks, quantizes the denoiser, saves the weights and renders with them.
Flags: `docs/sample_video.md`.
"""

import sys
from collections.abc import Sequence

import torch

from hyquant.devices import resolve_device
from hyquant.distributed import init_group
from hyquant.errors import HyquantError
from hyquant.video.flags import parse
from hyquant.video.run import sample


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 1 after one sentence on stderr; wrong usage exits with 2.

    Args:
        argv: The words after the program's name; None for those of this process.
    """
    arguments = parse(argv)
    try:
        group = init_group(resolve_device(arguments.device))
        try:
            written = sample(arguments, group)
        finally:
            group.close()
    except HyquantError as error:
        print(f"hyquant.sample_video: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        print(
            f"hyquant.sample_video: the run must fit into memory of device {arguments.device}, but it does not "
            f"({reason}); use more ranks, a smaller --video-size or --video-length, or --dtype bfloat16",
            file=sys.stderr,
        )
        return 1
    if group.rank == 0:
        for path in written:
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
