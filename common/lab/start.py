"""`lab start`: make a folder in which to write a phase: the phase before it, with stubs for the lesson's additions.

lab start 2 my-phase-2          the functions of the core path are empty, the rest is given
lab start 2 my-phase-2 --all    everything that the phase adds is empty
lab start 5 my-phase-5 --part cache
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

The lesson is `{folder}/README.md`. {held} Each stub raises `NotImplementedError` until you have written it. Signatures,
docstrings, data classes, constants and imports are given{helpers}.

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
    lab check {number} {argument} --diff       your function beside the shipped one, after its hint; once all pass, all
    lab check {number} {argument} --solution   the shipped function, after its diff

`{notes}` records the help that was given. git ignores this folder; remove its `.gitignore` to change that.
"""


CORE = """\
This folder holds the whole engine of the phase, in which the functions of the core path are empty. Writing them takes
about {minutes} minutes once you have read the lesson. `lab start {number} DIR --all` empties all that is new."""
WHOLE = """\
This folder holds the engine of the phase before it, the command line of this phase, and stubs for the lesson's
additions."""


def guide(work: Exercise, argument: str) -> str:
    """Return the text of EXERCISE.md."""
    lines = []
    for number, (file, stubs) in enumerate(groupby(work.stubs, key=lambda stub: stub.file), 1):
        words = work.words.get(file, "")
        lines.append(f"{number}. `{file}`{f': {words}' if words else ''}")
        for stub in stubs:
            minutes = work.time(stub)
            lines.append(f"   - [ ] `{stub.name}`{f' ({minutes} min)' if minutes else ''}: {stub.purpose}")
    given = list[str | None]()
    if work.absent:
        lines += ["", f"And, from scratch: {', '.join(f'`{file}`' for file in work.absent)}."]
    if work.changed and not work.minutes:
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
        rest = "Sources" if work.minutes else "So is what the phase adds in its other parts; but sources"
        given += [
            "" if work.minutes else None,
            f"{rest} that are compiled ({suffixes}) are left out: they would compute what you are to write. "
            "Here torch computes.",
            "",
        ]
    held = CORE.format(minutes=sum(work.minutes.values()), number=work.phase.number) if work.minutes else WHOLE
    return GUIDE.format(
        number=work.phase.number,
        name=work.phase.name,
        folder=work.phase.folder.name,
        held=held,
        helpers="" if work.minutes else "; helper functions are not",
        to_write="\n".join(lines),
        given="\n".join(line for line in given if line is not None),
        program=f"{argument}/generate.py",
        argument=argument,
        notes=EXERCISE_FILE,
    )


def start(found: list[Phase], number: int, folder: Path, everything: bool = False, part: str | None = None) -> Exercise:
    """Write the exercise into a folder that is absent or empty. UserError, with nothing written, on failure."""
    work = exercise(found, number, everything, part)
    if not work.stubs:
        raise UserError(f"phase {number} has nothing to write: its README names no function; try another phase")
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
    contents[EXERCISE_FILE] = (
        json.dumps({"phase": number, "all": everything, "part": part, "helped": {}}) + "\n"
    ).encode()
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
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument(
        "--all", action="store_true", help="empty everything that the phase adds, not the core path alone"
    )
    scope.add_argument("--part", metavar="PART", help="the core path of one part of a long lesson")
    options = parser.parse_args(arguments)
    work = start(phases(root), options.number, options.folder, options.all, options.part)
    first = work.stubs[0]
    print(f"{options.folder}: {len(work.stubs)} functions to write, listed in {options.folder / 'EXERCISE.md'}")
    print(f"Begin with {first}(): {first.purpose}")
    print(f"Then: lab check {options.number} {options.folder}")
    return 0
