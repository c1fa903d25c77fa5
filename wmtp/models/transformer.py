"""A decoder with several heads, each predicting one more token ahead.

    trunk:  h = blocks(embed(ids))                                  [B, S, D]
    head k: z_k = block_k(h)                                        [B, S, D],  k = 0 .. H-1
    logits[:, :, k] = unembed(norm(z_k))                            [B, S, H, V]

The model ends before the unembedding: it returns h and norm(z), and who wants logits applies
`model.unembed`. A loss that takes hidden states never holds them all.

Head k at position t predicts token t + k + 1. Trunk, parallel heads of one transformer block each,
and one unembedding for all: Gloeckle et al. 2024, arXiv 2404.19737, section 2. A block is
pre-norm attention and pre-norm SwiGLU, with rotary positions (Su et al. 2021, arXiv 2104.09864).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class MTPConfig:
    """The shape of an `MTPTransformer`.

    Attributes:
        vocab_size: V.
        horizon: H >= 1, the number of heads; 1 is an ordinary language model.
        dim: D, the hidden size; a multiple of 2 * attention_heads.
        trunk_layers: blocks before the heads part; the model is trunk_layers + 1 blocks deep.
        attention_heads: of every block.
        tie_embeddings: the unembedding is the embedding.
    """

    vocab_size: int
    horizon: int = 4
    dim: int = 512
    trunk_layers: int = 8
    attention_heads: int = 8
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.horizon, self.dim, self.attention_heads)
        if min(sizes) < 1 or self.trunk_layers < 0:
            raise ValueError(f"every size must be positive, got {self}")
        if self.dim % (2 * self.attention_heads):
            raise ValueError(
                f"dim must be a multiple of 2 * attention_heads = {2 * self.attention_heads}, "
                f"got {self.dim}: rotary positions turn pairs of channels"
            )


class MTPOutput(NamedTuple):
    """What `MTPTransformer` returns.

    Attributes:
        hidden_states: [B, S, D], the trunk's output, before the heads part.
        head_hidden_states: [B, S, H, D], what `unembed` turns into the logits [B, S, H, V].
    """

    hidden_states: Tensor
    head_hidden_states: Tensor


class MTPTransformer(nn.Module):
    """A causal transformer with `config.horizon` prediction heads.

    Weights are drawn from torch's global generator: seed it for a repeatable model.

    Attributes:
        unembed: nn.Linear from D to V, without bias, for all heads; its weight may be the
            embedding's.

        >>> config = MTPConfig(vocab_size=11, horizon=3, dim=8, trunk_layers=1, attention_heads=2)
        >>> model = MTPTransformer(config)
        >>> output = model(torch.zeros(2, 5, dtype=torch.long))
        >>> output.hidden_states.shape, output.head_hidden_states.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 5, 3, 8]))
        >>> model.unembed(output.head_hidden_states).shape
        torch.Size([2, 5, 3, 11])
    """

    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.trunk = nn.ModuleList(Block(config) for _ in range(config.trunk_layers))
        self.heads = nn.ModuleList(Block(config) for _ in range(config.horizon))
        self.norm = nn.RMSNorm(config.dim)
        self.unembed = nn.Linear(config.dim, config.vocab_size, bias=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        # Residual branches start smaller the more of them add up (Radford et al. 2019, GPT-2).
        depth = 2 * (self.config.trunk_layers + 1)
        for block in (*self.trunk, *self.heads):
            for branch_output in (block.attention.output, block.mlp.down):
                branch_output.weight.mul_(depth**-0.5)
        # Near-uniform predictions at the start, from embeddings that are far apart (N(0, 1)).
        nn.init.normal_(self.unembed.weight, std=0.02)
        if self.config.tie_embeddings:
            self.embed.weight = self.unembed.weight

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None) -> MTPOutput:
        """From tokens to hidden states.

        Args:
            input_ids: [B, S], integers in [0, V).
            document_ids: [B, >= S]: each document of a packed row sees itself alone, from its own
                position 0.
        """
        length = input_ids.shape[1]
        positions, seen = torch.arange(length, device=input_ids.device), None
        if document_ids is not None:
            document_ids = document_ids[:, :length]
            positions, seen = positions_within(document_ids), visible(document_ids)
        rotation = rotary_angles(positions, self.config)
        hidden = self.embed(input_ids)
        for block in self.trunk:
            hidden = block(hidden, rotation, seen)
        heads = torch.stack([head(hidden, rotation, seen) for head in self.heads], dim=2)
        return MTPOutput(hidden, self.norm(heads))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = CausalAttention(config)
        self.mlp_norm = nn.RMSNorm(config.dim)
        self.mlp = SwiGLU(config.dim)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], seen: Tensor | None = None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, seen)
        return x + self.mlp(self.mlp_norm(x))


class CausalAttention(nn.Module):
    """Multi-head attention to the past, with rotary positions."""

    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        self.attention_heads = config.attention_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.output = nn.Linear(config.dim, config.dim, bias=False)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], seen: Tensor | None = None
    ) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.attention_heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, heads, S, D / heads]
        q, k = rotate(q, rotation), rotate(k, rotation)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)
        mixed = mixed.transpose(1, 2).reshape(batch, length, dim)
        out: Tensor = self.output(mixed)
        return out


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202), 8/3 D wide."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        width = -(-8 * dim // 3 // 16) * 16
        self.gate_up = nn.Linear(dim, 2 * width, bias=False)
        self.down = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


def positions_within(document_ids: Tensor) -> Tensor:
    """[B, 1, S]: how far each token is from its document's first, of document_ids [B, S].

    >>> positions_within(torch.tensor([[7, 7, 8, 8, 8]]))
    tensor([[[0, 1, 0, 1, 2]]])
    """
    position = torch.arange(document_ids.shape[1], device=document_ids.device)
    begins = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    return (position - torch.where(begins, position, 0).cummax(1).values)[:, None]


def visible(document_ids: Tensor) -> Tensor:
    """[B, 1, S, S] bool: whether a token may look at another, itself or before it, of its own
    document."""
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return same.tril()[:, None]


def rotary_angles(positions: Tensor, config: MTPConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine [..., S, D / heads / 2] of position / 10000^(2 i / (D / heads))."""
    half = config.dim // config.attention_heads // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=positions.device) / half)
    angles = positions[..., None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x[i], x[i + half]) of [..., S, D / heads] by its position's angle."""
    cos, sin = (part.to(x.dtype) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
