"""A case as numbers."""

import torch
from torch import Tensor

from support.fuzz import layouts
from support.fuzz.options import Case
from wmtp.labels import has_target, shift_to_heads


def as_dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


class Problem:
    """The tensors of a case.

    Attributes:
        numbers: the floating tensors, dense, of their own dtypes; "rows" are the logits or hidden
            states [B, S, H, V or D], "matrix" and "bias" the lm_head's.
        target_ids: [B, S].
        targets, valid: [B, S, H], the ids as the heads are asked for them, and whether they are.
        upstream: of the loss [] and of the cross entropies [B, S, H], in float64.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.generator = torch.Generator().manual_seed(case["seed"])
        batch, length, heads, vocab = (case[n] for n in ("batch", "length", "heads", "vocab"))
        self.ignore_index = vocab - 1 if case["ignore_index"] == "last" else case["ignore_index"]
        self.target_ids = self._make_ids((batch, length), vocab)
        self.targets = shift_to_heads(self.target_ids.long(), heads, self.ignore_index)
        self.valid = has_target(self.target_ids, heads, self.ignore_index)
        self.numbers = self._make_numbers((batch, length, heads), vocab, case["dim"])
        self.upstream = (
            torch.tensor(case["grad_loss"], dtype=torch.float64),
            case["grad_ce"] * self._normal((batch, length, heads)).double(),
        )

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def _rand(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def _make_ids(self, shape: tuple[int, int], vocab: int) -> Tensor:
        ends = {"any": None, "first": [0], "last": [vocab - 1], "ends": [0, vocab - 1]}
        choices = ends[self.case["drawn_ids"]] or range(vocab)
        ids = torch.tensor(choices)[torch.randint(len(choices), shape, generator=self.generator)]
        ids[self._rand(shape) < self.case["ignored"]] = self.ignore_index
        if self.case["ids"] == "strided":
            return torch.stack((ids, torch.full_like(ids, -7)), -1)[..., 0]
        return ids.to(as_dtype(self.case["ids"]))

    def _make_numbers(self, rows: tuple[int, int, int], vocab: int, dim: int) -> dict[str, Tensor]:
        case = self.case
        dtype = as_dtype(case["dtype"])
        last = dim if case["op"] == "linear" else vocab
        main = case["scale"] * self._normal((*rows, last)).double() + case["offset"]
        for where, value in case["specials"]:
            self._put(main, where, value)
        found = {"rows": main.to(dtype)}
        if case["op"] == "linear":
            matrix = case["matrix_scale"] * self._normal((vocab, dim)) / dim**0.5
            found["matrix"] = matrix.to(dtype)
            if case["bias"]:
                found["bias"] = self._normal((vocab,)).to(dtype)
        batch, length, _ = rows
        if case["weighting"] in ("given", "learning"):
            found["head_weights"] = self._make_weights(rows).to(as_dtype(case["weights_dtype"]))
        elif case["weighting"] == "ref_ce":
            ref_ce = self._reference(16 * self._rand((batch, max(length - 1, 0))))
            found["ref_ce"] = ref_ce.to(as_dtype(case["reference_dtype"]))
        elif case["weighting"] == "ref_logits":
            found["ref_logits"] = self._reference(3 * self._normal((batch, length, vocab))).to(
                dtype
            )
        return found

    def _reference(self, values: Tensor) -> Tensor:
        """Some of the values replaced, where there is a special one."""
        special = self.case["reference"]
        replaced = self._rand(tuple(values.shape)) < 0.2
        return values if special is None else values.masked_fill(replaced, special)

    def _make_weights(self, rows: tuple[int, int, int]) -> Tensor:
        kind = self.case["weights"]
        if kind == "zero":
            return torch.zeros(rows)
        if kind == "ones":
            return torch.ones(rows)
        if kind == "wide":
            choices = torch.tensor([0.0, 1e-40, 1e-30, 1e-9, 1e-3, 1.0, 7.0, 65504.0, 1e30])
            return choices[torch.randint(len(choices), rows, generator=self.generator)]
        weights = 0.01 + self._rand(rows)
        if kind in ("denormal", "huge"):
            return weights * {"denormal": 1e-40, "huge": 3e38}[kind]
        if kind == "some":
            weights[self._rand(rows) < 0.4] = 0.0
            weights[self._rand(rows[:2]) < 0.2] = 0.0
        return weights

    def _put(self, main: Tensor, where: str, value: float) -> None:
        """A special value into some row [last] of main [B, S, H, last]."""
        if where == "no target":
            none = ~self.valid
            arrange = layouts.ROWS[self.case["layout"]].arrange
            read = arrange(none[..., None].float())[..., 0] != 0
            if not (read & self.valid).any():  # no other entry, which has one, shares the row
                main[none] = value
            return
        if not main.numel():
            return
        row = [int(torch.randint(size, (), generator=self.generator)) for size in main.shape[:3]]
        numbers, target = main[tuple(row)], int(self.targets[tuple(row)])
        last = len(numbers)
        target = target % last if self.valid[tuple(row)] else 0
        if where == "entry":
            numbers[int(torch.randint(last, (), generator=self.generator))] = value
        elif where == "target":
            numbers[target] = value
        elif where == "half":
            numbers[: (last + 1) // 2] = value
        elif where == "others":
            numbers[:target] = numbers[target + 1 :] = value
        else:
            numbers[:] = value
