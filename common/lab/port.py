"""`lab port`: carry a fix made in one phase forward to all later phases.

A fix is a commit that changes the engine, generate.py or config.yaml of exactly one phase. Files outside of the phases,
such as tests, may change with it, and so may README.md, lesson.ipynb, bench.py with benchmarks/ and results/, which are
each phase's own; all of these are left alone. The rest is carried (see common/lab/carry.py) and staged, to be committed
with the fix. A conflict stops the port until `--continue` or `--abort`; meanwhile its state is in .git/lab-port.json.

    lab port            # the last commit
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from common.errors import UserError
from common.lab.arguments import Parser
from common.lab.carry import Carrier, State, Trail
from common.lab.repository import Change, Repository
from common.lab.snapshots import OWN
from common.phases import phases

MARKER = re.compile(rb"^(<<<<<<<|>>>>>>>) ", re.MULTILINE)
EPILOG = """\
COMMIT changes files of one phase only. The result is staged: look at it (git diff --cached), then commit it with the
fix (git commit --amend). A conflict stops the port: edit the file that is named, then `lab port --continue`."""


def read_fix(repository: Repository, commit: str) -> tuple[str, dict[str, Change], list[str]]:
    """Return the phase folder that a commit changes, the changes to carry, and the changed files that stay.

    Raises UserError unless there is something to carry from exactly one phase.
    """
    short = commit[:10]
    if len(repository.text("rev-list", "--parents", "--max-count=1", commit).split()) > 2:
        raise UserError(f"{short} is a merge: name the commit in it that has the fix (`git log {short}^1..{short}^2`)")
    if not repository.succeeds("merge-base", "--is-ancestor", commit, "HEAD"):
        raise UserError(f"{short} is not in the history of HEAD: bring it here first (`git cherry-pick {short}`)")
    found: dict[str, dict[str, Change]] = {}
    own = []
    for path, change in repository.changes(commit).items():
        folder, _, inner = path.partition("/")
        if not re.fullmatch(r"phase-\d+-[a-z-]+", folder) or not inner:
            continue
        if inner.split("/")[0] in OWN:
            own.append(path)
        else:
            found.setdefault(folder, {})[inner] = change
    if not found and own:
        raise UserError(f"{short} changes only what every phase has of its own ({own[0]}, ...): carry it by hand")
    if not found:
        raise UserError(f"{short} touches no phase: name a commit that fixes something in a phase-N-... folder")
    if len(found) > 1:
        raise UserError(
            f"{short} touches several phases ({', '.join(sorted(found))}): commit the fix in the first of them alone "
            "(`git reset HEAD^` takes the last commit apart), and lab port carries it to the others"
        )
    return *found.popitem(), own


def carry(repository: Repository, file: Path, state: State) -> int:
    """Begin or continue, then print the next step. Exit status 1 at a conflict."""
    phase, changes, own = read_fix(repository, state.commit)
    number = int(phase.split("-")[1])
    later = [other.folder.name for other in phases(repository.top) if other.number > number]
    if not later:
        print(f"nothing to carry: {phase} is the last phase")
        return 0
    if own and not state.touched:
        print(f"not carried, because every phase has its own: {', '.join(own)}")
    trails = [
        Trail(path, f"{state.commit}^:{phase}", latest=change, taken=change, source=phase)
        for path, change in changes.items()
    ]
    if not Carrier(repository, file, state).run(trails, later):
        return 1
    staged = repository.text("diff", "--cached", "--name-only").splitlines()
    if not staged:
        print("nothing to carry: nothing is left to change in the later phases")
        return 0
    print(f"\nstaged: {len(staged)} file{'s' if len(staged) > 1 else ''} (`git diff --cached` shows them). Next:")
    if state.commit != repository.commit("HEAD"):
        why = "the fix is not the last commit"
    elif repository.text("for-each-ref", "--contains", state.commit, "refs/remotes"):
        why = "the fix is pushed already"
    else:
        print("  git commit --amend --no-edit    makes the fix one commit in all phases")
        return 0
    print(f'  git commit -m "Carry {state.commit[:10]} forward"    a commit of its own, because {why}')
    return 0


def start(repository: Repository, file: Path, name: str) -> int:
    if file.exists():
        raise UserError("a port is under way: `lab port --continue` continues it, `lab port --abort` undoes it")
    unsaved = repository.unsaved()
    if unsaved:
        more = f" and {len(unsaved) - 1} more" if len(unsaved) > 1 else ""
        raise UserError(f"{unsaved[0]}{more} not committed: commit first, or put it aside with `git stash -u`")
    return carry(repository, file, State(repository.commit(name), repository.commit("HEAD")))


def load(file: Path) -> State:
    """Read the state of the stopped port. Raises UserError if there is none."""
    if not file.exists():
        raise UserError("no port is under way: `lab port [COMMIT]` begins one")
    return State(**json.loads(file.read_text(encoding="utf-8")))


def go_on(repository: Repository, file: Path) -> int:
    state = load(file)
    if state.conflict is None:
        raise UserError("this port was interrupted in the middle: `lab port --abort`, then begin it again")
    path = repository.top / state.conflict
    if path.is_file() and MARKER.search(path.read_bytes()):
        raise UserError(f"{state.conflict} still has conflict markers (<<<<<<< or >>>>>>>): edit it, then continue")
    return carry(repository, file, state)


def abort(repository: Repository, file: Path) -> int:
    state = load(file)
    committed = repository.entries("HEAD")
    for path in state.touched:
        repository.put(path, committed.get(path))
    file.unlink()
    print(f"restored: {', '.join(state.touched)}")
    return 0


def run(arguments: list[str]) -> int:
    parser = Parser("lab port", "Carry a fix made in one phase forward to all later phases.", epilog=EPILOG)
    parser.add_argument("commit", nargs="?", metavar="COMMIT", help="the fix (default HEAD)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--continue", dest="go_on", action="store_true", help="continue after a conflict was resolved")
    action.add_argument("--abort", action="store_true", help="restore everything")
    options = parser.parse_args(arguments)
    if options.commit and (options.go_on or options.abort):
        raise UserError("--continue and --abort take no COMMIT: they act on the port that is under way")
    repository = Repository(Path.cwd())
    file = repository.top / repository.text("rev-parse", "--git-path", "lab-port.json")
    if options.go_on:
        return go_on(repository, file)
    return abort(repository, file) if options.abort else start(repository, file, options.commit or "HEAD")
