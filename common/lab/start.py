"""`lab start`: make a folder in which to write a phase: the phase before it, with stubs for the lesson's additions.

lab start 2 my-phase-2
"""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path

from common.errors import UserError
from common.lab.arguments import Parser
from common.lab.exercise import Exercise, exercise, exercise_files
from common.phases import EXERCISE_FILE, ROOT, Phase, phases

PHASE = re.compile(r"phase-\d")
GUIDE = """\
# Exercise: phase {number}, {name}

The lesson is `{folder}/README.md`. This folder holds the engine of the phase before it, the command line of this phase,
and stubs for the lesson's additions. Each stub raises `NotImplementedError` until you have written it. Signatures,
docstrings, data classes, constants and imports are given; helper functions are not.

## To write, in this order

{to_write}

You may copy a file that you prefer not to write from `{folder}`; the check counts it like your own.
{given}
## Run and check

    python {program} --help
    lab check {number} {argument}

The check runs the tests of phase {number} on this folder. It prints which tests pass, what to write next, and for the
first failure the expected and the actual value. If you are stuck:

    lab check {number} {argument} --hint
    lab check {number} {argument} --diff       your function beside the shipped one, after its hint
    lab check {number} {argument} --solution   the shipped function, after its diff

`{notes}` records the help that was given. git ignores this folder; remove its `.gitignore` to change that.
"""


def guide(work: Exercise, argument: str) -> str:
    """Return the text of EXERCISE.md."""
    lines = []
    for number, (file, stubs) in enumerate(groupby(work.stubs, key=lambda stub: stub.file), 1):
        words = work.words.get(file, "")
        lines.append(f"{number}. `{file}`{f': {words}' if words else ''}")
        lines += [f"   - [ ] `{s.name}`{f': {s.purpose}' if s.purpose else ''}" for s in stubs]
    given = []
    if work.absent:
        lines += ["", f"And, from scratch: {', '.join(f'`{file}`' for file in work.absent)}."]
    if work.changed:
        names = ", ".join(f"`{file}`" for file in work.changed)
        given = [
            "",
            "## Given",
            "",
            f"The phase's changes in existing files are plumbing, and given: {names}.",
            "",
        ]
    if work.off:
        suffixes = ", ".join(sorted({f"`{Path(file).suffix}`" for file in work.off}))
        given += [
            f"So is what the phase adds in its other parts, but for sources that are compiled ({suffixes}): they would "
            "compute what you are to write. Here torch computes.",
            "",
        ]
    return GUIDE.format(
        number=work.phase.number,
        name=work.phase.name,
        folder=work.phase.folder.name,
        to_write="\n".join(lines),
        given="\n".join(given),
        program=f"{argument}/generate.py",
        argument=argument,
        notes=EXERCISE_FILE,
    )


def start(found: list[Phase], number: int, folder: Path) -> Exercise:
    """Write the exercise into a folder that is absent or empty. UserError, with nothing written, on failure."""
    work = exercise(found, number)
    if not work.stubs:
        raise UserError(f"phase {number} has nothing to write: its README names no function; try the phase after it")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder that is absent or empty")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty, and nothing in it was touched; name a folder that is absent or empty")
    resolved = folder.resolve()
    if any(
        resolved.is_relative_to(p.folder) or (resolved.parent == p.folder.parent and PHASE.match(resolved.name))
        for p in found
    ):
        raise UserError(f"{folder} looks like a phase of the course, or is inside of one; choose a name like my-phase")
    contents = exercise_files(work)
    contents["EXERCISE.md"] = guide(work, str(folder)).encode()
    contents[EXERCISE_FILE] = (json.dumps({"phase": number, "helped": {}}) + "\n").encode()
    contents[".gitignore"] = b"*\n"
    try:
        for path, content in contents.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name another folder") from None
    return work


def run(arguments: list[str], root: Path = ROOT) -> int:
    parser = Parser("lab start", "Make a folder in which to write a phase yourself.")
    parser.add_argument("number", metavar="N", type=int, help="the number of the phase")
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder that is absent or empty")
    options = parser.parse_args(arguments)
    work = start(phases(root), options.number, options.folder)
    first = work.stubs[0]
    print(f"{options.folder}: {len(work.stubs)} functions to write, listed in {options.folder / 'EXERCISE.md'}")
    print(f"Begin with {first}(): {first.purpose}")
    print(f"Then: lab check {options.number} {options.folder}")
    return 0
