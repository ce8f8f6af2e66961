"""One decoder-only transformer for GPT-2, OPT, Llama, Mistral, Qwen2 and Qwen3 checkpoints.

The families differ in few places, and each place is one `if` on the configuration: the norm, how positions enter,
biases, the feed-forward. There is no cache here: `forward` computes every position of the sequence, every time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionBackend, CachedAttention, FullAttention
from .config import ModelConfig
from .kernels import TORCH, Kernels
from .kernels.reference import plus, times
from .rope import frequencies, rotation_tables

Rotation = tuple[Tensor, Tensor]  # cos and signed sin, each [T, 1, head_dim] or [B, T, 1, head_dim]
Wanted = tuple[Tensor, Tensor]  # row numbers [B, 1] and positions [B, W]: x[wanted] is [B, W, D]
Masks = dict[int | None, Tensor]  # by a layer's window: [T, T] or [B, T, T], 0 where a query may look, -inf where not

FEW = 16  # tokens: with fewer, an operation takes longer to start than to compute


def silu(x: Tensor) -> Tensor:
    """Return x * sigmoid(x), in place if no gradient is needed."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Linear(nn.Linear):
    """A matrix whose weights come from a checkpoint: memory is reserved for it and not filled."""

    def reset_parameters(self) -> None:
        """Leave the memory unwritten; random weights would cost time."""

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """x [..., in] -> [..., out], or some of the outputs alone: [..., stop - start]."""
        if stop is None:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight[start:stop], None if self.bias is None else self.bias[start:stop])

    @property
    def weight_bytes(self) -> tuple[int, int]:
        """Return the bytes of the matrix, and of its scales in other formats."""
        return self.weight.nbytes, 0


class Embedding(nn.Embedding):
    """As Linear, a table that a checkpoint fills."""

    def reset_parameters(self) -> None:
        """Leave the memory unwritten."""


def at_wanted(table: Tensor, wanted: Wanted) -> Tensor:
    """Select [B, W, 1, head_dim] from a table [T, 1, head_dim] that all rows share, or from one [B, T, 1, head_dim]."""
    return table[wanted[1]] if table.ndim == 3 else table[wanted]


class RMSNorm(nn.RMSNorm):
    """Zhang and Sennrich 2019."""

    kernels = TORCH

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of x + residual, and that sum; x is not read again, and the sum may take its memory."""
        return self.kernels.add_rms_norm(x, residual, self.weight, self.eps)


def make_norm(config: ModelConfig) -> nn.Module:
    """Make an RMSNorm or a LayerNorm over the whole width."""
    kind = RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.width, config.norm_eps)


class Attention(nn.Module):
    """Attention with grouped key / value heads (Ainslie et al. 2023), their three projections in one product."""

    kernels = TORCH

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self.config, self.number = config, number
        heads = config.heads + 2 * config.kv_heads
        self.qkv = Linear(config.width, heads * config.head_dim, bias=config.qkv_bias)
        self.output = Linear(config.heads * config.head_dim, config.width, bias=config.output_bias)
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.key_norm = RMSNorm(config.head_dim, config.norm_eps)

    def project(self, x: Tensor, rotation: Rotation | None, wanted: Wanted | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, T or W, H, d], keys and values [B, T, kv_heads, d], with RoPE applied."""
        config, (B, T, _), linear, rope = self.config, x.shape, self.kernels.linear, self.kernels.rope
        heads, kv, d = config.heads, config.kv_heads, config.head_dim
        if wanted is None:
            made = linear(self.qkv, x).view(B, T, heads + 2 * kv, d)
            asking, value = made[:, :, : heads + kv], made[:, :, heads + kv :]
            if rotation is not None and not config.qk_norm:  # both at once
                asking, rotation = rope(asking, *rotation), None
            query, key = asking[:, :, :heads], asking[:, :, heads:]
        else:
            first = heads * d
            query = linear(self.qkv, x[wanted], 0, first).view(B, -1, heads, d)
            key, value = linear(self.qkv, x, first, first + 2 * kv * d).view(B, T, 2 * kv, d).chunk(2, 2)
        if config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query = rope(query, *(rotation if wanted is None else (at_wanted(table, wanted) for table in rotation)))
            key = rope(key, *rotation)
        return query, key, value

    def finish(self, mixed: Tensor) -> Tensor:
        """[B, T or W, H, d] -> [B, T or W, D]."""
        return self.kernels.linear(self.output, mixed.flatten(2))


def halves(kernels: Kernels, linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return both halves of a layer's output for x: in one product, or in two if that is faster.

    In float32 a CPU spends nearly all of it on arithmetic: two products cost what one costs, and each leaves its half
    in memory without gaps, which the next operation reads faster. The halves of a few tokens are small anyway.
    """
    many = x.shape[1] > FEW
    if many and isinstance(linear, Linear) and x.device.type == "cpu" and linear.weight.dtype == torch.float32:
        half = linear.out_features // 2
        return kernels.linear(linear, x, 0, half), kernels.linear(linear, x, half, 2 * half)
    both = kernels.linear(linear, x)
    half = both.shape[-1] // 2
    return both[..., :half], both[..., half:]


class FeedForward(nn.Module):
    """Two matrices around an activation; or three, with a gate (Shazeer 2020), of which two lie in one."""

    kernels = TORCH

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gated = config.gated
        if config.gated:
            self.gate_up = Linear(config.width, 2 * config.ffn_width, bias=config.mlp_bias)
        else:
            self.up = Linear(config.width, config.ffn_width, bias=config.mlp_bias)
        self.down = Linear(config.ffn_width, config.width, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        # torch's own does the same in the same steps, but for the halves that a CPU takes one by one.
        fused = self.kernels.gated_linear is not TORCH.gated_linear and not torch.is_grad_enabled()
        if self.gated and self.activation is silu and fused:
            return self.kernels.linear(self.down, self.kernels.gated_linear(self.gate_up, x))
        if self.gated:
            gate, up = halves(self.kernels, self.gate_up, x)
            inner = times(self.activation(gate), up)
        else:
            inner = self.activation(self.kernels.linear(self.up, x))
        return self.kernels.linear(self.down, inner)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on the normed stream and added back to it."""

    def __init__(self, config: ModelConfig, number: int = 0) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, number)
        self.ffn_norm = make_norm(config)
        self.ffn = FeedForward(config)

    def forward(
        self, x: Tensor, rotation: Rotation | None, backend: AttentionBackend, wanted: Wanted | None = None
    ) -> Tensor:
        """x [B, T, D] -> [B, T or W, D]."""
        late = rotation if wanted is None and backend.applies_rope else None
        query, key, value = self.before(x, rotation if late is None else None, wanted)
        return self.after(x, backend.attend(self.attention.number, query, key, value, late), wanted)

    def before(self, x: Tensor, rotation: Rotation | None, wanted: Wanted | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values of a layer."""
        return self.attention.project(self.attention_norm(x), rotation, wanted)

    def after(self, x: Tensor, mixed: Tensor, wanted: Wanted | None) -> Tensor:
        """Return the layer's output for attention's, [B, T or W, H, d]."""
        found, x = self.attention.finish(mixed), x if wanted is None else x[wanted]
        if isinstance(self.ffn_norm, RMSNorm):
            normed, x = self.ffn_norm.of_sum(found, x)
        else:
            x = plus(found, x)
            normed = self.ffn_norm(x)
        return plus(self.ffn(normed), x)


class Transformer(nn.Module):
    """Token ids in, logits over the vocabulary out."""

    kernels = TORCH
    has_cache = True  # whether `states` can go on from a cache

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.positions = Embedding(config.context + config.position_offset, config.width)
        self.layers = nn.ModuleList(Block(config, number) for number in range(config.layers))
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
        positions: Tensor | range | None = None,
        wanted: Tensor | None = None,
        masks: Masks | None = None,
        taps: tuple[int, ...] = (),
        cached: dict[int | None, CachedAttention] | None = None,
        draft: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return `hidden`, and the outputs of the layers in `taps`, which learned drafters read.

        The tapped outputs are concatenated, [B, T or W, len(taps) * D]; None without taps. `masks` (each [B, T, T])
        replace the causal ones, and positions may differ by row ([B, T]): a tree of guesses has several tokens for one
        position. A range is for all rows. With `cached` (by window) the tokens follow those of a cache. A token
        -1 - j is token j of the row's `draft` (int64 [B, K]).
        """
        T = tokens.shape[1]
        x, rotation = self.kernels.embed(self.embedding.weight, tokens, draft), None
        at = range(T) if positions is None else positions
        if self.config.positions == "rope":
            rotation = self.rotation_of(at, x, max(next(iter(cached.values())).metadata.ends) if cached else None)
        elif isinstance(at, range):
            first = at.start + self.config.position_offset
            x = x + self.positions.weight[first : first + T]
        else:
            x = x + self.positions(at + self.config.position_offset)
        ways: dict[int | None, tuple[AttentionBackend, AttentionBackend]]
        if cached is None:
            given = {window: self.mask(T, x, window) for window in set(self.config.windows)} if masks is None else masks
            full = {window: FullAttention.of(mask) for window, mask in given.items()}
            ways = {window: (every, every.only(wanted)) for window, every in full.items()}
        else:
            ways = {window: (behind, behind.only(wanted)) for window, behind in cached.items()}
        asked = None if wanted is None else (torch.arange(len(tokens), device=tokens.device)[:, None], wanted)
        tapped = []
        for number, layer in enumerate(self.layers):
            every, last = ways[self.config.window_of(number)]
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

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., V]."""
        return self.kernels.linear(self.head, hidden)

    def rotation_of(self, positions: Tensor | range, like: Tensor, end: int | None = None) -> Rotation:
        """Return cos and signed sin [T, 1, head_dim] at positions [T], or [B, T, 1, head_dim] at positions [B, T].

        They are parts of tables, which grow with `end`, above all positions; without it the host waits for a tensor.
        """
        end = positions.stop if isinstance(positions, range) else end or int(positions.max()) + 1
        if self._tables is None or len(self._tables[0]) < end or self._tables[0].dtype != like.dtype:
            longest = max(256, 1 << (end - 1).bit_length())
            self._tables = self.rotation_at(torch.arange(longest, device=like.device), like)
        cos, sin = self._tables
        if isinstance(positions, range):
            return cos[positions.start : positions.stop], sin[positions.start : positions.stop]
        return cos[positions], sin[positions]

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
