"""Fixtures that contracts share with the tests of studies."""

from tests.search_tests.conftest import make_result, small_study

__all__ = ["make_result", "small_study"]
