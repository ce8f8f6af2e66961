"""transformers' `generate` as the peer in timings of our loops: same weights, same dtype, same tokens.

peer = TransformersPeer(checkpoint.folder, torch.float32, torch.device("cpu"))
peer.generate([prompt_ids], max_new_tokens=64, use_cache=False)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


class TransformersPeer:
    """A checkpoint loaded by transformers and decoded greedily by its own loop."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM  # slow to import, and only needed for a peer

        self.device = device
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        self.model = model.to(device).eval()

    def generate(self, prompts: list[list[int]], max_new_tokens: int, use_cache: bool) -> list[list[int]]:
        """Decode greedily, up to and with the first EOS. Prompts of different lengths are padded on the left."""
        longest = max(len(prompt) for prompt in prompts)
        eos = self.model.generation_config.eos_token_id
        pad = eos[0] if isinstance(eos, list) else eos or 0
        padding = [longest - len(prompt) for prompt in prompts]
        tokens = torch.tensor([[pad] * n + prompt for n, prompt in zip(padding, prompts, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
        output = self.model.generate(
            tokens.to(self.device),
            attention_mask=mask.to(self.device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            use_cache=use_cache,
            pad_token_id=pad,
        )
        return [_until_eos(row[longest:].tolist(), eos) for row in output]


def _until_eos(tokens: list[int], eos: int | list[int] | None) -> list[int]:
    """Cut at the first EOS: transformers pads rows that end before the others."""
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    for position, token in enumerate(tokens):
        if token in ends:
            return tokens[: position + 1]
    return tokens
