"""The critic's value head: one number for each position's hidden state."""

from torch import Tensor, nn


class ValueHead(nn.Module):
    """Linear(D, D/2) - ReLU - Linear(D/2, 1).

    Args:
        dim: D, the hidden size of the trunk whose states it reads.

        >>> import torch
        >>> ValueHead(dim=8)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, dim // 2), nn.ReLU(), nn.Linear(dim // 2, 1))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """From hidden_states [B, S, D] to values [B, S]."""
        values: Tensor = self.layers(hidden_states)
        return values.squeeze(-1)
