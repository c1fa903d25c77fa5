"""The library `torch.ops.wmtp`: opaque operators to autograd, torch.compile and the profiler."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

library = torch.library.Library("wmtp", "DEF")


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    *,
    tags: tuple[torch.Tag, ...] = (),
) -> None:
    """An operator `name(arguments) -> results`, with what each of torch's layers asks of it."""
    name = schema.partition("(")[0]
    library.define(schema, tags=tags)
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"wmtp::{name}", fake, lib=library)
    if backward is not None:
        torch.library.register_autograd(
            f"wmtp::{name}", backward, setup_context=setup_context, lib=library
        )


def needed(ctx: Any, values: Sequence[Any]) -> list[Any]:
    """Of each of an operator's arguments whether its gradient is; in setup_context of an operator
    with lists of tensors the flags of all their tensors stand one after the other."""
    flags = iter(ctx.needs_input_grad)
    return [
        [next(flags) for _ in value] if _is_tensor_list(value) else next(flags) for value in values
    ]


def none_for(values: Sequence[Any]) -> list[Any]:
    """What a backward returns where none of an operator's arguments has a gradient."""
    return [[None] * len(value) if _is_tensor_list(value) else None for value in values]


def _is_tensor_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, torch.Tensor) for entry in value)
