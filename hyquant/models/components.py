"""The parts of a HunyuanVideo pipeline as folders, and whether one is complete."""

from pathlib import Path

from hyquant.json_text import parse_json

COMPONENTS = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

_MARKS = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
}


def is_complete(folder: Path, name: str) -> bool:
    """Tell whether a component's folder holds its configuration and, for a model, every file of its weights.

    Args:
        folder: The component's folder.
        name: Which of `COMPONENTS` it is.
    """
    if name in _MARKS:
        return (folder / _MARKS[name]).is_file()
    try:
        shards = {shard for index in folder.glob("*.safetensors.index.json") for shard in _shards(index)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # an index that is cut short belongs to an incomplete download
    has_weights = bool(shards) or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    return (folder / "config.json").is_file() and has_weights and all((folder / shard).is_file() for shard in shards)


def _shards(index: Path) -> set[str]:
    return {str(shard) for shard in parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()}
