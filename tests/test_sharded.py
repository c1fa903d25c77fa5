"""DTensors: each process's loss of its own part, the gradients placed as what they belong to."""

import pytest
import torch
import torch.distributed as dist

from support.agreement import make_case
from support.tiny_runs import in_processes
from wmtp import (
    fused_linear_weighted_mtp_loss,
    fused_weighted_mtp_loss,
    linear_next_token_cross_entropy,
    mtp_cross_entropy,
    next_token_cross_entropy,
)

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
PROCESSES = 2


def tensors():
    """A batch of three, so that the parts differ; a sequence of five."""
    case = make_case((3, 5, 2, 13), weighting="given", ignored=0)
    return {
        "logits": case.logits,
        "hidden": torch.randn(3, 5, 2, 4, generator=torch.Generator().manual_seed(1)),
        "weight": torch.randn(13, 4, generator=torch.Generator().manual_seed(2)),
        "target_ids": case.target_ids,
        "head_weights": case.options["head_weights"] + 0.1,
    }


def of_logits(t):
    return fused_weighted_mtp_loss(t["logits"], t["target_ids"], t["head_weights"]).loss


def of_a_list(t):
    heads = [t["logits"][:, :, k] for k in range(2)]
    return fused_weighted_mtp_loss(heads, t["target_ids"], t["head_weights"]).loss


def of_a_reference(t):
    ref_logits, normalizer = t["logits"][:, :, 0].detach() / 2, torch.tensor(8.0)
    return fused_weighted_mtp_loss(
        t["logits"], t["target_ids"], ref_logits=ref_logits, normalizer=normalizer
    ).loss


def of_cross_entropies(t):
    heads = [t["logits"][:, :, k] for k in range(2)]
    ref_ce = next_token_cross_entropy(heads[0].detach(), t["target_ids"])
    ce = mtp_cross_entropy(t["logits"], t["target_ids"]) * mtp_cross_entropy(heads, t["target_ids"])
    return ce.sum() + ref_ce.sum()


def of_hidden(t):
    weights = (t["weight"], t["target_ids"], t["head_weights"])
    return fused_linear_weighted_mtp_loss(t["hidden"], *weights, chunk_bytes=200).loss


def of_a_list_of_hidden(t):
    hidden = [t["hidden"][:, :, k] for k in range(2)]
    ref_ce = linear_next_token_cross_entropy(hidden[0].detach(), t["weight"], t["target_ids"])
    if ref_ce.shape[1] < 1:
        return hidden[0].sum()
    return fused_linear_weighted_mtp_loss(hidden, t["weight"], t["target_ids"], ref_ce=ref_ce).loss


def of_documents_and_masks(t):
    ids = t["target_ids"]
    how = {"document_ids": ids // 7, "target_mask": ids % 3 > 0, "position_mask": ids % 5 + 0.5}
    prior = torch.tensor([0.5, 2.0])
    return fused_weighted_mtp_loss(
        t["logits"], ids, t["head_weights"], **how, head_prior=prior, reduction="pair_mean"
    ).loss


def of_labels_per_head(t):
    labels = [t["target_ids"], (t["target_ids"] + 1) % 13]
    hidden = (t["hidden"], t["weight"])
    return fused_linear_weighted_mtp_loss(*hidden, labels, reduction="head_mean").loss


LOSSES = [
    *(of_logits, of_a_list, of_a_reference, of_cross_entropies, of_hidden, of_a_list_of_hidden),
    *(of_documents_and_masks, of_labels_per_head),
]


def check_parts(mesh, placements, loss, compiled=False, plain_targets=False):
    """Against the same loss of this process's part as a plain tensor."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    leaves = ("logits", "hidden", "head_weights")
    whole, given = tensors(), {"weight": tensors()["weight"]}
    for name in (*leaves, "target_ids"):
        given[name] = distribute_tensor(whole[name], mesh, placements)
    plain = {"weight": whole["weight"]}
    for name in (*leaves, "target_ids"):
        plain[name] = given[name].to_local().clone()
    if plain_targets:
        given["target_ids"] = plain["target_ids"]
    for tensor in (*(given[name] for name in leaves), *(plain[name] for name in leaves)):
        tensor.requires_grad_()
    how = {"fullgraph": True, "dynamic": False, "backend": "aot_eager"}
    step = torch.compile(loss, **how) if compiled else loss
    found, wanted = step(given), loss(plain)
    assert not isinstance(found, DTensor)
    torch.testing.assert_close(found, wanted)
    found.backward()
    wanted.backward()
    for name in leaves:
        assert (given[name].grad is None) == (plain[name].grad is None)
        if plain[name].grad is not None:
            assert given[name].grad.placements == tuple(placements)
            torch.testing.assert_close(given[name].grad.to_local(), plain[name].grad)


def check_a_sharded_batch_is_the_whole_one(mesh):
    """With a normalizer of all processes the gradients are those of the batch on one."""
    from torch.distributed.tensor import Shard, distribute_tensor

    t = tensors()
    normalizer = torch.tensor(7.0)
    logits = t["logits"].clone().requires_grad_()
    whole = fused_weighted_mtp_loss(logits, t["target_ids"], normalizer=normalizer).loss
    whole.backward()
    shards = [distribute_tensor(t[name], mesh, [Shard(0)]) for name in ("logits", "target_ids")]
    part = fused_weighted_mtp_loss(
        shards[0].requires_grad_(), shards[1], normalizer=normalizer
    ).loss
    part.backward()
    torch.testing.assert_close(shards[0].grad.full_tensor(), logits.grad)
    total = part.detach()
    dist.all_reduce(total)
    torch.testing.assert_close(total, whole.detach())


def work(folder):
    from torch.distributed.tensor import Replicate, Shard

    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    for placement in (Replicate(), Shard(0), Shard(1)):
        for loss in LOSSES:
            check_parts(mesh, [placement], loss, plain_targets=loss in (of_a_list, of_hidden))
    check_a_sharded_batch_is_the_whole_one(mesh)
    (folder / f"{dist.get_rank()}.done").touch()
    dist.barrier()  # gloo aborts a process whose peer has gone
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    assert in_processes(PROCESSES, work, tmp_path) == [0] * PROCESSES
    assert {file.name for file in tmp_path.glob("*.done")} == {"0.done", "1.done"}


@pytest.fixture(scope="module")
def mesh():
    """[2, 2] processes of which there is but this one: nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield dist.init_device_mesh("cpu", (2, 2))
    dist.destroy_process_group()


@pytest.mark.parametrize("loss", LOSSES)
def test_on_a_mesh_of_two_dimensions(mesh, loss):
    from torch.distributed.tensor import Replicate, Shard

    for placements in ([Shard(0), Replicate()], [Shard(0), Shard(1)], [Replicate(), Replicate()]):
        check_parts(mesh, placements, loss)


@pytest.mark.parametrize("loss", [of_a_list, of_a_list_of_hidden])
def test_inside_compiled_code(mesh, loss):
    from torch.distributed.tensor import Shard

    check_parts(mesh, [Shard(0), Shard(1)], loss, compiled=True)


def misplaced(name):
    """Arguments of which one is placed as it may not be."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (2, 2))
    t, alike = tensors(), [Shard(0), Replicate()]
    placed = {key: distribute_tensor(value, mesh, alike) for key, value in t.items()}
    one = DTensor.from_local(torch.tensor(3.0), mesh, [Partial(), Replicate()], run_check=False)
    ref_ce = distribute_tensor(torch.rand(3, 4), mesh, [Replicate(), Shard(1)])
    over_heads, elsewhere = [Shard(0), Shard(2)], [Replicate(), Replicate()]
    partial = DTensor.from_local(t["logits"], mesh, [Partial(), Replicate()], run_check=False)
    return {
        "vocabulary": {"logits": distribute_tensor(t["logits"], mesh, [Shard(0), Shard(-1)])},
        "heads": {"logits": distribute_tensor(t["logits"], mesh, over_heads)},
        "partial": {"logits": partial},
        "a list": {
            "logits": [distribute_tensor(t["logits"][:, :, 0].contiguous(), mesh, over_heads)]
        },
        "a mixed list": {"logits": [placed["logits"][:, :, 0], t["logits"][:, :, 1]]},
        "targets": {"target_ids": distribute_tensor(t["target_ids"], mesh, elsewhere)},
        "all targets": {"target_ids": t["target_ids"]},
        "plain logits": {"logits": t["logits"]},
        "weights": {"head_weights": distribute_tensor(t["head_weights"], mesh, elsewhere)},
        "normalizer": {"normalizer": one},
        "temperature": {"temperature": one, "ref_logits": placed["logits"][:, :, 0]},
        "ref_ce": {
            "ref_ce": ref_ce,
            "logits": distribute_tensor(t["logits"], mesh, [Replicate(), Shard(1)]),
            "target_ids": distribute_tensor(t["target_ids"], mesh, [Replicate(), Shard(1)]),
        },
    }[name] | {"placed": placed}


REFUSED = {
    "vocabulary": r"logits may be sharded along batch and sequence alone, got a DTensor "
    r"\(Shard\(dim=0\), Shard\(dim=3\)\): gather it first with "
    r"logits.redistribute\(placements=\[Shard\(dim=0\), Replicate\(\)\]\)",
    "heads": "logits may be sharded along batch and sequence alone",
    "partial": r"logits may be sharded .* got a DTensor \(Partial\(sum\), Replicate\(\)\)",
    "a list": "logits may be sharded along batch and sequence alone",
    "a mixed list": "all heads' logits must be placed alike, got .* and a plain tensor",
    "targets": "target_ids must be placed as logits, got a DTensor .*: pass the part",
    "all targets": r"target_ids must be of this process's part of logits, \[B, S\] = \(2, 5\), got "
    r"the whole, \(3, 5\)",
    "plain logits": "target_ids must be placed as logits, got a DTensor .* and a plain tensor",
    "weights": "head_weights must be placed as logits",
    "normalizer": r"normalizer must be the same .*: pass normalizer.full_tensor\(\)",
    "temperature": r"temperature must be the same .*: pass temperature.full_tensor\(\)",
    "ref_ce": "ref_ce has no entry for the last position of each part",
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("mesh")
def test_what_is_placed_otherwise_is_refused(name):
    bad = misplaced(name)
    placed = bad.pop("placed")
    given = {"logits": placed["logits"], "target_ids": placed["target_ids"], **bad}
    with pytest.raises(ValueError, match=REFUSED[name]):
        fused_weighted_mtp_loss(**given)


def test_hidden_states_are_refused_alike(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    t = tensors()
    hidden = distribute_tensor(t["hidden"], mesh, [Shard(0), Shard(3)])
    with pytest.raises(ValueError, match=r"hidden may be sharded along batch and sequence alone"):
        fused_linear_weighted_mtp_loss(hidden, t["weight"], t["target_ids"])


def test_in_place_a_part_is_not_overwritten(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    t, placements = tensors(), [Shard(0), Shard(1)]
    logits = distribute_tensor(t["logits"], mesh, placements).requires_grad_() * 1
    target_ids = distribute_tensor(t["target_ids"], mesh, placements)
    with pytest.raises(ValueError, match=r"a DTensor's part.* or inplace=False"):
        fused_weighted_mtp_loss(logits, target_ids, inplace=True)


def test_parts_that_are_still_on_their_way(mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    t, placements = tensors(), [Shard(0), Replicate()]
    sharded = distribute_tensor(t["logits"], mesh, [Shard(0), Shard(3)])
    logits = sharded.redistribute(mesh, placements, async_op=True)
    target_ids = distribute_tensor(t["target_ids"], mesh, placements)
    loss = fused_weighted_mtp_loss(logits, target_ids).loss
    plain = fused_weighted_mtp_loss(logits.to_local() * 1, target_ids.to_local()).loss
    torch.testing.assert_close(loss, plain, equal_nan=True)
