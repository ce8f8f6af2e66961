"""One step on the device: draft, verify, accept, and all that the next step begins with.

The state of R lanes (a sequence each) is in device memory at fixed addresses: lengths, last tokens, block tables, keys
of random numbers, filters. The step reads and advances it, and returns a small tensor for the host. It reads nothing on
the host and has static shapes, so it can be captured in a graph and replayed.

The draft model is padded: it always takes the last two tokens. After a fully accepted draft its cache lacks one token,
else it writes the first of the two once more, with the same bits. A lane that is not live appends nothing: its counts
are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from common.errors import UserError

from .attention import CachedAttention
from .device_runner import DeviceRunner
from .drafters.model_device import draw_next
from .drafting import Draft
from .graphs import Device
from .kernels.key_ranges import FEW, KeyRanges
from .kernels.metadata import AttentionMetadata
from .kernels.tokens import UNLIMITED, SamplingMetadata
from .kv_cache import PAGE, KVCache, PagedCache, StaticCache
from .policies import AcceptancePolicy, DraftRows, TargetProbs
from .sampling import SamplingParams
from .transfers import Staged
from .verify import GreedySource, KeyedSource

COLUMNS = 4  # of the result, before the draft tokens


class Lanes(NamedTuple):
    """The state of R lanes: views of one buffer, so that one copy sets it."""

    filters: Tensor  # float64 [R, 4], as in SamplingMetadata
    keys: Tensor  # int64 [R, 2]
    lengths: Tensor  # int32 [R, 1]: tokens of the sequence
    ends: Tensor  # int32 [R, 1]: no step begins past this length, and no draft goes past it
    live: Tensor  # int32 [R, 1]: 1, or 0 for a lane without a sequence
    rules: Tensor  # int32 [R, 1]: which of the bucket's policies is its own
    tokens: Tensor  # int32 [R, 2]: the last two of the sequence
    target: Tensor  # int32 [R, 1 + pages]: the row in the target's cache, and its block table
    draft: Tensor  # int32 [R, 1 + pages], in the draft's

    @classmethod
    def of(cls, R: int, target: KVCache, draft: KVCache | None) -> tuple[int, list[tuple[torch.dtype, int]]]:
        """Return the bytes that R lanes need, and dtype and width of each field."""
        wide = [1 + (cache.width if isinstance(cache, PagedCache) else 0) for cache in (target, draft)]
        fields = [(torch.float64, 4), (torch.int64, 2), *((torch.int32, width) for width in (1, 1, 1, 1, 2, *wide))]
        return R * sum(dtype.itemsize * width for dtype, width in fields), fields

    @classmethod
    def on(cls, memory: Tensor, R: int, fields: list[tuple[torch.dtype, int]]) -> Lanes:
        """Return views of memory, uint8 [bytes]."""
        views, at = list[Tensor](), 0
        for dtype, width in fields:
            size = R * width * dtype.itemsize
            views.append(memory[at : at + size].view(dtype).view(R, width))
            at += size
        return cls(*views)


class Result(NamedTuple):
    """What a step says of one lane."""

    emitted: int  # tokens that the sequence gains: 0 if the lane is not live or at its end
    width: int  # draft tokens that counted
    finite: bool
    following: int  # the last gained token
    draft: list[int]

    @property
    def tokens(self) -> list[int]:
        return [*self.draft[: self.emitted - 1], self.following] if self.emitted else []


@dataclass(frozen=True)
class Bucket:
    """What is static in a step."""

    rows: int
    k: int
    greedy: bool  # every lane at temperature 0
    policies: tuple[AcceptancePolicy, ...] = ()  # of sampled drafts; none: the longest prefix of the target's choices


class DeviceStep:
    """The step of a bucket, and its lanes."""

    def __init__(self, target: DeviceRunner, draft: DeviceRunner | None, bucket: Bucket, device: Device) -> None:
        """Allocate the lanes. UserError for a bucket that the caches cannot hold."""
        self.target, self.draft, self.bucket = target, draft if bucket.k else None, bucket
        check_bucket(target.manager.cache, bucket)
        nbytes, self.fields = Lanes.of(
            bucket.rows, target.manager.cache, None if draft is None else draft.manager.cache
        )
        self.memory = device.empty(nbytes)
        device.copy_in(self.memory, torch.zeros(nbytes, dtype=torch.uint8))  # no lane is live while it is captured
        self.lanes = Lanes.on(self.memory, bucket.rows, self.fields)
        params = SamplingParams(temperature=0.0 if bucket.greedy else 1.0)
        self.params = [params] * bucket.rows  # only whether they are greedy is read; the rest is in the lanes
        self.source = GreedySource() if bucket.greedy else KeyedSource()

    def step(self) -> Tensor:
        """Advance all live lanes by one step; return int64 [R, COLUMNS + k], which `results` reads."""
        lanes, K = self.lanes, self.bucket.k
        live = (lanes.live != 0) & (lanes.lengths <= lanes.ends)  # [R, 1]
        # A length of 1 without new tokens: attention sees nothing, so it does not read the block table.
        lengths, tokens = torch.where(live, lanes.lengths, 1), torch.where(live, lanes.tokens, 0)
        widths = torch.where(live, (lanes.ends - lengths).clamp(max=K), 0)
        rows = SamplingMetadata(
            self.params, self.source, Staged(lanes.keys), Staged(lengths[:, 0].long()), Staged(lanes.filters)
        )
        drafted, probs = self._draft(tokens, lengths, widths, rows)
        names = -1 - torch.arange(K, device=tokens.device, dtype=torch.int32).expand(len(tokens), K)
        begin = self._begin(lanes.target, lengths - 1)
        counts = torch.where(live, widths + 1, 0)
        hidden, _ = forward(self.target, begin, lanes.target, torch.cat((tokens[:, 1:], names), 1), counts, drafted)
        logits = self.target.model.logits(hidden)  # [R, K+1, V]
        accepted, following = self._accept(logits, drafted, probs, widths[:, 0].long(), rows)

        emitted = torch.where(live, accepted[:, None] + 1, 0)
        finite = logits.amax(-1).isfinite().all(-1, keepdim=True) | ~live
        known = torch.cat((tokens[:, 1:], drafted.int()), 1)  # the last token, then the draft
        last = torch.cat((known.gather(1, accepted[:, None]), following[:, None].int()), 1)
        lanes.tokens.copy_(torch.where(live, last, lanes.tokens))
        lanes.lengths.add_(emitted.int())
        return torch.cat((emitted, widths.long(), finite.long(), following[:, None], drafted), 1)

    def results(self, numbers: list[int]) -> list[Result]:
        """Read what `step` returned, a result for each lane."""
        wide = COLUMNS + self.bucket.k
        rows = (numbers[at : at + wide] for at in range(0, len(numbers), wide))
        return [Result(row[0], row[1], bool(row[2]), row[3], row[4:]) for row in rows]

    def _begin(self, where: Tensor, starts: Tensor) -> Tensor:
        """Return `at` int32 [3, R] before a forward from these positions on: rows, starts, and no tokens yet."""
        return torch.stack((where[:, 0], starts[:, 0], torch.zeros_like(starts[:, 0])))

    def _draft(
        self, tokens: Tensor, lengths: Tensor, widths: Tensor, rows: SamplingMetadata
    ) -> tuple[Tensor, Tensor | None]:
        """Draw K tokens [R, K], with their distributions [R, K, V] unless they are certain."""
        (R, K), device = (len(tokens), self.bucket.k), tokens.device
        drafted, probs = torch.empty(R, K, dtype=torch.long, device=device), None
        if self.draft is None:
            return drafted, None
        model = self.draft.model
        if not self.bucket.greedy:
            probs = torch.empty(R, K, model.config.vocab_size, device=device)
        noises = [policy.draft_noise for policy in self.bucket.policies]
        at, where = self._begin(self.lanes.draft, lengths - 2), self.lanes.draft
        counts = torch.where(widths > 0, 2, 0)
        for j in range(K):
            if j:
                counts, tokens = (widths > j).int(), torch.full((R, 1), -j, dtype=torch.int32, device=device)
            hidden, at = forward(self.draft, at, where, tokens, counts, drafted)
            logits = model.logits(hidden[:, -1])
            draw_next(model.kernels, logits, rows, noises, self.lanes.rules[:, 0], j, drafted, probs)
        return drafted, probs

    def _accept(
        self, logits: Tensor, drafted: Tensor, probs: Tensor | None, widths: Tensor, rows: SamplingMetadata
    ) -> tuple[Tensor, Tensor]:
        """Return how many draft tokens are accepted, and the token that follows: int64 [R] each."""
        kernels, K = self.target.model.kernels, self.bucket.k
        if not K:
            return torch.zeros_like(widths), kernels.sample(logits[:, 0], rows)
        if self.bucket.greedy:
            return kernels.verify_greedy(drafted, logits, widths)
        probs_of = kernels.probabilities(logits.flatten(0, 1), rows).view(*logits.shape)
        draft, target = Draft(drafted, probs, [K] * len(drafted)), TargetProbs(probs_of, probs_of)
        accepted = following = widths
        for rule, policy in enumerate(self.bucket.policies):
            verdict = policy.verify(draft, target, DraftRows(widths, *rows.keyed, self.source))
            accepted = self._of_rule(rule, verdict.accepted, accepted)
            following = self._of_rule(rule, verdict.next_tokens, following)
        return accepted, following

    def _of_rule(self, rule: int, mine: Tensor, others: Tensor) -> Tensor:
        """Return `mine` in lanes of this rule or a later one, and `others` in those before: [R]."""
        return mine if rule == 0 else torch.where(self.lanes.rules[:, 0] >= rule, mine, others)


def forward(
    runner: DeviceRunner, before: Tensor, where: Tensor, tokens: Tensor, counts: Tensor, draft: Tensor
) -> tuple[Tensor, Tensor]:
    """Run a model over counts[r] of W tokens [R, W] of each lane, after those of `before`; return states and `at`.

    where: row and block table of each lane. draft: int64 [R, K], the tokens that negative ids name.
    """
    model, cache, (R, W) = runner.model, runner.manager.cache, tokens.shape
    limits: list[int | None] = sorted(set(model.config.windows), key=str)
    windows = torch.cat(
        [torch.full((1,), limit or UNLIMITED, dtype=torch.int32, device=tokens.device) for limit in limits]
    )
    at, positions, end, lo = model.kernels.advance(before, counts[:, 0].int(), W, windows)
    most = capacity(cache)
    tables = Staged(where[:, 1:].contiguous()) if isinstance(cache, PagedCache) else None
    # The host's lists are bounds: nothing that a kernel reads follows from them.
    metadata = AttentionMetadata(cache, [0] * R, [most - W] * R, [W] * R, [0] * R, Staged(at), tables, most=most)
    cached = {
        limit: CachedAttention(metadata, KeyRanges(Staged(of_limit), Staged(end), simple=[False] * R), model.kernels)
        for limit, of_limit in zip(limits, lo, strict=True)
    }
    named = draft if draft.shape[1] else None
    return model.states(tokens, positions, cached=cached, draft=named)[0], at


def capacity(cache: KVCache) -> int:
    """Return how many positions a row can have."""
    return cache.width * PAGE if isinstance(cache, PagedCache) else cast(StaticCache, cache).capacity


def check_bucket(cache: KVCache, bucket: Bucket) -> None:
    """Raise UserError for a bucket that is larger than the cache."""
    if bucket.rows > len(cache.lengths):
        raise UserError(f"a bucket of {bucket.rows} rows is larger than the cache, which has {len(cache.lengths)}")
    if bucket.k + 1 > min(FEW, capacity(cache)):
        raise UserError(f"a step of {bucket.k} draft tokens is larger than {min(FEW, capacity(cache)) - 1}, the most")
