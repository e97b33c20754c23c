"""The step that a CUDA graph holds, run as it is on the CPU: the same logits as the step whose shapes grow."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from compressor.layers import CUDA, relayout
from compressor.models import StaticDecoder, wrap_live
from compressor.models.graphs import GraphedStep, room_for
from compressor.runtimes.generating import generate
from tests.layers.test_cuda_layout import quantized_moe
from tests.models.test_decoding import SUMS, apart, decoder_of
from tests.models.test_families import MOE, WINDOWS
from tests.tiny_models import FAMILIES, tiny_ids

CASES = [(family, {}) for family in FAMILIES if family not in MOE]
CASES += [(family, settings) for family, settings in WINDOWS.items() if family not in MOE]


@torch.no_grad()
@pytest.mark.parametrize(("family", "settings"), CASES, ids=[f"{f}-{'-'.join(s) or 'plain'}" for f, s in CASES])
def test_static_steps_have_the_logits_of_dynamic_ones(family, settings):
    """A prompt whose first row is padded, then twelve tokens: past windows of eight, in a room of 32."""
    _, decoder = decoder_of(family, settings)
    ids, mask = tiny_ids(2, 22), torch.ones(2, 22, dtype=torch.int64)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    step = GraphedStep(decoder, 2, 32, capture=False)
    static = step(ids[:, :10], mask[:, :10], positions[:, :10], logits_to_keep=1)
    dynamic = decoder(ids[:, :10], mask[:, :10], positions[:, :10], logits_to_keep=1)
    for k in range(10, 22):
        inputs = ids[:, k : k + 1], mask[:, : k + 1], positions[:, k : k + 1]
        static = step(*inputs, past_key_values=static.past_key_values)
        dynamic = decoder(*inputs, past_key_values=dynamic.past_key_values)
        assert apart(static.logits, dynamic.logits) <= SUMS


@torch.no_grad()
def test_a_step_writes_the_second_text_as_if_it_were_its_first():
    """Nothing of the first is left: not its tokens, not its padding, not a NaN."""
    _, decoder = decoder_of("llama", {})
    step = GraphedStep(decoder, 2, 32, capture=False)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :3] = 0
    generate(step, tiny_ids(2, 6), mask, max_new_tokens=20, eos_token_id=())
    with torch.inference_mode():
        step._cache.held[:, :, :, :, 20:] = torch.nan
    ids = tiny_ids(2, 4)
    found = generate(step, ids, max_new_tokens=8, eos_token_id=())
    assert torch.equal(found, generate(decoder, ids, max_new_tokens=8, eos_token_id=()))


class StandInGraph:
    """A CUDA graph on the CPU: what ran while it was captured runs again, with its result in the same memory."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1
        self.result.copy_(self.run())

    @contextmanager
    def capture(self, step):
        self.run = step._step
        yield
        self.result = step._logits


@pytest.fixture
def stand_in(monkeypatch):
    """torch.cuda as far as capturing uses it; `graph` is found on the instance whose method captures."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda _: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_stream=lambda _: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    capture = GraphedStep._capture

    def captured(step):
        monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph.capture(step))
        capture(step)

    monkeypatch.setattr(GraphedStep, "_capture", captured)


@torch.no_grad()
def test_replays_write_the_text_of_dynamic_steps(stand_in):
    """After a warm-up that wrote into the cache; two texts, each token but a text's first a replay."""
    _, decoder = decoder_of("gemma2", {})
    step = GraphedStep(decoder, 2, 32, capture=True)
    for ids in (tiny_ids(2, 6), tiny_ids(2, 9)):
        found = generate(step, ids, max_new_tokens=8, eos_token_id=())
        assert torch.equal(found, generate(decoder, ids, max_new_tokens=8, eos_token_id=()))
    assert step._graph.replays == 14


@torch.no_grad()
def test_a_text_may_not_end_before_its_least_length():
    """Logits of inference mode are not to be written into."""
    _, decoder = decoder_of("llama", {})
    ids = tiny_ids(1, 6)
    first = int(generate(decoder, ids, max_new_tokens=1, eos_token_id=())[0, -1])
    longer = generate(decoder, ids, max_new_tokens=2, min_new_tokens=2, eos_token_id=first)
    assert longer.shape == (1, 8)
    assert first not in longer[0, 6:].tolist()


@torch.no_grad()
def test_a_full_room_takes_no_more_tokens():
    _, decoder = decoder_of("llama", {})
    step = GraphedStep(decoder, 1, 8, capture=False)
    with pytest.raises(ValueError, match="in a room of 8"):
        generate(step, tiny_ids(1, 4), max_new_tokens=8, eos_token_id=())


@pytest.mark.parametrize(("tokens", "room"), [(1, 256), (256, 256), (257, 512), (5000, 8192)])
def test_rooms_double(tokens, room):
    assert room_for(tokens, 256) == room


def test_only_experts_that_are_one_call_make_a_static_step():
    """Those of transformers choose on the host which experts to run."""
    dense, mixture = decoder_of("llama", {})[1], decoder_of("qwen3_moe", {})[1]
    assert (dense.static, mixture.static) == (True, False)


@torch.no_grad()
def test_experts_in_the_cuda_layout_make_a_static_step():
    """The same logits as the dynamic step gives with the same op."""
    model = quantized_moe(group_size=32)
    relayout(model, CUDA)
    decoder = StaticDecoder(wrap_live(model, None), model)
    assert decoder.static
    ids = tiny_ids(2, 6)
    step = GraphedStep(decoder, 2, 16, capture=False)
    found = generate(step, ids, max_new_tokens=6, eos_token_id=())
    assert torch.equal(found, generate(decoder, ids, max_new_tokens=6, eos_token_id=()))
