"""`quantize_checkpoint`: what `quantize_` and `save_quantized` write, in one pass over a checkpoint that is not loaded.

A thread reads pieces of weights in the order of their names, which is the order the model's digest wants. The units of
the export are complete in that order too, and a second thread writes each behind the last one. Both digests, of what is
read and of what is written, are computed on the way. After each unit the journal gets a line: how far the file is and
its digest up to there. A later attempt checks these digests, reads the weights of what is done for the model's digest
alone, and goes on.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hyquant.calibration.calibrate import Calibrated
from hyquant.calibration.file import SavedCalibration, open_calibrated, require_usable
from hyquant.checkpoint.pipeline import read_ahead, write_behind
from hyquant.checkpoint.recipe import Recipe, build_recipe, plan_checkpoint, require_statistics
from hyquant.checkpoint.source import FloatCheckpoint, open_checkpoint
from hyquant.config import QuantConfig, Target, digest
from hyquant.errors import CalibrationError
from hyquant.export.layout import model_quant_type
from hyquant.export.manifest import ExportManifest, FileInfo, Layout, ModelInfo
from hyquant.export.names import MANIFEST_NAME, default_names
from hyquant.export.resumable import Attempt, resumable_folder
from hyquant.export.tensor_file import TensorFile, size_of
from hyquant.export.writer import is_export_file, require_writable, write_descriptions
from hyquant.models.fingerprint import TensorsDigest, plain_config
from hyquant.software import software_versions
from hyquant.threads import one_thread_of_arithmetic

logger = logging.getLogger(__name__)

DEFAULT_STEPS = 50
"""HunyuanVideo's own number of denoising steps."""

OnProgress = Callable[[int, int], None]
"""Called with the bytes of weights that are quantized and those there are."""


@dataclass(frozen=True)
class StreamReport:
    """What was done.

    Attributes:
        manifest: What the export says about itself.
        units: How many units there were.
        resumed_units: How many of them an earlier attempt had written.
        discarded: Whether an earlier attempt was of other weights or settings and was thrown away.
    """

    manifest: ExportManifest
    units: int
    resumed_units: int
    discarded: bool


@dataclass(frozen=True)
class _Piece:
    key: str
    first: int
    values: Tensor
    unit: int
    ends_tensor: bool


def quantize_checkpoint(
    source: str | Path,
    out_dir: str | Path,
    config: QuantConfig,
    *,
    stats: str | Path | None = None,
    num_steps: int | None = None,
    dtype: str | None = None,
    target: Target = "hyquant",
    layout: Layout = "original",
    overwrite: bool = False,
    on_progress: OnProgress = lambda done, total: None,
) -> StreamReport:
    """Quantize a float checkpoint into an export, in memory that does not grow with the model.

    Args:
        source: The checkpoint, as `hyquant.checkpoint.source.open_checkpoint` takes it.
        out_dir: The folder to make.
        config: What to do.
        stats: A file of statistics, by `hyquant.calibration.file.save_calibrated`; needed unless nothing is stored.
        num_steps: Denoising steps it is for; None for those of the statistics, or 50.
        dtype: The dtype the float model runs in; None for that of the checkpoint.
        target: What is meant to execute it.
        layout: Whose layer names to write.
        overwrite: Replace an export that is there already.
        on_progress: Called after each unit.

    Raises:
        ConfigError: If the checkpoint is damaged or incomplete, or the configuration cannot be carried out.
        LayerMatchError: If the checkpoint is of another model, or a pattern matches no layer.
        CalibrationError: If statistics are missing or of another model.
        ExportError: If the folder cannot be written.
    """
    out = Path(out_dir)
    checkpoint = open_checkpoint(Path(source), dtype=dtype)
    saved = None if stats is None else open_calibrated(Path(stats))
    steps = num_steps or (DEFAULT_STEPS if saved is None else saved.info.num_steps)
    plan = plan_checkpoint(checkpoint, config, num_steps=steps, target=target)
    require_writable(plan, out, layout=layout, target=target, overwrite=overwrite)
    if saved is not None:
        _require_same_dtype(saved, checkpoint)
        require_usable(saved, plan)
    found = Calibrated(stats={}) if saved is None else saved.found
    require_statistics(plan, found)
    recipe = build_recipe(checkpoint, plan, layout, found)
    identity = _identity(checkpoint, saved, recipe, target)
    size_bytes = sum(map(size_of, recipe.specs.values()))
    with resumable_folder(
        out, identity=identity, size_bytes=size_bytes, mark=MANIFEST_NAME, overwrite=overwrite, is_ours=is_export_file
    ) as attempt:
        names = default_names(model_quant_type(plan))
        weights = attempt.folder / names.weights
        done, info, denoiser = _write(weights, recipe, checkpoint, attempt, on_progress)
        if saved is not None and saved.info.denoiser != denoiser:
            raise CalibrationError(
                f"statistics must be of the weights that are quantized, denoiser {denoiser}, but {saved.path} is of "
                f"{saved.info.denoiser}; calibrate this model"
            )
        model_dtype = str(checkpoint.dtype).removeprefix("torch.")
        manifest = write_descriptions(
            attempt.folder,
            plan,
            list(recipe.specs),
            {names.weights: info},
            names=(names,),
            model=ModelInfo(kind="hunyuan_video", source=checkpoint.source, fingerprint=denoiser, dtype=model_dtype),
            layout=layout,
            target=target,
        )
    logger.info("export out_dir=%s type=%s resumed=%d", out, manifest.model_quant_type, done)
    return StreamReport(manifest, len(recipe.outputs), done, attempt.discarded)


def _write(
    path: Path, recipe: Recipe, checkpoint: FloatCheckpoint, attempt: Attempt, on_progress: OnProgress
) -> tuple[int, FileInfo, str]:
    """Write the tensors; return how many units were there already, the file's size and digest, and the denoiser's."""
    total = checkpoint.size_bytes
    config = getattr(checkpoint.denoiser, "config", {})
    fingerprint = TensorsDigest(plain_config(config))
    with TensorFile(path, recipe.specs) as file:
        done = _resume(file, recipe, attempt)
        write = _Writer(file, attempt)
        read_bytes = 0
        with (
            one_thread_of_arithmetic(),
            read_ahead(_read(checkpoint, recipe, fingerprint, done), depth=2) as pieces,
            write_behind(write, depth=1) as hand_over,
        ):
            builders = {}
            for piece in pieces:
                index = piece.unit
                if index not in builders:
                    builders[index] = recipe.builder(index)
                builders[index].add(piece.key, piece.first, piece.values)
                read_bytes += piece.values.numel() * piece.values.element_size()
                if piece.ends_tensor and piece.key == recipe.outputs[index].last_key:
                    hand_over((index, builders.pop(index).tensors))
                    on_progress(read_bytes, total)
        return done, file.finish(), fingerprint.hexdigest()


def _read(checkpoint: FloatCheckpoint, recipe: Recipe, fingerprint: TensorsDigest, done: int) -> Iterator[_Piece]:
    """Yield all pieces of units that are not done, in the order of names; the digest sees those of all."""
    unit_of = {key: index for index, output in enumerate(recipe.outputs) for key in output.unit.keys}
    for key in sorted(checkpoint.tensors):
        tensor = checkpoint.tensors[key]
        fingerprint.begin(key, tensor.dtype, tensor.shape)
        rows = tensor.shape[0]
        for first, values in tensor.pieces():
            fingerprint.add(values)
            if unit_of[key] >= done:
                yield _Piece(key, first, values, unit_of[key], first + len(values) == rows)


class _Writer:
    """Writes the tensors of one unit after the other, and notes each."""

    def __init__(self, file: TensorFile, attempt: Attempt) -> None:
        self._file, self._attempt = file, attempt

    def __call__(self, unit: tuple[int, dict[str, Tensor]]) -> None:
        index, tensors = unit
        for key, tensor in tensors.items():
            self._file.put(key, tensor)
        tail = self._file.tail_sha256(tensors)
        self._attempt.note(
            {"unit": index, "end": self._file.position, "sha256": self._file.running_sha256(), "tail_sha256": tail}
        )


def _resume(file: TensorFile, recipe: Recipe, attempt: Attempt) -> int:
    """Take what an earlier attempt has written and return how many units it is; else begin the file."""
    done = 0
    for entry in attempt.entries:
        end, sha256, tail = entry["end"], entry["sha256"], entry["tail_sha256"]
        assert isinstance(end, int)
        is_whole = file.tail_sha256(recipe.outputs[done].specs) == tail and file.resume(end, str(sha256))
        if not is_whole:
            break
        done += 1
    if attempt.entries:
        attempt.keep(done)
    if done == 0:
        file.start()
        for key, tensor in recipe.attentions.items():
            file.put(key, tensor)
    return done


def _require_same_dtype(saved: SavedCalibration, checkpoint: FloatCheckpoint) -> None:
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    if saved.info.dtype != dtype:
        raise CalibrationError(
            f"statistics must be of the model in the dtype it is quantized from, {dtype}, but {saved.path} is of "
            f"{saved.info.dtype}; calibrate in {dtype}, or give --dtype {saved.info.dtype}"
        )


def _identity(checkpoint: FloatCheckpoint, saved: SavedCalibration | None, recipe: Recipe, target: Target) -> str:
    """Return a digest of everything that settles the export."""
    used = None if saved is None else saved.path.stat()
    return digest(
        {
            "weights": checkpoint.identity,
            "plan": recipe.plan.model_dump(mode="json"),
            "layout": recipe.layout,
            "target": target,
            "stats": None if used is None else [used.st_size, used.st_mtime_ns],
            "versions": dict(software_versions()),
        },
        length=64,
    )
