"""Measures how well the instruments measure: predictions against sweeps, and latency under load.

Sections (`--only`): `sweep`, drafters x K x temperature x dtype, each cell predicted before it is run (its parts are
`survival`, `cost` and `prediction`); `synthetic`, the same with forced acceptance, where only costs can be wrong;
`latency`, an open loop against the engine, at rising rates; `serving`, the server against the engine that it serves.
Only on request: `peers`, other servers with the same weights. A run that was killed goes on with `--resume`.

    python bench.py --quick
    python bench.py --output results
    python bench.py --output results --resume --only latency
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import launch  # noqa: F401 (must be the first import)
import torch
from benchmarks.sections import (
    FIGURES,
    Options,
    Section,
    draw_predictions,
    measure_latency,
    measure_server,
    measure_servers,
    measure_sweep,
    measure_synthetic,
)

from common.benchmark import print_document, print_table
from common.device import resolve_device
from common.harness import Bench, model_hashes, open_results
from common.options import parse_options, run_main
from instruments.loads import draw as draw_loads
from instruments.loads import summary
from instruments.predict import compared, sentences, verdicts

SECTIONS: dict[Section, Callable[[Bench, Options], None]] = {
    "sweep": measure_sweep,
    "synthetic": measure_synthetic,
    "latency": measure_latency,
    "serving": measure_server,
    "peers": measure_servers,
}


def main(arguments: list[str]) -> int:
    options = parse_options(Options, arguments, program="bench.py")
    device = resolve_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    hashes = model_hashes(options.model, "auto")
    with open_results(options, FIGURES, device, options.dtype, hashes) as results:
        bench = Bench(options, results, device)
        for name in options.only or [name for name in SECTIONS if name != "peers"]:  # other servers are not everywhere
            SECTIONS[name](bench, options)
        bench.report("sweep", "Sweep")
        bench.report("serving", "What HTTP costs")
        bench.report("first", "Time to the first token over HTTP")
        bench.report("peers", "Other servers")
        predictions = compared(results.rows)
        names = list(dict.fromkeys(name for line in predictions for name in line))
        if predictions:
            print_table("Predicted and measured", names, [[line.get(n) for n in names] for line in predictions])
            print(*sentences(predictions), sep="\n", file=sys.stderr)
        loads = summary([row for row in results.rows if not row.synthetic])
        names = list(dict.fromkeys(name for line in loads for name in line))
        if loads:
            print_table("Latency under load", names, [[line.get(n) for n in names] for line in loads])
        if options.output:
            draw_predictions(predictions, options.output / "predictions.png", bench.mark)
            if loads:
                draw_loads(loads, options.output / "latency.png")
        status = bench.close()
        print_document(bench.document() | {"predictions": verdicts(predictions), "latency": loads})
        return status


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
