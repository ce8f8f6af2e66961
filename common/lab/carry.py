"""How one fix goes through the later phases, file by file: the part of `lab port` that decides.

Each file that the fix changes is followed from phase to phase:

- where a phase has the file as the previous phase had it, it gets the previous phase's new file, byte for byte;
- where the lesson changed the file, the change is merged into it (three-way, `git merge-file`): base and theirs are the
  file before and after in the latest phase that took the change, ours is this phase's own. So a conflict that was
  resolved in one phase is not met again in the next;
- where the lesson renamed the file, the change follows it (git's rename detection between the two phases); where it
  removed the file, the phase is skipped, with a message;
- a file that the fix adds is added; one that it deletes is deleted where it was the same, else kept, with a message.

    lab port --help
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common.lab.repository import Change, Conflict, Entry, Repository


@dataclass
class State:
    """What `--continue` and `--abort` need to know of a port that has stopped."""

    commit: str  # the fix
    head: str  # where the port began
    touched: list[str] = field(default_factory=list)  # files that it has written so far
    conflict: str | None = None  # the one of them that a person has to put right


@dataclass
class Trail:
    """One file of the fix on its way through the phases."""

    path: str  # in the latest phase that has it
    tree: str  # that phase before the port
    latest: Change  # that phase's file, before and after the port
    taken: Change  # the same of the latest phase that took the change
    source: str  # the folder of the phase that took it


@dataclass
class Carrier:
    """One run of `lab port`, or of its continuation."""

    repository: Repository
    file: Path  # of the state
    state: State

    def run(self, trails: list[Trail], folders: list[str]) -> bool:
        """Carry everything, or stop at the first conflict (False). What an earlier run has touched stands as it is."""
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
        """The file's path in a phase: the same, or the one that the lesson gave it."""
        if trail.path in files or trail.latest.before is None:
            return trail.path
        return self.repository.renames(trail.tree, tree).get(trail.path, trail.path)

    def _merge(self, trail: Trail, ours: Entry | None, folder: str) -> Entry | Conflict | None:
        """What becomes of the file in a phase."""
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
        """Remember a file before it is written, so that `--abort` works whatever happens."""
        self.state.touched.append(full)
        self.file.write_text(json.dumps(asdict(self.state)), encoding="utf-8")

    def _stop(self, full: str, conflict: Conflict) -> None:
        self.state.conflict = full
        self._touch(full)
        self.repository.put_conflict(full, conflict)
        if conflict.marked == conflict.ours:
            what = f"put the right {full} there: it is no text and cannot be merged, so it is still this phase's own"
        else:
            what = f"edit {full}: keep what is right for this phase, and none of the marker lines <<<<<<< to >>>>>>>"
        print(
            f"\n{full}: CONFLICT: the lesson changed what the fix changes (`git show {self.state.commit[:10]}`)\n"
            f"  1. {what}\n"
            "  2. lab port --continue    goes on with the other files and phases\n"
            "  or lab port --abort       puts everything back as it was"
        )


def _outcome(trail: Trail, path: str, ours: Entry | None, result: Entry | None) -> str:
    """One file in one phase, in words."""
    if result == ours:
        kept = "kept, because it differs from the deleted one; `git rm` it if it should go too"
        return "has the change already" if trail.taken.after else kept
    renamed = "" if path == trail.path else f" (it was {trail.path})"
    return f"{'carried' if result else 'deleted'}{renamed}"
