"""Room on disk: estimates, sentences, and a slot's waiting."""

import shutil

import pytest

from search import room
from search.errors import StoreError
from search.room import (
    FIRST_PAUSE_S,
    FULL_BYTES,
    RESERVE_BYTES,
    RoomWatch,
    first_bytes,
    fullness,
    run_shortage,
    trial_bytes,
    trial_shortage,
)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def with_free(monkeypatch, free_bytes):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage._replace(free=free_bytes))


def test_a_trial_is_estimated_from_what_earlier_ones_left(study_config, tmp_path):
    settings = study_config.workload.settings
    raw_bytes = settings.num_frames * settings.height * settings.width * 3
    assert 0 < trial_bytes(study_config, tmp_path) < 3 * 2 * 8 * raw_bytes

    for run, size in (("a", 1000), ("b", 5000)):
        folder = tmp_path / "artifacts" / run / "artifacts"
        folder.mkdir(parents=True)
        (folder / "videos.mp4").write_bytes(bytes(size))
    assert trial_bytes(study_config, tmp_path) == 3 * 5000


def test_trials_whose_video_was_removed_say_nothing_about_the_next_one(study_config, tmp_path):
    unknown = trial_bytes(study_config, tmp_path)
    for number in range(10):
        folder = tmp_path / "artifacts" / str(number) / "artifacts"
        folder.mkdir(parents=True)
        (folder / "result.json").write_bytes(bytes(10))
    without = trial_bytes(study_config, tmp_path)
    (folder / "videos.mp4").write_bytes(bytes(5000))

    assert without == unknown > 10_000
    assert trial_bytes(study_config, tmp_path) == 3 * 5010


def test_the_first_trial_of_a_real_workload_writes_its_float_clips(study_config):
    """129 frames of 720p for 16 prompts are 22.8 GB of float32 pixels; HunyuanVideo's records are small beside them."""
    settings = study_config.workload.settings.model_copy(update={"num_frames": 129, "height": 720, "width": 1280})
    workload = study_config.workload.model_copy(update={"settings": settings, "num_search_prompts": 16})
    clips = 16 * 129 * 720 * 1280 * 3 * 4
    assert clips < first_bytes(study_config.model_copy(update={"workload": workload})) < 1.1 * clips


def test_a_shortage_is_one_sentence_with_the_folder_and_both_sizes(study_config, tmp_path, monkeypatch):
    with_free(monkeypatch, RESERVE_BYTES // 2)
    assert f"{tmp_path} has 32 MiB free; free some" in trial_shortage(study_config, tmp_path, 0)
    assert "trials to come write" in run_shortage(study_config, tmp_path, 0)
    with_free(monkeypatch, 2**40)
    assert trial_shortage(study_config, tmp_path, 0) is None
    assert run_shortage(study_config, tmp_path, 0) is None


def test_a_disk_is_full_when_a_result_finds_no_room(tmp_path, monkeypatch):
    with_free(monkeypatch, FULL_BYTES - 1024)
    assert fullness(tmp_path) == f"results of trials need at least 1 MiB, but {tmp_path} has 1023 KiB free; free some"
    with_free(monkeypatch, FULL_BYTES)
    assert fullness(tmp_path) is None


def test_a_slot_waits_for_room_and_gives_up_after_its_limit():
    clock, answers = Clock(), ["the disk is full"]
    watch = RoomWatch(lambda: answers[0], limit_s=60.0, clock=clock)
    assert not watch.has_room()
    clock.now += 59.0
    assert not watch.has_room()
    clock.now += 2.0
    with pytest.raises(StoreError, match=r"within 60 s \(timeouts.room_s\), but the disk is full"):
        watch.has_room()
    answers[0] = None
    assert watch.has_room()


def test_after_a_refusal_the_next_trial_waits_and_each_time_longer_until_one_goes_well():
    clock = Clock()
    watch = RoomWatch(lambda: None, limit_s=60.0, clock=clock)
    for pause_s in (FIRST_PAUSE_S, 2 * FIRST_PAUSE_S):
        watch.refused("stage render: no space")
        clock.now += pause_s - 0.1
        assert not watch.has_room()
        clock.now += 0.1
        assert watch.has_room()
    watch.went_well()
    watch.refused("stage render: no space")
    clock.now += FIRST_PAUSE_S
    assert watch.has_room()


def test_refusals_over_the_limit_without_a_trial_that_goes_well_stop_the_slot():
    clock = Clock()
    watch = RoomWatch(lambda: None, limit_s=20.0, clock=clock)

    def go_on_for_ever():
        while True:
            watch.refused("no space")
            while not watch.has_room():
                clock.now += 1.0

    with pytest.raises(StoreError, match="no space"):
        go_on_for_ever()
