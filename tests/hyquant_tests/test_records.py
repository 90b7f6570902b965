"""Records on disk: streamed while a model runs, constants once, read back one at a time."""

import json
import os
import stat
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from hyquant.calibration.capture import capture_in_memory
from hyquant.calibration.records import StoredRecords, are_intact, pack_tree, unpack_tree, write_records
from hyquant.errors import CalibrationError
from hyquant.models.base import Record, RenderSettings
from hyquant.models.tiny import TinyVideoModel

NUM_STEPS = 4


def random_records(
    num_steps: int = NUM_STEPS, latents: tuple[int, ...] = (1, 4, 2, 8, 8), text: tuple[int, ...] = (1, 9, 24)
) -> list[Record]:
    """Return the calls of one prompt: float32 latents and a timestep per step, the same text at every step."""
    generator = torch.Generator().manual_seed(0)
    constants = {"text": torch.randn(text, generator=generator).bfloat16(), "guidance": torch.tensor([6000.0])}
    return [
        Record(
            step_index,
            0,
            {
                "latents": torch.randn(latents, generator=generator),
                "timestep": torch.tensor([1000 - step_index]),
                **{name: tensor.clone() for name, tensor in constants.items()},
            },
        )
        for step_index in range(num_steps)
    ]


def write(folder: Path, records: list[Record]) -> None:
    def capture(sink):
        for record in records:
            sink(record)

    write_records(folder, capture)


def assert_same_records(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert (one.step_index, one.prompt_index) == (other.step_index, other.prompt_index)
        assert one.inputs.keys() == other.inputs.keys()
        for name, tensor in one.inputs.items():
            assert torch.equal(tensor, other.inputs[name])
            assert tensor.dtype == other.inputs[name].dtype


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path / "prompt", random_records())
    return tmp_path / "prompt"


def test_what_was_written_is_read_again_and_again(folder):
    records = StoredRecords([folder])

    assert are_intact(folder)
    assert_same_records(records, random_records())
    assert_same_records(records, random_records())


def test_records_that_vanish_while_they_are_read_are_one_sentence(folder):
    records = StoredRecords([folder])
    for path in folder.glob("*.safetensors"):
        path.unlink()

    with pytest.raises(CalibrationError, match=r"must stay while they are read, but .* is gone; capture them again"):
        records[0]


def test_prompts_are_counted_over_the_folders(folder):
    records = StoredRecords([folder, folder])

    assert [record.prompt_index for record in records] == [0] * NUM_STEPS + [1] * NUM_STEPS


def test_what_all_steps_share_is_stored_once(folder):
    """Text and guidance once, latents and timestep per step."""
    assert len(list(folder.glob("*.safetensors"))) == 2 + 2 * NUM_STEPS


def size_bytes(num_steps: int, *, per_step: int, constants: int, is_shared: bool) -> int:
    """Return the bytes of one prompt's records, from the bytes of what changes per step and of what does not."""
    return num_steps * per_step + constants * (1 if is_shared else num_steps)


def test_a_prompt_at_720p_takes_under_2_gb_and_not_15():
    """HunyuanVideo in the original layout at 720x1280x129 and 50 steps, worked out by hand from its shapes.

    The latents are float32 [1, 16, 33, 90, 160]: 129 frames are 1 + 32 latent frames, height and width are divided by
    8. Patches of 2 x 2 make 33 * 45 * 80 = 118 800 tokens, each with a float32 cosine and sine of width 128. The text
    is bfloat16 [1, 256, 4096], pooled [1, 768], with an int64 mask [1, 256]. msModelSlim's "timestep" dump of a step
    holds args and kwargs, and in both all of these.
    """
    latents, rotary = 16 * 33 * 90 * 160 * 4, 2 * 33 * 45 * 80 * 128 * 4
    text = 256 * 4096 * 2 + 768 * 2 + 256 * 8
    per_step, constants = latents + 8, rotary + text + 2

    ours = size_bytes(50, per_step=per_step, constants=constants, is_shared=True)
    repeated = 2 * size_bytes(50, per_step=per_step, constants=constants, is_shared=False)

    assert ours < 1.7e9
    assert 15e9 < repeated < 16e9


def test_files_have_the_size_that_the_formula_gives(tmp_path):
    """Up to the headers: below 200 bytes per file, 500 per record in the index."""
    records = random_records(20, latents=(1, 16, 5, 16, 16), text=(1, 64, 512))
    write(tmp_path / "prompt", records)

    on_disk = sum(path.stat().st_size for path in (tmp_path / "prompt").iterdir())
    in_full = sum(len(save(record.inputs)) for record in records)
    per_step, constants = 16 * 5 * 16 * 16 * 4 + 8, 64 * 512 * 2 + 4
    expected = size_bytes(20, per_step=per_step, constants=constants, is_shared=True)

    assert 0 < on_disk - expected < 200 * (2 * 20 + 2) + 500 * 20
    assert in_full - size_bytes(20, per_step=per_step, constants=constants, is_shared=False) < 500 * 20
    assert on_disk < 0.6 * in_full


def test_a_tree_of_positional_inputs_is_packed_as_well():
    tree = {
        "args": (torch.ones(2), [torch.zeros(3), None], {"cos": torch.ones(2)}),
        "text": "a",
        "n": 3,
        "x": 0.5,
        "y": -torch.inf,
    }
    held: dict[str, torch.Tensor] = {}

    def put(tensor):
        held[str(len(held))] = tensor
        return str(len(held) - 1)

    packed = json.loads(json.dumps(pack_tree(tree, put)))
    unpacked = unpack_tree(packed, held.__getitem__)

    assert isinstance(unpacked["args"], tuple)
    assert isinstance(unpacked["args"][1], list)
    assert torch.equal(unpacked["args"][2]["cos"], torch.ones(2))
    assert unpacked["args"][1][1] is None
    assert {name: unpacked[name] for name in ("text", "n", "x", "y")} == {
        name: tree[name] for name in ("text", "n", "x", "y")
    }


def test_what_is_no_data_is_refused():
    with pytest.raises(CalibrationError, match="but got function"):
        pack_tree({"callback": lambda: None}, str)


def test_a_model_keeps_no_record_it_has_handed_over():
    """So memory is bounded by one step: the tensors of every earlier call are gone when the next one comes."""
    model = TinyVideoModel(0)
    handed: list[weakref.ref[torch.Tensor]] = []

    def sink(record: Record) -> None:
        assert all(reference() is None for reference in handed)
        handed.extend(weakref.ref(tensor) for tensor in record.inputs.values())

    model.capture(["a", "b"], [0, 1], RenderSettings(height=16, width=16, num_frames=1, num_steps=3), sink)

    assert len(handed) == 2 * 3 * 6


def test_files_are_there_while_the_capture_is_still_running(tmp_path):
    seen: list[int] = []

    def capture(sink):
        for record in random_records():
            sink(record)
            seen.append(len(list(tmp_path.rglob("*.safetensors"))))

    write_records(tmp_path / "prompt", capture)

    assert seen == [4, 6, 8, 10]


def test_reading_maps_files_and_opens_only_those_of_the_record(folder):
    records = StoredRecords([folder])
    first = records[0]
    mapped = {Path(line.split()[-1]).name for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    own = {path.name for path in folder.glob("*.safetensors")}

    assert len(mapped & own) == len(first.inputs)


def test_an_interrupted_capture_leaves_nothing(tmp_path):
    def capture(sink):
        sink(random_records()[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(tmp_path / "prompt", capture)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.multiproc
def test_what_a_killed_capture_left_is_removed_by_the_next_of_the_same_folder(tmp_path):
    for name in ("prompt", "prompt", "prompt 2"):
        if os.fork() == 0:
            write_records(tmp_path / name, lambda sink: os._exit(9))
        os.wait()

    write(tmp_path / "prompt", random_records())

    others = [path.name for path in tmp_path.iterdir() if path.name != "prompt"]
    assert [name.startswith(".prompt 2.") for name in others] == [True]


def test_what_a_living_capture_has_written_is_not_removed(folder):
    def capture(sink):
        sink(random_records()[0])
        write(folder, random_records())
        for record in random_records()[1:]:
            sink(record)

    write_records(folder, capture)

    assert are_intact(folder)
    assert_same_records(StoredRecords([folder]), random_records())


@pytest.mark.parametrize("which", ["records.json", "*.safetensors"])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-3], id="cut short"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], id="one bit changed"),
        pytest.param(None, id="deleted"),
    ],
)
def test_a_damaged_folder_is_noticed_and_replaced(folder, which, damage):
    path = next(iter(folder.glob(which)))
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))

    assert not are_intact(folder)

    write(folder, random_records())

    assert are_intact(folder)
    assert_same_records(StoredRecords([folder]), random_records())
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_records_that_another_process_finished_first_are_kept(folder):
    """It may have readers already."""
    before = (folder / "records.json").stat().st_ino

    write(folder, random_records())

    assert (folder / "records.json").stat().st_ino == before


def test_a_missing_folder_is_an_error(tmp_path):
    assert not are_intact(tmp_path / "none")
    with pytest.raises(CalibrationError, match="must be whole"):
        StoredRecords([tmp_path / "none"])


def test_files_are_not_readable_by_others(folder):
    assert stat.S_IMODE(folder.stat().st_mode) & 0o007 == 0
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


def test_records_of_a_model_come_back_bit_equal(tmp_path):
    model = TinyVideoModel(0, dtype=torch.bfloat16)
    settings = RenderSettings(height=16, width=16, num_frames=5, num_steps=2)
    records = capture_in_memory(model, ["a red ball"], [1], settings)

    write(tmp_path / "prompt", records)

    assert_same_records(StoredRecords([tmp_path / "prompt"]), records)
