"""The scripts in examples/, as they stand."""

import importlib.util
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from wmtp import backends, fused_weighted_mtp_loss, kernels

EXAMPLES = Path(__file__).parents[1] / "examples"


def module(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found  # where Triton looks for the source
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_scripts_are_short(script):
    assert len(script.read_text().splitlines()) <= 60


def test_own_rule_runs():
    command = [sys.executable, EXAMPLES / "own_rule.py"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    torn, fused = (line.split(": ")[1] for line in run.stdout.splitlines())
    assert torn == fused
    assert "Torn has no twin for backend" in run.stderr


@pytest.mark.filterwarnings("ignore:.*has no twin")
def test_a_rule_of_ones_own_is_two_passes_or_one():
    """Timed and counted: a Triton function saves the pass for the cross entropies."""
    if not kernels.interpreted():
        pytest.skip("counts what the interpreter runs")
    own_rule = module("own_rule")
    logits = torch.randn(1, 8, 2, 2000, requires_grad=True)
    target_ids, passes, seconds = torch.randint(2000, (1, 8)), {}, {}
    weighted_loss = backends.BACKENDS["triton"].weighted_loss
    for rule in (own_rule.Torn(), own_rule.FusedTorn()):
        name, count = type(rule).__name__, []

        def watched(inputs, settings, count=count):
            count.append(settings.gradient)
            return weighted_loss(inputs, settings)

        loss = partial(fused_weighted_mtp_loss, logits, target_ids, weighting=rule)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backends.BACKENDS["triton"], "weighted_loss", watched)
            loss(backend="triton").loss.backward()
            begun = time.perf_counter()
            loss(backend="triton").loss.backward()
            seconds[name] = time.perf_counter() - begun
        passes[name] = count[: len(count) // 2]
    print({name: f"{passes[name]}, {seconds[name]:.3f} s" for name in passes})
    assert passes == {"Torn": ["none", "new"], "FusedTorn": ["new"]}
