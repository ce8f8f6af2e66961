"""Text that occurs in both halves of the corpus.

Files are held out by path, but the library repeats itself: the tests of two event loops share whole methods. A model
may have memorised such text, so no prompt may contain or precede it.
"""

from __future__ import annotations

from collections.abc import Iterator

from common.models.corpus import SourceFile

WINDOW = 4  # lines
LEAST_CHARACTERS = 120  # per window, without spaces at line ends; shorter windows agree by chance


def windows(text: str) -> Iterator[str]:
    """Yield every run of WINDOW lines with enough characters for a copy; blank lines and indentation do not count."""
    lines = [line.strip() for line in text.split("\n")]
    lines = [line for line in lines if line]
    for first in range(len(lines) - WINDOW + 1):
        window = "\n".join(lines[first : first + WINDOW])
        if len(window) >= LEAST_CHARACTERS:
            yield window


def copied_windows(heldout: list[SourceFile], train: list[SourceFile]) -> set[str]:
    """Return the windows of the held-out files that also occur in a training file."""
    ours = {window for file in heldout for window in windows(file.text)}
    return {window for file in train for window in windows(file.text) if window in ours}
