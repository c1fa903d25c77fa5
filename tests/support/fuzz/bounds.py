"""How far an answer may lie from the truth, entry by entry: the rounding of each step, carried on.

    x       logits            exact; of the linear op a product rounded to its dtype
    p       softmax           dp = p (exp(dx + dlse) - 1) + eps p (1 + |log p|)
    ce      lse - x_target    dce = dlse + dx_target + eps (1 + ce)
    w       weights           exact; or a softmax of (ce - ref) / T, whose odds dce / T moves
    c       dloss/dce         dc = eps c + dw dc/dw
    g       c (p - onehot)    dg = |c| dp + dc |p - onehot|, and the rounding of what it is kept in

d stands for the bound, eps for a few roundings of the accumulation dtype. A bound has the size of
its own entry, never that of the largest. All of it is float64, [B, S, H] or [B, S, H, V].
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from support.fuzz.answers import Answer, Truth, gradient_name, keywords, objectives, pieces
from support.fuzz.problem import Problem, as_dtype
from wmtp import excess_head_weights
from wmtp.labels import shift_to_heads
from wmtp.reduction import accumulation_dtype, counted_tokens

UNITS = 8  # roundings of a step, and as many again as the square root of the terms it sums up


class Rounding(NamedTuple):
    """eps of what a step is computed in, and the smallest number that is told from 0; `normal`:
    that a kernel may take for 0, for no exponential cares for less."""

    eps: float
    least: float
    normal: float

    def __call__(self, size: Tensor) -> Tensor:
        return self.eps * size.abs() + self.least


def rounding(dtype: torch.dtype, units: float) -> Rounding:
    limits = torch.finfo(dtype)
    least = limits.smallest_normal * limits.eps
    return Rounding(units * limits.eps, least, 4 * limits.smallest_normal)


class Off(NamedTuple):
    """A value, and how far off it may be."""

    value: Tensor
    by: Tensor


def times(a: Tensor, b: Tensor) -> Tensor:
    """a b, and 0 where one of them is."""
    return torch.where((a == 0) | (b == 0), 0.0, a * b)


def softmax(x: Off, acc: Rounding) -> tuple[Off, Tensor]:
    """p, and how far off the log-sum-exp may be [...]; where that is no number, p is 0 or NaN."""
    lse = x.value.logsumexp(-1, keepdim=True)
    log_p = torch.where(lse.isfinite(), x.value - lse, -math.inf)
    lse_off = torch.where(lse.isfinite(), (log_p + x.by).logsumexp(-1, keepdim=True), 0.0)
    lse_off = lse_off.clamp(min=0.0)
    p = log_p.exp()
    by = times(p, torch.expm1(x.by + lse_off) + acc.eps * (1 + log_p.abs())) + acc.normal
    return Off(p, by.clamp(max=1.0)), lse_off[..., 0]


def cross_entropy(x: Off, targets: Tensor, ce: Tensor, lse_off: Tensor, acc: Rounding) -> Off:
    at_target = x.by.gather(-1, targets[..., None])[..., 0]
    return Off(ce, lse_off + at_target + acc.eps * (1 + ce.abs()))


class Bounds:
    """What every entry of the answer to a problem may be off by."""

    def __init__(self, problem: Problem, exact: Truth) -> None:
        self.problem, self.case, self.exact = problem, problem.case, exact
        dtype = problem.numbers["rows"].dtype
        vocab, rows = exact.logits.shape[-1], exact.slope.numel()
        self.acc = rounding(accumulation_dtype(problem.numbers["rows"]), UNITS + math.sqrt(vocab))
        self.sum = self.acc._replace(eps=self.acc.eps + self.acc.eps / UNITS * math.sqrt(rows))
        # What a gradient is written in, and rounded to again when backward multiplies it; a view
        # that shows an entry several times rounds their sum once more.
        self.kept = rounding(dtype, 1.02 if self.case["leaf"] else 1.6)
        # What was taken for 0 when it was written ahead is 0 times any upstream gradient.
        least = max(self.kept.least, self.acc.normal) * max(1.0, abs(self.case["grad_loss"]))
        self.kept = self.kept._replace(least=least)
        self.valid = problem.valid
        self.given = {name: self._dense(name) for name in exact.tensors.given}
        x = Off(exact.logits, self._logits_off())
        self.p, lse_off = softmax(x, self.acc)
        self.onehot = problem.targets[..., None] == torch.arange(vocab)
        self.targets = torch.where(self.valid, problem.targets, 0)
        self.p = self.p._replace(by=self.p.by + self.acc.eps * self.onehot)
        self.ce = cross_entropy(x, self.targets, self._ce(), lse_off, self.acc)
        self.ce = self.ce._replace(by=torch.where(self.valid, self.ce.by, 0.0))
        self._weigh()

    def _ce(self) -> Tensor:
        ce = self.exact.answer["ce"]
        return F.pad(ce[..., None], (0, 0, 0, 1))[:, : self.case["length"]] if ce.dim() == 2 else ce

    def _dense(self, name: str) -> Tensor:
        given = self.exact.tensors.given[name]
        given = torch.stack(given, 2) if isinstance(given, list) else given
        if name == "rows" and self.case["op"] == "linear":
            given = given.masked_fill(~self.valid[..., None], 0.0)
        return given.detach()

    def _logits_off(self) -> Tensor:
        logits = self.exact.logits
        if self.case["op"] != "linear":
            return torch.zeros_like(logits)
        size = self.given["rows"].abs() @ self.given["matrix"].abs().T
        size = size + self.given["bias"].abs() if "bias" in self.given else size
        off = self.acc(size) + rounding(self.problem.numbers["rows"].dtype, 1.02)(logits)
        return torch.where(logits.isfinite(), off, 0.0)

    def _weigh(self) -> None:
        """weights [B, S, H], what 1 / denominator is [], and dloss/dce [B, S, H]."""
        case = self.case
        if case["weighting"] in ("ref_ce", "ref_logits"):
            weights = self._excess_weights()  # which sum to 1, even where they are NaN
            self.weight_sum = self.valid.any(-1, keepdim=True).double()
        else:
            known = self.given.get("head_weights", torch.ones(())).double()
            weights = Off(torch.where(self.valid, known, 0.0), torch.zeros(()))
            self.weight_sum = weights.value.sum(-1, keepdim=True)
        self.weights = weights.value
        self.inverse = self._inverse()
        slope = self.exact.slope
        by = self.sum.eps * slope.abs() + torch.where(slope == 0, 0.0, self.acc.least)
        self.slope = Off(slope, by + times(weights.by, self.inverse))

    def _excess_weights(self) -> Off:
        options = keywords(self.problem, "both")
        if "ref_ce" in self.given:
            ref = self.given["ref_ce"]
            ref_off = torch.zeros_like(ref)
        else:
            ref, ref_off = self._reference()
        weights = excess_head_weights(
            *(self.ce.value, ref, self.problem.target_ids),
            *(options["temperature"], options["excess"], self.problem.ignore_index),
        )
        ref, ref_off = (self._aligned(values) for values in (ref, ref_off))
        exact = ~((self.ce.value - ref).isfinite() & self.valid)  # what is infinite is not rounded
        off = self.ce.by + ref_off + self.acc.eps * (self.ce.value.abs() + ref.abs())
        off = torch.where(exact, 0.0, off / options["temperature"])
        moved = off + off.amax(-1, keepdim=True)
        w, factor = weights, torch.expm1(moved.clamp(max=300.0))
        down = w * (1 - w) * factor / (1 + (1 - w) * factor)
        up = w * (1 - w) * factor / (1 + w * factor)
        by = torch.maximum(up, down) + self.acc(w)
        by = torch.where(moved > 300, 1.0, by)
        return Off(w, torch.where(exact & (w == 0), 0.0, by))

    def _reference(self) -> tuple[Tensor, Tensor]:
        """Its cross entropies [B, S - 1], and how far off they are."""
        logits = self.given["ref_logits"]
        ids = self.problem.target_ids.long()[:, 1:]
        counts = ids != self.problem.ignore_index
        x = Off(logits[:, :-1], torch.zeros_like(logits[:, :-1]))
        targets = torch.where(counts, ids, 0)
        lse = x.value.logsumexp(-1)
        ce = lse - x.value.gather(-1, targets[..., None])[..., 0]
        _, lse_off = softmax(x, self.acc)
        found = cross_entropy(x, targets, ce, lse_off, self.acc)
        return torch.where(counts, found.value, 0.0), torch.where(counts, found.by, 0.0)

    def _aligned(self, ref: Tensor) -> Tensor:
        of_token = F.pad(ref, (1, 0))[:, : self.case["length"]]
        return shift_to_heads(of_token, self.case["heads"], 0.0)

    def _inverse(self) -> Tensor:
        """1 / denominator, or [H] of them; 0 where that is 0, for nobody counts then."""
        divisor, pairs = keywords(self.problem, "both").get("normalizer"), self.valid.sum((0, 1))
        if divisor is None:
            total = self.weight_sum.sum()
            divisor = {
                "token_mean": counted_tokens(self.weight_sum).sum().clamp(min=1),
                "weight_mean": torch.where(total == 0, 1.0, total),
                "pair_mean": pairs.sum(),
                "head_mean": pairs,
                "sum": 1.0,
            }[self.case["reduction"]]
        divisor = torch.as_tensor(divisor, dtype=torch.float64)
        if self.case["reduction"] == "head_mean":
            divisor = divisor * len(pairs)
        return torch.where(divisor == 0, 0.0, 1 / divisor)

    def loss(self) -> Tensor:
        ce, slope = self.ce, self.slope
        off = times(slope.by, ce.value) + times(slope.value, ce.by)
        off = off + self.sum.eps * times(slope.value, ce.value)
        least = self.acc.least * self.inverse.amax().clamp(min=1.0) * slope.value.numel()
        return off.sum() + least

    def upstream(self, objective: str) -> Off:
        """What reaches the cross entropies [B, S, H]."""
        grad_loss, grad_ce = self.problem.upstream
        grad_loss = grad_loss if objective in ("loss", "both") else grad_loss * 0
        of_ce = grad_ce if objective in ("ce", "both") else grad_ce * 0
        of_ce = torch.where(self.valid, of_ce, 0.0)
        of_loss = times(grad_loss, self.slope.value)
        by = times(grad_loss.abs(), self.slope.by) + self.acc.eps * (of_loss.abs() + of_ce.abs())
        value = of_loss + of_ce
        return Off(value, by + torch.where(value == 0, 0.0, self.acc.least))

    def logits_gradient(self, c: Off) -> Off:
        """Before it is rounded to what it is kept in."""
        q = self.p.value - self.onehot.double()
        by = times(c.value.abs()[..., None], self.p.by)
        by = by + times(c.by[..., None], q.abs() + self.p.by)
        return Off(times(c.value[..., None], q), by)

    def head_weights_gradient(self, objective: str) -> Tensor:
        grad_loss = self.problem.upstream[0].abs() * (objective != "ce")
        ce, w, scale = self.ce, self.weights, self.inverse
        mean, mean_off = torch.zeros(()), torch.zeros(())
        if self.case["reduction"] == "token_mean":
            counted = counted_tokens(self.weight_sum)
            share = torch.where(counted, w / self.weight_sum, 0.0)
            scale = torch.where(counted, scale / self.weight_sum, 0.0)
            mean = times(share, ce.value).sum(-1, keepdim=True)
            mean_off = times(share, ce.by).sum(-1, keepdim=True)
        elif self.case["reduction"] == "weight_mean" and self.case["normalizer"] is None:
            mean, mean_off = self.exact.answer["loss"], self.loss()
        off = ce.by + mean_off + self.sum.eps * (ce.value + mean)
        kept = rounding(as_dtype(self.case["weights_dtype"]), 1.6)
        by = times(grad_loss * scale, off + kept.eps * (ce.value - mean).abs())
        return torch.where(self.valid, by + kept.least, 0.0)

    def of_tensors(self, objective: str) -> dict[str, Tensor]:
        """Of the gradients in the dense tensors."""
        c = self.upstream(objective)
        g = self.logits_gradient(c)
        counts = torch.where(c.value == 0, 0.0, 1.0)[..., None]
        if "shared" in self.case["layout"]:  # each head is handed an equal part of their sum
            counts = counts.amax(2, keepdim=True).expand(counts.shape)
        found = {"head_weights": self.head_weights_gradient(objective)}
        if self.case["op"] != "linear":
            return {**found, "rows": g.by + counts * self.kept(g.value)}
        return {**found, **self._linear_gradients(c, g, counts)}

    def _linear_gradients(self, c: Off, g: Off, counts: Tensor) -> dict[str, Tensor]:
        """g is kept, multiplied with its row's c, and summed up in products; in float16 the
        operator keeps it in units of the largest c."""
        unit = 1.0
        if self.case["dtype"] == "float16" and self.case["backend"] != "eager":
            unit = max(c.value[c.value.isfinite()].abs().flatten().tolist(), default=0.0)
        kept = self.kept._replace(eps=2 * self.kept.eps, least=self.kept.least * unit)
        x, matrix = self.given["rows"].flatten(0, 2), self.given["matrix"]
        size, off = g.value.abs(), g.by + counts * kept(g.value)
        size, off = size.flatten(0, 2), off.flatten(0, 2)
        to_hidden = times_rows(off + self.sum.eps * size, matrix.abs())
        product = times_rows(g.value.flatten(0, 2), matrix)
        to_hidden = to_hidden + kept(product) + self.kept.least
        chunks = 1 if self.case["chunk_bytes"] is None else max(self.valid.any(-1).sum().item(), 1)
        summed = kept.eps + self.sum.eps
        if self.case["grad_accum_dtype"] == "own":
            summed += chunks * self.kept.eps
        to_hidden = to_hidden.view(self.given["rows"].shape)
        found = {"rows": torch.where(self.valid[..., None], to_hidden, 0.0)}
        for name, operand in (("matrix", x), ("bias", torch.ones_like(x[:, :1]))):
            by = times_rows((off + summed * size).T, operand.abs())
            by = by + kept.least * (operand.abs().nan_to_num(0.0, 0.0).sum() + len(x))
            by = by + self.kept(times_rows(g.value.flatten(0, 2).T, operand))
            found[name] = by if name == "matrix" else by[:, 0]
        return found

    def found(self) -> Answer:
        """By the names of the answer."""
        exact = self.exact.answer
        ce = self.ce.by
        off = {"ce": ce[:, : max(self.case["length"] - 1, 0), 0] if exact["ce"].dim() == 2 else ce}
        if "loss" in exact:
            off["loss"] = self.loss()
        leaves = self.exact.tensors.leaves
        for turn, objective in enumerate(objectives(self.problem) if leaves else ()):
            dense = self.of_tensors(objective)
            for name in leaves:
                for i, piece in enumerate(self._pulled_back(name, dense[name])):
                    off[gradient_name(turn, objective, name, i)] = piece
        return off

    def _pulled_back(self, name: str, off: Tensor) -> list[Tensor]:
        """From what the call is given to the leaves it is made of."""
        given = pieces(self.exact.tensors.given[name])
        parts = off.unbind(2) if len(given) > 1 or off.dim() > given[0].dim() else [off]
        if self.case["leaf"]:
            return [*parts]
        return [
            *torch.autograd.grad(given, self.exact.tensors.leaves[name], parts, retain_graph=True)
        ]


def times_rows(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, where 0 times what is no number is 0."""
    return torch.nan_to_num(a, 0.0) @ torch.nan_to_num(b, 0.0)
