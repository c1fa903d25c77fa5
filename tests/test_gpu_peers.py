"""Other people's kernels in the GPU suite: compared as ours are, and free to refuse."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from support.gpu_jobs import BOTH, SMALL, record_of
from wmtp.benchmarks import gpu_peers, problem


def liger_module(factor):
    def liger_cross_entropy(logits, targets, ignore_index):
        return factor * F.cross_entropy(logits, targets, ignore_index=ignore_index)

    return types.SimpleNamespace(liger_cross_entropy=liger_cross_entropy)


def test_peers_are_compared_with_a_mean_cross_entropy(monkeypatch):
    name = "liger_kernel.transformers.functional"
    monkeypatch.setitem(sys.modules, name, liger_module(1.0))
    peer = gpu_peers.PeerProblem("liger", SMALL, torch.float32, "cpu")
    peer.check("liger", "forward")
    peer.check("liger", BOTH)
    peer.call("liger", BOTH)()  # a second round
    _, gradient = peer.call("liger", BOTH)()
    assert gradient.shape == SMALL
    # Heads 0 and 1 of 8 tokens: 7 + 6 rows have a target.
    assert (gradient.abs().sum(-1) > 0).sum() == 13
    monkeypatch.setitem(sys.modules, name, liger_module(1.1))
    with pytest.raises(AssertionError, match=r"liger disagrees .* of the loss"):
        peer.check("liger", "forward")


def test_others_that_break_are_no_failure_of_ours(monkeypatch):
    def broken(*inputs):
        raise RuntimeError("no C compiler\nand much more")

    monkeypatch.setitem(problem.PROVIDERS, "compiled", broken)
    record = record_of("compiled")
    assert (record["outcome"], record["why"]) == ("refused", "RuntimeError: no C compiler")


def test_what_a_peer_raises_is_its_refusal(monkeypatch):
    def refuse(logits, targets, **options):
        raise AssertionError("Input N 50 is not divisible by vector size 8")

    module = types.SimpleNamespace(cross_entropy=refuse)
    monkeypatch.setitem(sys.modules, "quack.cross_entropy", module)
    record = record_of("quack")
    assert (record["outcome"], record["why"]) == (
        "refused",
        "AssertionError: Input N 50 is not divisible by vector size 8",
    )
