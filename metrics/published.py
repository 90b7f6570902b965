"""Files with published weights: where other libraries keep them, and whether they are what was published.

A metric that needs weights asks here for their file. What is not there is an error that says where to get it and where
to put it: nothing is ever downloaded, neither here nor by the libraries, which find the file in its place.
"""

import hashlib
import logging
import re
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError

import torch

from metrics.errors import WeightsMissing

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20


def torch_hub_file(metric: str, url: str) -> Path:
    """Return where torch.hub keeps a downloaded file; TORCH_HOME moves that folder.

    Raises:
        WeightsMissing: If the file is not there.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        raise WeightsMissing(f"weights of {metric} must be at {path}, but are not; download {url} to that place")
    return path


def hugging_face_file(metric: str, repository: str, name: str) -> Path:
    """Return a repository's file in the Hugging Face cache; HF_HOME moves that folder.

    Raises:
        WeightsMissing: If it is not there.
    """
    found = cached_file(repository, name)
    if found is None:
        raise WeightsMissing(
            f"weights of {metric} must be in the Hugging Face cache, but are not; "
            f"run `hf download {repository} {name}` once"
        )
    return found


def cached_file(repository: str, name: str) -> Path | None:
    """Return a repository's file in the Hugging Face cache, None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name)
    return Path(found) if isinstance(found, str) else None


@lru_cache
def require_published(metric: str, path: Path) -> None:
    """Compare a file with the digest that its publisher put into its name, and log the digest, once per process.

    torch.hub's names end in the first digits of the sha256 (`alexnet-owt-7be5be79.pth`), and the Hugging Face cache
    links to files named by all of them.

    Raises:
        WeightsMissing: If the digest is another one.
    """
    digest = sha256_of(path)
    named = re.search(r"(?:^|-)([0-9a-f]{8,64})(?:\.\w+)?$", path.resolve().name)
    if named is not None and not digest.startswith(named[1]):
        raise WeightsMissing(
            f"weights of {metric} must have the sha256 that begins with {named[1]}, but {path} has {digest}; "
            "download the file again"
        )
    logger.info("weights metric=%s file=%s sha256=%s", metric, path, digest)


def require_tensors(metric: str, path: Path) -> None:
    """Refuse a file of torch.save that holds more than tensors: torch.hub would run it.

    Raises:
        WeightsMissing: If it does, or is damaged.
    """
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise WeightsMissing(
            f"weights of {metric} must be tensors only, but {path} has something else or is damaged; download the file "
            "again"
        ) from error


def sha256_of(path: Path) -> str:
    """Return a file's sha256 in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
