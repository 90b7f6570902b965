import io

import pytest

from search.progress import RunProgress, in_words, time_left_s
from search.watching import RunEvent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def event(kind: str, message: str, complete: int, trial: int | None = None) -> RunEvent:
    return RunEvent(kind=kind, message=message, counts={"complete": complete, "infeasible": 1}, budget=10, trial=trial)


def test_without_a_terminal_there_is_one_plain_line_per_message_with_the_time_left():
    stream, now = io.StringIO(), iter([100.0, 160.0])
    with RunProgress(stream, clock=lambda: next(now)) as progress:
        progress(event("resumed", "resumed study demo", 1))
        progress(event("trial", "trial 2 complete (0.9 0.8)", 2, trial=2))
        progress(event("progress", "", 2))
        progress(event("trial", "trial 3 complete (0.9 0.8)", 3, trial=3))

    assert stream.getvalue().splitlines() == [
        "resumed study demo",
        "trial 2 complete (0.9 0.8) [3/10 evaluated]",
        "trial 3 complete (0.9 0.8) [4/10 evaluated, about 6 min left]",
    ]


def test_a_terminal_shows_messages_and_markup_in_them_is_text():
    stream = Terminal()
    with RunProgress(stream, clock=lambda: 0.0) as progress:
        progress(event("note", "queued [bold] presets", 0))

    assert "queued [bold] presets" in stream.getvalue()


def test_the_time_left_leaves_out_the_start_and_is_unknown_before_two_trials():
    assert time_left_s([], 10) is None
    assert time_left_s([300.0], 10) is None
    assert time_left_s([300.0, 310.0, 320.0], 4) == 40.0


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, ""), (40, "40 s"), (720, "12 min"), (12000, "3 h 20 min")], ids=str
)
def test_durations_are_said_as_people_say_them(seconds, words):
    assert in_words(seconds) == words
