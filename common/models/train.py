"""Train an embedded model, or distil one from another, on the Python standard library's source.

The target learns from the text. The draft learns from the target's probabilities on the same text, first by
KL(target || draft), then by the total variation distance: 1 - TV = sum min(p, q) is exactly the probability that
speculative sampling accepts the draft's token (Leviathan et al. 2023; Zhou et al. 2024, DistillSpec). Matrices are
trained by Muon (Jordan et al. 2024), the embedding and the norms by AdamW. Checkpoints are written during the run: the
same command resumes, with the same batches as an uninterrupted run.

    python -m common.models.train --out runs/target --tokenizer common/models/stdlib-10m
    python -m common.models.train --out runs/draft --teacher runs/target/model --layers 2 --width 128 ...
    python -m common.models.train --out runs/qat --init stdlib-10m --qat int4 --steps 200 --lr 2e-4
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic_settings import BaseSettings
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from common.checkpoint import open_checkpoint
from common.errors import UserError
from common.flags import Threads
from common.models import qat
from common.models.batches import Batches, encode_documents, plan_stages
from common.models.corpus import read_corpus, read_files
from common.models.resuming import keep_log, read_checkpoint, write_checkpoint
from common.models.train_tokenizer import save_tokenizer
from common.options import parse_options, run_main


class TrainOptions(BaseSettings):
    """All options of a training run. The defaults are those of stdlib-10m."""

    out: Path = Field(description="folder for checkpoints, the log and, at the end, the model")
    tokenizer: Path = Field(default=Path("common/models/stdlib-10m"), description="folder with tokenizer.json")
    teacher: Path | None = Field(default=None, description="distil from this model folder instead of the text alone")
    init: str | None = Field(default=None, description="continue from this model, with its shape")
    qat: Literal["none", "int4"] = Field(default="none", description="train for weights rounded to int4, groups of 64")
    corpus: list[Path] = Field(
        default=[], description="files to train on instead of the standard library; the last of several is held out"
    )
    layers: int = Field(default=6, ge=1)
    width: int = Field(default=384, ge=8)
    heads: int = Field(default=6, ge=1)
    kv_heads: int = Field(default=2, ge=1)
    head_dim: int = Field(default=64, ge=2)
    ffn: int = Field(default=1024, ge=8)
    context: int = Field(default=1024, ge=16)
    steps: int = Field(default=1600, ge=1, description="optimiser steps")
    batch_tokens: int = Field(default=8192, ge=16, description="tokens per optimiser step")
    micro_tokens: int = Field(default=8192, ge=16, description="tokens per forward; less means accumulation")
    window: int = Field(default=512, ge=8, description="window of the first steps, in tokens")
    full_share: float = Field(default=0.2, ge=0, le=1, description="share of the steps at the full context")
    tv_share: float = Field(default=0.5, ge=0, le=1, description="share of a distillation under the TV loss")
    lr: float = Field(default=3e-3, gt=0, description="peak learning rate; then linearly to zero")
    warmup: int = Field(default=100, ge=0)
    weight_decay: float = Field(default=0.1, ge=0)
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    bf16: bool = Field(default=True, description="autocast the matrix products to bfloat16")
    compile: bool = Field(default=True, description="torch.compile the loss")
    checkpointing: bool = Field(default=False, description="recompute activations instead of keeping them")
    threads: Threads = Field(default=0, description="CPU threads; 0 leaves torch's choice")
    save_every: int = Field(default=200, ge=1)
    eval_every: int = Field(default=200, ge=1)
    stop_after: int = Field(default=0, ge=0, description="stop after this step, to be resumed later; 0: never")

    def decisive(self) -> dict[str, Any]:
        """Return the options that a resumed run must share with the run that it continues."""
        machine = {"out", "device", "threads", "compile", "save_every", "eval_every", "stop_after"}
        return self.model_dump(mode="json", exclude=machine)


def build_model(options: TrainOptions, vocab_size: int) -> LlamaForCausalLM:
    """Build a fresh Llama of the given shape, normal(0, 0.02) weights, output projections scaled down by depth."""
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=options.width,
        intermediate_size=options.ffn,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.head_dim,
        max_position_embeddings=options.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.div_(math.sqrt(2 * options.layers))
    return model


def continued_model(name: str, tokenizer: Tokenizer, context: int) -> LlamaForCausalLM:
    """Load an existing checkpoint to train further. UserError unless it is a Llama that fits the other options."""
    checkpoint = open_checkpoint(name)
    if checkpoint.config.get("architectures") != ["LlamaForCausalLM"]:
        raise UserError(f"--init {name}: expected a LlamaForCausalLM, got {checkpoint.config.get('architectures')}")
    config = LlamaConfig.from_pretrained(checkpoint.folder)
    if config.vocab_size != tokenizer.get_vocab_size():
        raise UserError(
            f"--init {name} has {config.vocab_size} tokens, --tokenizer {tokenizer.get_vocab_size()}: give its own"
        )
    if config.max_position_embeddings < context:
        raise UserError(f"--init {name} sees {config.max_position_embeddings} tokens; give --context at most that")
    return LlamaForCausalLM.from_pretrained(checkpoint.folder, config=config, dtype=torch.float32)


def build_optimizers(model: LlamaForCausalLM, options: TrainOptions) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    if not hasattr(torch.optim, "Muon"):
        raise UserError("training needs torch.optim.Muon: install torch 2.9 or newer")
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    inner_ids = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in inner_ids]
    muon = torch.optim.Muon(inner, lr=options.lr, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0)]


def learning_rate(step: int, options: TrainOptions) -> float:
    """Return the learning rate: linear warm-up, then linear to zero at the last step."""
    warmup = min(1.0, (step + 1) / max(1, options.warmup))
    return options.lr * min(warmup, (options.steps - step) / max(1, options.steps - options.warmup))


def make_loss(model: LlamaForCausalLM, teacher: LlamaForCausalLM | None) -> Callable[..., torch.Tensor]:
    """Return `loss(tokens, tv)`: mean over positions of cross entropy, or of the distance to the teacher."""

    def logits_of(network: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
        hidden = network.model(input_ids=tokens[:, :-1]).last_hidden_state  # [B, T-1, D]
        return F.linear(hidden, network.lm_head.weight).float().flatten(0, 1)  # [B*(T-1), V]

    def loss(tokens: torch.Tensor, tv: bool) -> torch.Tensor:
        logits = logits_of(model, tokens)
        if teacher is None:
            return F.cross_entropy(logits, tokens[:, 1:].flatten())
        with torch.no_grad():
            target_probs = logits_of(teacher, tokens).softmax(-1)
        if tv:
            return 1 - torch.minimum(target_probs, logits.softmax(-1)).sum(-1).mean()
        return F.cross_entropy(logits, target_probs)  # KL up to the target's own entropy

    return loss


def check_finite(loss: float, model: LlamaForCausalLM, step: int) -> None:
    """Raise UserError for a loss that is not finite, naming the first tensor that is not."""
    if math.isfinite(loss):
        return
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(f"the loss at step {step} is {loss}: the weights of {name} are not finite; lower --lr")
    for name, parameter in model.named_parameters():  # after the weights, because one bad weight spoils all gradients
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            raise UserError(f"the loss at step {step} is {loss}: the gradient of {name} is not finite; lower --lr")
    raise UserError(f"the loss at step {step} is {loss} with finite weights: the batch overflows; try --no-bf16")


class Trainer:
    """One run: model, optimisers, batches and log, resumable from `out/checkpoint.pt`."""

    def __init__(self, options: TrainOptions) -> None:
        self.options = options
        if options.threads:
            torch.set_num_threads(options.threads)
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(auto if options.device == "auto" else options.device)
        if not (options.tokenizer / "tokenizer.json").is_file():
            raise UserError(f"--tokenizer: no tokenizer.json in {options.tokenizer}")
        self.tokenizer = Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
        if options.corpus:
            files = read_files(options.corpus)
            files, heldout = files[:-1] or files, files[-1:]
        else:
            files, heldout = read_corpus("train"), read_corpus("heldout")
        stages = plan_stages(options.steps, options.window, options.context, options.full_share)
        self.batches = Batches(encode_documents(self.tokenizer, files), stages, options.batch_tokens, options.seed)
        stream = encode_documents(self.tokenizer, heldout)
        rows = min(64, len(stream) // options.context)
        if rows == 0:
            raise UserError(f"the held-out text is shorter than one context of {options.context} tokens")
        starts = torch.linspace(0, len(stream) - options.context, rows).long()
        self.heldout = torch.stack([stream[s : s + options.context] for s in starts])
        if options.init:
            self.model = continued_model(options.init, self.tokenizer, options.context)
        else:
            self.model = build_model(options, self.tokenizer.get_vocab_size())
        if options.qat == "int4":
            qat.round_forwards(self.model)
        torch.nn.Module.to(self.model, self.device)
        if options.checkpointing:
            self.model.gradient_checkpointing_enable()
        self.optimizers = build_optimizers(self.model, options)
        teacher = None
        if options.teacher:
            teacher = LlamaForCausalLM.from_pretrained(options.teacher, dtype=torch.float32).eval()
            torch.nn.Module.to(teacher, self.device)
        loss = make_loss(self.model, teacher)
        self.loss = torch.compile(loss) if options.compile else loss
        self.plain_loss = make_loss(self.model, None)
        self.step = 0
        self.checkpoint = options.out / "checkpoint.pt"
        self.log = options.out / "log.jsonl"

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.options.bf16 else nullcontext()

    def resume(self) -> None:
        """Continue from the last checkpoint, if there is one; drop log lines past it."""
        state = read_checkpoint(self.checkpoint, self.options.decisive(), self.device)
        if state is not None:
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step = state["step"]
        keep_log(self.log, self.step)

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "options": self.options.decisive(),
            "step": self.step,
        }
        write_checkpoint(self.checkpoint, state)

    def train_step(self) -> float:
        options = self.options
        tokens = self.batches.at(self.step).to(self.device)
        rows = max(1, options.micro_tokens // tokens.shape[1])
        tv = self.step >= options.steps * (1 - options.tv_share)
        total = 0.0
        for micro in tokens.split(rows):
            with self.autocast():
                loss = self.loss(micro, tv) * (len(micro) / len(tokens))
            loss.backward()
            total += loss.item()
        check_finite(total, self.model, self.step)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, options)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total

    @torch.no_grad()
    def heldout_loss(self) -> float:
        """Compute cross entropy in nats per token on a fixed sample of the held-out half."""
        self.model.eval()
        with self.autocast():
            losses = [self.plain_loss(rows.to(self.device), False).item() for rows in self.heldout.split(4)]
        self.model.train()
        return sum(losses) / len(losses)

    def run(self) -> None:
        options = self.options
        options.out.mkdir(parents=True, exist_ok=True)
        self.resume()
        last = min(options.steps, options.stop_after or options.steps)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        began = time.perf_counter()
        with Progress(*columns, refresh_per_second=1) as progress, self.log.open("a") as log:
            task = progress.add_task("training", total=options.steps, completed=self.step)
            self.model.train()
            while self.step < last:
                loss = self.train_step()
                now = time.perf_counter()
                row: dict[str, float] = {
                    "step": self.step - 1,
                    "loss": loss,
                    "tokens_per_s": options.batch_tokens / (now - began),
                }
                if self.step % options.eval_every == 0 or self.step == options.steps:
                    row["heldout_loss"] = self.heldout_loss()
                log.write(json.dumps(row) + "\n")
                log.flush()
                if self.step % options.save_every == 0 or self.step == last:
                    self.save()
                progress.update(task, completed=self.step, description=f"loss {loss:.3f}")
                began = time.perf_counter()
        if self.step == options.steps:
            self.export(options.out / "model")

    def export(self, folder: Path) -> None:
        """Write the finished model in transformers' format: fp16 safetensors, config, tokenizer."""
        if self.options.qat == "int4":
            qat.restore(self.model)
        self.model.config.use_cache = True
        self.model.generation_config.use_cache = None
        self.model.half().save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder, self.options.context)


def main(arguments: list[str]) -> int:
    Trainer(parse_options(TrainOptions, arguments, program="train.py")).run()
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
