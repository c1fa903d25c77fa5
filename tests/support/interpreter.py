"""Triton's interpreter as the tests want it: it rounds as a card does, and takes half the time."""

from typing import Any

import numpy as np


def amend() -> None:
    """For this process. Imports Triton, so TRITON_INTERPRET must be set."""
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(to_bfloat16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    interpreter.InterpreterBuilder.cast_impl = cast_impl

    # For every device function it patches triton.language anew: once a launch is enough.
    patch, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: dict[int, Any] = {}

    def patch_lang(function: Any) -> Any:
        module = id(function.__globals__)
        if module not in patched:
            patched[module] = patch(function)
        return patched[module]

    def execute_once(self: Any, *arguments: Any, **options: Any) -> None:
        patched.clear()
        execute(self, *arguments, **options)

    interpreter._patch_lang = patch_lang
    interpreter.GridExecutor.__call__ = execute_once


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to nearest, ties to even; Triton's cuts them off."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)
