"""Triton's interpreter as the tests want it: it rounds as a card does, and takes a quarter of the
time, most of which goes into making the same few types anew for every operation."""

import dataclasses
import functools
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

    # Of every sum of integers it asks whether it overflows, and then drops the answer.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    keep_types(interpreter, tl)


def keep_types(interpreter: Any, tl: Any) -> None:
    """What follows from a type is found once."""
    in_numpy, semantic = interpreter._get_np_dtype, interpreter.TritonSemantic
    make_block, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    broadcast, equal = semantic.broadcast_impl_value, tl.dtype.__eq__
    blocks: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, dict[str, Any]] = {}
    dtypes: dict[str, Any] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = {"shape": self.shape, "numel": self.numel}
        vars(self).update(shapes[key], handle=handle, type=type, dtype=type.scalar)

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        same = lhs.type.is_block() and rhs.type.is_block() and lhs.shape is rhs.shape
        return (lhs, rhs) if same else broadcast(self, lhs, rhs)

    def get_np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = in_numpy(dtype)
        return dtypes[name]

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor
    tl.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    semantic.computation_type_impl = functools.cache(semantic.computation_type_impl)
    semantic.broadcast_impl_value = broadcast_impl_value
    interpreter._get_np_dtype = get_np_dtype


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to nearest, ties to even; Triton's cuts them off."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)
