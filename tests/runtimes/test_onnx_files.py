"""Folders that are damaged, hostile, or of something else; each is refused with a reason."""

import json
import shutil
import sys

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from compressor.errors import EnvironmentProblem, IntegrityError, RecipeError, UnsupportedModel
from compressor.runtimes import open_onnx, open_onnx_encoder
from tests.runtimes.tiny_graphs import D, V, decoder_folder, encoder_folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return decoder_folder(tmp_path_factory.mktemp("onnx") / "model", "biased")


@pytest.fixture
def folder(original, tmp_path):
    shutil.copytree(original, tmp_path / "model")
    return tmp_path / "model"


def edit(folder, change) -> None:
    """Change the graph as a protobuf."""
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    change(proto)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())


def point(tensor, **place) -> None:
    """Let a tensor say that it lies elsewhere."""
    kept = {entry.key: entry.value for entry in tensor.external_data} | {k: str(v) for k, v in place.items()}
    del tensor.external_data[:]
    for key, value in kept.items():
        tensor.external_data.add(key=key, value=value)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "inside/../../secret", "link"])
def test_weights_outside_the_folder_are_not_read(folder, location):
    """Paths that climb out, absolute ones, links."""
    (folder.parent / "secret").write_bytes(b"\0" * 100_000)
    (folder / "inside").mkdir()
    (folder / "link").symlink_to(folder.parent / "secret")
    edit(folder, lambda proto: point(proto.graph.initializer[0], location=location))
    with pytest.raises(IntegrityError, match="outside the folder; such a file is not opened"):
        open_onnx(folder)


@pytest.mark.parametrize("accuracy_level", [None, 1])
def test_a_folder_of_links_opens(folder, accuracy_level):
    """As the hub's cache keeps models: each file a link to one of many beside each other."""
    blobs, snapshot = folder.parent / "blobs", folder.parent / "snapshot"
    folder.rename(blobs)
    snapshot.mkdir()
    for file in list(blobs.iterdir()):
        file.rename(blobs / f"{file.stem}-{file.suffix[1:]}-hash")
        (snapshot / file.name).symlink_to(f"../blobs/{file.stem}-{file.suffix[1:]}-hash")
    model = open_onnx(snapshot, threads=1, accuracy_level=accuracy_level)
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, V)


def test_weights_hidden_in_a_branch_are_checked_too(folder):
    """External data inside an attribute of a node of a subgraph."""

    def change(proto):
        tensor = TensorProto(name="deep", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
        point(tensor, location="../secret")
        body = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "branch", [], [])
        proto.graph.node.append(helper.make_node("If", ["condition"], ["out"], then_branch=body, else_branch=body))

    edit(folder, change)
    with pytest.raises(IntegrityError, match=r"weight 'deep' points to '../secret', outside"):
        open_onnx(folder)


def test_a_data_file_cut_short(folder):
    """The weight that does not fit any more is named, with the bytes."""
    data = folder / "model.onnx.data"
    size = data.stat().st_size
    data.write_bytes(data.read_bytes()[: size - 100])
    with pytest.raises(
        IntegrityError, match=rf"weight '\w+' is bytes \d+ to \d+ of model.onnx.data, which has {size - 100}"
    ):
        open_onnx(folder)


@pytest.mark.parametrize("place", [{"offset": -4096}, {"offset": "much"}, {"length": 10**12}, {"location": ""}])
def test_places_that_are_none(folder, place):
    """Offsets and lengths that no file has."""
    edit(folder, lambda proto: point(proto.graph.initializer[0], **place))
    with pytest.raises(IntegrityError, match="weight 'embed'"):
        open_onnx(folder)


def test_a_missing_data_file(folder):
    """Copying the graph alone is the commonest mistake."""
    (folder / "model.onnx.data").unlink()
    with pytest.raises(IntegrityError, match=r"is in 'model.onnx.data', which is not there"):
        open_onnx(folder)


def test_a_graph_cut_short(folder):
    """Any prefix of the graph's file is refused: as a protobuf, by its content, or by onnxruntime."""
    whole = (folder / "model.onnx").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (folder / "model.onnx").write_bytes(whole[:length])
        with pytest.raises(IntegrityError, match=r"model\.onnx"):
            open_onnx(folder)


def test_a_node_without_an_op(folder):
    """onnxruntime's own complaint comes as ours."""
    edit(folder, lambda proto: proto.graph.node[0].ClearField("op_type"))
    with pytest.raises(IntegrityError, match="does not load it"):
        open_onnx(folder)


def test_an_op_without_a_kernel(tmp_path):
    """It is the model that is not supported, not the file that is damaged."""
    head = [
        helper.make_node("Cast", ["y"], ["narrow"], to=TensorProto.BFLOAT16),
        helper.make_node("Sigmoid", ["narrow"], ["made"]),
        helper.make_node("Cast", ["made"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["wide", "head"], ["logits"]),
    ]
    with pytest.raises(UnsupportedModel, match=r"has no kernel for it: .*Sigmoid"):
        open_onnx(decoder_folder(tmp_path / "model", "biased", head))


def test_names_that_are_not_the_ecosystems(folder):
    """What the graph reads and writes is listed beside what is expected."""

    def change(proto):
        proto.graph.input[0].name = "tokens"
        for node in proto.graph.node:
            node.input[:] = ["tokens" if name == "input_ids" else name for name in node.input]

    edit(folder, change)
    with pytest.raises(IntegrityError, match="not a decoder with a KV cache: it reads tokens, attention_mask"):
        open_onnx(folder)


def test_an_encoder_is_no_decoder_and_the_other_way(folder, tmp_path):
    """Each opening says what it found."""
    with pytest.raises(IntegrityError, match="not a decoder with a KV cache"):
        open_onnx(encoder_folder(tmp_path / "encoder"))
    with pytest.raises(IntegrityError, match="not an encoder"):
        open_onnx_encoder(folder)
    with pytest.raises(IntegrityError, match="writes pooled; expected are"):
        open_onnx_encoder(encoder_folder(tmp_path / "pooled", output="pooled"))


def test_missing_files(folder):
    """The graph, then the config."""
    (folder / "config.json").unlink()
    with pytest.raises(EnvironmentProblem, match=r"no config\.json beside the graph, and no genai_config\.json"):
        open_onnx(folder)
    (folder / "model.onnx").unlink()
    with pytest.raises(EnvironmentProblem, match=r"no model\.onnx here"):
        open_onnx(folder)


def test_the_configuration_of_onnxruntime_genai(folder):
    """Its builder writes a file of its own: the sizes and the end of a text come from there."""
    shared = json.loads((folder / "config.json").read_text())
    names = ("hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    decoder = {name: shared[name] for name in names} | {"head_size": shared["head_dim"]}
    model = {"type": "llama", "vocab_size": V, "context_length": 77, "eos_token_id": [3, 4], "decoder": decoder}
    for name in ("config.json", "generation_config.json"):
        (folder / name).unlink()
    (folder / "genai_config.json").write_text(json.dumps({"model": model, "search": {}}))
    opened = open_onnx(folder, threads=1)
    assert (opened.config.vocab_size, opened.config.max_position_embeddings) == (V, 77)
    assert opened.generation_config.eos_token_id == [3, 4]
    assert opened(torch.tensor([[1, 2]])).logits.shape == (1, 2, V)
    (folder / "genai_config.json").write_text(json.dumps({"model": model | {"type": "unheard-of"}}))
    with pytest.raises(UnsupportedModel, match="unheard-of"):
        open_onnx(folder)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_missing_packages(folder, package, monkeypatch):
    """What to install is said."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'compressor\[onnx\]'"):
        open_onnx(folder)


@pytest.mark.parametrize("options", [{"threads": 0}, {"accuracy_level": 7}])
def test_options_that_mean_nothing(folder, options):
    """They are refused by name."""
    with pytest.raises(RecipeError, match=next(iter(options))):
        open_onnx(folder, **options)


def test_shared_weights_count_once(folder):
    """Two names for the same bytes, as of a tied embedding."""
    before = open_onnx(folder, threads=1).weight_bytes

    def change(proto):
        twin = proto.graph.initializer.add()
        twin.CopyFrom(proto.graph.initializer[0])
        twin.name = "twin"

    edit(folder, change)
    assert open_onnx(folder, threads=1).weight_bytes == before


def test_weights_inside_the_graph(tmp_path):
    """A graph without a data file beside it opens too, and its bytes count."""
    folder = decoder_folder(tmp_path / "model", "biased")
    onnx.save_model(onnx.load(folder / "model.onnx"), folder / "whole.onnx")
    (folder / "whole.onnx").rename(folder / "model.onnx")
    (folder / "model.onnx.data").unlink()
    model = open_onnx(folder, threads=1)
    assert model.weight_bytes > 4 * V * D
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, V)


def test_an_encoder(tmp_path):
    """Types and mask arrive where they should, and may be left out."""
    model = open_onnx_encoder(encoder_folder(tmp_path / "encoder"), threads=1)
    file = tmp_path / "encoder" / "model.onnx"
    tensors = {one.name: numpy_helper.to_array(one) for one in onnx.load(file).graph.initializer}
    embed, types = (torch.tensor(tensors[name]) for name in ("embed", "types"))
    ids, kinds = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[0, 1, 1], [1, 0, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    found = model(input_ids=ids, attention_mask=mask, token_type_ids=kinds).last_hidden_state
    torch.testing.assert_close(found, (embed[ids] + types[kinds]) * mask[..., None])
    torch.testing.assert_close(model(ids).last_hidden_state, embed[ids] + types[0])
    assert next(model.parameters()).device.type == "cpu"
