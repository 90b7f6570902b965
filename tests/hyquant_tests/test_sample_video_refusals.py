"""What `hyquant.sample_video` refuses, with one sentence: 2 for usage, 1 for what it finds."""

import os

import pytest
import torch

from hyquant.distributed import Group
from hyquant.errors import CalibrationError, ConfigError, ExportError
from hyquant.models.base import Record
from hyquant.sample_video import main
from hyquant.video.arguments import LARGEST, flag
from hyquant.video.dump import Dump, share_of
from hyquant.video.flags import parse
from hyquant.video.loading import load_video_model
from hyquant.video.prompts import Job, jobs_of, read_prompts
from hyquant.video.ranks import Run
from hyquant.video.saving import require_savable, save_video
from tests.hyquant_tests.video_commands import SHORT, clip_flags, frames, model_flags
from tools.export_original_layout import MODEL

SAVES = ["--do_save_video"]
QUANT = ["--do_quant", "--quant_weight_save_folder", "w", "--quant_dump_calib_folder", "c"]
PUBLISHED = {
    "540p": [(544, 960), (960, 544), (624, 832), (832, 624), (720, 720)],
    "720p": [(720, 1280), (1280, 720), (1104, 832), (832, 1104), (960, 960)],
}
"""Sizes of Tencent's README."""


def usage_error(words, capsys):
    """Return the one sentence of a usage error."""
    with pytest.raises(SystemExit) as left:
        main(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2
    return line.removeprefix("hyquant.sample_video: ")


def found_error(words, capsys):
    """Return the one sentence of an error that is found while running."""
    code = main(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 1
    return line.removeprefix("hyquant.sample_video: ")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--quant_type", "w4a4", *QUANT], "argument --quant_type: invalid choice: 'w4a4' (choose from "),
        (["--anti_method", "m5", *QUANT], "argument --anti_method: invalid choice: 'm5' (choose from "),
        (["--target", "elsewhere", *QUANT], "argument --target: invalid choice"),
        (["--act-method", "guess", *QUANT], "argument --act-method: invalid choice"),
        (["--dtype", "int8", *SAVES], "argument --dtype: invalid choice"),
        (["--model-resolution", "1080p", *SAVES], "argument --model-resolution: invalid choice"),
        (["--infer-step", "3", *SAVES], "unrecognized arguments: --infer-step 3"),
        (["--do-quant", *SAVES], "unrecognized arguments: --do-quant"),
        (["--video-size", "32", *SAVES], "argument --video-size: expected 2 arguments"),
        (["--video-size", "40", "64", *SAVES], "--video-size must be multiples of 16, but got 40 64; give 32 64"),
        (["--video-size", "0", "64", *SAVES], "--video-size: input should be greater than or equal to 16, but got 0"),
        (["--video-length", "8", *SAVES], "--video-length must be 1 + a multiple of 4, but got 8; give 5"),
        (["--infer-steps", "0", *SAVES], "--infer-steps: input should be greater than or equal to 1, but got 0"),
        (["--infer-steps", "few", *SAVES], "argument --infer-steps: invalid int value: 'few'"),
        (["--num-videos", "0", *SAVES], "--num-videos: input should be greater than or equal to 1"),
        (["--seed", "-1", *SAVES], "--seed: input should be greater than or equal to 0, but got -1"),
        (["--prompt", "", *SAVES], "--prompt: string should have at least 1 character, but got ''"),
        (["--ulysses-degree", "0", *SAVES], "--ulysses-degree: input should be greater than or equal to 1"),
        (["--ring-degree", "-2", *SAVES], "--ring-degree: input should be greater than or equal to 1"),
        (["--flow-shift", "0", *SAVES], "--flow-shift: input should be greater than 0, but got 0.0"),
        (["--embedded-cfg-scale", "nan", *SAVES], "--embedded-cfg-scale: input should be a finite number"),
        (["--cfg-scale", "0.5", *SAVES], "--cfg-scale: input should be greater than or equal to 1, but got 0.5"),
        (["--neg-prompt", "blurred", *SAVES], "--neg-prompt has an effect with --cfg-scale above 1 only"),
        ([], "a run must leave something, but neither --do_quant nor --do_save_video is given"),
        (["--quant_type", "w8a8", *SAVES], "--quant_type says how to quantize, but --do_quant is not given"),
        (["--target", "hyquant", *SAVES], "--target says how to quantize, but --do_quant is not given"),
        (["--do_quant", "--quant_dump_calib_folder", "c"], "--quant_weight_save_folder must be given"),
        (["--do_quant", "--quant_weight_save_folder", "w"], "--quant_dump_calib_folder must be given"),
        ([*QUANT, "--quant_type", "w8a8_dynamic", "--act-method", "minmax"], "--act-method says how stored ranges"),
        ([*QUANT, "--quant_type", "w8a8", "--timestep-sep", "1"], "--timestep-sep divides the steps of w8a8_timestep"),
        ([*QUANT, "--timestep-sep", "-1"], "--timestep-sep: input should be greater than or equal to 0, but got -1"),
        ([*QUANT, "--quant_dump_calib_folder", "w/c"], "--quant_dump_calib_folder w/c lies in it; give it a folder"),
        ([*QUANT, "--save-path", "w"], "--quant_weight_save_folder must hold weights alone, but --save-path w lies in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_line_that_contradicts_itself_is_refused(words, sentence, capsys):
    assert sentence in usage_error([*clip_flags(SHORT), *words], capsys)


@pytest.mark.parametrize("left_out", ["--prompt", "--flow-reverse"])
def test_a_flag_that_must_be_given_is_named(left_out, capsys):
    words = clip_flags(SHORT)
    where = words.index(left_out)
    words = words[:where] + words[where + (2 if left_out == "--prompt" else 1) :]

    assert f"{left_out} must be given" in usage_error([*words, *SAVES], capsys)


@pytest.mark.parametrize("resolution", LARGEST)
def test_a_resolution_allows_its_published_sizes_and_smaller_ones_but_none_larger(resolution, capsys):
    words = [*clip_flags(SHORT), *SAVES, "--model-resolution", resolution, "--video-size"]
    height, width = LARGEST[resolution]

    for size in [*PUBLISHED[resolution], (32, 32)]:
        assert parse([*words, *map(str, size)]).video_size == size
    assert f"is for videos of up to {height} x {width} pixels" in usage_error(
        [*words, str(height), str(width + 16)], capsys
    )


def test_the_defaults_are_those_of_the_table():
    """But for its two that contradict each other: 540p is not for 720 x 1280."""
    arguments = parse(["--prompt", "a", "--flow-reverse", *QUANT, "--model-resolution", "720p"])

    assert str(arguments.model_base) == "ckpts"
    assert str(arguments.dit_weight).endswith("hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt")
    assert [str(arguments.vae_path), str(arguments.text_encoder_path)] == ["vae", "text_encoder"]
    assert str(arguments.text_encoder_2_path) == "clip-vit-large-patch14"
    assert (arguments.video_size, arguments.video_length, arguments.infer_steps) == ((720, 1280), 129, 50)
    assert (arguments.ulysses_degree, arguments.ring_degree, arguments.num_videos) == (1, 1, 1)
    assert (arguments.seed, arguments.vae_parallel, arguments.do_save_video) == (None, False, False)
    assert str(arguments.save_path) == "results"
    assert arguments.quantization is not None
    assert (arguments.quantization.quant_type, arguments.quantization.anti_method) == ("w8a8_timestep", None)
    assert type(arguments).model_fields["model_resolution"].default == "540p"


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o700, 0o604, 0o641])
def test_a_prompt_file_that_others_can_read_or_the_group_can_change_is_refused(base, tmp_path, capsys, mode):
    path = tmp_path / "prompts.txt"
    path.write_text(SHORT)
    path.chmod(mode)

    assert found_error([*model_flags(base), *clip_flags(str(path)), *SAVES], capsys) == (
        f"a prompt file must have a mode within 0640, but that of {path} is {mode:04o}; run chmod 640 {path}"
    )


@pytest.mark.parametrize("mode", [0o640, 0o600, 0o440, 0o400])
def test_a_prompt_file_of_a_stricter_mode_is_read_line_by_line(tmp_path, mode):
    path = tmp_path / "prompts"
    path.write_text("\n a cat \n\na dog, 一只狗\n", encoding="utf-8")
    path.chmod(mode)

    assert read_prompts(str(path)) == ["a cat", "a dog, 一只狗"]


@pytest.mark.parametrize(
    ("content", "sentence"), [(b"\n \n", "has none; write some"), (b"\xff\xfe\xff", "must be readable as UTF-8")]
)
def test_a_prompt_file_without_prompts_is_refused(tmp_path, content, sentence):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    path.chmod(0o600)

    with pytest.raises(ConfigError, match=sentence):
        read_prompts(str(path))


def test_a_missing_prompt_file_is_no_prompt(base, capsys):
    error = found_error([*model_flags(base), *clip_flags("nowhere/prompts.txt"), *SAVES], capsys)

    assert error == "--prompt must be a text or a file of prompts, but nowhere/prompts.txt is not there; check the path"


def test_a_long_prompt_is_a_text_and_not_a_path():
    assert read_prompts("a " * 5000) == ["a " * 5000]


@pytest.mark.parametrize("name", ["model_base", "dit_weight", "vae_path", "text_encoder_path", "text_encoder_2_path"])
def test_a_missing_path_is_named_with_its_flag(base, capsys, name):
    error = found_error([*model_flags(base), *clip_flags(SHORT), *SAVES, flag(name), "nowhere"], capsys)

    assert error.startswith(f"{flag(name)} must be ")
    assert "nowhere" in error


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        (f"{MODEL}/vae/config.json", "the autoencoder must come with config.json"),
        ("text_encoder/config.json", "lacks files of text_encoder"),
        ("tokenizer/tokenizer_config.json", "lacks files of tokenizer"),
        (f"{MODEL}/transformers/config.json", "rope_dim_list is not given"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(changed, capsys, place, sentence):
    (changed / place).unlink()

    assert sentence in found_error([*model_flags(changed), *clip_flags(SHORT), *SAVES], capsys)


def test_weights_that_hold_code_are_refused(changed, capsys):
    torch.save({"module": os.system}, changed / MODEL / "transformers" / "mp_rank_00_model_states.pt")

    assert "holds code, which is not run" in found_error([*model_flags(changed), *clip_flags(SHORT), *SAVES], capsys)


def test_guidance_is_refused_where_the_weights_take_none(changed, capsys):
    path = changed / MODEL / "transformers" / "mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=True)["module"]
    torch.save({"module": {name: x for name, x in content.items() if not name.startswith("guidance_in")}}, path)
    words = [*model_flags(changed), *clip_flags(SHORT), *SAVES]

    assert main([*words, "--save-path", str(changed / "out")]) == 0
    assert "these weights were not; use --cfg-scale" in found_error([*words, "--embedded-cfg-scale", "6"], capsys)


@pytest.mark.parametrize("degree", ["--ulysses-degree", "--ring-degree"])
def test_degrees_must_be_the_ranks(base, capsys, degree):
    error = found_error([*model_flags(base), *clip_flags(SHORT), *SAVES, degree, "2"], capsys)

    assert "must be the number of ranks, but" in error
    assert error.endswith("is not 1; start torchrun with --nproc_per_node=2, or give other degrees")


def test_heads_that_do_not_divide_are_refused(base):
    """Before the ranks exchange anything, so no other rank is needed here."""
    arguments = parse([*model_flags(base), *clip_flags(SHORT), *SAVES, "--ulysses-degree", "3"])
    run = Run(arguments, Group(rank=0, world_size=3))
    model = load_video_model(arguments, num_ranks=3)

    with pytest.raises(ConfigError, match="must divide the 4 heads, but is 3; choose one of"), run.shared(model):
        pytest.fail("it was shared")


def test_an_export_is_kept_unless_it_may_be_overwritten(base, tmp_path, capsys):
    folders = ["--quant_weight_save_folder", str(tmp_path / "w"), "--quant_dump_calib_folder", str(tmp_path / "c")]
    words = [*model_flags(base), *clip_flags(SHORT), "--do_quant", *folders]
    assert main(words) == 0
    before = (tmp_path / "w" / "hyq_manifest.json").read_bytes()
    capsys.readouterr()

    assert found_error([*words, "--timestep-sep", "0"], capsys).endswith("or say that it may be overwritten")
    assert (tmp_path / "w" / "hyq_manifest.json").read_bytes() == before
    assert main([*words, "--timestep-sep", "0", "--overwrite"]) == 0
    assert (tmp_path / "w" / "hyq_manifest.json").read_bytes() != before


def test_folders_of_others_are_kept(base, tmp_path, capsys):
    for name in ("w", "c/calib_data"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "thesis.txt").write_text("mine")
    words = [*model_flags(base), *clip_flags(SHORT), "--do_quant", "--quant_weight_save_folder"]

    error = found_error([*words, str(tmp_path / "w"), "--quant_dump_calib_folder", str(tmp_path / "d")], capsys)
    assert "only an export may be replaced" in error
    error = found_error([*words, str(tmp_path / "v"), "--quant_dump_calib_folder", str(tmp_path / "c")], capsys)
    assert "only calibration records may be replaced" in error
    assert (tmp_path / "c" / "calib_data" / "thesis.txt").read_text() == "mine"


def test_folders_that_are_files_are_refused(base, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = [*model_flags(base), *clip_flags(SHORT), "--save-path", str(tmp_path / "file")]
    quant = ["--do_quant", "--quant_weight_save_folder", str(tmp_path / "w"), "--quant_dump_calib_folder"]

    assert found_error([*words, *SAVES], capsys).startswith("--save-path must be a folder, but")
    assert found_error([*words, *quant, str(tmp_path / "file")], capsys).startswith(
        "calibration records must be written"
    )


def test_a_run_that_does_not_fit_into_memory_says_so(base, capsys, monkeypatch):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr("hyquant.sample_video.sample", out_of_memory)

    error = found_error([*model_flags(base), *clip_flags(SHORT), *SAVES], capsys)
    assert error.startswith(
        "the run must fit into memory of device auto, but it does not (CUDA out of memory); use more"
    )


def test_steps_beyond_the_last_are_all_dynamic_and_told(base, tmp_path, caplog):
    folders = ["--quant_weight_save_folder", str(tmp_path / "w"), "--quant_dump_calib_folder", str(tmp_path / "c")]

    assert main([*model_flags(base), *clip_flags(SHORT), "--do_quant", *folders, "--timestep-sep", "2"]) == 0
    assert [r.getMessage() for r in caplog.records if "timestep" in r.getMessage()] == [
        "--timestep-sep 2 lies beyond the 2 steps, so every step is dynamic"
    ]


def test_a_record_that_cannot_be_written_is_told_when_the_capture_has_ended(tmp_path):
    """Until then the other ranks need this one."""
    dump, captured = Dump(tmp_path / "cache", rank=0, num_ranks=1), []

    def capture(sink):
        for step_index in range(3):
            sink(Record(step_index, 0, {"x": {1, 2}}))  # type: ignore[dict-item]
            captured.append(step_index)

    dump.prepare()
    with pytest.raises(CalibrationError, match="a record must hold tensors"):
        dump.write({}, capture)
    assert captured == [0, 1, 2]
    assert dump.problem({}) == "absent"
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_dump_is_only_taken_for_what_it_was_captured_from(tmp_path):
    dump = Dump(tmp_path, rank=1, num_ranks=2)

    def capture(sink):
        sink(Record(0, 0, {"x": torch.ones(2)}))

    dump.prepare()
    dump.write({"seeds": [1], "dtype": "a"}, capture)

    assert (dump.note.name, dump.records.name) == ("calib_data_1.json", "calib_data_1")
    assert dump.problem({"seeds": [1], "dtype": "a"}) is None
    assert dump.problem({"seeds": [2], "dtype": "a"}) == "stale, other seeds"
    assert dump.problem({"seeds": [1]}) == "stale"
    dump.note.write_text("[")
    assert dump.problem({"seeds": [1], "dtype": "a"}) == "unreadable"
    dump.prepare()
    assert dump.problem({"seeds": [1], "dtype": "a"}) == "absent"


def test_stale_records_give_way_to_those_that_are_captured_again(tmp_path):
    """Whole records of another run must go: a writer that finds a whole folder takes it for its own."""
    dump = Dump(tmp_path, rank=0, num_ranks=1)
    for value in (1.0, 2.0):
        dump.prepare()
        dump.write({"seeds": [value]}, lambda sink, value=value: sink(Record(0, 0, {"x": torch.tensor([value])})))

        assert [record.inputs["x"].item() for record in dump.read()] == [value]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_share_records_without_loss_or_repetition(num_ranks):
    taken = []
    sinks = [share_of(taken.append, Group(rank=rank, world_size=num_ranks)) for rank in range(num_ranks)]
    for step_index in range(7):
        for sink in sinks:
            sink(Record(step_index, 0, {}))

    assert [record.step_index for record in taken] == list(range(7))


def test_every_prompt_is_rendered_with_every_seed():
    assert jobs_of(["a", "b"], seed=5, num_videos=2) == [
        *(Job(0, "a", 5), Job(1, "a", 6)),
        *(Job(2, "b", 5), Job(3, "b", 6)),
    ]
    assert (
        Job(3, "A cat: 一只猫/../x " + "y" * 99, 5).file_name("float").startswith("0003_seed5_float_A-cat-一只猫-x-yyy")
    )


def test_a_saved_video_is_the_one_given_up_to_the_codec(tmp_path):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(5, 3, 2, 2, generator=generator)
    video = torch.nn.functional.interpolate(coarse, size=(32, 48), mode="bilinear")

    save_video(tmp_path / "a.mp4", video)

    found = frames(tmp_path / "a.mp4").float() / 255
    assert found.shape == (5, 32, 48, 3)
    assert (found - video.permute(0, 2, 3, 1)).abs().mean() < 0.02  # colours are stored at half the size
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_video_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(ExportError, match="cannot be written"):
        save_video(tmp_path / "missing" / "a.mp4", torch.zeros(1, 3, 16, 16))
    (tmp_path / "b.mp4").write_text("")
    with pytest.raises(ExportError, match="exists"):
        require_savable([tmp_path / "b.mp4"], overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["b.mp4"]
