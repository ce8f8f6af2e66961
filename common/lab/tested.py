"""Which tests are about which module of the engine: the table of CONTRIBUTING.md, found in the sources.

First come tests with the module's name, then those that detect changes of the module by the lists in tests/mutants,
then those that name the module (or its path, or what it defines) and whose own name contains the module's. If there are
none, all tests that name the module count; those that name few modules come first. The phase of a test does not matter.
What tests reach only through other modules is in BY_HAND.

    print(table(ROOT))
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path

from common.errors import UserError
from common.phases import phases
from common.terminal import print_table

SHOWN = 3  # files per module
COMPILED = (".cpp", ".cu", ".cuh", ".h", ".inl")
# Below the engine. A folder has its sources that are compiled, and those of its modules that no test names.
BY_HAND = {
    "attention.py": "phase5/test_cached_runner.py phase5/test_windows.py",
    "cli.py": "every_phase/test_command_line.py phase2/test_options.py phase3/test_drafter_options.py",
    "compile.py": "phase4/test_packing_compile.py",
    "config_file.py": "every_phase/test_config_forms.py every_phase/test_mutated_folders.py",
    "config_rope.py": "every_phase/test_config_forms.py",
    "drafters/memory.py": "phase3/test_heads.py",
    "drafters/eagle.py": "phase3/test_heads.py phase5/test_cpp_eagle.py",
    "drafters/medusa.py": "phase3/test_heads.py phase5/test_cpp_medusa.py",
    "generate.py": "every_phase/test_decoding.py every_phase/test_streams.py",
    "inputs.py": "phase5/test_host_traffic.py phase5/test_cached_runner.py",
    "kernels/__init__.py": "phase5/test_kernel_calls.py",
    "kernels/arguments.py": "phase5/test_cuda_kernels.py phase5/test_triton_kernels.py",
    "kernels/cpp/packed.py": "phase5/test_cpp_step.py",
    "kernels/cpp/src/": "phase5/test_cpp_ops.py phase5/test_cpp_step.py phase5/test_cpp_speculate.py",
    "kernels/cuda/": "phase5/test_cuda_kernels.py phase5/test_cuda_end_to_end.py",
    "kernels/gpu.py": "phase5/test_cuda_kernels.py phase5/test_triton_kernels.py",
    "kernels/gpu_tokens.py": "phase5/test_cuda_kernels.py phase5/test_triton_kernels.py",
    "kernels/launches.py": "phase5/test_cuda_kernels.py phase5/test_triton_kernels.py",
    "kernels/matrix.py": "phase5/test_cuda_kernels.py phase5/test_triton_kernels.py",
    "kernels/tokens.py": "phase5/test_cuda_kernels.py phase5/test_triton_kernels.py",
    "kernels/triton/": "phase5/test_triton_kernels.py phase5/test_triton_end_to_end.py",
    "model.py": "every_phase/test_logits.py",
    "quantize_others.py": "every_phase/test_quantised_checkpoints.py",
    "rope.py": "every_phase/test_logits.py every_phase/test_config_forms.py",
    "shapes.py": "phase4/test_packing_compile.py",
    "steps.py": "phase3/test_step_stats.py",
    "parallel/__init__.py": "phase6/test_parallel.py",
    "parallel/group.py": "phase6/test_parallel.py phase6/test_split_model.py",
    "parallel/lead.py": "phase6/test_parallel.py phase6/test_split_model.py",
    "parallel/lifeline.py": "phase6/test_parallel.py",
    "parallel/messages.py": "phase6/test_split_model.py",
    "parallel/worker.py": "phase6/test_split_model.py phase6/test_parallel.py",
    "uncached_runner.py": "phase6/test_llm_engine.py",
}
Modules = Mapping[str, Mapping[str, str]]  # `drafters/heads` -> what a package exports, with the module that defines it


def modules_of(engine: Path) -> Modules:
    """Return the modules of an engine; a package is named by its folder, and the engine itself ``."""
    found: dict[str, dict[str, str]] = {}
    for file in sorted(engine.rglob("*.py")):
        path = file.relative_to(engine).with_suffix("")
        package = path.name == "__init__"
        name = "" if str(path.parent) == "." and package else (path.parent if package else path).as_posix()
        found[name] = {}
        for node in ast.parse(file.read_text(encoding="utf-8")).body if package else []:
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                target = "/".join([*([name] if name else []), *node.module.split(".")])
                found[name] |= {alias.name: target for alias in node.names}
    return found


def resolve(modules: Modules, start: str, names: list[str]) -> str:
    """Return the module in which a dotted name ends: `kernels.cpp.CppModel` is of `kernels/cpp/model`."""
    for name in names:
        inner = f"{start}/{name}" if start else name
        if inner not in modules:
            return resolve(modules, modules[start][name], [name]) if name in modules[start] else start
        start = inner
    return start


def named(test: str, modules: Modules) -> set[str]:
    """Return the modules that a test file's source names."""
    bound, found = {"engine": ""}, set[str]()
    tree = ast.parse(test)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package, *names = alias.name.split(".")
                if re.fullmatch(r"phase\d+", package):
                    module = resolve(modules, "", names)
                    bound |= {alias.asname: module} if alias.asname else {package: ""}
                    found.add(module)
        elif isinstance(node, ast.ImportFrom) and re.match(r"phase\d+\b", node.module or ""):
            for alias in node.names:
                module = resolve(modules, "", [*str(node.module).split(".")[1:], alias.name])
                bound[alias.asname or alias.name] = module
                found.add(module)
    inner = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}  # `a.b` of `a.b.c`
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node not in inner:
            first, *names = ast.unparse(node).split(".")
            if first in bound:
                found.add(resolve(modules, bound[first], names))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            dotted = re.findall(r"phase\d+((?:\.\w+)+)", node.value) + re.findall(r"^\.[\w.]+$", node.value)
            found |= {resolve(modules, "", name.split(".")[1:]) for name in dotted}
            found |= {name for name in re.findall(r"engine/([\w/]+)\.py", node.value) if name in modules}
    return found - {""}


def killers(root: Path) -> dict[str, list[str]]:
    """Return the tests that detect mutants: source below the engine -> test files, by the lists in tests/mutants."""
    found: dict[str, list[str]] = defaultdict(list)
    for file in sorted((root / "tests/mutants").glob("*.py")):
        values: dict[str, ast.expr] = {}
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
                continue
            values[node.targets[0].id] = node.value
            for call in ast.walk(node.value):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "mutants":
                    source = "".join(_strings(call.args[0], values)).partition("/engine/")[2]
                    tests = [name.removeprefix("tests/") for name in _strings(call.args[1], values)]
                    found[source] += [name for name in tests if name.endswith(".py") and name not in found[source]]
    return found


def _strings(node: ast.expr, values: Mapping[str, ast.expr]) -> Iterator[str]:
    """Yield the strings of an expression, in order, with those of the file's constants in their place."""
    if isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.Name):
        yield from _strings(values[node.id], values)
    else:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                yield from _strings(child, values)


def by_module(root: Path) -> dict[str, list[str]]:
    """Return the test files, below `tests`, of every module, and of the folders in BY_HAND, of the newest engine.

    Raises UserError for a module without a test, and for a line of BY_HAND that is out of date.
    """
    engine = phases(root)[-1].folder / "engine"
    modules = modules_of(engine)
    files = sorted(path for path in (root / "tests").glob("*phase*/test_*.py"))
    tests = {f"{path.parent.name}/{path.name}": named(path.read_text("utf-8"), modules) for path in files}
    paths = {name: f"{name}.py" if (engine / f"{name}.py").is_file() else f"{name}/__init__.py" for name in modules}
    mutants = killers(root)
    found: dict[str, list[str]] = {}
    for name in sorted(modules.keys() - {""}):
        place, words = paths[name], set(name.rpartition("/")[2].split("_"))
        rank = {}
        for test, names in tests.items():
            stem = set(Path(test).stem.split("_")) - {"test"}
            if stem == words:
                rank[test] = 0
            elif test in mutants[place]:
                rank[test] = 1
            elif name in names:
                rank[test] = 2 if words <= stem else 3
        best = [test for test in rank if rank[test] < 3 or min(rank.values()) == 3]
        found[place] = sorted(best, key=lambda test: (rank[test], len(tests[test])))[:SHOWN]
    for place, by_hand in BY_HAND.items():
        if not (engine / place).exists() or not set(by_hand.split()) <= tests.keys():
            raise UserError(f"common/lab/tested.py: {place}: {by_hand} in BY_HAND is out of date")
        found[place] = by_hand.split()
    compiled = {
        f"{path.parent.relative_to(engine).as_posix()}/" for path in engine.rglob("*") if path.suffix in COMPILED
    }
    for place in sorted(compiled | found.keys()):
        if not found.get(place):
            if f"{Path(place).parent.as_posix()}/" not in BY_HAND:
                raise UserError(f"engine/{place}: no test names it; write one, or name it in common/lab/tested.py")
            del found[place]
    return dict(sorted(found.items()))


def table(root: Path) -> str:
    """Return the table of CONTRIBUTING.md, without the marks around it."""
    rows = [
        (f"`{place}`{', the rest' if place.endswith('/') else ''}", ", ".join(f"`{test}`" for test in tests))
        for place, tests in by_module(root).items()
    ]
    out = StringIO()
    print_table("", ["in `engine`", "in `tests`"], rows, file=out)
    return out.getvalue().strip()
