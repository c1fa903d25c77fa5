"""The gradient times a factor of the device: any layout, each entry once, few programs."""

import pytest
import torch

from wmtp import kernels

SHAPES = [(0, 3, 2, 9), (1, 1, 1, 5), (2, 3, 2, 5000), (2, 3, 7)]


def placed(shape, dtype, device, lead, gap):
    """Random numbers, `lead` elements into a storage of NaN, rows `gap` apart; that storage."""
    *outer, columns = shape
    storage = torch.full((lead + torch.Size(outer).numel() * (columns + gap) + 1,), torch.nan)
    storage = storage.to(device, dtype)
    padded = storage[lead:-1].view(*outer, columns + gap)
    return padded[..., :columns].copy_(torch.randn(shape)), storage


@pytest.mark.parametrize("factor", [1.0, -2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_layout(device, dtype, factor):
    for shape in SHAPES:
        for lead, gap in ((0, 0), (1, 0), (71, 0), (0, 1), (7, 64)):
            grad, storage = placed(shape, dtype, device, lead, gap)
            wanted = (grad.float() * factor).to(dtype)
            gaps = storage.isnan()
            product = kernels.multiply_(grad, torch.tensor(factor, device=device))
            assert product.data_ptr() == grad.data_ptr()
            assert torch.equal(product, wanted)
            assert torch.equal(storage.isnan(), gaps)


def test_times_0_nothing_is_left(device):
    grad = torch.tensor([[[[1.0, torch.nan, torch.inf, -2.0]]]], device=device)
    assert torch.equal(
        kernels.multiply_(grad, torch.zeros((), device=device)), torch.zeros_like(grad)
    )


def test_heads_first(device):
    grad = torch.randn(3, 2, 4, 100, device=device).permute(1, 2, 0, 3)
    wanted = grad * 3
    assert torch.equal(kernels.multiply_(grad, torch.tensor(3.0, device=device)), wanted)


@pytest.mark.parametrize("contiguous", [True, False])
def test_programs_are_as_many_as_the_device_holds(monkeypatch, contiguous):
    """A factor of 1 must cost no program a row."""
    from wmtp.kernels import scale_kernel, tiers

    launched = []

    class Recorder:
        def __getitem__(self, grid):
            launched.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(scale_kernel, "scale_kernel", Recorder())
    grad = torch.empty(64, 64, 4, 100)[..., : 100 if contiguous else 99]
    kernels.multiply_(grad, torch.tensor(2.0))
    kernels.multiply_(grad[:1, :1, :1], torch.tensor(2.0))
    processors = tiers.machine(grad.device).processors
    assert launched == [(scale_kernel.PROGRAMS_A_PROCESSOR * processors,), (1,)]
