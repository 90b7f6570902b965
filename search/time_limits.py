"""How long a stage of a trial may take before it counts as hung; derived from what stages of the study have taken.

    render, score, latency    factor * the longest of this stage so far, as each trial does the same work in it
    all other stages          factor * the longest stage of any kind so far, as only the first static trial calibrates
    nothing seen yet          first_s

Only slots of as many ranks on such a device say how long a stage takes in this one (`search.evaluating`).

A trial that ended before all prompts counts as if it had gone on as before: what it took for its renderings and scores
is scaled to all. A member of the front that is measured again on several seeds has as many times the limits.

Never less than `least_s`, and `stages` in the study file overrides. Waiting for other slots is not counted.
"""

from collections.abc import Mapping

from search.study import TimeoutsConfig

STEADY = ("render", "score", "latency")
_BY_CLIP = ("render", "score")
_NO_WORK = ("wait", "overhead")


class StageLimits:
    """The limits of one study, as far as its stage times are known.

    Args:
        config: What the study file says.
    """

    def __init__(self, config: TimeoutsConfig) -> None:
        self._config = config
        self._longest_s: dict[str, float] = {}

    def learn(self, stage_seconds: Mapping[str, float], *, share: float = 1.0) -> None:
        """Take the stage times of one trial into account, which rendered a share of the clips of a whole one."""
        for stage, seconds in stage_seconds.items():
            if stage not in _NO_WORK:
                whole_s = seconds / share if stage in _BY_CLIP else seconds
                self._longest_s[stage] = max(whole_s, self._longest_s.get(stage, 0.0))

    def limit_s(self, stage: str, *, trials: int = 1) -> float:
        """Return how many seconds a stage may take that does the work of so many whole trials."""
        given = self._config.stages.get(stage)
        if given is not None:
            return given
        longest_s = self._longest_s.get(stage) if stage in STEADY else max(self._longest_s.values(), default=None)
        if longest_s is None:
            return self._config.first_s
        return max(self._config.least_s, self._config.factor * longest_s * trials)
