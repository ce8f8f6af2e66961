"""Everything that a figure depends on besides its own settings: machine, libraries, commit, models, prompts.

python -c "from common.environment import environment; print(environment('cpu', 'float32', 2, {}))"
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:  # torch takes seconds to import
    import torch

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("transformers", "tokenizers", "safetensors", "numpy", "triton")


def _output(*command: str) -> str | None:
    """Return the output of a command, or None if the command is missing or fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """Return the commit of the repository at `root` and whether its tracked files differ; None without a repository.

    Changes in results do not count: one bench writes them before the next begins, and no measurement reads them.
    A folder inside a repository does not count: an installed copy may be inside another repository, whose commit says
    nothing about the code.
    """
    top = _output("git", "-C", str(root), "rev-parse", "--show-toplevel")
    commit = _output("git", "-C", str(root), "rev-parse", "--verify", "HEAD")
    if top is None or commit is None or Path(top).resolve() != root.resolve():
        return None, None
    sources = ("--", ":(exclude,glob)**/results/**")
    return commit, bool(_output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", *sources))


def cpu_name() -> str:
    """Return the processor's name as its maker writes it, or at least its architecture."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return found[1] if found else platform.machine()


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def cpu_quota() -> float | None:
    """Return the cores that the control group may use (`cpu.max`, or version 1's quota); None without a limit."""
    found = (_read("/sys/fs/cgroup/cpu.max") or "max").split()
    if len(found) < 2:
        old = (_read(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period"))
        found = [text for text in old if text]
    if len(found) < 2 or found[0] in ("max", "-1"):
        return None
    return int(found[0]) / int(found[1])


def instruction_set() -> str:
    """Return the widest vector instructions that torch uses here, or SPECDEC_CPU_ISA's choice for the C++ kernels."""
    import torch

    return os.environ.get("SPECDEC_CPU_ISA") or torch.backends.cpu.get_cpu_capability().lower()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def environment(
    device: torch.device | str,
    dtype: torch.dtype | str,
    threads: int,
    models: Mapping[str, str],
    prompts_sha256: str | None = None,
) -> dict[str, Any]:
    """Describe everything that a figure depends on, ready for JSON. `models` maps names to content hashes."""
    import torch

    device = torch.device(device)
    is_cuda = device.type == "cuda"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if is_cuda else None
    commit, dirty = git_state(ROOT)
    return {
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "instruction_set": instruction_set(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "cpu_quota": cpu_quota(),
        "load_average": list(os.getloadavg()),
        "torch": torch.__version__,
        "libraries": {library: found for library in LIBRARIES if (found := _version(library))},
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if is_cuda else cpu_name(),
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda if is_cuda else None,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "models": dict(models),
        "prompts_sha256": prompts_sha256,
    }
