"""How the slots of a study come to one noise floor: floors of other devices and numbers of ranks are other yardsticks.

    noise_floor                      the floor of the study, once there is one
    proposed_floor:HOST/DIGEST       what a slot measured that found none

A slot that found none proposes its own and looks again after a pause. If there still is none, it makes the first
proposal by name the study's, so that all who propose in the same moment write the same one, and who comes later finds
it. Nothing but a write that takes longer than the pause could change it afterwards.
"""

import time

import optuna

from search.noise_floor import NoiseFloor
from search.processes import WorkerId
from search.storage import FLOOR, stored_floor

SETTLE_S = 1.0
_PROPOSED = "proposed_floor:"


def agreed_floor(study: optuna.Study, own: NoiseFloor | None, worker: WorkerId) -> NoiseFloor | None:
    """Return the noise floor of a study.

    Args:
        study: The study.
        own: What this slot measured, which becomes the study's if that has none yet; None only looks.
        worker: This slot.
    """
    known = stored_floor(study)
    if known is not None or own is None:
        return known
    study.set_user_attr(f"{_PROPOSED}{worker.key}", own.model_dump(mode="json"))
    time.sleep(SETTLE_S)
    attributes = study.user_attrs
    if FLOOR not in attributes:
        first = min(key for key in attributes if key.startswith(_PROPOSED))
        study.set_user_attr(FLOOR, attributes[first])
    return stored_floor(study)
