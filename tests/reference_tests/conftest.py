"""Routes, float runs and good exports, each made once per session."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.reference_tests.configs import CONFIGS
from tests.reference_tests.judging import FloatRun, run_float
from tests.reference_tests.routes import Route, build_route, write_export


@pytest.fixture(scope="session")
def route_of() -> Callable[[str, str], Route]:
    """Build a route for a deployment dtype."""
    return cache(build_route)


@pytest.fixture(scope="session")
def float_run_of(route_of) -> Callable[[str, str], FloatRun]:
    """Run a route's float model."""
    return cache(lambda route, dtype: run_float(route_of(route, dtype)))


@pytest.fixture(scope="session")
def export_of(route_of, tmp_path_factory) -> Callable[[str, str], Path]:
    """Write the export of a route by the name of its configuration; do not change the folder."""

    def write(route: str, config: str) -> Path:
        made, _ = CONFIGS[config]
        return write_export(route_of(route, made.deploy_dtype), made, tmp_path_factory.mktemp("exports") / "good")

    return cache(write)
