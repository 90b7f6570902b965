"""Every point of a search space, found by asking `suggest` with each answer it may get.

A space is finite: its shares lie on a grid and everything else is a choice. What is asked for depends on earlier
answers, so the points are the leaves of a tree; it is walked depth first, in the order in which the space lists its
choices.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from hyquant.config import QuantConfig
from spaces.space import SearchSpace
from spaces.suggest import suggest

Params = dict[str, Any]


def points(space: SearchSpace, *, num_steps: int) -> Iterator[tuple[Params, QuantConfig]]:
    """Return the parameters and the config of every point; several may have one config.

    Args:
        space: What may be chosen.
        num_steps: Denoising steps of the study's renderings.

    Raises:
        ConfigError: If the space wants a ladder and has none yet.
    """
    answers: list[int] = []
    while True:
        trial: Any = _Answers(answers)  # all of a trial that `suggest` asks for
        config = suggest(trial, space, num_steps=num_steps)
        yield trial.params, config
        answers = [index for index, _ in trial.given]
        sizes = [size for _, size in trial.given]
        while answers and answers[-1] + 1 == sizes[len(answers) - 1]:
            answers.pop()
        if not answers:
            return
        answers[-1] += 1


def count_points(space: SearchSpace, *, num_steps: int, at_most: int) -> int:
    """Return how many points a space has, or `at_most` if it has more."""
    return sum(1 for _ in islice(points(space, num_steps=num_steps), at_most))


class _Answers:
    """What `suggest` asks of a trial: gives prepared answers, then the first of each, and notes index and number."""

    def __init__(self, prepared: Sequence[int]) -> None:
        self._prepared = prepared
        self.params: Params = {}
        self.given: list[tuple[int, int]] = []

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._answer(name, choices)

    def suggest_int(self, name: str, low: int, high: int) -> Any:
        return self._answer(name, range(low, high + 1))

    def suggest_float(self, name: str, low: float, high: float, *, step: float) -> Any:
        return self._answer(name, [low + index * step for index in range(round((high - low) / step) + 1)])

    def _answer(self, name: str, values: Sequence[Any]) -> Any:
        asked = len(self.given)
        index = self._prepared[asked] if asked < len(self._prepared) else 0
        self.given.append((index, len(values)))
        self.params[name] = values[index]
        return values[index]
