"""The manifest sees any change of the folder."""

import json
from pathlib import Path

import pytest

from compressor.errors import EnvironmentProblem, IntegrityError
from compressor.exporters.manifest import verify_manifest, write_manifest
from compressor.reports import Measurement, Report

SOURCE = {"name": "demo/tiny-moe", "revision": None, "digest": "12" * 32}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("model/config.json", "model/model.safetensors", "report.json", "work/journal.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"content of {name}")
    write(tmp_path)
    return tmp_path


def write(folder: Path) -> Path:
    report = Report.start("ab" * 32, {}, None, "m", Measurement()).with_gate({"verdict": "pass", "checks": []})
    versions = {"compressor": "1.2.3"}
    return write_manifest(folder, recipe="ab" * 32, seed=7, sources=[SOURCE], versions=versions, report=report)


def test_manifest_says_from_what_the_folder_was_made(folder):
    """Recipe, seed, sources, versions and verdict are there; work/ and the manifest itself are not listed."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["recipe_sha256"], manifest["seed"], manifest["verdict"]) == ("ab" * 32, 7, "pass")
    assert manifest["sources"] == [SOURCE]
    assert manifest["versions"]["compressor"] == "1.2.3"
    assert set(manifest["versions"]) == {"compressor", "torch", "transformers", "python"}
    assert list(manifest["files"]) == ["model/config.json", "model/model.safetensors", "report.json"]
    assert manifest["files"]["report.json"]["bytes"] == len("content of report.json")


def test_an_untouched_folder_verifies(folder):
    """What was written is accepted, and work/ may change."""
    (folder / "work" / "more").write_text("x")
    assert verify_manifest(folder)["seed"] == 7


def test_equal_folders_have_equal_manifests(folder):
    """Nothing in it depends on time or place."""
    before = (folder / "manifest.json").read_bytes()
    assert write(folder).read_bytes() == before


def test_one_changed_byte_is_found(folder):
    """A change that keeps the size is seen by the digest."""
    (folder / "model/config.json").write_text("Content of model/config.json")
    with pytest.raises(IntegrityError, match=r"model/config\.json: changed: SHA-256"):
        verify_manifest(folder)


def test_another_size_is_found(folder):
    """One more byte is named with both sizes."""
    with (folder / "report.json").open("a") as file:
        file.write("x")
    with pytest.raises(IntegrityError, match=r"report\.json: has 23 bytes, manifest\.json says 22"):
        verify_manifest(folder)


def test_a_missing_file_is_found(folder):
    """A listed file must be there."""
    (folder / "model/model.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"model\.safetensors: missing"):
        verify_manifest(folder)


def test_an_added_file_is_found(folder):
    """Code that was slipped in beside the weights is not overlooked."""
    (folder / "model/modeling_evil.py").write_text("x")
    with pytest.raises(IntegrityError, match=r"modeling_evil\.py: not listed"):
        verify_manifest(folder)


def test_a_manifest_cannot_point_outside(folder):
    """A name that leaves the folder is refused before any file is opened."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {"../secret": {"sha256": "0", "bytes": 1}}
    path.write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match="leaves the folder"):
        verify_manifest(folder)


def test_no_manifest_and_a_broken_one(folder):
    """A folder without one is the wrong folder; one that is no manifest is an integrity error."""
    path = folder / "manifest.json"
    for text in ("{", "[]", '{"schema": "compressor.manifest/1", "files": {"a": {}}}'):
        path.write_text(text)
        with pytest.raises(IntegrityError, match=r"manifest\.json: "):
            verify_manifest(folder)
    path.unlink()
    with pytest.raises(EnvironmentProblem, match="no manifest"):
        verify_manifest(folder)


def test_a_report_of_another_recipe_is_refused(folder):
    """Recipe and report in one folder belong together."""
    report = Report.start("cd" * 32, {}, None, "m", Measurement())
    with pytest.raises(IntegrityError, match="the report is of recipe cdcd"):
        write_manifest(folder, recipe="ab" * 32, seed=0, sources=[], report=report)
