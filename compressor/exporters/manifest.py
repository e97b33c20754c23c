"""`manifest.json`: from what an output folder was made, and the digest of every file in it."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path, PurePosixPath

from compressor.checkpoint.digest import file_sha256, folder_digests
from compressor.checkpoint.writer import write_json
from compressor.errors import EnvironmentProblem, IntegrityError
from compressor.reports import Report

SCHEMA = "compressor.manifest/1"
NAME = "manifest.json"
# work/ holds what resuming needs; it comes and goes, and is no part of the result.
NOT_COVERED = frozenset({NAME, "work"})
SOURCE_KEYS = {"name", "revision", "digest"}


def write_manifest(
    folder: Path,
    *,
    recipe: str,
    seed: int,
    sources: Sequence[Mapping[str, str | None]],
    versions: Mapping[str, str] | None = None,
    report: Report | None = None,
) -> Path:
    """Write `manifest.json` into a finished output folder and return its path; the last file to be written there.

    `recipe` is the SHA-256 of the resolved recipe, as the report carries it. Each source (model, calibration data) is
    {"name", "revision", "digest"}, None where it has none. `versions` adds to those of compressor, torch, transformers
    and python. Holds no time and no path of this machine, so that equal runs give equal manifests.
    Raises IntegrityError if the report belongs to another recipe.
    """
    if report is not None and report.recipe_sha256 != recipe:
        raise IntegrityError(f"{folder}: the report is of recipe {report.recipe_sha256}, the manifest of {recipe}")
    for source in sources:
        if source.keys() != SOURCE_KEYS:
            raise ValueError(f"a source takes {', '.join(sorted(SOURCE_KEYS))}, not {', '.join(source)}")
    manifest = {
        "schema": SCHEMA,
        "recipe_sha256": recipe,
        "seed": seed,
        "sources": [dict(source) for source in sources],
        "versions": installed_versions() | dict(versions or {}),
        "verdict": report.gate.get("verdict") if report is not None and report.gate else None,
        "files": folder_digests(folder, skip=NOT_COVERED),
    }
    path = Path(folder) / NAME
    write_json(path, manifest)
    return path


def verify_manifest(folder: Path) -> dict:
    """Check that a folder holds exactly what its manifest says, and return the manifest.

    Raises IntegrityError naming the first file that is missing, changed, of another size, or not listed (outside
    `work/`); EnvironmentProblem if there is no manifest. Sizes are compared before any file is read.
    """
    folder = Path(folder)
    manifest = _read(folder / NAME)
    files: dict[str, dict] = manifest["files"]
    for name, expected in files.items():
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise IntegrityError(f"{folder / NAME}: the file name {name!r} leaves the folder")
        if not path.is_file():
            raise IntegrityError(f"{path}: missing, but listed in {NAME}")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise IntegrityError(f"{path}: has {size:,} bytes, {NAME} says {expected['bytes']:,}")
    for name in _present(folder):
        if name not in files:
            raise IntegrityError(f"{folder / name}: not listed in {NAME}; it was added after the run")
    for name, expected in files.items():
        found = file_sha256(folder / name)
        if found != expected["sha256"]:
            raise IntegrityError(f"{folder / name}: changed: SHA-256 is {found}, {NAME} says {expected['sha256']}")
    return manifest


def installed_versions() -> dict[str, str]:
    """Return the versions of compressor, torch, transformers and python that are running."""
    versions = {}
    for package in ("compressor", "torch", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    return versions | {"python": platform.python_version()}


def _present(folder: Path) -> list[str]:
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(name.as_posix() for name in names if name.parts[0] not in NOT_COVERED)


def _read(path: Path) -> dict:
    if not path.is_file():
        raise EnvironmentProblem(f"{path}: no manifest; give the folder that a run has written")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise IntegrityError(f"{path}: not JSON ({error})") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise IntegrityError(f"{path}: not a manifest: its schema is {schema!r}, this version reads {SCHEMA!r}")
    try:
        well_formed = all({"sha256", "bytes"} <= entry.keys() for entry in manifest["files"].values())
    except (KeyError, AttributeError):
        well_formed = False
    if not well_formed:
        raise IntegrityError(f"{path}: `files` must give sha256 and bytes for every name")
    return manifest
