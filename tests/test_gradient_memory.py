"""One large gradient's memory is kept for the next one, and never while anybody can see it."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from support.agreement import make_case
from wmtp import fused_weighted_mtp_loss, release_memory
from wmtp.backends import cpu, gradient_memory
from wmtp.backends.gradient_memory import KEPT_FROM_BYTES, new_gradient

SHAPE = (1, 2, 2, KEPT_FROM_BYTES // 16)  # float32
CASE_SHAPE = (1, 65, 1, KEPT_FROM_BYTES // 256)  # the same and a little more


@pytest.fixture(autouse=True)
def _nothing_kept():
    release_memory()
    yield
    release_memory()


class Allocations(list):
    """A `prepare` that counts: new memory may well have the old one's address."""

    def __call__(self, new):
        self.append(new.data_ptr())


@pytest.fixture
def allocations():
    return Allocations()


def test_a_dead_gradients_memory_is_used_again(allocations):
    address = new_gradient(SHAPE, torch.float32, allocations).data_ptr()
    again = new_gradient(SHAPE, torch.float32, allocations)
    assert again.data_ptr() == address
    assert again.shape == SHAPE
    assert again.is_contiguous()
    assert len(allocations) == 1


def test_of_the_same_size_in_another_shape_and_dtype(allocations):
    new_gradient(SHAPE, torch.float32, allocations)
    other = new_gradient((4, SHAPE[-1] * 2), torch.bfloat16, allocations)
    assert (tuple(other.shape), other.dtype) == ((4, SHAPE[-1] * 2), torch.bfloat16)
    assert len(allocations) == 1


def overlap(a, b):
    start = max(a.data_ptr(), b.data_ptr())
    return start < min(a.data_ptr() + a.nbytes, b.data_ptr() + b.nbytes)


def shared_with_a_process(gradient):
    """What sending it through a torch.multiprocessing queue does."""
    return gradient.share_memory_().data_ptr()


HOLDERS = {
    "the gradient": lambda g: g,
    "a view": lambda g: g[0, 1, 1, 5:7],
    "a detached alias": lambda g: g.detach(),
    "an expanded alias": lambda g: g[:, :, :1].expand(-1, -1, 4, -1),
    "another dtype": lambda g: g.view(torch.int32),
    "a numpy array": lambda g: g.numpy(),
    "a part of a numpy array": lambda g: g.numpy()[0, 0, 0, :3],
    "a memoryview": lambda g: memoryview(g.numpy()),
    "a capsule": lambda g: torch.utils.dlpack.to_dlpack(g),
    "numpy from dlpack": lambda g: np.from_dlpack(g),
    "its storage": lambda g: g.untyped_storage(),
    "another process": shared_with_a_process,
    "a leaf's grad": lambda g: leaf_with(g),
    "a graph": lambda g: torch.ones((), requires_grad=True) * g,
}


def leaf_with(gradient):
    leaf = torch.zeros_like(gradient)
    leaf.grad = gradient
    return leaf


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_held_memory_is_not_used_again(allocations, hold):
    held = hold(new_gradient(SHAPE, torch.float32, allocations))
    other = new_gradient(SHAPE, torch.float32, allocations)
    assert len(allocations) == 2
    del held, other


def test_of_two_the_last_is_kept(allocations):
    first, second = (new_gradient(SHAPE, torch.float32, allocations) for _ in range(2))
    assert not overlap(first, second)
    address = second.data_ptr()
    del first, second
    assert new_gradient(SHAPE, torch.float32, allocations).data_ptr() == address
    assert len(allocations) == 2


def test_another_size_takes_its_place(allocations):
    new_gradient(SHAPE, torch.float32, allocations)
    larger = (*SHAPE[:3], SHAPE[-1] + 1)
    assert new_gradient(larger, torch.float32, allocations).shape == larger
    new_gradient(SHAPE, torch.float32, allocations)
    assert len(allocations) == 3


def test_small_gradients_are_not_kept(allocations):
    for _ in range(2):
        assert new_gradient((3, 5), torch.float32, allocations).shape == (3, 5)
    new_gradient((KEPT_FROM_BYTES // 4 - 1,), torch.float32, allocations)
    assert len(allocations) == 3
    assert not gradient_memory._kept


def test_small_gradients_leave_the_large_one_alone(allocations):
    new_gradient(SHAPE, torch.float32, allocations)
    new_gradient((3, 5), torch.float32, allocations)
    new_gradient(SHAPE, torch.float32, allocations)
    assert len(allocations) == 2


def test_release_memory_gives_it_back(allocations):
    new_gradient(SHAPE, torch.float32, allocations)
    release_memory()
    assert not gradient_memory._kept
    held = new_gradient(SHAPE, torch.float32, allocations)
    assert len(allocations) == 2
    held.fill_(1)
    release_memory()  # while it is in use: it stays with whoever has it
    new_gradient(SHAPE, torch.float32, allocations).fill_(2)
    assert (held == 1).all()
    assert len(allocations) == 3


def test_the_environment_switches_it_off(monkeypatch, allocations):
    monkeypatch.setenv("WMTP_KEEP_GRADIENT", "0")
    for _ in range(2):
        new_gradient(SHAPE, torch.float32, allocations)
    assert len(allocations) == 2
    assert not gradient_memory._kept


def test_where_torch_cannot_count_users_nothing_is_kept():
    code = (
        "import torch; del torch._C._storage_Use_Count\n"
        "from wmtp.backends.gradient_memory import KEPT_FROM_BYTES, new_gradient\n"
        "new = []\n"
        "for _ in range(2): new_gradient((KEPT_FROM_BYTES,), torch.int8, lambda _: new.append(1))\n"
        "import wmtp.backends.gradient_memory\n"
        "assert len(new) == 2 and not wmtp.backends.gradient_memory._kept"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_threads_never_share_it(monkeypatch):
    """All find the kept block free, and take their time to take it."""
    new_gradient(SHAPE, torch.float32, Allocations())

    class SlowTorch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, *shape, **options):
            time.sleep(0.1)
            return torch.empty(*shape, **options)

    monkeypatch.setattr(gradient_memory, "torch", SlowTorch())
    found = []

    def work():
        found.append(new_gradient(SHAPE, torch.float32, Allocations()))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 3
    assert not any(overlap(found[i], found[j]) for i in range(3) for j in range(i))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_does_not_wait_for_a_thread_that_it_has_not():
    with gradient_memory._lock:  # as another thread may, when the parent forks
        child = os.fork()
        if not child:
            os._exit(0 if gradient_memory._lock.acquire(timeout=5) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.fixture
def fresh_memory(monkeypatch):
    """Addresses of the gradients that the backend had to ask the system for."""
    allocations = Allocations()
    monkeypatch.setattr(cpu, "_ask_for_huge_pages", allocations)
    return allocations


def gradient_of(case, upstream=1.0):
    logits = case.logits.detach().requires_grad_()
    loss = fused_weighted_mtp_loss(logits, case.target_ids, backend="cpu").loss
    return torch.autograd.grad(loss * upstream, logits)[0]


@pytest.mark.parametrize("is_leaf", [True, False])
def test_a_training_loop_asks_for_memory_once(fresh_memory, is_leaf):
    case = make_case(CASE_SHAPE)
    leaf = case.logits.requires_grad_()
    for _ in range(4):
        leaf.grad = None
        logits = leaf if is_leaf else leaf * 1
        fused_weighted_mtp_loss(logits, case.target_ids, backend="cpu").loss.backward()
        del logits
    assert len(fresh_memory) == 1


def test_compiled_code_asks_for_memory_once(fresh_memory):
    case = make_case(CASE_SHAPE)
    logits = case.logits.requires_grad_()
    step = torch.compile(
        lambda logits: fused_weighted_mtp_loss(logits, case.target_ids, backend="cpu").loss,
        fullgraph=True,
        backend="aot_eager",
    )
    for _ in range(4):
        logits.grad = None
        step(logits).backward()
    assert len(fresh_memory) == 1


@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_successive_gradients_do_not_alias(upstream):
    case, other = make_case(CASE_SHAPE), make_case(CASE_SHAPE, seed=1)
    first = gradient_of(case, upstream)
    expected = first.clone()
    second = gradient_of(other, upstream)
    assert not overlap(first, second)
    assert torch.equal(first, expected)
    del second
    assert torch.equal(gradient_of(case, upstream), expected)  # in memory that was used before
    assert torch.equal(first, expected)


def test_a_gradient_that_waits_in_a_graph_is_not_overwritten():
    case, other = make_case(CASE_SHAPE), make_case(CASE_SHAPE, seed=1)
    expected = gradient_of(case).clone()
    logits = case.logits.requires_grad_()
    loss = fused_weighted_mtp_loss(logits, case.target_ids, backend="cpu").loss
    gradient_of(other)
    loss.backward()
    assert torch.equal(logits.grad, expected)
