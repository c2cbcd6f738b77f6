"""What the user should know of a sweep besides its numbers."""

from __future__ import annotations

import warnings

from anypatch.errors import AnypatchWarning, DataError
from anypatch.measure.images import ImageSet
from anypatch.measure.rows import Collections

NAMED = 20  # unreadable images that are named one by one


class Notes:
    """Notes for the user, each also a warning when it appears."""

    def __init__(self, collections: Collections) -> None:
        self.all: list[str] = []
        self._skipped: dict[str, str] = {}
        for note in collections.notes:
            self.add(note)

    def add(self, note: str) -> None:
        if note and note not in self.all:
            self.all.append(note)
            warnings.warn(note, AnypatchWarning, stacklevel=4)

    def skipped(self, name: str, images: ImageSet, failures: dict[int, str]) -> None:
        """Count and name unreadable images; said again only if more were found."""
        if not failures:
            return
        if len(failures) == len(images):
            first = next(iter(failures))
            raise DataError(
                f"{images.name}: none of its {len(images)} images can be read ({images.keys[first]}: {failures[first]})"
            )
        shown = "; ".join(f"{images.keys[i]} ({why})" for i, why in sorted(failures.items())[:NAMED])
        more = f"; and {len(failures) - NAMED} more" if len(failures) > NAMED else ""
        note = f"{len(failures)} of {len(images)} images of {name} cannot be read and are left out: {shown}{more}"
        before = self._skipped.get(name)
        if before in self.all:
            if before == note:
                return
            self.all.remove(before)
        self._skipped[name] = note
        self.add(note)
