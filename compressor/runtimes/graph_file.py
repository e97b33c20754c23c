"""A `model.onnx` before it runs: what its nodes say, and whether its weights are where they may be.

Only the graph is read; the weights beside it (external data) stay on disk, whatever their size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import EnvironmentProblem, IntegrityError

GRAPH = "model.onnx"
ATTENTION = "GroupQueryAttention"
PAST_INPUTS = (3, 4)  # of GroupQueryAttention: past_key, past_value
BIAS_INPUT = 10  # and what is added to the scores
WITH_ACCURACY_LEVEL = ("MatMulNBits", "QMoE")


@dataclass(frozen=True)
class GraphFile:
    """The graph of a folder, checked: `proto` is an onnx.ModelProto without its external data.

    `weight_bytes` is what the weights take on disk, inside the graph and beside it, shared ones once.
    """

    path: Path
    proto: Any
    weight_bytes: int

    @property
    def folder(self) -> Path:
        """Where the graph itself lies, links followed: what onnxruntime looks for weights in."""
        return self.path.resolve().parent

    def with_accuracy_level(self, level: int) -> bytes:
        """The graph as bytes, all quantized products computing as the level says (1: float32, 4: 8-bit activations).

        Places of weights are relative to `folder` in it.
        """
        import onnx

        changed = onnx.ModelProto()
        changed.CopyFrom(self.proto)
        for node in _nodes(changed):
            if node.op_type in WITH_ACCURACY_LEVEL:
                kept = [one for one in node.attribute if one.name != "accuracy_level"]
                del node.attribute[:]
                node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", level)])
        for tensor in _tensors(changed):
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = str((self.path.parent / entry.value).resolve().relative_to(self.folder))
        return changed.SerializeToString()

    def attention_nodes(self) -> list[Any]:
        """The nodes that attend and write the cache in one go."""
        return [node for node in _nodes(self.proto) if node.op_type == ATTENTION]

    def cache_can_be_shared(self, past_names: set[str]) -> bool:
        """Whether past and present may be one buffer: nothing but GroupQueryAttention reads what is cached.

        The op is told how much of the buffer holds keys; anything else would take all of it for cached tokens.
        """
        readers = [
            (node, index) for node in _nodes(self.proto) for index, name in enumerate(node.input) if name in past_names
        ]
        settings = [one for node in self.attention_nodes() for one in node.attribute]
        windowed = any(one.name == "sliding_window_cache" and one.i for one in settings)
        only_attention = all(node.op_type == ATTENTION and index in PAST_INPUTS for node, index in readers)
        return bool(readers) and only_attention and not windowed

    def counts_tokens(self) -> bool:
        """Whether padding is a matter of how many tokens a row has, so that it has to come last.

        GroupQueryAttention without a bias on the scores (as onnxruntime-genai's builder writes it) knows only the
        number of tokens of each row, not which ones they are.
        """
        nodes = self.attention_nodes()
        return any(len(node.input) <= BIAS_INPUT or not node.input[BIAS_INPUT] for node in nodes)


def read_graph(folder: Path) -> GraphFile:
    """Read and check the graph of a folder.

    EnvironmentProblem where `onnx` or the file is missing; IntegrityError where it is no ONNX, or where its weights are
    missing, cut short, or outside the folder.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise EnvironmentProblem(
            "running an ONNX folder needs the extra `onnx`: pip install 'compressor[onnx]'"
        ) from None
    path = Path(folder) / GRAPH
    if not path.is_file():
        raise EnvironmentProblem(f"{folder}: no {GRAPH} here; give the folder that an export to ONNX wrote")
    try:
        proto = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise IntegrityError(f"{path} is not an ONNX graph, or is cut short: {error}") from error
    if not proto.graph.output:
        raise IntegrityError(f"{path} is not an ONNX graph: it has no outputs")
    inside, outside = 0, set()
    for tensor in _tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            outside.add(_place(path, tensor))
        else:
            inside += tensor.ByteSize()
    return GraphFile(path, proto, inside + sum(end - begin for _, begin, end in outside))


def _place(path: Path, tensor: Any) -> tuple[Path, int, int]:
    """Where a tensor lies that is not in the graph: the file, and its first byte and the one behind its last."""
    said = {entry.key: entry.value for entry in tensor.external_data}
    what = f"{path}: weight {tensor.name!r}"
    if not said.get("location"):
        raise IntegrityError(f"{what} is said to lie in another file, but in which is not said")
    file = (path.parent / said["location"]).resolve()
    # A cache of the hub links each file to one beside the others', so what counts is where the graph itself lies.
    if not file.is_relative_to(path.resolve().parent):
        raise IntegrityError(f"{what} points to {said['location']!r}, outside the folder; such a file is not opened")
    if not file.is_file():
        raise IntegrityError(f"{what} is in {said['location']!r}, which is not there")
    try:
        offset, size = int(said.get("offset") or 0), file.stat().st_size
        length = int(said["length"]) if said.get("length") else size - offset
    except ValueError as error:
        raise IntegrityError(f"{what} has no usable offset and length in {file.name}: {error}") from error
    if offset < 0 or length < 0 or offset + length > size:
        raise IntegrityError(
            f"{what} is bytes {offset} to {offset + length} of {file.name}, which has {size}: the file is cut short, "
            "or belongs to another graph"
        )
    return file, offset, offset + length


def _tensors(proto: Any) -> Iterator[Any]:
    """All tensors of a model: of its graph, its subgraphs, its functions, and inside attributes."""
    for graph in _graphs(proto):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in _nodes(proto):
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors


def _graphs(proto: Any) -> Iterator[Any]:
    """The graph and the bodies inside its nodes and functions."""
    yield proto.graph
    for node in _nodes(proto):
        for attribute in node.attribute:
            yield from ([attribute.g] if attribute.HasField("g") else [])
            yield from attribute.graphs


def _nodes(proto: Any) -> Iterator[Any]:
    """The nodes of the graph, of its subgraphs at any depth, and of functions."""
    waiting = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            bodies = [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
            waiting.extend(inner for body in bodies for inner in body.node)
