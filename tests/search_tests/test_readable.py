import pytest

from search.readable import readable


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.65432, "0.6543"),
        (1.0, "1"),
        (1.39049, "1.39"),
        (0.9784, "0.978"),
        (0.99949, "0.99949"),
        (0.99999513, "0.9999951"),
        (1 - 1e-12, "1"),
        (-0.99, "-0.99"),
        (48213.0, "4.821e+04"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
    ],
)
def test_a_number_keeps_what_tells_two_trials_apart(value: float, text: str):
    assert readable(value) == text
