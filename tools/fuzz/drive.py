"""The two engines: hypothesis draws and shrinks documents, atheris follows coverage through bytes."""

import logging
import os
import shutil
import sys
import warnings
from pathlib import Path

import yaml
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.errors import Flaky

from tools.fuzz.oracle import Oracle, guarded_folder
from tools.fuzz.tally import Tally
from tools.fuzz.targets import BYTES, TREES, Target
from tools.fuzz.trees import mutated

_ROUND = 200
_LARGEST = 1 << 16


def replay(tally: Tally, path: Path) -> int:
    """Judge one file and print what is wrong with it."""
    target = TREES[tally.target][0] if tally.target in TREES else BYTES[tally.target]
    folder, oracle, _ = _begin(target)
    finding = oracle.judge(lambda: target.read(folder, path.read_bytes()))
    print("nothing is wrong" if finding is None else f"{finding.place}\n{finding.text}")
    return int(finding is not None)


def fuzz_trees(tally: Tally) -> None:
    """Change seeds as documents until the time is up; each new defect is shrunk and reported once."""
    target, dump = TREES[tally.target]
    folder, oracle, payloads = _begin(target)
    documents = [document for payload in payloads if isinstance(document := yaml.safe_load(payload), dict)]
    database = DirectoryBasedExampleDatabase(tally.folder / f"{tally.target}.examples")
    known = set(tally.places)

    @settings(max_examples=_ROUND, deadline=None, database=database, verbosity=Verbosity.quiet,
              suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
              phases=(Phase.reuse, Phase.generate, Phase.shrink))  # fmt: skip
    @given(st.integers(0, len(documents) - 1).flatmap(lambda index: mutated(documents[index])))
    def one_round(document: object) -> None:
        if tally.is_over:
            return
        try:
            payload = dump(document)
        except (ValueError, yaml.YAMLError):  # no such file can be written
            return
        finding = oracle.judge(lambda: target.read(folder, payload))
        tally.count(payload, finding, unless=known)
        assert finding is None or finding.place in known

    while not tally.is_over:
        try:
            one_round()
        except (AssertionError, Flaky):  # flaky if time was up while it shrank
            known |= set(tally.places)


def fuzz_bytes(tally: Tally) -> None:
    """Change seeds as bytes until the time is up; ends the process, because libFuzzer never gives it back."""
    import atheris

    target = BYTES[tally.target]
    folder, oracle, payloads = _begin(target)
    corpus = tally.folder / f"{tally.target}.corpus"
    corpus.mkdir(exist_ok=True)
    for index, payload in enumerate(payloads):
        (corpus / f"seed-{index}").write_bytes(payload)

    def one(payload: bytes) -> None:
        tally.count(payload, oracle.judge(lambda: target.read(folder, payload)))
        if tally.is_over:
            shutil.rmtree(folder)
            os._exit(tally.report())

    arguments = [
        f"-max_len={_LARGEST}",
        "-timeout=86400",  # by the clock, which a busy machine stretches; the oracle judges by computing
        "-rss_limit_mb=0",
        f"-artifact_prefix={tally.folder}/findings/",
    ]
    atheris.Setup([sys.argv[0], "-print_final_stats=0", "-verbosity=0", *arguments, str(corpus)], one)
    atheris.Fuzz()


def _begin(target: Target) -> tuple[Path, Oracle, list[bytes]]:
    """Return a folder, its guard, and seeds; each is read once so that what is imported late is there."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    folder, oracle = guarded_folder()
    payloads = target.seeds(folder)
    return folder, oracle, payloads
