"""Several rules at once: their weights, multiplied. B batch, S sequence, H heads.

w[b, t, k] = product over the rules of their finished weights
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from wmtp.exact_zero import product
from wmtp.labels import Targets
from wmtp.weightings.base import Weighting, rule_of
from wmtp.weightings.decay import Decay

SCOPES = ("row", "token", "chunk", "head", "batch")


@dataclass(frozen=True, eq=False)
class Product(Weighting):
    """`A * B` of two rules or more: w = w_A w_B, each finished before.

    Rules whose weights labels tell, and `Decay`, cost nothing beside another; two that follow from
    the cross entropies are fused as one. No gradient reaches `Given` beside a rule that follows
    from the cross entropies: pass it detached there.

    Attributes:
        rules: two or more, of which none is a product.

    Raises, with the loss:
        ValueError: reductions of the rules that differ, and none is named.

    >>> import torch
    >>> from wmtp.weightings import DFT, Focal
    >>> ce, valid = torch.tensor([[[0.6931]]]), torch.tensor([[[True]]])
    >>> (DFT() * Focal(gamma=1.0)).weights(ce, valid)
    tensor([[[0.2500]]])
    """

    rules: tuple[Weighting, ...]

    @property
    def scope(self) -> str:  # type: ignore[override]
        return max((rule.scope for rule in self.rules), key=SCOPES.index)

    @property
    def reduction(self) -> str:  # type: ignore[override]
        """ "" where they differ."""
        found = {rule.reduction for rule in self.rules if not isinstance(rule, Decay)}
        return found.pop() if len(found) == 1 else "" if found else Decay.reduction

    @property
    def at_most_one(self) -> bool:  # type: ignore[override]
        return all(rule.at_most_one for rule in self.rules)

    @property
    def known(self) -> bool:  # type: ignore[override]
        return all(rule.known for rule in self.rules)

    @property
    def compares(self) -> bool:  # type: ignore[override]
        return any(rule.compares for rule in self.rules)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(name for rule in self.rules for name in rule.needs))

    @property
    def numbers(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"{i}.{name}" for i, rule in enumerate(self.rules) for name in rule.numbers)

    @property
    def case(self) -> str:
        """Of two."""
        cases = [rule.case for rule in self.rules]
        return "*".join(cases) if len(cases) == 2 and all(cases) else ""

    def parts(self) -> tuple[Weighting, ...]:
        return self.rules

    def weights(self, ce: Tensor, valid: Tensor, **needs: Tensor) -> Tensor:
        """Also what the rules need."""
        found = []
        for rule in self.rules:
            wanted = (*rule.needs, *(("ref_ce",) if rule.compares else ()))
            found.append(rule.weights(ce, valid, **{name: needs[name] for name in wanted}))
        return functools.reduce(product, found)

    def check(self, name: str, scores: Tensor, targets: Targets) -> None:
        for rule in self.rules:
            rule.check(name, scores, targets)
        comparing = [type(rule).__name__ for rule in self.rules if rule.compares]
        if sum(rule.selects for rule in self.rules) > 1:
            raise ValueError("a product may have one KeepTop, got several: multiply their ratios")
        if len(comparing) > 1:
            raise ValueError(
                f"one rule of a product may compare with a reference, got {' and '.join(comparing)}"
                ": pass the weights of one as head_weights"
            )

    def with_fields(self, **fields: Any) -> "Product":
        """Of the rule that compares with a reference: another reference."""
        rules = (rule.with_fields(**fields) if rule.compares else rule for rule in self.rules)
        return Product(tuple(rules))

    def narrowed(self, targets: Targets) -> Targets:
        return functools.reduce(lambda so_far, rule: rule.narrowed(so_far), self.rules, targets)

    def resolved(self, targets: Targets) -> "Product":
        return Product(tuple(rule.resolved(targets) for rule in self.rules))

    def number_values(self) -> list[Tensor | float]:
        return [number for rule in self.rules for number in rule.number_values()]

    def with_numbers(self, numbers: Sequence[Tensor]) -> "Product":
        left, rules = list(numbers), []
        for rule in self.rules:
            count = len(rule.numbers)
            rules.append(rule.with_numbers(left[:count]))
            left = left[count:]
        return Product(tuple(rules))

    def key(self) -> str:
        return f"{self._name} { ({'rules': tuple(rule.key() for rule in self.rules)}) }"

    @classmethod
    def _known_by(cls, fields: dict[str, Any]) -> "Product":
        return cls(tuple(map(rule_of, fields["rules"])))
