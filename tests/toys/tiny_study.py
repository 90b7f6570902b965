"""A study file's content for the tiny model and the hashing judge: seconds a trial, prompts in files beside it."""

from typing import Any

TINY_STUDY: dict[str, Any] = {
    "name": "tiny-study",
    "model": {"kind": "tiny", "source": "0", "device": "cpu"},
    "space": "mini",
    "workload": {
        "calibration_prompts": "calibration.txt",
        "search_prompts": "search.txt",
        "num_calibration_prompts": 2,
        "num_search_prompts": 3,
        "settings": {"height": 16, "width": 16, "num_frames": 5, "num_steps": 2, "batch_size": 2},
    },
    "deployment": {"height": 32, "width": 32, "num_frames": 5, "num_steps": 2},
    "judge": {"model": "hashing"},
    "constraints": [{"metric": "collapsed", "max": 0.5}],
    "latency": {"rounds": 3, "warmup": 1, "compile": False},
    "confirm": None,
}
