"""What the ranks of a run know together, and how they work on one video."""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from pydantic import JsonValue

from hyquant.distributed import Group, run_together
from hyquant.errors import ConfigError
from hyquant.models.hunyuan_video import HunyuanVideo
from hyquant.parallel import parallelize_, parallelize_vae_, unparallelize_, unparallelize_vae_
from hyquant.video.arguments import Arguments
from hyquant.video.prompts import Job, jobs_of, read_prompts


class Run:
    """What all stages know: `arguments`, the `settings` of clip and sampling that they mean, and the `group` of ranks.

    Raises:
        ConfigError: If the degrees do not fit the number of ranks.
    """

    def __init__(self, arguments: Arguments, group: Group) -> None:
        ulysses, ring = arguments.ulysses_degree, arguments.ring_degree
        if ulysses * ring != group.world_size:
            raise ConfigError(
                f"--ulysses-degree times --ring-degree must be the number of ranks, but {ulysses} x {ring} is not "
                f"{group.world_size}; start torchrun with --nproc_per_node={ulysses * ring}, or give other degrees"
            )
        self.arguments = arguments
        self.settings = arguments.settings()
        self.group = group
        self._started_s = time.perf_counter()

    def say(self, stage: str, **facts: object) -> None:
        """Print what a stage came to, with the seconds since the last one; rank 0 speaks for all."""
        now_s = time.perf_counter()
        if self.group.rank == 0:
            words = [stage, *(f"{name}={value}" for name, value in facts.items())]
            print(*words, f"seconds={now_s - self._started_s:.1f}", flush=True)
        self._started_s = now_s

    def on_rank_0(self, work: Callable[[], object]) -> None:
        """Do something on rank 0 while the others wait; what fails there fails everywhere. Collective."""
        run_together(self.group, lambda: work() if self.group.rank == 0 else None)

    def jobs(self) -> list[Job]:
        """Return the same prompts and seeds on every rank: rank 0 reads the file and draws the seed. Collective.

        Raises:
            ConfigError: As `read_prompts`.
        """
        given, group = self.arguments, self.group
        prompts = run_together(group, lambda: read_prompts(given.prompt) if group.rank == 0 else [])
        seed = secrets.randbelow(2**32) if given.seed is None else given.seed
        match group.broadcast([list[JsonValue](prompts), seed]):
            case [list(agreed), int(seed)]:
                jobs = jobs_of([str(prompt) for prompt in agreed], seed=seed, num_videos=given.num_videos)
            case other:
                raise AssertionError(other)
        self.say("prompts", prompts=len(agreed), videos=len(jobs), seed=seed)
        return jobs

    @contextmanager
    def shared(self, model: HunyuanVideo) -> Iterator[None]:
        """Have all ranks work on one video while the block runs. Collective.

        Raises:
            ConfigError: As `parallelize_` and `parallelize_vae_`.
        """
        given = self.arguments
        with ExitStack() as undo:
            parallelize_(model.denoiser, ulysses=given.ulysses_degree, ring=given.ring_degree, group=self.group)
            undo.callback(unparallelize_, model.denoiser)
            if given.vae_parallel:
                parallelize_vae_(model.vae, self.group)
                undo.callback(unparallelize_vae_, model.vae)
            yield
