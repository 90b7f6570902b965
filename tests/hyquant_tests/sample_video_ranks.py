"""Commands on two ranks, and what a shared model gives, as JSON: run by `test_sample_video_on_ranks.py`.

Everything heavy is imported once; ranks are forks, so that many commands take seconds. The first argument is a JSON
list of [name, words]; a name of "exact" runs no command but compares a shared model with itself alone.
"""

import io
import json
import logging
import multiprocessing
import os
import sys
from contextlib import redirect_stderr, redirect_stdout

import torch

from hyquant.devices import resolve_device
from hyquant.distributed import init_group
from hyquant.models.hunyuan_video import load_pipeline  # noqa: F401  (loaded before there are ranks)
from hyquant.models.sampling import draw_noise
from hyquant.sample_video import main
from hyquant.video.flags import parse
from hyquant.video.loading import load_video_model
from hyquant.video.ranks import Run
from tests.hyquant_tests.parallel_ranks import EVEN, ODD, call, error, inputs_of, watching
from tests.toys.ports import free_port

NUM_RANKS = 2


class Lines(logging.Handler):
    """Keeps what the decoder says."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def command(words):
    """What one rank printed and returned."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as left:
            code = left.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


@torch.no_grad()
def exact(words):
    """Relative errors of a model that the command's own code shares among ranks, against itself alone."""
    arguments = parse(words)
    group = init_group(resolve_device("cpu"), timeout_s=60)
    run = Run(arguments, group)
    model = load_video_model(arguments, num_ranks=group.world_size)
    cases = {"full": inputs_of(EVEN, [16]), "padded": inputs_of(ODD, [16, 5])}
    alone = {name: call(model.denoiser, inputs) for name, inputs in cases.items()}
    latents = draw_noise([0], (8, 3, 6, 6))
    decoded = model.vae.decode(latents).sample
    said = Lines()
    logging.getLogger("hyquant.parallel.decode").addHandler(said)
    logging.getLogger("hyquant.parallel.decode").setLevel(logging.INFO)
    seen = []
    with run.shared(model), watching(model.denoiser, seen):
        found = {name: error(call(model.denoiser, inputs), alone[name]) for name, inputs in cases.items()}
        found["decoded"] = error(model.vae.decode(latents).sample, decoded)
    found["decode says"] = said.lines
    found["num_tokens"] = [num_tokens for num_tokens, _ in seen]
    found["undone"] = torch.equal(call(model.denoiser, cases["padded"]), alone["padded"])
    group.close()
    return found


def rank_of(name, words, rank, port, queue):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    queue.put((rank, exact(words) if name.startswith("exact") else command(words)))


def on_ranks(name, words):
    port = free_port()
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    ranks = [fork.Process(target=rank_of, args=(name, words, rank, port, queue)) for rank in range(NUM_RANKS)]
    for process in ranks:
        process.start()
    try:
        found = dict(queue.get(timeout=60) for _ in ranks)
    finally:
        for process in ranks:
            process.join(timeout=5)
            process.kill()
    return [found[rank] for rank in range(NUM_RANKS)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: on_ranks(name, words) for name, words in json.loads(sys.argv[1])}))
