"""The linear loss in two processes: DDP, and weights that FSDP2 has sharded."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from support.tiny_runs import in_processes
from wmtp import fused_linear_weighted_mtp_loss
from wmtp.reference import compute_weighted_mtp_loss

PROCESSES, VOCABULARY, DIM, HEADS = 2, 33, 8, 2  # 33 rows do not divide among two
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(DIM, DIM)
        self.lm_head = torch.nn.Linear(DIM, VOCABULARY)

    def forward(self, x, target_ids, **more):
        hidden = self.body(x).tanh()
        head = self.lm_head
        return fused_linear_weighted_mtp_loss(
            hidden, head.weight, target_ids, lm_head_bias=head.bias, chunk_bytes=1, **more
        ).loss


def problem():
    torch.manual_seed(0)
    x = torch.randn(PROCESSES, 6, HEADS, DIM)
    return Model(), x, torch.randint(VOCABULARY, (PROCESSES, 6))


def true_gradients():
    """Of the mean of the processes' losses."""
    model, x, target_ids = problem()
    logits = F.linear(model.body(x).tanh(), model.lm_head.weight, model.lm_head.bias)
    losses = [
        compute_weighted_mtp_loss(logits[i : i + 1], target_ids[i : i + 1], horizon=HEADS).loss
        for i in range(PROCESSES)
    ]
    (sum(losses) / PROCESSES).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def with_ddp(model, x, target_ids):
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    wrapped(x, target_ids).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def with_fsdp(model, x, target_ids):
    """The head by itself, sharded again when its forward, which nobody calls, would end."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model.lm_head.weight, DTensor)
    with CommDebugMode() as communication:
        loss = model(x, target_ids)
    counts = communication.get_comm_counts()
    # Of the head's weight and bias, for five chunks; FSDP gathers the body in its own way.
    assert counts[torch.ops.c10d_functional.all_gather_into_tensor] == 2
    loss.backward()
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def with_fsdp_compiled(model, x, target_ids):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.lm_head, mesh=dist.init_device_mesh("cpu", (PROCESSES,)))
    hidden = model.body(x).tanh()
    step = torch.compile(
        lambda hidden, weight, bias: (
            fused_linear_weighted_mtp_loss(
                hidden, weight, target_ids, lm_head_bias=bias, chunk_bytes=1
            ).loss
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    step(hidden, model.lm_head.weight, model.lm_head.bias).backward()
    for parameter in model.body.parameters():
        dist.all_reduce(parameter.grad, dist.ReduceOp.SUM)
        parameter.grad /= PROCESSES
    return {
        name: getattr(parameter.grad, "full_tensor", lambda grad=parameter.grad: grad)()
        for name, parameter in model.named_parameters()
    }


def work(function, folder):
    rank = dist.get_rank()
    model, x, target_ids = problem()
    found = function(model, x[rank : rank + 1], target_ids[rank : rank + 1])
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()  # gloo aborts a process whose peer has gone
    dist.destroy_process_group()


@pytest.mark.parametrize("function", [with_ddp, with_fsdp, with_fsdp_compiled])
def test_gradients_are_those_of_one_process(function, tmp_path):
    assert in_processes(PROCESSES, work, function, tmp_path) == [0] * PROCESSES
    wanted = true_gradients()
    for rank in range(PROCESSES):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)
