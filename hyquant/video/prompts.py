"""Which videos a run makes: every prompt with as many seeds as asked for."""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from hyquant.errors import ConfigError

PROMPT_MODE = 0o640
"""The most that a prompt file's mode may allow."""

_SUFFIX = ".txt"
_NAME_LENGTH = 60


@dataclass(frozen=True)
class Job:
    """One video: its place among all, prompt and seed."""

    index: int
    prompt: str
    seed: int

    def file_name(self, label: str) -> str:
        """Return the name of its file; `label` says what rendered it."""
        words = re.sub(r"\W+", "-", self.prompt).strip("-")[:_NAME_LENGTH]
        return f"{self.index:04d}_seed{self.seed}_{label}_{words}.mp4"


def jobs_of(prompts: list[str], *, seed: int, num_videos: int) -> list[Job]:
    """Return the videos of a run: `num_videos` for every prompt, with seeds that count up from the same one."""
    pairs = [(prompt, seed + offset) for prompt in prompts for offset in range(num_videos)]
    return [Job(index, *pair) for index, pair in enumerate(pairs)]


def read_prompts(given: str) -> list[str]:
    """Return the prompt that was given, or those of the file that was: one a line, empty lines left out.

    Args:
        given: A prompt or a file. What ends in .txt is always a file.

    Raises:
        ConfigError: If the file is missing, unreadable or empty, or others than its owner may change or read it.
    """
    if not os.path.isfile(given):
        if given.endswith(_SUFFIX):
            raise ConfigError(f"--prompt must be a text or a file of prompts, but {given} is not there; check the path")
        return [given]
    path = Path(given)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & ~PROMPT_MODE:
        raise ConfigError(
            f"a prompt file must have a mode within {PROMPT_MODE:04o}, but that of {path} is {mode:04o}; run chmod 640 "
            f"{path}"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"a prompt file must be readable as UTF-8, but {path} is not: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"a prompt file must have one prompt a line, but {path} has none; write some")
    return prompts
