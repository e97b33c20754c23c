"""The reader takes what is whole and names what is not."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint import CheckpointReader, ShardWriter
from compressor.checkpoint.header import DTYPES
from compressor.errors import EnvironmentProblem, IntegrityError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.arange(6, dtype=torch.int32).reshape(2, 3),
    "c.scale": torch.tensor(0.5, dtype=torch.bfloat16),
}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path, shard_bytes=48) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
    return tmp_path


def edit_index(folder: Path, **changes: str | None) -> None:
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    for name, shard in changes.items():
        data["weight_map"][name.replace("_", ".")] = shard
    index.write_text(json.dumps(data))


def test_tensors_equal_those_the_library_wrote(single):
    """A file written by safetensors itself is read bit for bit, in the order asked."""
    read = CheckpointReader(single).tensors(["c.scale", "a.weight"])
    assert list(read) == ["c.scale", "a.weight"]
    assert all(torch.equal(read[name], TENSORS[name]) for name in read)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_comes_back(tmp_path, name):
    """Bytes of each dtype of the format survive writing and reading."""
    tensor = torch.zeros(3, 8, dtype=torch.uint8).view(DTYPES[name]) if name != "BOOL" else torch.eye(3).bool()
    with ShardWriter(tmp_path, shard_bytes=1000) as writer:
        writer.add("x", tensor)
    reader = CheckpointReader(tmp_path)
    assert (reader.dtype("x"), reader.shape("x")) == (tensor.dtype, tuple(tensor.shape))
    assert torch.equal(reader.tensor("x").view(torch.uint8), tensor.view(torch.uint8))


def test_an_empty_tensor_comes_back(tmp_path):
    """A tensor without elements has a shape all the same."""
    save_file({"x": torch.empty(0, 4)}, tmp_path / "model.safetensors")
    assert CheckpointReader(tmp_path).tensor("x").shape == (0, 4)


def test_tensors_own_their_memory(single):
    """A tensor stays as it is when the file is overwritten, and keeps no more than its own bytes."""
    tensor = CheckpointReader(single).tensor("a.weight")
    with (single / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * (single / "model.safetensors").stat().st_size)
    assert torch.equal(tensor, TENSORS["a.weight"])
    assert tensor.untyped_storage().nbytes() == 48


def test_shards_read_as_one(sharded):
    """Names, shapes and metadata of all shards stand together."""
    reader = CheckpointReader(sharded)
    assert reader.keys() == sorted(TENSORS)
    assert [file.name for file in reader.files] == [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    assert reader.metadata() == {"format": "pt"}
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in reader.tensors().items())


def test_one_file_can_be_read_by_its_path(single):
    """A block's file is a checkpoint of its own."""
    assert len(CheckpointReader(single / "model.safetensors")) == 3


def test_digest_is_that_of_sha256sum(sharded):
    """The digest can be had without us: sha256sum of the list that sha256sum prints."""
    files = sorted(sharded.glob("*.safetensors"))
    lines = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    assert CheckpointReader(sharded).digest() == hashlib.sha256(lines.encode()).hexdigest()


def test_unknown_tensor_is_named(single):
    """Asking for what is not there says so with the name."""
    with pytest.raises(IntegrityError, match=r"no tensor 'd\.weight' among the 3"):
        CheckpointReader(single).tensor("d.weight")


def test_missing_shard_is_named(sharded):
    """A shard that the index lists must be there."""
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"model-00002-of-00002\.safetensors: missing"):
        CheckpointReader(sharded)


@pytest.mark.parametrize("kept", [4, 40, -1])
def test_truncated_shard_is_refused_on_opening(sharded, kept):
    """A file cut in its length field, its header or its data is seen before any tensor is read."""
    shard = sharded / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(IntegrityError, match=r"model-00001-of-00002\.safetensors: (truncated|not a safetensors file)"):
        CheckpointReader(sharded)


def test_truncation_names_the_tensor(single):
    """The tensor that the file's end cuts is in the message."""
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"'c\.scale' ends at byte"):
        CheckpointReader(single)


def test_bytes_after_the_last_tensor_are_refused(single):
    """The format leaves no room to hide bytes."""
    with (single / "model.safetensors").open("ab") as file:
        file.write(b"123")
    with pytest.raises(IntegrityError, match="3 bytes after the last tensor"):
        CheckpointReader(single)


def test_name_of_the_index_absent_from_its_shard(sharded):
    """An index that promises a tensor nobody holds is refused with name and file."""
    edit_index(sharded, x_weight="model-00001-of-00002.safetensors")
    with pytest.raises(IntegrityError, match=r"00001-of-00002\.safetensors: has no tensor 'x\.weight'"):
        CheckpointReader(sharded)


def test_tensor_in_another_shard_than_the_index_says(sharded):
    """The index and the shards must agree on the place."""
    first, second = (f"model-0000{k}-of-00002.safetensors" for k in (1, 2))
    edit_index(sharded, a_weight=second, b_weight=first)
    with pytest.raises(IntegrityError, match=r"'a\.weight' is in model-00001-of-00002\.safetensors instead"):
        CheckpointReader(sharded)


def test_tensor_that_the_index_does_not_list(sharded):
    """Two loaders would read two different models from such a folder."""
    index = sharded / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    del data["weight_map"]["b.weight"]
    index.write_text(json.dumps(data))
    with pytest.raises(IntegrityError, match=r"holds 'b\.weight', which .* does not list"):
        CheckpointReader(sharded)


def test_tensor_in_two_shards(sharded):
    """A name may be in one file only."""
    shard = sharded / "model-00002-of-00002.safetensors"
    save_file(load_file(shard) | {"a.weight": torch.zeros(1)}, shard)
    with pytest.raises(IntegrityError, match=r"'a\.weight' is in two files"):
        CheckpointReader(sharded)


def test_tensor_twice_in_one_header(tmp_path):
    """JSON parsers keep the last of two equal keys; the header may not rely on that."""
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'
    header = ('{"x":' + entry % (0, 1) + ',"x":' + entry % (1, 2) + "}").encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(IntegrityError, match="lists 'x' twice"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 2]}, "takes 4 bytes, the header gives it 2"),
        ({"dtype": "U8", "shape": [-2], "data_offsets": [0, 2]}, "malformed"),
        ({"dtype": "U8", "shape": [2]}, "malformed"),
        ({"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}, "leaves a gap"),
    ],
)
def test_impossible_entries_are_refused(tmp_path, entry, message):
    """A header cannot talk the reader into other bytes than the tensor's."""
    header = json.dumps({"x": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(IntegrityError, match=message):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors"])
def test_index_names_stay_inside_the_folder(sharded, name):
    """A downloaded index does not choose files elsewhere on the machine."""
    edit_index(sharded, a_weight=name)
    with pytest.raises(IntegrityError, match="leaves the folder"):
        CheckpointReader(sharded)


def test_link_out_of_the_folder_is_refused(sharded, tmp_path_factory):
    """A shard that is a link to somewhere else is not read."""
    shard = sharded / "model-00001-of-00002.safetensors"
    shard.symlink_to(shard.rename(tmp_path_factory.mktemp("elsewhere") / "x.safetensors"))
    with pytest.raises(IntegrityError, match="is a link that leaves the folder"):
        CheckpointReader(sharded)


def test_links_of_the_hub_cache_are_followed(tmp_path):
    """The hub's cache keeps files in blobs/ and links to them from snapshots/<revision>/."""
    snapshot, blobs = tmp_path / "models--o--m/snapshots/abc", tmp_path / "models--o--m/blobs"
    blobs.mkdir(parents=True)
    with ShardWriter(snapshot, shard_bytes=48) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
    for number, file in enumerate(snapshot.glob("*.safetensors")):
        file.symlink_to(file.rename(blobs / f"{number}"))
    assert torch.equal(CheckpointReader(snapshot).tensor("a.weight"), TENSORS["a.weight"])


def test_pickles_are_refused_as_such(tmp_path):
    """A folder with pickles only is told how to become readable; nothing is opened."""
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    with pytest.raises(EnvironmentProblem, match=r"pytorch_model\.bin: only safetensors"):
        CheckpointReader(tmp_path)


def test_folder_without_weights(tmp_path):
    """No weights at all is a matter of the machine, not of integrity."""
    with pytest.raises(EnvironmentProblem, match="no weights"):
        CheckpointReader(tmp_path)
