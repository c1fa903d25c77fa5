"""Runs that are struck and damaged at random end as if nothing had been: none lost, none different.

WMTP_FAULTS: how many runs, of the three algorithms in turn (`make faults`: 60). WMTP_FAULTS_SEED:
others. The same seed draws the same faults, but for what follows on a kill by the clock.
"""

import os
from functools import cache

import pytest

from support.faults.rounds import Round, Runs
from support.tiny_runs import ALGORITHMS

RUNS = int(os.environ.get("WMTP_FAULTS", "3"))
SEED = int(os.environ.get("WMTP_FAULTS_SEED", "0"))


@pytest.fixture(scope="session")
def runs(corpus, tmp_path_factory):
    """Of an algorithm."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return cache(lambda algo: Runs(algo, corpus, folder))


@pytest.mark.parametrize("number", range(RUNS))
def test_a_run_ends_as_if_nothing_had_been(number, runs, tmp_path, record_property):
    algo = ALGORITHMS[number % len(ALGORITHMS)]
    print(f"WMTP_FAULTS_SEED={SEED}, round {number}, {algo}:")
    played = Round(runs(algo), f"{SEED} {number}", tmp_path / "run")
    played.play()
    record_property("faults", dict(played.counts))
