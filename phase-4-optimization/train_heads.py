"""Train Medusa heads or an EAGLE layer for a target, and measure them on held-out text.

python train_heads.py --kind medusa --out runs/medusa
python train_heads.py --kind eagle --target FOLDER --corpus a.py --corpus b.py --out runs/eagle
python train_heads.py --kind eagle --evaluate runs/eagle/heads

The same command resumes an interrupted run. The result is OUT/heads, for --heads of generate.py.
"""

from __future__ import annotations

import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from common.benchmark import print_table
from common.device import resolve_device
from common.errors import UserError
from common.options import parse_options, run_main
from engine.drafters.heads import find_heads, load_heads, save_heads
from engine.load import LoadedModel, load
from training.figures import decoding_figures
from training.options import HeadOptions
from training.trainer import HeadTrainer


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = next((line.split(":")[1] for line in cpu_lines() if line.startswith("model name")), platform.processor())
    return f"{torch.get_num_threads()} threads of {model.strip() or platform.machine()}"


def cpu_lines() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text().splitlines() if info.is_file() else []


def figures_table(on_text: dict[str, Any]) -> list[list[object]]:
    columns = ("accuracy", "acceptance", "survival")
    return [[depth, *row] for depth, row in enumerate(zip(*(on_text[name] for name in columns), strict=True), start=1)]


def show(on_text: dict[str, Any] | None, decoded: dict[str, Any] | None) -> None:
    if on_text:
        title = f"held-out text; a table of counts gets {on_text['table_accuracy']:.3f} right at depth 1"
        print_table(title, ["depth", "right", "accepted", "survives"], figures_table(on_text))
    if decoded:
        rows = [[where, decoded[f"{where}_tokens_per_forward"]] for where in ("forced", "sampled")]
        print_table(f"chains of {decoded['k']} at temperature 1", ["text", "tokens per target forward"], rows)


def card(options: HeadOptions, target: LoadedModel, about: dict[str, Any], parameters: int) -> str:
    on_text, decoded = about["heldout"], about["decoding"]
    lines = [
        f"# {options.kind} heads for {target.checkpoint.name}",
        "",
        f"{parameters / 1e6:.2f}M parameters in float16, for the target with hash {target.checkpoint.content_hash()}.",
        "",
        "| | |",
        "|---|---|",
        f"| steps | {options.steps} of {options.batch_tokens} tokens, windows of {options.window} |",
        f"| hardware | {about['hardware']}, {about['minutes']:.1f} minutes |",
        f"| command | `{about['command']}` |",
        "",
        f"On {on_text['positions']} positions of held-out text. A table of counts on the same training text, which",
        f"sees the same last token, gets {on_text['table_accuracy']:.3f} right at depth 1.",
        "",
        "| depth | right | sum min(p, q) | chain gets this far |",
        "|---|---|---|---|",
        *(f"| {depth} | " + " | ".join(f"{x:.3f}" for x in row) + " |" for depth, *row in figures_table(on_text)),
    ]
    if decoded:
        lines += [
            "",
            f"Tokens per target forward, chains of {decoded['k']} at temperature 1, {decoded['prompts']} prompts of",
            f"the `test` half: {decoded['forced_tokens_per_forward']:.2f} on forced text, "
            f"{decoded['sampled_tokens_per_forward']:.2f} on samples.",
        ]
    return "\n".join(lines) + "\n"


def decoding(options: HeadOptions, heads: Any, target: LoadedModel) -> dict[str, Any] | None:
    if not options.prompts or target.config.context < 512:
        return None
    return decoding_figures(heads, target, options.prompts, k=4, length=64, seed=options.seed)


def train(options: HeadOptions, out: Path, target: LoadedModel, command: str) -> None:
    trainer = HeadTrainer(options, target, out)
    if not trainer.run():
        return
    heads, device = trainer.heads, trainer.device
    about: dict[str, Any] = {
        "command": command,
        "hardware": hardware(device),
        "minutes": trainer.seconds / 60,
        "torch": torch.__version__,
        "training": options.decisive(),
    }
    folder = out / "heads"
    save_heads(folder, heads, target, **about)
    saved = load_heads(folder, target, options.kind)  # measure the saved heads, in float16
    trainer.heads = saved
    about |= {"heldout": trainer.figures(), "decoding": decoding(options, saved, target)}
    save_heads(folder, saved, target, **about)
    (folder / "README.md").write_text(
        card(options, target, about, sum(p.numel() for p in saved.parameters())), encoding="utf-8"
    )
    show(about["heldout"], about["decoding"])


def main(arguments: list[str]) -> int:
    options = parse_options(HeadOptions, arguments, program="train_heads.py")
    if options.threads:
        torch.set_num_threads(options.threads)
    if (options.out is None) == (options.evaluate is None):
        raise UserError("give --out FOLDER to train, or --evaluate FOLDER to measure trained heads")
    target = load(options.target, torch.float32, resolve_device(options.device))
    if options.evaluate is not None:
        heads = load_heads(find_heads(str(options.evaluate), target, options.kind), target, options.kind)
        show(None, decoding(options, heads, target))
    elif options.out is not None:
        train(options, options.out, target, shlex.join(["python", "train_heads.py", *arguments]))
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
