"""Which card a device's name means: claims go by cards, because one card has several names and an index is none.

An index counts what a process sees: containers, and jobs of Slurm with ConstrainDevices, all count from 0. What tells
cards apart is what can be known without loading a driver: the UUIDs that nvidia-smi lists, and the numbers of the
Ascend cards in /dev, of which a container sees its own.
"""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_DEV = Path("/dev")
_CARD = re.compile(r"^GPU (\d+): (.*) \(UUID: (GPU-[\w-]+)\)$", re.MULTILINE)
_PATIENCE_S = 20


def cards(names: Sequence[str], *, kind: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return what the cards of devices are called everywhere on this host, by name; unknown ones are left out.

    Args:
        names: Of devices: an index, or what the variable of visible devices takes besides.
        kind: Their kind, "npu" for example.
        environment: Says how CUDA counts.
    """
    if not names or kind not in ("cuda", "npu"):
        return {}
    known = _nvidia_cards(environment) if kind == "cuda" else _ascend_cards()
    found = {name: _card_of(name, known) for name in names}
    return {name: card for name, card in found.items() if card is not None}


def _card_of(name: str, known: Mapping[str, str]) -> str | None:
    """Return a card by its index or by the beginning of its UUID, which CUDA takes for it."""
    if name in known:
        return known[name]
    meant = {card for card in known.values() if card.startswith(name)}
    return meant.pop() if len(meant) == 1 else None


def _nvidia_cards(environment: Mapping[str, str]) -> dict[str, str]:
    """Return UUIDs by index as `nvidia-smi -L` lists them; none where CUDA may count in another order.

    nvidia-smi counts along the bus. So does CUDA among equal cards, and where CUDA_DEVICE_ORDER says PCI_BUS_ID.
    """
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE_S
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found = _CARD.findall(listed)
    is_in_order = len({model for _, model, _ in found}) == 1 or environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    return {index if is_in_order else uuid: uuid for index, _, uuid in found}


def _ascend_cards() -> dict[str, str]:
    """Return the cards in /dev by index: torch_npu counts those that there are."""
    numbers = sorted(int(name[7:]) for name in os.listdir(_DEV) if re.fullmatch(r"davinci\d+", name))
    return {str(index): f"davinci{number}" for index, number in enumerate(numbers)}
