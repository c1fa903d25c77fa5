"""A launch in clusters that fails, whatever the reason, leaves its device without clusters."""

import warnings

import pytest
import torch

pytest.importorskip("triton")

from test_kernels import make, weighted_loss
from test_kernels_tiers import assert_loss_and_gradient

from wmtp import kernels

V = 16_500  # bfloat16: two CTAs, or one of twice as many logits


def failure(kind):
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return {
        "driver": RuntimeError("Triton Error [CUDA]: invalid argument"),
        "compiler": CompilationError("tl.max(x)", None, "Layout has 4 CTAs per CGA"),
        "assembler": PTXASError("ptxas died"),
        "resources": OutOfResources(300_000, 232_448, "shared memory"),
        "anything": AssertionError(),
    }[kind]


@pytest.fixture
def launches(monkeypatch):
    """(install what happens to a launch in clusters, and to others; the CTAs of all that came)."""
    if not kernels.interpreted():
        pytest.skip("the kernels must run on CPU tensors here")
    from wmtp.kernels import launch, tiers

    if tiers.machine(torch.device("cpu")).most_ctas == 1:
        pytest.skip("no clusters here")

    run, tried = launch.launch_as, []
    monkeypatch.setattr(launch, "_without_clusters", set())

    def install(error, otherwise=run):
        def launch_as(chosen, case):
            tried.append(chosen.num_ctas)
            if chosen.num_ctas > 1:
                raise error
            otherwise(chosen, case)

        monkeypatch.setattr(launch, "launch_as", launch_as)

    return install, tried


@pytest.mark.parametrize("kind", ["driver", "compiler", "assembler", "resources", "anything"])
def test_any_failure_in_clusters_falls_back_once_and_says_so_once(launches, kind):
    install, tried = launches
    error = failure(kind)
    install(error)
    logits, target_ids = make((1, 3, 1, V), torch.bfloat16, "cpu", ignored=0.0)
    said = f"in clusters of 2 blocks failed on cpu .{type(error).__name__}"
    with pytest.warns(RuntimeWarning, match=said):
        assert_loss_and_gradient(logits, target_ids)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "a launch in clusters")
        assert_loss_and_gradient(logits, target_ids)
    assert tried == [2, 1, 1]


def test_each_device_is_remembered_for_itself(launches):
    from wmtp.kernels.launch import Case, Rule, launch

    install, tried = launches
    install(failure("driver"), otherwise=lambda *_: None)

    def launch_on(device):
        rows = torch.empty(1, 2, 1, V, dtype=torch.bfloat16, device=device)
        options = dict.fromkeys(Case._fields)
        launch(Case(**options | {"rows": rows, "heads": 1, "grad": rows, "rule": Rule()}))

    for device in ("cpu", "meta"):
        with pytest.warns(RuntimeWarning, match=f"failed on {device}"):
            launch_on(device)
    for device in ("cpu", "meta"):
        launch_on(device)
    assert tried == [2, 1, 2, 1, 1, 1]


def test_a_forced_tier_raises(launches, monkeypatch):
    install, tried = launches
    install(failure("resources"))
    monkeypatch.setenv("WMTP_TRITON_TIER", "row")
    logits, target_ids = make((1, 3, 1, V), torch.bfloat16, "cpu")
    for _ in range(2):
        with pytest.raises(type(failure("resources")), match="shared memory"):
            weighted_loss(logits, target_ids)
    assert tried == [2, 2]


def test_a_failure_that_has_nothing_to_do_with_clusters_raises_and_is_not_remembered(launches):
    def out_of_memory(*_):
        raise MemoryError("no memory for either")

    install, tried = launches
    install(failure("driver"), otherwise=out_of_memory)
    logits, target_ids = make((1, 3, 1, V), torch.bfloat16, "cpu")
    for _ in range(2):
        with pytest.raises(MemoryError, match="for either"):
            weighted_loss(logits, target_ids)
    assert tried == [2, 1, 2, 1]
