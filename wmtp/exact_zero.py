"""What counts for nothing spoils nothing: 0 times an infinity or a NaN is 0 here.

Two functions for the eager loss, differentiable as often as wanted, in either direction. IEEE's
0 x inf = NaN would carry one bad row of logits into the loss and the gradients of all others, and
`torch.where` around the product would hide it from the loss alone: autograd multiplies again.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from wmtp.transforms import in_torch_func


def product(a: Tensor, b: Tensor) -> Tensor:
    """a * b, and 0 wherever a is 0; they broadcast.

    >>> product(torch.tensor([0.0, 2.0]), torch.tensor([float("inf"), 3.0]))
    tensor([0., 6.])
    """
    return _apply(_Product, a, b, False)


def log_sum_exp(rows: Tensor, shift: Tensor) -> Tensor:
    """log sum exp(x - shift) of rows [..., V], whose gradient is that of their log-sum-exp.

    Args:
        rows: [..., V].
        shift: [...], a constant that keeps the exponentials in range.

    A row whose result is not finite gets a NaN gradient, but exactly 0 where 0 comes from above.
    """
    return _apply(_LogSumExp, rows, shift)


def _apply(function, *arguments):
    # A functional one costs 100 us a call, and torch.compile takes none that has a jvp.
    if torch.compiler.is_compiling() or not (in_torch_func() or forward_ad._current_level >= 0):
        return function.apply(*arguments)
    if _is_functionalized():  # by which no Function goes through: values, and plain derivatives
        return _PLAIN[function](*arguments)
    return _FUNCTIONAL[function].apply(*arguments)


def _is_functionalized() -> bool:
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or ()
    return any(layer.key() == functorch.TransformType.Functionalize for layer in stack)


class _Product(Function):
    """`both`: a 0 on either side wins. So it is with derivatives: a slope of infinity at a weight
    of 0 is right there, and nothing to whoever is multiplied with that weight."""

    @staticmethod
    def forward(ctx, a, b, both):
        ctx.save_for_backward(a, b)
        return _product(a, b, both)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        of_a, of_b, _ = ctx.needs_input_grad
        return (
            _apply(_Product, grad, b, True).sum_to_size(a.shape) if of_a else None,
            _apply(_Product, grad, a, True).sum_to_size(b.shape) if of_b else None,
            None,
        )


def _product(a, b, both):
    zero = (a == 0) | (b == 0) if both else a == 0
    return torch.where(zero, 0.0, a * b)


class _LogSumExp(Function):
    @staticmethod
    def forward(ctx, rows, shift):
        log_sum = _log_sum_exp(rows, shift)
        ctx.save_for_backward(rows, shift, log_sum)
        return log_sum

    @staticmethod
    def backward(ctx, grad):
        rows, shift, log_sum = ctx.saved_tensors
        unwanted = (grad == 0) & ~log_sum.isfinite()
        exponents = (rows - shift[..., None]).masked_fill(unwanted[..., None], 0.0)
        scale = grad * (-log_sum.masked_fill(unwanted, 0.0)).exp()
        return scale[..., None] * exponents.exp(), None


def _log_sum_exp(rows, shift):
    return (rows - shift[..., None]).exp().sum(-1).log()


class _FunctionalProduct(_Product):
    generate_vmap_rule = True
    forward = staticmethod(_product)  # type: ignore[assignment]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def jvp(ctx, of_a, of_b, _):
        a, b = ctx.saved_tensors
        return _apply(_Product, of_a, b, True) + _apply(_Product, of_b, a, True)


class _FunctionalLogSumExp(_LogSumExp):
    generate_vmap_rule = True
    forward = staticmethod(_log_sum_exp)  # type: ignore[assignment]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output)
        ctx.save_for_forward(*inputs, output)

    @staticmethod
    def jvp(ctx, of_rows, _):
        rows, shift, log_sum = ctx.saved_tensors
        softmax = (rows - shift[..., None] - log_sum[..., None]).exp()
        return _apply(_Product, of_rows, softmax, True).sum(-1)


_PLAIN: dict[type[Function], Callable[..., Tensor]] = {_Product: _product, _LogSumExp: _log_sum_exp}
_FUNCTIONAL = {_Product: _FunctionalProduct, _LogSumExp: _FunctionalLogSumExp}
