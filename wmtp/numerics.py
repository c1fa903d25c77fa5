"""What is made of the logits before the softmax, and beside the cross entropy. V vocabulary.

x = s logits                                logit_scale = s
  | c tanh(s logits / c)                    softcap = c (Gemma 2, arXiv 2408.00118, section 2)
  | a sigmoid((s logits + b) / c)           sigmoid_cap = (a, b, c)
f = (1 - eps) ce + eps (lse - mean_v x) + z lse^2
                                            label_smoothing = eps (Szegedy et al. 2016,
                                            arXiv 1512.00567, section 7), z_loss = z (PaLM,
                                            arXiv 2204.02311, section 5)
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp.kinds import check_number, check_whole, is_real, shown


class Numerics(NamedTuple):
    """The same as the kernels have it: both caps are one, for sigmoid(u) = (1 + tanh(u / 2)) / 2.

        x = slope logits  |  center + amplitude tanh(slope logits + offset)    if amplitude > 0

    x rises with the logits, so that their order is its order.
    """

    slope: float = 1.0
    offset: float = 0.0
    amplitude: float = 0.0
    center: float = 0.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0

    @property
    def capped(self) -> bool:
        return self.amplitude > 0

    @property
    def adds_terms(self) -> bool:
        """Whether the loss averages more than the cross entropy."""
        return self.z_loss != 0 or self.label_smoothing != 0

    @property
    def of_ce(self) -> "Numerics":
        """Without what the loss averages more than that."""
        return self._replace(z_loss=0.0, label_smoothing=0.0)

    @property
    def steepest(self) -> float:
        """The largest dx / dlogits."""
        return self.slope * self.amplitude if self.capped else self.slope

    @property
    def largest_gradient(self) -> float:
        """No |df / dlogits| is larger: of float16 logits, which are at most 65504."""
        largest_x = abs(self.center) + self.amplitude if self.capped else 65504 * self.slope
        largest_lse = largest_x + math.log(2.0**31)
        return self.steepest * (1 + 2 * self.z_loss * largest_lse)

    def x_of(self, logits: Tensor) -> Tensor:
        """x of logits as they are accumulated, by plain torch operations."""
        if not self.capped:
            return logits if self.slope == 1 else logits * self.slope
        # A NaN passes by: where its row has no weight, tanh' would make one of a gradient of 0.
        nan = logits.isnan()
        steps = logits.masked_fill(nan, 0.0) * self.slope + self.offset
        return torch.where(nan, logits, steps.tanh() * self.amplitude + self.center)


PLAIN = Numerics()


def numerics_of(
    logit_scale: float = 1.0,
    softcap: float | None = None,
    sigmoid_cap: Sequence[float] | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Numerics:
    """Of the arguments of a loss.

    Raises:
        ValueError: both caps; a scale or cap that is not finite and > 0, z_loss < 0,
            label_smoothing outside [0, 1).
    """
    _check_finite("logit_scale", logit_scale, "it multiplies the logits")
    if softcap is not None and sigmoid_cap is not None:
        raise ValueError("softcap and sigmoid_cap exclude each other: pass the one your head has")
    if not (is_real(z_loss) and 0 <= z_loss < math.inf):
        raise ValueError(
            f"z_loss must be a finite number >= 0, got {shown(z_loss)}: 1e-4 is the usual choice"
        )
    if not (is_real(label_smoothing) and 0 <= label_smoothing < 1):
        raise ValueError(
            f"label_smoothing must be in [0, 1), got {shown(label_smoothing)}: 0.1 is the usual "
            "choice"
        )
    # torch.compile's symbols become numbers here: of each value there is a graph.
    scale, terms = float(logit_scale), (float(z_loss), float(label_smoothing))
    if softcap is not None:
        _check_finite("softcap", softcap, "it bounds the logits, e.g. 30.0; None is no cap")
        cap = float(softcap)
        return Numerics(scale / cap, 0.0, cap, 0.0, *terms)
    if sigmoid_cap is not None:
        a, b, c = _checked_sigmoid_cap(sigmoid_cap)
        return Numerics(scale / (2 * c), b / (2 * c), a / 2, a / 2, *terms)
    return Numerics(scale, 0.0, 0.0, 0.0, *terms)


def _check_finite(name: str, value: float, remedy: str) -> None:
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a tensor: pass {name}.item()")
    check_number(name, value, remedy)


def _checked_sigmoid_cap(cap: Sequence[float]) -> tuple[float, float, float]:
    if isinstance(cap, (tuple, list)) and len(cap) == 3 and all(map(is_real, cap)):
        a, b, c = map(float, cap)
        if 0 < a < math.inf and math.isfinite(b) and 0 < c < math.inf:
            return a, b, c
    found = tuple(map(shown, cap)) if isinstance(cap, (tuple, list)) else shown(cap)
    raise ValueError(
        "sigmoid_cap must be (a, b, c) of a sigmoid((x + b) / c), a and c > 0, all finite, got "
        f"{found}: (30.0, 0.0, 7.5) is one"
    )


def check_vocab_size(vocab_size: int | None, columns: int, name: str) -> None:
    """`name` is what has so many columns, or rows."""
    if vocab_size is None:
        return
    check_whole("vocab_size", vocab_size, 1, "it is the number of columns that are tokens")
    if vocab_size > columns:
        raise ValueError(
            f"vocab_size must be at most V = {columns}, as many as the {name} have, got "
            f"{vocab_size}: pass None for all"
        )
