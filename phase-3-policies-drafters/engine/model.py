"""One decoder-only transformer for GPT-2, OPT, Llama, Mistral, Qwen2 and Qwen3 checkpoints.

The families differ in few places, and each place is one `if` on the configuration: the norm, how positions enter,
biases, the feed-forward. There is no cache here: `forward` computes every position of the sequence, every time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .rope import frequencies, rotate, rotation_tables

Rotation = tuple[Tensor, Tensor]  # cos and signed sin, each [T, 1, head_dim] or [B, T, 1, head_dim]
Wanted = tuple[Tensor, Tensor]  # row numbers [B, 1] and positions [B, W]: x[wanted] is [B, W, D]
Masks = dict[int | None, Tensor]  # by a layer's window: [T, T] or [B, T, T], 0 where a query may look, -inf where not

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Linear(nn.Linear):
    """A matrix whose weights come from a checkpoint: memory is reserved for it and not filled."""

    def reset_parameters(self) -> None:
        """Leave the memory unwritten; random weights would cost time."""


class Embedding(nn.Embedding):
    """As Linear, a table that a checkpoint fills."""

    def reset_parameters(self) -> None:
        """Leave the memory unwritten."""


def at_wanted(table: Tensor, wanted: Wanted) -> Tensor:
    """Select [B, W, 1, head_dim] from a table [T, 1, head_dim] that all rows share, or from one [B, T, 1, head_dim]."""
    return table[wanted[1]] if table.ndim == 3 else table[wanted]


def make_norm(config: ModelConfig) -> nn.Module:
    """Make an RMSNorm (Zhang and Sennrich 2019) or a LayerNorm; torch's statistics are float32 in every dtype."""
    if config.norm == "rms":
        return nn.RMSNorm(config.width, eps=config.norm_eps)
    return nn.LayerNorm(config.width, eps=config.norm_eps)


class Attention(nn.Module):
    """Causal attention with grouped key / value heads (Ainslie et al. 2023), written out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        kv_width = config.kv_heads * config.head_dim
        self.query = Linear(config.width, config.heads * config.head_dim, bias=config.qkv_bias)
        self.key = Linear(config.width, kv_width, bias=config.qkv_bias)
        self.value = Linear(config.width, kv_width, bias=config.qkv_bias)
        self.output = Linear(config.heads * config.head_dim, config.width, bias=config.output_bias)
        if config.qk_norm:
            self.query_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
            self.key_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Tensor, wanted: Wanted | None = None) -> Tensor:
        """x [B, T, D]; mask [1 or B*KV, group*T, T], 0 where a query may look and -inf where not -> [B, T or W, D]."""
        config, (B, T, _) = self.config, x.shape
        key = self.key(x).view(B, T, config.kv_heads, config.head_dim)
        value = self.value(x).view(B, T, config.kv_heads, config.head_dim)
        asking = x if wanted is None else x[wanted]
        W = asking.shape[1]
        query = self.query(asking).view(B, W, config.heads, config.head_dim)
        if config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query = rotate(query, *(rotation if wanted is None else (at_wanted(table, wanted) for table in rotation)))
            key = rotate(key, *rotation)

        # Query head h reads key / value head h // group, so the group's queries stand as rows over the same keys.
        kv, group, d = config.kv_heads, config.heads // config.kv_heads, config.head_dim
        query = query.view(B, W, kv, group, d).permute(0, 2, 3, 1, 4).reshape(B * kv, group * W, d)
        key = key.permute(0, 2, 3, 1).reshape(B * kv, d, T)
        value = value.permute(0, 2, 1, 3).reshape(B * kv, T, d)
        scores = torch.baddbmm(mask, query, key, alpha=d**-0.5)  # mask + query @ key / sqrt(d)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(x.dtype)
        mixed = (weights @ value).view(B, kv, group, W, d).permute(0, 3, 1, 2, 4)
        output: Tensor = self.output(mixed.reshape(B, W, config.heads * d))
        return output


class FeedForward(nn.Module):
    """Two matrices around an activation; or three, with a gate (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate = Linear(config.width, config.ffn_width, bias=config.mlp_bias) if config.gated else None
        self.up = Linear(config.width, config.ffn_width, bias=config.mlp_bias)
        self.down = Linear(config.ffn_width, config.width, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        inner = self.activation(up) if self.gate is None else self.activation(self.gate(x)) * up
        output: Tensor = self.down(inner)
        return output


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on the normed stream and added back to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.ffn_norm = make_norm(config)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Tensor, wanted: Wanted | None = None) -> Tensor:
        attended = self.attention(self.attention_norm(x), rotation, mask, wanted)
        x = (x if wanted is None else x[wanted]) + attended
        fed: Tensor = self.ffn(self.ffn_norm(x))
        return x + fed


class Transformer(nn.Module):
    """Token ids in, logits over the vocabulary out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.positions = Embedding(config.context + config.position_offset, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config)
        self.head = Linear(config.width, config.vocab_size, bias=False)
        self._tables: Rotation | None = None

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """tokens int64 [B, T] -> logits [B, T, V], in the dtype of the weights.

        `positions` (int64 [T]) defaults to 0 .. T-1. Rows that are shorter than T are padded on the right: under a
        causal mask nothing to the left of the padding can see it.
        """
        return self.logits(self.hidden(tokens, positions))

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
        """Return the normalised output of the last layer, [B, T, D], which `logits` reads.

        `wanted` (int64 [B, W]) names the positions in 0 .. T-1 whose output will be read: the result is then
        [B, W, D]. Every layer but the last needs all positions, because later layers read keys and values made from
        them; in the last layer nothing reads the others, and they are not computed.
        """
        return self.states(tokens, positions, wanted)[0]

    def states(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        wanted: Tensor | None = None,
        masks: Masks | None = None,
        taps: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor | None]:
        """Return `hidden`, and the outputs of the layers in `taps`, which learned drafters read.

        The tapped outputs are concatenated, [B, T or W, len(taps) * D]; None without taps. `masks` (each [B, T, T])
        replace the causal ones, and positions may differ by row ([B, T]): a tree of guesses has several tokens for one
        position.
        """
        T = tokens.shape[1]
        x = self.embedding(tokens)
        rotation = None
        if self.config.positions == "learned":
            at = torch.arange(T, device=tokens.device) if positions is None else positions
            x = x + self.positions(at + self.config.position_offset)
        else:
            rotation = self.rotation(T, x) if positions is None else self.rotation_at(positions, x)
        given = {window: self.mask(T, x, window) for window in set(self.config.windows)} if masks is None else masks
        grouped = {window: self.grouped_masks(mask, wanted) for window, mask in given.items()}
        asked = None if wanted is None else (torch.arange(len(tokens), device=tokens.device)[:, None], wanted)
        tapped = []
        for number, layer in enumerate(self.layers):
            every, last = grouped[self.config.window_of(number)]
            if number < len(self.layers) - 1:
                x = layer(x, rotation, every)
                if number in taps:
                    tapped.append(x if asked is None else x[asked])
            else:
                x = layer(x, rotation, last, asked)
                if number in taps:
                    tapped.append(x)
        hidden: Tensor = self.norm(x)
        return hidden, torch.cat(tapped, -1) if tapped else None

    def grouped_masks(self, mask: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
        """A mask [T, T] or [B, T, T] as attention takes it: [1 or B*KV, group*T, T] for all positions, and for W."""
        kv, group = self.config.kv_heads, self.config.heads // self.config.kv_heads
        shared = mask.ndim == 2  # by every row and key / value head
        every = mask.repeat(group, 1)[None] if shared else mask.repeat_interleave(kv, 0).repeat(1, group, 1)
        if wanted is None:
            return every, every
        rows = mask[wanted] if shared else mask[torch.arange(len(mask), device=mask.device)[:, None], wanted]
        return every, rows.repeat_interleave(kv, 0).repeat(1, group, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., V]."""
        logits: Tensor = self.head(hidden)
        return logits

    def rotation(self, length: int, like: Tensor) -> Rotation:
        """Return the tables for positions 0 .. T-1, from a store that grows with the longest sequence."""
        if self._tables is None or len(self._tables[0]) < length or self._tables[0].dtype != like.dtype:
            longest = max(256, 1 << (length - 1).bit_length())
            self._tables = self.rotation_at(torch.arange(longest, device=like.device), like)
        return self._tables[0][:length], self._tables[1][:length]

    def rotation_at(self, positions: Tensor, like: Tensor) -> Rotation:
        """Return the tables of `rotate` for positions [T] or [B, T], each [..., 1, head_dim]; computed in float32."""
        inverse, scale = frequencies(self.config.rope, self.config.head_dim)
        angles = positions.float()[..., None, None] * inverse.to(positions.device)
        return rotation_tables(angles, scale, like.dtype)

    def mask(self, length: int, like: Tensor, window: int | None) -> Tensor:
        """Return the mask [T, T]: 0 if the query (row) sees the key (column), -inf after it and before the window."""
        blocked = torch.full((length, length), float("-inf"), dtype=like.dtype, device=like.device)
        mask = blocked.triu(1)
        if window is not None:
            mask += blocked.tril(-window)
        return mask
