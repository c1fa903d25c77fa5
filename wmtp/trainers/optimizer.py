"""The optimiser: a scheduled learning rate for the model, a constant one for the value head."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from wmtp.trainers.config import TrainConfig


def build_optimizer(
    config: TrainConfig, model: nn.Module, value_head: nn.Module | None, warmup_steps: int
) -> tuple[Optimizer, LambdaLR]:
    """AdamW over the model's matrices (decayed), its norms, and the value head, in this order.

    Args:
        config: see `lr_factor`, `weight_decay` and `value_lr` there.
        model, value_head: what is trained.
        warmup_steps: of the value head alone; the model's schedule starts after them.
    """

    def schedule(step: int) -> float:
        return config.lr_factor(max(0, step - warmup_steps))

    def constant(step: int) -> float:
        return 1.0

    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": norms, "lr": config.lr, "weight_decay": 0.0},
    ]
    factors: list[Callable[[int], float]] = [schedule, schedule]
    if value_head is not None:
        parameters = list(value_head.parameters())
        groups.append({"params": parameters, "lr": config.value_lr, "weight_decay": 0.0})
        factors.append(constant)
    optimizer = AdamW(groups, betas=(0.9, 0.95))
    return optimizer, LambdaLR(optimizer, factors)


def multiply_gradients(model: nn.Module, factor: Tensor) -> None:
    """In place, where there are any."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def state_bytes(optimizer: Optimizer, *modules: nn.Module | None) -> int:
    """Of parameters and optimiser: what a checkpoint takes, but for small change."""
    tensors: list[Any] = [each for module in modules if module for each in module.parameters()]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    return sum(each.nbytes for each in tensors if isinstance(each, Tensor))
