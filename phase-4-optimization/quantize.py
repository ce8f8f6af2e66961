"""Write a checkpoint with quantised matrices; four-bit ones are calibrated on training text.

python quantize.py --model stdlib-10m --quant int4 --out runs/stdlib-10m-int4
python quantize.py --model stdlib-10m --quant int4 --method awq --group 128 --asymmetric --out runs/awq
python generate.py --model runs/stdlib-10m-int4 --prompt "from pathlib import"
"""

from __future__ import annotations

import sys
import time

import torch

from common.device import MIB, resolve_device
from common.errors import UserError
from common.options import parse_options, run_main
from engine.load import load
from engine.quantize import Format, quantize_model, stored_bytes
from engine.quantize_calibrated import calibration_windows, quantize_calibrated
from engine.quantize_files import is_quantized, save_quantized
from engine.quantize_options import QuantizeOptions


def main(arguments: list[str]) -> int:
    options = parse_options(QuantizeOptions, arguments, program="quantize.py")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise UserError(f"--out {options.out}: there is something already; give a folder that is new or empty")
    format, method = Format(options.quant, options.group, options.asymmetric), options.chosen
    loaded = load(options.model, torch.float32, resolve_device(options.device))
    if is_quantized(loaded.checkpoint):
        raise UserError(f"{options.model} is quantised already; give the model it came from")
    before, start = sum(stored_bytes(loaded.model)), time.perf_counter()
    about: dict[str, object] = {"method": method, "source": options.model}
    about["source_hash"] = loaded.checkpoint.content_hash()
    if method == "rtn":
        quantize_model(loaded.model, format, options.head)
    else:
        windows = calibration_windows(loaded, options.corpus, options.tokens, options.window, options.seed)
        about["calibration_tokens"] = windows.numel()
        print(f"calibrating on {windows.numel()} tokens", file=sys.stderr)
        quantize_calibrated(loaded.model, format, method, windows, options.head)
    _, largest = next(iter(loaded.checkpoint.tensors()))
    save_quantized(options.out, loaded.checkpoint, loaded.model, format, largest.dtype, about)
    values, others = stored_bytes(loaded.model)
    print(
        f"{options.out}: {format}, {method}, {time.perf_counter() - start:.0f} s; the layers' matrices take "
        f"{values / MIB:.2f} MiB and their scales {others / MIB:.2f} MiB, {before / MIB:.2f} MiB in float32"
    )
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
