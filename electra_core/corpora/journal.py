"""Records from time to time how far `electra prepare` has come, so that a killed run need not start again.

    .DATA.partial/journal.json    {"settings": what the run makes, "state": what is durable so far}

The same command finds the folder (`files.new_folder.partial_folder`), truncates the files to the last entry, and
continues with the next document; the result is the same, byte for byte. Another command, or the same one on files
that have changed, finds that the settings differ and starts with an empty folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from electra_core.files.new_file import write_durably

FILE = "journal.json"


class Journal:
    """The journal in `folder`, which is emptied unless it comes from a run with the same settings.

    Args:
        settings: JSON values.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._path, self._new = folder / FILE, folder / "journal.new"
        self._settings = json.loads(json.dumps(settings))
        self.state: dict[str, Any] | None = self._read()
        """State of the latest entry; None if there is nothing to continue."""
        if self.state is None:
            self.clear()

    def write(self, state: Mapping[str, Any]) -> None:
        """Replaces the entry; what it describes must be durable already."""
        write_durably(self._new, json.dumps({"settings": self._settings, "state": state}))
        os.replace(self._new, self._path)

    def remove(self) -> None:
        """Removes the journal, once the work is done, and an entry in the writing of which a run was killed."""
        for path in (self._path, self._new):
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Empties the folder."""
        self.state = None
        for path in self._path.parent.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _read(self) -> dict[str, Any] | None:
        try:
            content = json.loads(self._path.read_bytes())
            return content["state"] if content["settings"] == self._settings else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
