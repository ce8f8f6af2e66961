"""Training of learned heads: the target is frozen, its states are the input, its distribution is the goal.

As the embedded draft was trained: cross entropy to the target's distribution first, then the tokens that stand
(loss.py); Muon (Jordan et al. 2024) for the matrices, AdamW for the rest. Checkpoints are written as it goes and
found again: the same command resumes, with the same batches as an uninterrupted run.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.benchmark import progress
from common.errors import UserError
from common.models.resuming import keep_log, read_checkpoint, write_checkpoint
from engine.drafters.heads import Heads, build_heads, target_states
from engine.drafters.medusa import MedusaHeads
from engine.load import LoadedModel

from .data import MixedBatches, count_table, read_streams, write_text
from .features import HeadInit, features, initialise
from .figures import text_figures
from .loss import Objective
from .options import HeadOptions


class MatrixOptimizer:
    """Muon or AdamW for matrices, AdamW for the rest. A stack of matrices is taken apart: Muon treats each alone."""

    def __init__(self, heads: nn.Module, options: HeadOptions) -> None:
        if options.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
            raise UserError("--optimizer muon needs torch 2.9 or newer; use --optimizer adamw")
        matrices = [p for p in heads.parameters() if p.ndim >= 2 and p.shape[-2] > 1]
        rest = [p for p in heads.parameters() if p.ndim < 2 or p.shape[-2] == 1]
        # views: an update of the part is an update of the whole
        self.parts = [
            (whole, place, nn.Parameter(whole.detach()[place]))
            for whole in matrices
            for place in itertools.product(*map(range, whole.shape[:-2]))
        ]
        parts, lr, decay = [part for _, _, part in self.parts], options.lr, options.weight_decay
        inner: torch.optim.Optimizer
        if options.optimizer == "muon":
            inner = torch.optim.Muon(parts, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        else:
            inner = torch.optim.AdamW(parts, lr=lr, betas=(0.9, 0.95), weight_decay=decay)
        self.optimizers = [inner, torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]

    def step(self, lr: float) -> None:
        for whole, place, part in self.parts:
            part.grad = None if whole.grad is None else whole.grad[place]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()  # type: ignore[no-untyped-call]
            optimizer.zero_grad(set_to_none=True)
        for whole, _, _ in self.parts:
            whole.grad = None


def learning_rate(step: int, options: HeadOptions) -> float:
    """Linear warm-up, then linear to zero at the last step."""
    warmup = min(1.0, (step + 1) / max(1, options.warmup))
    return options.lr * min(warmup, (options.steps - step) / max(1, options.steps - options.warmup))


def check_finite(loss: float, heads: nn.Module, step: int) -> None:
    """A loss that is not a number ends the run and names the first tensor that went wrong."""
    if math.isfinite(loss):
        return
    for what, tensors in (("weights", heads.named_parameters()), ("gradients", gradients(heads))):
        for name, tensor in tensors:
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(f"the loss at step {step} is {loss}: the {what} of {name} are not finite; lower --lr")
    raise UserError(f"the loss at step {step} is {loss} with finite weights: the batch overflows; try --no-bf16")


def gradients(heads: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, parameter.grad) for name, parameter in heads.named_parameters() if parameter.grad is not None]


class HeadTrainer:
    """One run: heads, optimisers, batches and log, resumable from `out/checkpoint.pt`."""

    def __init__(self, options: HeadOptions, target: LoadedModel, out: Path) -> None:
        self.options, self.target, self.out = options, target, out
        self.device = target.model.embedding.weight.device
        out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(options.seed)
        self.heads: Heads = build_heads(options.kind, options.shape(target.config.ffn_width), target.config)
        automatic: HeadInit = "zero" if options.kind == "medusa" else "random"
        initialise(self.heads, target.model, automatic if options.head_init == "auto" else options.head_init)
        self.heads.to(self.device)
        self.optimizer = MatrixOptimizer(self.heads, options)
        self.step, self.seconds = 0, 0.0
        self.checkpoint, self.log = out / "checkpoint.pt", out / "log.jsonl"

        window = options.window
        if window > target.config.context:
            raise UserError(f"--window {window} is longer than the target's context of {target.config.context} tokens")
        if window < options.depths + 2:
            raise UserError(f"--window {window} is too short for --depths {options.depths}")
        stream, heldout = read_streams(target, options.corpus)
        if len(heldout) < window:
            raise UserError(f"the held-out text has {len(heldout)} tokens, less than one --window of {window}")
        starts = torch.linspace(0, len(heldout) - window, min(options.eval_rows, len(heldout) // window)).long()
        self.heldout = torch.stack([heldout[start : start + window] for start in starts])
        self.table = count_table(stream, 2 if isinstance(self.heads, MedusaHeads) else 1, target.config.vocab_size)
        written = self._written(stream) if options.generated else None
        share, tokens = options.generated_share, options.batch_tokens
        self.batches = MixedBatches(stream, written, share, options.steps, window, tokens, options.seed)

    def _written(self, stream: Tensor) -> Tensor:
        """The target's own text, kept for a resumed run."""
        file, options = self.out / "generated.pt", self.options
        if not file.is_file():
            length = min(self.target.config.context, 4 * options.window)
            rows = min(options.generated_rows, max(1, -(-options.generated // length)))
            began = time.perf_counter()
            torch.save(write_text(self.target, stream, options.generated, length, rows, options.seed), file)
            self.seconds += time.perf_counter() - began
        written: Tensor = torch.load(file, weights_only=True)
        return written

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.options.bf16 else nullcontext()

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one; log lines past it are dropped."""
        state = read_checkpoint(self.checkpoint, self.options.decisive(), self.device)
        if state is not None:
            self.heads.load_state_dict(state["heads"])
            for optimizer, saved in zip(self.optimizer.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds = state["step"], state["seconds"]
        keep_log(self.log, self.step)

    def save(self) -> None:
        state = {
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizer.optimizers],
            "options": self.options.decisive(),
            "step": self.step,
            "seconds": self.seconds,
        }
        write_checkpoint(self.checkpoint, state)

    def train_step(self) -> float:
        options = self.options
        tokens = self.batches.at(self.step).to(self.device)
        accepted = self.step >= options.steps * (1 - options.tv_share)
        objective = Objective(accepted, options.chain, options.decay)
        rows = max(1, options.micro_tokens // options.window)
        loss = sum(self._backward(micro, objective, len(micro) / len(tokens)) for micro in tokens.split(rows))
        check_finite(loss, self.heads, self.step)
        torch.nn.utils.clip_grad_norm_(self.heads.parameters(), 1.0)
        self.optimizer.step(learning_rate(self.step, options))
        self.step += 1
        return loss

    def _backward(self, tokens: Tensor, objective: Objective, share: float) -> float:
        """Gradients of one forward, [B, W] tokens.

        Logits exist for a few rows at a time: the features are a leaf of the graph that goes through the output matrix,
        and hand their gradient on when it is complete.
        """
        target, options = self.target.model, self.options
        with torch.no_grad(), self.autocast():
            states = target_states(self.target, tokens, self.heads.taps)
        hidden = states[..., : self.target.config.width]
        with self.autocast():
            predicted = features(self.heads, target, tokens, states, options.trained_depths)  # [K, B, T, D]
        leaf, total, T = predicted.detach().requires_grad_(), 0.0, predicted.shape[2]
        for at in torch.arange(len(tokens), device=tokens.device).split(max(1, options.logit_tokens // options.window)):
            with self.autocast():
                logits = target.logits(leaf[:, at])
                with torch.no_grad():
                    probs = target.logits(hidden[at]).float().softmax(-1)
            loss = objective(probs, logits.float(), tokens[at])
            if options.feature_loss:
                true = torch.stack([hidden[at, d + 1 : d + 1 + T] for d in range(len(predicted))])
                loss = loss + options.feature_loss * F.smooth_l1_loss(leaf[:, at].float(), true.float())
            loss = loss * (share * len(at) / len(tokens))
            loss.backward()
            total += loss.item()
        predicted.backward(leaf.grad)
        return total

    def figures(self) -> dict[str, Any]:
        """On the held-out windows, in full precision."""
        return text_figures(self.heads, self.target, self.heldout, self.options.depths, self.table)

    def run(self) -> bool:
        """Train to the end, or to `stop_after`; whether the end was reached."""
        options = self.options
        self.resume()
        last = min(options.steps, options.stop_after or options.steps)
        with progress("training", last) as show, self.log.open("a") as log:
            for step in range(self.step):
                show(f"step {step}")
            while self.step < last:
                began = time.perf_counter()
                loss = self.train_step()
                took = time.perf_counter() - began
                self.seconds += took
                row: dict[str, Any] = {"step": self.step - 1, "loss": loss, "tokens_per_s": options.batch_tokens / took}
                if self.step % options.eval_every == 0 or self.step == options.steps:
                    row["heldout"] = self.figures()
                log.write(json.dumps(row) + "\n")
                log.flush()
                if self.step % options.save_every == 0 or self.step == last:
                    self.save()
                show(f"loss {loss:.3f}")
        return self.step == options.steps
