"""Digests are those of the bytes."""

import hashlib

from compressor.checkpoint import file_sha256, folder_digests


def test_digest_of_a_file(tmp_path):
    """SHA-256 of "abc" as in FIPS 180-2."""
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_digests_of_a_folder(tmp_path):
    """Names are relative, sorted, and what is skipped is skipped at the top only."""
    (tmp_path / "model" / "work").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    for name in ("z.txt", "model/a.txt", "model/work/b.txt", "work/c.txt"):
        (tmp_path / name).write_text(name)
    digests = folder_digests(tmp_path, skip=frozenset({"work"}))
    assert list(digests) == ["model/a.txt", "model/work/b.txt", "z.txt"]
    assert digests["z.txt"] == {"sha256": hashlib.sha256(b"z.txt").hexdigest(), "bytes": 5}
