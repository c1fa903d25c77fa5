"""Some of the kernels' tests on their PTX, in `make test`; `make ptx` runs all."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).parents[1]
TIERS = "test_kernels_tiers.py::test_every_tier_agrees_with_the_truth"
# Each tier, dtype and rule, both vocabularies' parities; in place, listed, shared, split, scaled.
CASES = {
    "sm_80": [
        "test_kernels.py::test_agrees_with_the_truth[cpu-torch.bfloat16, 1000-abs-False]",
        "test_kernels.py::test_shared_heads[cpu-dtype0-1001]",
        "test_kernels.py::test_target_out_of_range_gives_nan_and_only_there[cpu-33-2]",
        f"{TIERS}[cpu-row-torch.bfloat16, 7-uniform-True]",
        f"{TIERS}[cpu-token-torch.float16, 1000-signed-False]",
        f"{TIERS}[cpu-online-torch.float16, 33-uniform-False]",
        "test_rows_ce.py::test_rows[interpreted-2-40001-torch.bfloat16]",
        "test_head_list.py::test_every_tier_takes_a_list[online-cpu]",
        "test_scale_kernel.py::test_times_0_nothing_is_left[cpu]",
        "ptx/test_mutations.py::test_shared_memory_that_is_read_early[token]",
    ],
    "sm_90a": [
        f"{TIERS}[cpu-online-torch.float32, 130-signed-False]",
        f"{TIERS}[cpu-token-torch.float32, 130-abs-False]",
        f"{TIERS}[cpu-online-torch.bfloat16, 7-given-False]",
        "test_kernels_tiers.py::test_a_long_odd_vocabulary[cpu-row-dtype1]",
        "test_kernels_tiers.py::test_a_long_odd_vocabulary[cpu-online-dtype1]",
        "test_kernels_tiers.py::test_shared_heads[cpu-online-dtype1-1001]",
        "test_kernels_tiers.py::test_few_rows_are_split[cpu-dtype1-33333]",
        "test_kernels_weights.py::test_weight_mean_of_weights_of_any_size[cpu-1e-42-dtype1]",
        "test_head_list.py::test_every_tier_takes_a_list[row-cpu]",
        "ptx/test_mutations.py::test_a_guard_that_is_lost",
    ],
}


@pytest.mark.parametrize("architecture", CASES)
@pytest.mark.skipif("WMTP_KERNELS_ON" in os.environ, reason="all of them run as PTX already")
def test_kernels_as_ptx(architecture):
    """In a process of its own: here Triton is its interpreter."""
    cases = [str(TESTS / case) for case in CASES[architecture]]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "-v", *cases],
        env={**os.environ, "WMTP_KERNELS_ON": architecture},
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(cases)} passed" in done.stdout, done.stdout
    ran = re.search(r"as PTX on (\w+): (\d+) launches", done.stdout)
    assert ran is not None
    assert ran[1] == architecture
    assert int(ran[2]) > len(cases)
