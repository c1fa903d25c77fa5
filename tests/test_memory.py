"""Peak bytes of a call, and bytes still free."""

import pytest
import torch

from wmtp.benchmarks import memory
from wmtp.benchmarks.memory import available_bytes, loss_peak_bytes, peak_bytes

SHAPE = (1, 64, 2, 1000)


def test_the_profiler_itself_says_nothing(capfd):
    peak_bytes(lambda: torch.empty(10))
    assert "profiler_st" not in capfd.readouterr().err


def test_peak_counts_what_was_held_at_once():
    def call():
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        second = torch.empty(600, dtype=torch.uint8)
        third = torch.empty(500, dtype=torch.uint8)
        return second, third

    assert peak_bytes(call) == 1100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_holds_one_gradient_and_in_place_none(dtype):
    logits_bytes = 64 * 2 * 1000 * dtype.itemsize
    # A score of [B, S, H] tensors, and the exponentials of a row for each thread.
    small = 64 * 2 * 4 * 20 + torch.get_num_threads() * 1100 * 4

    def peak(provider, direction):
        return loss_peak_bytes(provider, direction, SHAPE, dtype, "cpu")

    assert logits_bytes <= peak("fused", "forward+backward") <= logits_bytes + small
    assert peak("fused_inplace", "inplace") <= small
    assert peak("fused", "forward") <= small
    assert peak("eager", "forward+backward") > 1.9 * logits_bytes


def test_available_memory_is_the_least_of_system_and_cgroups(monkeypatch, tmp_path):
    def write(file, text):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)

    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    write("proc/meminfo", "MemTotal:  90 kB\nMemAvailable:   70 kB\nHugePages_Total:  0\n")
    assert available_bytes() == 70 * 1024

    write("proc/self/cgroup", "0::/outer/inner\n")
    write("cgroup/outer/inner/memory.max", "max\n")
    write("cgroup/outer/memory.max", "50000\n")
    write("cgroup/outer/memory.current", "30000\n")
    write("cgroup/outer/memory.stat", "anon 20000\ninactive_file 10000\n")
    assert available_bytes() == 50000 - 30000 + 10000

    write("proc/self/cgroup", "4:memory:/elsewhere\n1:cpu:/elsewhere\n")
    write("cgroup/memory/memory.limit_in_bytes", "40000\n")
    write("cgroup/memory/memory.usage_in_bytes", "5000\n")
    write("cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 3000\n")
    assert available_bytes() == 40000 - 5000 + 3000
