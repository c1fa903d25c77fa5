"""Rules as Triton functions: those of `wmtp.weightings`, compiled when a loss first needs them."""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import triton
import triton.language as tl

from wmtp.weightings.base import rule_of


@functools.cache
def device_function(rule: str) -> Any:
    """The twin of the rule of this `Weighting.key`, for the kernels' RULE; None: known weights."""
    found = rule_of(rule)
    if found.known:
        return None
    assert found.device is not None, f"{rule} has no Triton function"
    return jitted(found.device)


def jitted(function: Callable[..., Any]) -> Any:
    """`triton.jit` of a plain function, in whose module `tl` and the functions that it calls are
    bound."""
    assert isinstance(function, FunctionType)
    scope = function.__globals__
    scope["tl"] = tl
    for name in function.__code__.co_names:
        if isinstance(scope.get(name), FunctionType):
            scope[name] = jitted(scope[name])
    return triton.jit(function)
