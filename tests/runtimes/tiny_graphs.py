"""ONNX folders of one tiny layer, in the three ways in which decoders are written, and the same computed by numpy.

`counting`: as onnxruntime-genai's builder has it, attention told how many tokens a row has. `biased`: padding as a bias
on the scores. `plain`: standard ops, past and new tokens concatenated (as optimum-onnx has it).
B sequences, S new tokens, T = past + S, D width, H heads, K key-value heads, W their width, V vocabulary.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from transformers import BertConfig, GenerationConfig, LlamaConfig

D, H, W, V, LONGEST = 32, 4, 16, 50, 256
KINDS = ("counting", "biased", "plain")
EOS = 7
MICROSOFT = "com.microsoft"


def kv_heads(kind: str) -> int:
    return H if kind == "plain" else 2


def weights(kind: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {"embed": (V, D), "wq": (D, H * W), "wk": (D, kv_heads(kind) * W), "wv": (D, kv_heads(kind) * W),
              "wo": (H * W, D), "head": (D, V)}  # fmt: skip
    made = {name: (0.3 * random.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    angles = np.arange(LONGEST)[:, None] / 10000 ** (np.arange(0, W, 2) / W)
    return made | {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}


def expected_logits(kind: str, ids: np.ndarray) -> np.ndarray:
    """Logits `[T, V]` of one sequence without padding, all at once."""
    return expected_hidden(kind, ids) @ weights(kind)["head"]


def expected_hidden(kind: str, ids: np.ndarray) -> np.ndarray:
    """What the head reads, `[T, D]`."""
    weight, length = weights(kind), len(ids)
    x = weight["embed"][ids]

    def heads(name: str, turned: bool) -> np.ndarray:
        split = (x @ weight[name]).reshape(length, -1, W).transpose(1, 0, 2)
        if turned:
            low, high = np.split(split, 2, -1)
            cos, sin = weight["cos"][:length], weight["sin"][:length]
            split = np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)
        return split.repeat(H // len(split), 0)

    scores = heads("wq", True) @ heads("wk", True).transpose(0, 2, 1) / W**0.5
    scores = np.where(np.tril(np.ones((length, length))) > 0, scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    attended = (shares @ heads("wv", False)).transpose(1, 0, 2).reshape(length, -1)
    return x + attended @ weight["wo"]


def decoder_folder(folder: Path, kind: str, head: list[onnx.NodeProto] | None = None, **more: np.ndarray) -> Path:
    """A folder with graph, data and configs; `head` are other nodes from `y` to `logits`, `more` their weights."""
    constants = {
        "zero": 0,
        "zero_1": [0],
        "one": 1,
        "one_1": [1],
        "axes": [1, 2],
        "split": [0, 0, -1, W],
        "join": [0, 0, -1],
    }
    initial = {**weights(kind), **{name: np.array(value) for name, value in constants.items()}, **more}
    initial |= {"hidden": np.float32(-1e9), "scale": np.float32(W**-0.5), "float_zero": np.float32(0)}
    node = helper.make_node
    nodes = [
        node("Gather", ["embed", "input_ids"], ["x"]),
        *(node("MatMul", ["x", name], [name[1]]) for name in ("wq", "wk", "wv")),
        node("Shape", ["attention_mask"], ["mask_shape"]),
        node("Gather", ["mask_shape", "one"], ["total"]),
        node("Cast", ["total"], ["total_32"], to=TensorProto.INT32),
        *{"counting": _counting, "biased": _biased, "plain": _plain}[kind](),
        node("MatMul", ["a", "wo"], ["o"]),
        node("Add", ["x", "o"], ["y"]),
        *(head or [node("MatMul", ["y", "head"], ["logits"])]),
    ]
    inputs = {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "total"]}
    inputs |= {} if kind == "counting" else {"position_ids": ["batch", "sequence"]}
    declared = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name, shape in inputs.items()]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", V])]
    for part in ("key", "value"):
        shape = ["batch", kv_heads(kind), "length", W]
        declared.append(helper.make_tensor_value_info(f"past_key_values.0.{part}", TensorProto.FLOAT, shape))
        outputs.append(helper.make_tensor_value_info(f"present.0.{part}", TensorProto.FLOAT, shape))
    read = {name for one in nodes for name in one.input}
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in initial.items() if name in read]
    save(folder, helper.make_graph(nodes, kind, declared, outputs, tensors))
    LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=D, num_hidden_layers=1, num_attention_heads=H,
        num_key_value_heads=kv_heads(kind), head_dim=W, max_position_embeddings=LONGEST,
    ).save_pretrained(folder)  # fmt: skip
    GenerationConfig(eos_token_id=EOS).save_pretrained(folder)
    return folder


def encoder_folder(folder: Path, output: str = "last_hidden_state") -> Path:
    """Embeddings of tokens and their types, masked."""
    random = np.random.default_rng(0)
    tensors = {"embed": random.standard_normal((V, D)), "types": random.standard_normal((2, D))}
    nodes = [
        helper.make_node("Gather", ["embed", "input_ids"], ["x"]),
        helper.make_node("Gather", ["types", "token_type_ids"], ["t"]),
        helper.make_node("Add", ["x", "t"], ["sum"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "axis"], ["mask_3"]),
        helper.make_node("Mul", ["sum", "mask_3"], [output]),
    ]
    names = ("input_ids", "attention_mask", "token_type_ids")
    declared = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in names]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", "sequence", D])]
    initial = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in tensors.items()]
    initial.append(numpy_helper.from_array(np.array([-1]), "axis"))
    save(folder, helper.make_graph(nodes, "encoder", declared, outputs, initial))
    BertConfig(vocab_size=V, hidden_size=D, num_hidden_layers=1, num_attention_heads=2).save_pretrained(folder)
    return folder


def save(folder: Path, graph: onnx.GraphProto) -> None:
    """`model.onnx`, its weights beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    onnx.save_model(
        model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=256
    )


def _attention(inputs: list[str], **attributes: int) -> onnx.NodeProto:
    cached = ["past_key_values.0.key", "past_key_values.0.value"]
    return helper.make_node(
        "GroupQueryAttention", [*inputs[:3], *cached, *inputs[3:]], ["a", "present.0.key", "present.0.value"],
        domain=MICROSOFT, num_heads=H, kv_num_heads=2, **attributes,
    )  # fmt: skip


def _counting() -> list[onnx.NodeProto]:
    return [
        helper.make_node("ReduceSum", ["attention_mask", "one_1"], ["count"], keepdims=0),
        helper.make_node("Sub", ["count", "one"], ["last"]),
        helper.make_node("Cast", ["last"], ["last_32"], to=TensorProto.INT32),
        _attention(["q", "k", "v", "last_32", "total_32", "cos", "sin"], do_rotary=1),
    ]


def _biased() -> list[onnx.NodeProto]:
    node = helper.make_node
    return [
        *(_rotary(name) for name in "qk"),
        node("Shape", ["input_ids"], ["shape"]),
        node("Gather", ["shape", "zero_1"], ["batch_1"]),
        node("Gather", ["shape", "one_1"], ["sequence_1"]),
        node("Unsqueeze", ["total", "zero"], ["total_1"]),
        node("Sub", ["total", "one"], ["last"]),
        node("Cast", ["last"], ["last_32"], to=TensorProto.INT32),
        node("Expand", ["last_32", "batch_1"], ["lasts"]),
        node("Unsqueeze", ["attention_mask", "axes"], ["mask_4"]),
        node("Cast", ["mask_4"], ["present_4"], to=TensorProto.BOOL),
        node("Where", ["present_4", "float_zero", "hidden"], ["bias_4"]),
        node("Concat", ["batch_1", "one_1", "sequence_1", "total_1"], ["bias_shape"], axis=0),
        node("Expand", ["bias_4", "bias_shape"], ["bias"]),
        _attention(["q_turned", "k_turned", "v", "lasts", "total_32", "", "", "", "bias"], do_rotary=0),
    ]


def _plain() -> list[onnx.NodeProto]:
    node = helper.make_node
    return [
        *(_rotary(name) for name in "qk"),
        *_split("q_turned", "q_heads"),
        *_split("k_turned", "k_heads"),
        *_split("v", "v_heads"),
        node("Concat", ["past_key_values.0.key", "k_heads"], ["present.0.key"], axis=2),
        node("Concat", ["past_key_values.0.value", "v_heads"], ["present.0.value"], axis=2),
        node("Transpose", ["present.0.key"], ["keys"], perm=[0, 1, 3, 2]),
        node("MatMul", ["q_heads", "keys"], ["products"]),
        node("Mul", ["products", "scale"], ["scores"]),
        # A key is seen if it does not lie behind the query, and is no padding.
        node("Shape", ["input_ids"], ["shape"]),
        node("Gather", ["shape", "one"], ["sequence"]),
        node("Sub", ["total", "sequence"], ["past"]),
        node("Range", ["past", "total", "one"], ["queries"]),
        node("Unsqueeze", ["queries", "one_1"], ["queries_2"]),
        node("Range", ["zero", "total", "one"], ["keys_1"]),
        node("LessOrEqual", ["keys_1", "queries_2"], ["behind"]),
        node("Unsqueeze", ["attention_mask", "axes"], ["mask_4"]),
        node("Cast", ["mask_4"], ["present_4"], to=TensorProto.BOOL),
        node("And", ["behind", "present_4"], ["seen"]),
        node("Where", ["seen", "scores", "hidden"], ["masked"]),
        node("Softmax", ["masked"], ["shares"], axis=-1),
        node("MatMul", ["shares", "present.0.value"], ["heads"]),
        node("Transpose", ["heads"], ["heads_last"], perm=[0, 2, 1, 3]),
        node("Reshape", ["heads_last", "join"], ["a"]),
    ]


def _rotary(name: str) -> onnx.NodeProto:
    inputs = [name, "position_ids", "cos", "sin"]
    return helper.make_node("RotaryEmbedding", inputs, [f"{name}_turned"], domain=MICROSOFT)


def _split(name: str, heads: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Reshape", [name, "split"], [f"{name}_4"]),
        helper.make_node("Transpose", [f"{name}_4"], [heads], perm=[0, 2, 1, 3]),
    ]
