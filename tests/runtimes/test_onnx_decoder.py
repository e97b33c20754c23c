"""The decoder against numpy: prompts, steps, padding on either side, caches; in all three ways to write a graph."""

import numpy as np
import pytest
import torch
from onnx import helper
from transformers import DynamicCache

from compressor.metrics.latency import measure_latency
from compressor.runtimes import OnnxModel, kv_cache, open_onnx
from tests.runtimes.tiny_graphs import KINDS, MICROSOFT, D, V, decoder_folder, expected_hidden, expected_logits

TOLERANCE = {"rtol": 0, "atol": 1e-5}
ROWS = (np.array([3, 14, 15, 9, 2, 6]), np.array([5, 35, 8]))  # two sequences of different length
FIRST = torch.tensor(ROWS[0])[None]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("onnx")
    return {kind: open_onnx(decoder_folder(root / kind, kind), threads=1) for kind in KINDS}


def batch(rows, side: str, length: int):
    """Token ids and mask, padded on one side."""
    ids, mask = torch.full((len(rows), length), V - 1), torch.zeros(len(rows), length, dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    return ids, mask


def assert_equal(found: torch.Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [1, 128])
def test_steps_behind_a_padded_prompt(models, kind, room, monkeypatch):
    """Two rows padded on the left, then six steps; buffers with little room are moved as they fill up."""
    monkeypatch.setattr(kv_cache, "ROOM", room)
    ids, mask = batch(ROWS, "left", 6)
    out = models[kind](ids, mask)
    texts = [list(row) for row in ROWS]
    for row, text in enumerate(texts):
        assert_equal(out.logits[row, -len(text) :], expected_logits(kind, np.array(text)))
    for step in range(6):
        new = torch.tensor([[10 + step], [20 + step]])
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
        out = models[kind](new, mask, past_key_values=out.past_key_values)
        for row, text in enumerate(texts):
            text.append(int(new[row]))
            assert_equal(out.logits[row, 0], expected_logits(kind, np.array(text))[-1])
    assert out.past_key_values.get_seq_length() == 12


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_right(models, kind):
    """As evaluations pad: what follows a row's end changes nothing before it."""
    logits = models[kind](*batch(ROWS, "right", 8)).logits
    for row, text in enumerate(ROWS):
        assert_equal(logits[row, : len(text)], expected_logits(kind, text))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_several_tokens_behind_a_past(models, kind, padded):
    """A second piece of the prompt for two rows, which GroupQueryAttention takes in one row only."""
    first = ROWS if padded else (ROWS[0], ROWS[0][::-1].copy())
    ids, mask = batch(first, "left", 6)
    cache = models[kind](ids, mask).past_key_values
    more = torch.tensor([[30, 31, 32], [40, 41, 42]])
    mask = torch.cat([mask, torch.ones_like(more)], 1)
    logits = models[kind](more, mask, past_key_values=cache).logits
    for row, text in enumerate(first):
        assert_equal(logits[row], expected_logits(kind, np.concatenate([text, more[row].numpy()]))[-3:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_transformers_stands_for_one_of_ours(models, kind):
    """What the timing code does: one DynamicCache handed in again and again, updated in place; no mask, last logits."""
    cache = DynamicCache(config=models[kind].config)
    models[kind](FIRST, past_key_values=cache, use_cache=True)
    out = models[kind](torch.tensor([[1]]), past_key_values=cache, logits_to_keep=1)
    assert_equal(out.logits[0], expected_logits(kind, np.append(ROWS[0], 1))[-1:])
    assert models[kind](torch.tensor([[1]]), use_cache=False).past_key_values is None


def test_the_cache_is_shared_only_where_attention_alone_reads_it(models, tmp_path):
    """A graph that looks at the length of the past may not be given a longer buffer."""
    stores = {kind: type(model.new_cache(1).storage).__name__ for kind, model in models.items()}
    assert stores == {"counting": "SharedStorage", "biased": "SharedStorage", "plain": "GrowingStorage"}
    looking = [
        helper.make_node("Shape", ["past_key_values.0.key"], ["past_shape"]),
        helper.make_node("Gather", ["past_shape", "two"], ["past_length"]),
        helper.make_node("Cast", ["past_length"], ["past_float"], to=1),
        helper.make_node("MatMul", ["y", "head"], ["head_out"]),
        helper.make_node("Add", ["head_out", "past_float"], ["logits"]),
    ]
    model = open_onnx(decoder_folder(tmp_path / "m", "biased", looking, two=np.array(2)), threads=1)
    cache = model(FIRST).past_key_values
    out = model(torch.tensor([[1]]), past_key_values=cache)
    assert_equal(out.logits[0, 0], expected_logits("biased", np.append(ROWS[0], 1))[-1] + len(ROWS[0]))


def test_wrong_shapes_are_refused(models):
    """Masks that do not cover the past, caches of another batch or of torch, padding behind a prompt."""
    model = models["counting"]
    cache = model(FIRST).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask is \[1, 1\]; 6 cached and 1 new"):
        model(torch.tensor([[1]]), torch.tensor([[1]]), past_key_values=cache)
    with pytest.raises(ValueError, match="the cache is of 1 sequences, input_ids of 2"):
        model(torch.tensor([[1], [2]]), past_key_values=cache)
    with pytest.raises(ValueError, match="0 for a new token"):
        model(torch.tensor([[1]]), torch.tensor([[1] * 6 + [0]]), past_key_values=cache)
    filled = DynamicCache()
    filled.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    with pytest.raises(ValueError, match="tokens of a torch model"):
        model(torch.tensor([[1]]), past_key_values=filled)


def quantized_head(accuracy_level: int | None) -> tuple[list, dict[str, np.ndarray], np.ndarray]:
    """A head of 4-bit codes in blocks of 16, and what it dequantizes to, `[D, V]`."""
    random = np.random.default_rng(1)
    codes, scales = random.integers(0, 16, (V, D // 16, 16)), random.uniform(0.01, 0.2, (V, D // 16)).astype(np.float32)
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
    level = {} if accuracy_level is None else {"accuracy_level": accuracy_level}
    node = helper.make_node(
        "MatMulNBits", ["y", "codes", "scales"], ["logits"], domain=MICROSOFT, K=D, N=V, bits=4, block_size=16, **level
    )
    return [node], {"codes": packed, "scales": scales}, ((codes - 8) * scales[..., None]).reshape(V, D).T


def test_the_accuracy_level_can_be_chosen(tmp_path):
    """8-bit activations are less exact than the graph's own level, and level 1 makes such a graph exact again."""
    errors = {}
    for written in (None, 4):
        nodes, tensors, head = quantized_head(written)
        folder = decoder_folder(tmp_path / str(written), "biased", nodes, **tensors)
        exact = expected_hidden("biased", ROWS[0]) @ head
        for asked in (None, 1, 4):
            found = open_onnx(folder, threads=1, accuracy_level=asked)(FIRST).logits[0].numpy()
            errors[written, asked] = np.abs(found - exact).max() / np.abs(exact).max()
    assert {key: error < 1e-5 for key, error in errors.items()} == {
        (None, None): True, (None, 1): True, (None, 4): False, (4, None): False, (4, 1): True, (4, 4): False,
    }  # fmt: skip
    assert all(error < 0.05 for error in errors.values())


def test_latency_is_measured_as_of_any_model(models):
    """The project's own timing runs on it unchanged."""
    figures = measure_latency(models["biased"], batch_sizes=[1, 2], prompt=4, generate=4, min_rounds=3, max_seconds=2)
    assert all(estimate is not None and estimate.value > 0 for estimate in figures.decode_ms_per_token.values())


def test_it_says_what_it_is(models):
    """Where it is, how many bytes its weights have on disk, that it has none to train."""
    model = models["plain"]
    assert isinstance(model, OnnxModel)
    assert next(model.parameters()).device == model.device == torch.device("cpu")
    assert sum(parameter.numel() for parameter in model.parameters()) == 0
    data = (model.folder / "model.onnx.data").stat().st_size
    assert data <= model.weight_bytes < data + 2000
