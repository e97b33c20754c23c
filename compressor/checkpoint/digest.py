"""SHA-256 of files, read in pieces."""

import hashlib
import os
from pathlib import Path


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digests(folder: Path, *, skip: frozenset[str] = frozenset()) -> dict[str, dict[str, str | int]]:
    """Return {"sha256", "bytes"} for every file below a folder, by relative name with `/`, sorted.

    `skip` names what directly lies in the folder and is left out: files, or folders with all they hold.
    """
    folder = Path(folder)
    digests: dict[str, dict[str, str | int]] = {}
    for place, folders, files in os.walk(folder):
        if Path(place) == folder:
            folders[:] = [name for name in folders if name not in skip]
            files = [name for name in files if name not in skip]
        for name in files:
            path = Path(place, name)
            relative = path.relative_to(folder).as_posix()
            digests[relative] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    return dict(sorted(digests.items()))
