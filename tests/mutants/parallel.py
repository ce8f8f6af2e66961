"""Phase 6: which part of a model a rank has, what ranks exchange, and what rank 0 tells the others."""
# ruff: noqa: E501

from __future__ import annotations

from tests.support.mutants import mutants

ENGINE = "phase-6-gpu-streams-graphs/engine"
SHARDS = ("tests/phase6/test_shard.py", "tests/phase6/test_split_model.py")
STEPS = ("tests/phase6/test_split_model.py",)
FILES = ("tests/phase6/test_split_model.py", "-k", "quantize_py or other_tools")
TIMES = ("tests/phase6/test_traffic.py",)
GRID = ("tests/phase6/test_split_model.py", "-k", "float32 or family or partial")

SHARD = mutants(
    f"{ENGINE}/parallel/shard.py",
    SHARDS,
    ("        share = size // self.ranks\n        return slice(self.rank * share, (self.rank + 1) * share)", "        share = size // self.ranks\n        return slice(0, share)"),
    ("slice(self.rank * self.vocab, min((self.rank + 1) * self.vocab, self.whole.vocab_size))", "slice(0, self.vocab)"),
    ("first = self.rank * self.whole.kv_heads // self.ranks", "first = self.rank"),
    ("kv_heads=max(1, whole.kv_heads // ranks)", "kv_heads=whole.kv_heads"),
    ('if module in ("attention.query", "ffn.gate", "ffn.up"):', 'if module in ("attention.query", "ffn.gate"):'),
    ('if kind == "bias" and self.rank:', 'if kind == "bias" and not self.rank:'),
    ('if kind == "bias" and self.rank:', "if False:"),
    ("number = int(found[1]) - self.rank * self.local.layers", "number = int(found[1])"),
    ("whole.window_of(rank * count + layer)", "whole.window_of(layer)"),
    ('return ("head.weight", tensor) if self.last and self.whole.tied else None', "return None"),
    ('if self.mode == "layers" or name.endswith(".factor"):', 'if self.mode == "layers":'),
    ('if name.startswith("head."):', 'if name == "head.weight":'),
    ("        return self._range(self.whole.ffn_width) if", "        return WHOLE if"),
    ("if config.kv_heads % ranks and ranks % config.kv_heads:", "if config.kv_heads % ranks:"),
)  # fmt: skip

STORED = (
    *mutants(
        f"{ENGINE}/parallel/shard.py",
        FILES,
        ('if name.endswith((".order", ".factor")):', 'if name.endswith(".order"):'),
        ("        return name, torch.cat([part[1] for part in parts if part is not None])", "        return self.part(name, tensor)"),
        ('name == "embedding.weight" or name.startswith("head.")', 'name in ("embedding.weight", "head.weight")'),
    ),
    *mutants(
        f"{ENGINE}/quantize_files.py",
        FILES,
        ('tied = config.tied and not about.get("head", False)', "tied = config.tied"),
        ("        shard.complete(model, {}, dtype, device)\n", "        pass\n"),
    ),
)  # fmt: skip

TRAFFIC = mutants(
    f"{ENGINE}/parallel/traffic.py",
    TIMES,
    ("max(view.began for view in views)", "min(view.began for view in views)"),
    ("max(view.ended for view in views)", "min(view.ended for view in views)"),
    ("group.traffic.passages or [], None", "group.traffic.passages or [], group.traffic.passages"),
    ("        seen.pop()  # the message that ends the trace\n", "        pass\n"),
    ("if not what.turns or group.rank == 0:", "if group.rank == 0:"),
    ("if not what.turns or group.rank == 0:", "if not what.turns:"),
)  # fmt: skip

EXCHANGED = (
    *mutants(
        f"{ENGINE}/parallel/group.py",
        STEPS,
        ("        numbers.copy_(gathered[0])\n        for other in gathered[1:]:", "        for other in gathered[1:]:"),
        ("numbers.view(torch.int32) if how == 2 else numbers", "numbers", "a sum of one number and zeros, but for the sign of a zero"),
        ("body[:room].ljust(room, b\"\\0\")", "body[:room].rjust(room, b\"\\0\")"),
        ("        self._finish_sends(UNTAKEN)\n", ""),
        ("        self.freed.append(cache)\n", "        pass\n"),
    ),
    *mutants(
        f"{ENGINE}/parallel/split_model.py",
        STEPS,
        ("            self.group.tell(Move(self.number, source, target))\n", ""),
        ("cache.lengths[row.number] = row.length", "cache.lengths[row.number] = max(cache.lengths[row.number], row.length)"),
        ("            cache.tables[row.number] = row.table\n", "            cache.tables[row.number] = cache.tables[row.number] or row.table\n"),
        ("for tap in taps), layers - 1)", "for tap in taps), 0)"),
        ("torch.cat([blocks[tap] for tap in part.taps], 1)", "torch.cat([*blocks.values()], 1)"),
        ("local = (*(tap % layers for tap in taps), ", "local = (*(0 for tap in taps), "),
        ("hidden=step.hidden)\n\n    def follow", "hidden=False)\n\n    def follow"),
        ("wanted=part.wanted if part.asks else []", "wanted=part.wanted if part.logits else []"),
        ("states[part.wanted, :-width] if taps", "states[: len(part.wanted), :-width] if taps"),
        ("by_outputs = shard.mode == \"gather\"", "by_outputs = True"),
    ),
    *mutants(
        f"{ENGINE}/parallel/messages.py",
        STEPS,
        ("wanted = [token - start for token in self.wanted if start <= token < stop]", "wanted = [token for token in self.wanted if start <= token < stop]"),
        ("parents = None if self.parents is None else self.parents[first:last]", "parents = None"),
    ),
    *mutants(
        f"{ENGINE}/parallel/worker.py",
        STEPS,
        ("                set_rows(cache, message.rows)\n", ""),
        ("                    storage.move(message.source, message.target)", "                    pass"),
        ("                    del caches[number], owners[number]\n", "                    pass\n"),
    ),
    *mutants(
        f"{ENGINE}/quantize.py",
        STEPS,
        ("self.put(first + start, grid, levels[:, :, columns])", "self.put(first + start, grid, levels[:, :, : self.in_features])"),
        ("Grid(*(each[:, groups] for each in grid)), levels[:, groups]", "grid, levels[:, groups]"),
    ),
)  # fmt: skip

# Each is a build of its own.
BARRIERS = mutants(
    f"{ENGINE}/kernels/cpp/src/step.inl",
    GRID,
    ("            gather(block, thread, barrier, block.my_inner, model.ffn_padded()", "            if (number > 0) gather(block, thread, barrier, block.my_inner, model.ffn_padded()"),
    ("            gather(block, thread, barrier, block.my_mixed", "            if (number > 0) gather(block, thread, barrier, block.my_mixed"),
    ("if (thread == 0) block.exchange(block.with, How::owned", "if (thread < 0) block.exchange(block.with, How::owned"),
    ("        block.exchange(block.with, How::sum, block.partial, block.partial, size);\n", ""),
    ("float* x = block.x + (block.exchange == nullptr ? 0 : model.split.rank * columns);", "float* x = block.x;"),
)  # fmt: skip

MUTANTS = [*SHARD, *STORED, *TRAFFIC, *EXCHANGED, *BARRIERS]
