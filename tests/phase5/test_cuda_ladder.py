"""Every rung of the CUDA ladders equals torch, emulated or on a GPU; and a dry run of their bench."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from common.results import Results
from phase5.kernels import registry
from tests.support.beside import beside

check, ladder = beside(5, "checks.check"), beside(5, "ladder.cuda")
CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.fixture(scope="module", params=["emulated", pytest.param("on a GPU", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, emulate: Callable[[pytest.MonkeyPatch], None]) -> Iterator[torch.device]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "emulated":
            emulate(patch)
            yield CPU
        else:
            reason = registry.why_not("cuda", torch.device("cuda"))
            if reason is not None:
                pytest.skip(reason)
            yield torch.device("cuda", torch.cuda.current_device())


def numbers(device: torch.device, *shape: int, seed: int) -> Tensor:
    """Return a tensor surrounded by NaN, at a multiple of 16 bytes."""
    made: Tensor = check.poisoned(device, BF16, *shape, seed=seed)
    return made


@pytest.mark.parametrize("rung", ladder.RUNGS)
@pytest.mark.parametrize(("N", "K"), [(1, 8), (5, 24), (37, 136), (3, 1600)])
def test_linear(rung: int, N: int, K: int, device: torch.device) -> None:
    weight, x, bias = numbers(device, N, K, seed=1), numbers(device, K, seed=2), numbers(device, N, seed=3)
    check.near(f"rung {rung}", ladder.linear(rung, weight, x, bias), F.linear(x, weight, bias), check.WITHIN[BF16])


@pytest.mark.parametrize("rung", ladder.RUNGS)
@pytest.mark.parametrize(("H", "HK", "D"), [(1, 1, 64), (5, 5, 64), (8, 2, 128), (8, 1, 64)])
@pytest.mark.parametrize("n", [1, 5, 123, 300])
def test_attention(rung: int, H: int, HK: int, D: int, n: int, device: torch.device) -> None:
    query = numbers(device, H, D, seed=1)
    keys, values = (torch.full((HK, n + 3, D), float("nan"), dtype=BF16, device=device) for _ in range(2))
    keys[:, :n], values[:, :n] = numbers(device, HK, n, D, seed=2), numbers(device, HK, n, D, seed=3)
    wanted = F.scaled_dot_product_attention(
        query[None, :, None].float(), keys[None, :, :n].float(), values[None, :, :n].float(), enable_gqa=H > HK
    )
    check.near(
        f"rung {rung}", ladder.attention(rung, query, keys, values, n), wanted[0, :, 0].to(BF16), check.WITHIN[BF16]
    )


def test_wrong_arguments_are_named(device: torch.device) -> None:
    weight, x, bias = numbers(device, 3, 8, seed=1), numbers(device, 8, seed=2), numbers(device, 3, seed=3)
    for rung, tensors, message in (
        (6, (weight, x, bias), "rung 6; expected one of 1, 2, 3, 4, 5"),
        (1, (weight.float(), x, bias), "weight is torch.float32; expected torch.bfloat16"),
        (1, (weight, x[:7], bias), r"x has shape \[7\]; expected \[8\]"),
    ):
        with pytest.raises(UserError, match=message):
            ladder.linear(rung, *tensors)
    keys = numbers(device, 2, 9, 64, seed=1)
    with pytest.raises(UserError, match="10 tokens of 9; expected at least 1"):
        ladder.attention(1, numbers(device, 4, 64, seed=2), keys, keys, 10)


def test_the_benches_walk_their_grids(tmp_path: Path, bench_part: Callable[[int, str], ModuleType]) -> None:
    gpu_ladder, gpu_peers, runs = (bench_part(5, name) for name in ("gpu_ladder", "gpu_peers", "runs"))
    options = runs.Options(dry_run=True)
    with Results(None, {}, {}, {}, False) as results:
        lab = runs.Lab(options, results, CPU)
        gpu_ladder.measure_gpu_ladder(lab)
        gpu_peers.measure_gpu_peers(lab)
        gpu_ladder.draw_gpu_ladder(lab, tmp_path / "ladder.png")
        rows = results.rows
        assert all(row.synthetic for row in rows)
        of_ladder = [row for row in rows if row.section == "gpu_ladder" and row.kind == "run"]
        assert len(of_ladder) == 8 * len(gpu_ladder.cases())  # 5 rungs, two of the engine, the null arm
        models = {row.cell["model"] for row in rows if row.section == "gpu_peers"}
        assert models == {"gpt2-xl", "Llama-3.1-8B", "stdlib-10m", "stdlib-1m"}
        assert (tmp_path / "ladder.png").stat().st_size > 1000

        wet = runs.Lab(runs.Options(), results, CPU)
        with pytest.raises(UserError, match=r"cannot run here: .*--dry-run walks their grid"):
            gpu_ladder.measure_gpu_ladder(wet)
        with pytest.raises(UserError, match="need a GPU, and this is cpu"):
            gpu_peers.measure_gpu_peers(wet)
