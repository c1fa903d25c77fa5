"""The machine sees what it claims to see: kernels that are broken on purpose.

Only where kernels run on it: WMTP_KERNELS_ON=sm_90a, or sm_80.
"""

import linecache
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

GPU = Path(__file__).parents[2] / "kernels" / "gpu"
# Barriers that nothing is found without, by what stands at their line, and why.
REDUNDANT = {
    "    tl.debug_barrier()\n": "register_kernel: a row of several warps has passed others by then",
    "        tl.debug_barrier()  # in place": "row_gradient: its gradient is never in place",
    "            tl.debug_barrier()  # in place": "write_gradient: split rows are read elsewhere",
    "    row_m = tl.max(m, axis=0)": "online_kernel: a program's first reduction follows nothing",
    "            tl.store(weight_sum_ptr": "finish_kernel: few tokens are one step of its loop",
}
# Of these the last element is touched.
TIGHT = {
    "weights_kernel": {"row_scalar_ptr", "weight_sum_ptr", "valid_mask_ptr", "factors_ptr"},
    "rows": {"target_ptr", "ce_ptr", "row_max_ptr", "log_sum_ptr", "grad_ptr"},
}
CHOSEN = ["row", "token", "online", "split, token", "gradient", "scale"]
OF_FORMS = ["row, of a form", "token, of a form", "online, of a form", "split, of a form"]


@pytest.fixture
def on(ptx_machine):
    """(driver, module of mutations)."""
    from ptx import mutations

    yield ptx_machine, mutations
    ptx_machine.change = ptx_machine.replace = None
    ptx_machine.record.found.clear()


def test_every_barrier_removed_in_turn(on):
    driver, mutations = on
    found = list(mutations.removals(driver, mutations.SCENARIOS))
    missed = [removal for removal in found if not removal.kinds]
    print(f"{len(found) - len(missed)} of {len(found)} removals seen")
    assert len(found) > 100
    assert len(missed) <= 0.15 * len(found)
    for removal in missed:
        name, number = removal.line.split(":")
        line = linecache.getline(str(GPU / name), int(number))
        assert line.startswith(tuple(REDUNDANT)), removal


@pytest.mark.parametrize("title", CHOSEN + OF_FORMS)
def test_kernels_as_they_are_have_no_findings(on, title):
    driver, mutations = on
    assert mutations.execute(driver, mutations.SCENARIOS[title]) == []


def moved(tensor):
    """Its pointer, one element on."""
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + 1)


def truncated(tensor):
    """Its storage without the last element."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return whole[:-1].clone().as_strided((1,), (1,), tensor.storage_offset())


@pytest.mark.parametrize("how", [moved, truncated])
@pytest.mark.parametrize("title", ["row", "token", "online", "split, token"])
def test_a_tensor_that_is_not_what_the_launcher_was_given(on, title, how):
    driver, mutations = on
    names = TIGHT["rows"] | ({"logits_ptr"} if how is moved else set())
    if title == "row":
        names |= TIGHT["weights_kernel"]
    for name in sorted(names):
        driver.replace = lambda each, tensor, name=name: how(tensor) if each == name else tensor
        kinds = mutations.execute(driver, mutations.SCENARIOS[title])
        assert {"outside of memory", "misaligned"} & set(kinds), name


@pytest.mark.parametrize("title", CHOSEN[:5])
def test_shared_memory_that_is_read_early(on, title):
    """Without the first store to it."""
    driver, mutations = on
    scenario = mutations.SCENARIOS[title]
    for text in mutations.texts(driver, scenario):
        store = re.search(r"\b(st\.shared|stmatrix)[^;]*;", text)
        if store is not None:
            without = text[: store.start()] + text[store.end() :]
            kinds = mutations.execute(driver, scenario, mutations.replacing(text, without))
            assert "reads shared memory before it is written" in kinds


@pytest.mark.parametrize("fusion", [True, False])
def test_sums_whose_lanes_differ_in_the_last_bit(on, fusion):
    """A product that is fused into the first addition of a sum, in one lane of each pair."""
    from support.compiled import unrounded_kernel

    a, b = torch.rand(2, 128)
    unrounded_kernel[(1,)](a, b, torch.empty(1), N=128, num_warps=4, enable_fp_fusion=fusion)
    assert on[0].record.kinds() == (
        {"lanes write different bits to one place"} if fusion else set()
    )


def test_a_guard_that_is_lost(on):
    """Masked lanes that load all the same leave the tensor, or its last row's end."""
    driver, mutations = on
    scenario = mutations.SCENARIOS["gradient"]
    for text in mutations.texts(driver, scenario):
        assert mutations.execute(
            driver,
            scenario,
            mutations.replacing(text, re.sub(r"@%p\d+ st\.global", "st.global", text)),
        )


def test_an_instruction_that_is_not_there_is_named(on):
    driver, mutations = on
    scenario = mutations.SCENARIOS["scale"]
    with pytest.raises(Exception, match=r"mul\.rz\.f32"):
        mutations.execute(driver, scenario, lambda text: text.replace("mul.f32", "mul.rz.f32"))
