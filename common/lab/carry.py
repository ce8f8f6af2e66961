"""Carry one fix through the later phases, file by file: the decisions of `lab port`.

Each file that the fix changes is followed from phase to phase:

- if a phase has the file as the previous phase had it, the phase gets the previous phase's new file, byte for byte;
- if the lesson changed the file, the change is merged into it (three-way, `git merge-file`): base and theirs are the
  file before and after in the latest phase that took the change, ours is this phase's own. So a conflict that was
  resolved in one phase does not recur in the next;
- if the lesson renamed the file, the change follows it (git's rename detection between the two phases); if the lesson
  removed the file, the phase is skipped, with a message;
- a file that the fix adds is added; a file that it deletes is deleted if identical, else kept, with a message.

    lab port --help
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common.lab.repository import Change, Conflict, Entry, Repository


@dataclass
class State:
    """The state of a stopped port, for `--continue` and `--abort`."""

    commit: str  # the fix
    head: str  # HEAD when the port began
    touched: list[str] = field(default_factory=list)  # files written so far
    conflict: str | None = None  # the file that a person has to edit


@dataclass
class Trail:
    """One file of the fix, followed through the phases."""

    path: str  # the path in the latest phase with the file
    tree: str  # that phase before the port
    latest: Change  # that phase's file, before and after the port
    taken: Change  # the same for the latest phase that took the change
    source: str  # the folder of the phase that took it


@dataclass
class Carrier:
    """One run of `lab port`, or its continuation."""

    repository: Repository
    file: Path  # of the state
    state: State

    def run(self, trails: list[Trail], folders: list[str]) -> bool:
        """Carry everything, or stop at the first conflict (False). Files written by an earlier run are skipped."""
        settled = {path: self.repository.stage(path) for path in self.state.touched}
        self.state.conflict = None
        for folder in folders:
            tree = f"{self.state.head}:{folder}"
            files = self.repository.entries(tree)
            for trail in trails:
                path = self._find(trail, files, tree)
                full, ours = f"{folder}/{path}", files.get(path)
                if full in settled:
                    result = settled[full]
                elif ours is None and trail.latest.before is not None:
                    print(f"{full}: not in this phase, skipped")
                    continue
                else:
                    merged = self._merge(trail, ours, folder)
                    if isinstance(merged, Conflict):
                        self._stop(full, merged)
                        return False
                    result = merged
                    if result != ours:
                        self._touch(full)
                        self.repository.put(full, result)
                    print(f"{full}: {_outcome(trail, path, ours, result)}")
                trail.path, trail.tree, trail.latest = path, tree, Change(ours, result)
                if ours != result:
                    trail.taken, trail.source = trail.latest, folder
        self.file.unlink(missing_ok=True)
        return True

    def _find(self, trail: Trail, files: dict[str, Entry], tree: str) -> str:
        """Return the file's path in a phase: the same, or the lesson's new name."""
        if trail.path in files or trail.latest.before is None:
            return trail.path
        return self.repository.renames(trail.tree, tree).get(trail.path, trail.path)

    def _merge(self, trail: Trail, ours: Entry | None, folder: str) -> Entry | Conflict | None:
        """Return the new content of the file in a phase."""
        if ours == trail.latest.before:
            return trail.latest.after
        base, theirs = trail.taken.before, trail.taken.after
        if ours == base:
            return theirs
        if ours == theirs or ours is None or theirs is None:
            return ours
        labels = [folder, f"{trail.source} before the fix", f"{trail.source} after the fix"]
        return self.repository.merge(base, ours, theirs, labels)

    def _touch(self, full: str) -> None:
        """Remember a file before it is written, so that `--abort` can restore it."""
        self.state.touched.append(full)
        self.file.write_text(json.dumps(asdict(self.state)), encoding="utf-8")

    def _stop(self, full: str, conflict: Conflict) -> None:
        self.state.conflict = full
        self._touch(full)
        self.repository.put_conflict(full, conflict)
        if conflict.marked == conflict.ours:
            what = f"replace {full} by the right version: it is binary and cannot be merged; now it is this phase's own"
        else:
            what = f"edit {full}: keep this phase's right lines, and remove the marker lines <<<<<<< to >>>>>>>"
        print(
            f"\n{full}: CONFLICT: the lesson changed what the fix changes (`git show {self.state.commit[:10]}`)\n"
            f"  1. {what}\n"
            "  2. lab port --continue    goes on with the other files and phases\n"
            "  or lab port --abort       restores everything"
        )


def _outcome(trail: Trail, path: str, ours: Entry | None, result: Entry | None) -> str:
    """Describe the result for one file in one phase."""
    if result == ours:
        kept = "kept, because it differs from the deleted one; `git rm` it if it should go too"
        return "has the change already" if trail.taken.after else kept
    renamed = "" if path == trail.path else f" (it was {trail.path})"
    return f"{'carried' if result else 'deleted'}{renamed}"
