"""Files appear whole, the same each time, or not at all."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from compressor.checkpoint import CheckpointReader, ShardWriter, write_json, write_safetensors, write_text
from compressor.checkpoint import writer as writer_module
from compressor.errors import EnvironmentProblem, IntegrityError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_six(folder: Path, shard_bytes: int, **options) -> ShardWriter:
    """Six tensors of 16 bytes each."""
    with ShardWriter(folder, shard_bytes=shard_bytes, **options) as writer:
        for k in range(6):
            writer.add(f"t{k}", torch.full((4,), k, dtype=torch.float32))
    return writer


@pytest.fixture
def full_disk(monkeypatch):
    """Every flush to the disk fails as it does when the disk is full."""

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer_module.os, "fsync", fail)


def test_a_small_checkpoint_is_one_file(tmp_path):
    """What fits into one shard needs no index."""
    writer = write_six(tmp_path, 1000)
    assert names(tmp_path) == ["model.safetensors"]
    assert writer.total_bytes == 96


def test_shards_are_filled_in_order(tmp_path):
    """At 40 bytes a shard, two tensors of 16 bytes go into each; the index says where and how much."""
    writer = write_six(tmp_path, 40)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    assert names(tmp_path) == [*shards, "model.safetensors.index.json"]
    assert index == {
        "metadata": {"total_size": 96},
        "weight_map": {f"t{k}": shards[k // 2] for k in range(6)},
    }
    assert [file.name for file in writer.files] == shards


def test_the_library_reads_what_we_write(tmp_path):
    """Plain safetensors sees the same tensors, aligned, and the metadata."""
    tensors = {"half": torch.ones(3, dtype=torch.bfloat16), "codes": torch.arange(5), "flag": torch.tensor(True)}
    write_safetensors(tmp_path / "x.safetensors", tensors, {"made": "here"})
    read = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "made": "here"}


def test_bytes_do_not_depend_on_the_order_of_tensors_or_metadata(tmp_path):
    """The same content gives the same file."""
    tensors = {"a": torch.ones(2), "b": torch.zeros(3, dtype=torch.int8)}
    write_safetensors(tmp_path / "1", tensors, {"x": "1", "y": "2", "z": "3"})
    write_safetensors(tmp_path / "2", dict(reversed(tensors.items())), {"z": "3", "y": "2", "x": "1"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_views_are_written_as_they_look(tmp_path):
    """Transposed and sliced tensors are laid out row by row."""
    whole = torch.arange(12).reshape(3, 4)
    write_safetensors(tmp_path / "x", {"t": whole.T, "s": whole[1:, ::2]})
    read = load_file(tmp_path / "x")
    assert torch.equal(read["t"], whole.T)
    assert torch.equal(read["s"], whole[1:, ::2])


def test_a_slice_does_not_keep_its_stack_alive(tmp_path):
    """One expert of a stack that waits for its shard holds its own 16 bytes."""
    with ShardWriter(tmp_path, shard_bytes=1000) as writer:
        writer.add("expert", torch.zeros(8, 4)[3])
        assert writer._shard["expert"].untyped_storage().nbytes() == 16


def test_at_most_one_shard_is_held(tmp_path):
    """Tensors leave memory when their shard is full."""
    with ShardWriter(tmp_path, shard_bytes=32) as writer:
        for k in range(5):
            writer.add(f"t{k}", torch.zeros(4))
            assert sum(tensor.nbytes for tensor in writer._shard.values()) <= 32


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    """The limit bends for what cannot be split."""
    with ShardWriter(tmp_path, shard_bytes=8) as writer:
        writer.add("small", torch.zeros(1))
        writer.add("large", torch.zeros(100))
        writer.add("last", torch.zeros(1))
    assert [len(CheckpointReader(file)) for file in writer.files] == [1, 1, 1]


def test_a_name_is_written_once(tmp_path):
    """The second tensor of a name is an error, and nothing stays."""

    def write() -> None:
        with ShardWriter(tmp_path, shard_bytes=4) as writer:
            writer.add("x", torch.zeros(1))
            writer.add("x", torch.zeros(1))

    with pytest.raises(IntegrityError, match="'x' is written twice"):
        write()
    assert names(tmp_path) == []


def test_an_exception_removes_the_shards(tmp_path):
    """What stops half way leaves an empty folder."""

    def write() -> None:
        with ShardWriter(tmp_path, shard_bytes=16) as writer:
            writer.add("a", torch.zeros(4))
            writer.add("b", torch.zeros(4))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert names(tmp_path) == []


def test_nothing_looks_complete_before_the_end(tmp_path):
    """While shards are written, no file has a checkpoint's name."""
    with ShardWriter(tmp_path, shard_bytes=16) as writer:
        writer.add("a", torch.zeros(4))
        writer.add("b", torch.zeros(4))
        assert list(tmp_path.glob("*.safetensors*")) == []


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    """Shards that a killed process staged do not stay beside the new ones."""
    (tmp_path / ".model-00007.staged").write_bytes(b"x")
    (tmp_path / ".model-00008.staged.partial").write_bytes(b"x")
    write_six(tmp_path, 1000)
    assert names(tmp_path) == ["model.safetensors"]


def test_an_older_checkpoint_is_replaced(tmp_path):
    """Fewer shards than before leave none of the old ones, nor their index."""
    write_six(tmp_path, 32)
    write_six(tmp_path, 1000)
    assert names(tmp_path) == ["model.safetensors"]


def test_a_full_disk_names_path_and_bytes(tmp_path, full_disk):
    """The message says where, how much was needed and how much is free; no file stays."""
    with pytest.raises(EnvironmentProblem, match=r"x\.txt: cannot be written: No space.*; 5 bytes are needed, [\d,]+ "):
        write_text(tmp_path / "x.txt", "12345")
    assert names(tmp_path) == []


def test_a_full_disk_leaves_no_shards(tmp_path, full_disk):
    """An export that does not fit leaves an empty folder."""
    with pytest.raises(EnvironmentProblem, match="bytes are needed"):
        write_six(tmp_path, 32)
    assert names(tmp_path) == []


def test_shards_without_their_index_are_removed(tmp_path, monkeypatch):
    """If only the index does not fit any more, the renamed shards go too."""

    def fail(path: Path, obj: object) -> None:
        raise EnvironmentProblem("full")

    monkeypatch.setattr(writer_module, "write_json", fail)
    with pytest.raises(EnvironmentProblem):
        write_six(tmp_path, 32)
    assert names(tmp_path) == []


def test_a_failed_write_keeps_the_old_file(tmp_path, full_disk):
    """A file is replaced by a whole one or stays."""
    (tmp_path / "x.json").write_text("old")
    with pytest.raises(EnvironmentProblem):
        write_json(tmp_path / "x.json", {})
    assert (tmp_path / "x.json").read_text() == "old"


def test_a_missing_folder_is_an_environment_problem(tmp_path):
    """Writing into a folder that is not there says so instead of a traceback."""
    with pytest.raises(EnvironmentProblem, match="No such file or directory"):
        write_text(tmp_path / "no" / "x.txt", "x")


def test_json_has_no_nan(tmp_path):
    """Other programs could not read it."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"x": float("nan")})
    assert names(tmp_path) == []


def test_written_files_follow_the_umask(tmp_path):
    """A checkpoint is as readable for others as any file of the user."""
    old = os.umask(0o022)
    try:
        write_text(tmp_path / "x", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644
