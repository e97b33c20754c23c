"""Every family in the table: loaded block by block it is the stock model, and what is written loads back as such."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressor.calibration import Calibration, Workplace, last_hidden
from compressor.checkpoint import CheckpointReader, Journal
from compressor.exporters import export_safetensors, reload
from compressor.exporters.parity import TOLERANCE, live_logits, relative_difference
from compressor.gates.structure import check_structure
from compressor.models import FAMILIES, in_float32, load_model, observe_experts, wrap_live
from compressor.passes import Context, Prune, Quantize
from tests.tiny_models import FAMILIES as TINY
from tests.tiny_models import rough_vectors, save_tiny, tiny_ids, tiny_model

MOE = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]
WINDOWS = {  # full attention and a window of 8 of 32 tokens, in all layers or some
    "mistral": {"sliding_window": 8},
    "mixtral": {"sliding_window": 8},
    "phi3": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 8},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 8},
}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
SETTINGS = [
    ("gemma", {"hidden_size": 96, "tie_word_embeddings": True}),
    ("gemma3_text", {"rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }}),
    ("llama", {"sliding_window": 8}),  # which Llama does not have: stock ignores the key
    ("olmoe", {"norm_topk_prob": False, "attention_bias": True}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 16}),
    ("qwen2_moe", {"decoder_sparse_step": 2}),
    ("qwen2_moe", {"mlp_only_layers": [1], "norm_topk_prob": False}),
]  # fmt: skip
INT4 = {"bits": 4, "group_size": 32}
PASSES = {
    "gptq": [Quantize(**INT4)],
    "rtn": [Quantize(method="rtn", scale_search="mse", **INT4)],
    "experts": [Prune(structure="experts", ratio=0.25), Quantize(method="rtn", scale_search="minmax", **INT4)],
    "wanda": [Prune(structure="2:4")],
}
EXPORTS = [(family, "gptq") for family in TINY] + [(family, "experts") for family in MOE]
MORE_EXPORTS = [(family, kind) for family in ("gemma2", "phi3", "mixtral", "qwen2_moe") for kind in ("rtn", "wanda")]


@torch.no_grad()
def stock_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What `from_pretrained` computes."""
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()(ids).logits


def saved(folder: Path, family: str, **settings) -> Path:
    """A tiny checkpoint whose norms and biases matter."""
    dtype = settings.pop("dtype", torch.float32)
    return save_tiny(folder, family, model=rough_vectors(tiny_model(family, dtype=dtype, **settings)))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny products gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A bfloat16 checkpoint of each family. Do not write here."""
    root = tmp_path_factory.mktemp("families")
    return {family: saved(root / family, family, dtype=torch.bfloat16) for family in TINY}


@pytest.fixture(scope="module")
def exported(sources, tmp_path_factory):
    """`exported(family, kind)`: the compressed model, its exported folder, the ledgers; each made once."""
    root, made = tmp_path_factory.mktemp("exported"), {}

    def get(family: str, kind: str):
        if (family, kind) not in made:
            model, out, ledgers = load_model(str(sources[family])), root / f"{family}-{kind}", []
            for i, step in enumerate(PASSES[kind]):
                place = Workplace(out / f"{i}", Journal(out / f"{i}.jsonl", {"test": 1}), i)
                place.folder.mkdir(parents=True)
                context = Context(Calibration(), workplace=place, ids=tiny_ids(16, 64))
                ledgers.append(step.apply(model, context).to_json())
                model.finish_generation(place.folder)
            export_safetensors(model, out / "model", shard_bytes=10**9)
            made[family, kind] = (model, out / "model", ledgers)
        return made[family, kind]

    return get


def test_the_table_and_the_tiny_models_hold_the_same_families():
    """No family is without tests."""
    assert sorted(TINY) == sorted(FAMILIES)


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY)
def test_logits_are_those_of_stock(family, tmp_path):
    """In float32, exactly: embedding scales, norms, biases, windows, soft caps."""
    folder, ids = saved(tmp_path, family), tiny_ids()
    model = load_model(str(folder))
    assert torch.equal(model.head().logits(last_hidden(model, ids)), stock_logits(folder, ids))


@pytest.mark.parametrize("family", TINY)
def test_bfloat16_logits_are_those_of_stock(family, sources):
    """Within 1 %: stock's head rounds its logits, ours does not."""
    model, ids = load_model(str(sources[family])), tiny_ids()
    expected = stock_logits(sources[family], ids).float()
    assert (model.head().logits(last_hidden(model, ids)) - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("family", WINDOWS)
def test_sliding_windows_are_those_of_stock(family, tmp_path):
    """Exactly, and not what full attention computes."""
    folder, ids = saved(tmp_path / "window", family, **WINDOWS[family]), tiny_ids()
    model, full = load_model(str(folder)), load_model(str(saved(tmp_path / "full", family)))
    logits = model.head().logits(last_hidden(model, ids))
    assert torch.equal(logits, stock_logits(folder, ids))
    assert not torch.allclose(logits, full.head().logits(last_hidden(full, ids)), atol=0.1)


@pytest.mark.parametrize(("family", "settings"), SETTINGS, ids=str)
def test_other_settings_are_those_of_stock(family, settings, tmp_path):
    """Exactly: rotary variants, dense layers among sparse ones, widths whose root is not a bfloat16 number."""
    folder, ids = saved(tmp_path, family, **settings), tiny_ids()
    model = load_model(str(folder))
    assert torch.equal(model.head().logits(last_hidden(model, ids)), stock_logits(folder, ids))


def test_asking_what_a_layer_is_given_leaves_the_model_alone(tmp_path):
    """A forward that somebody else has put on a layer is there again, and the stock forward runs as before."""
    model, ids = wrap_live(tiny_model("mistral")), tiny_ids(2)
    layer = model.blocks[0]
    original = layer.forward
    layer.forward = hooked = lambda *inputs, **arguments: original(*inputs, **arguments)
    with torch.no_grad():
        expected = model.skeleton(ids).logits
        assert torch.equal(model.head().logits(last_hidden(model, ids)), expected)
        assert torch.equal(model.skeleton(ids).logits, expected)
    assert layer.forward is hooked
    assert "forward" not in vars(model.blocks[1])


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "live"])
@torch.no_grad()
def test_a_bfloat16_gemma_widens_to_the_float32_one(stored, tmp_path):
    """The embedding's scale, sqrt(96), is not the bfloat16 number next to it; parity of exports rests on this."""
    folder, ids = saved(tmp_path, "gemma", dtype=torch.bfloat16, hidden_size=96), tiny_ids(2)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    before = loaded(ids).logits
    model = load_model(str(folder)) if stored else wrap_live(loaded)
    with model.live() as module:
        assert torch.equal(module(ids).logits, before)
        with in_float32(module):
            assert torch.equal(module(ids).logits, expected)


# -- anatomy ----------------------------------------------------------------------------------------------------------


def test_fused_projections_are_sites_of_their_own():
    """Phi-3: q, k, v in one linear, gate and up in another."""
    block = wrap_live(tiny_model("phi3")).anatomy(0)
    assert {reads: len(sites) for reads, sites in block.shared_inputs().items()} == {
        "self_attn.o_proj": 1, "self_attn.qkv_proj": 1, "mlp.gate_up_proj": 1, "mlp.down_proj": 1,
    }  # fmt: skip


def test_a_shared_expert_is_made_of_sites_and_its_gate_is_none():
    """Gate and up of the shared expert read one input; the gate of one output stays dense, as the router does."""
    block = wrap_live(tiny_model("qwen2_moe")).anatomy(0)
    groups = {reads: [site.path for site in sites] for reads, sites in block.shared_inputs().items()}
    assert [paths for paths in groups.values() if "shared" in paths[0]] == [
        ["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"],
        ["mlp.shared_expert.down_proj"],
    ]
    assert (block.experts.shared_path, block.experts.shared_gate_path) == (
        "mlp.shared_expert",
        "mlp.shared_expert_gate",
    )
    assert wrap_live(tiny_model("mixtral")).anatomy(0).experts.shared_path is None


@pytest.mark.parametrize("family", MOE)
def test_names_of_experts_on_the_disk_are_those_of_save_pretrained(family, sources):
    """Gate, up and down of each expert, in this order, are rows of the stack in memory."""
    reader, model = CheckpointReader(sources[family] / "model.safetensors"), load_model(str(sources[family]))
    with model.open_block(1) as block:
        stack = block.experts
        gate_up, down = stack.read()
        gate, up, out = (reader.tensor(f"{stack.disk_name}.5.{name}.weight") for name in stack.expert_names)
        assert torch.equal(torch.cat([gate, up]), gate_up[5])
        assert torch.equal(out, down[5])
        assert torch.equal(reader.tensor(f"{stack.router_disk_name}.weight"), stack.router.weight)


@pytest.mark.parametrize(("family", "norm"), [(f, n) for f in MOE for n in (True, False) if n or f != "mixtral"])
@torch.no_grad()
def test_what_the_stack_says_of_its_gates_is_what_the_router_does(family, norm):
    """Gates of a token sum to one where they are normalised, to less where they are not; there are top-k of them."""
    settings = {} if family == "mixtral" else {"norm_topk_prob": norm}
    model, calls = tiny_model(family, **settings), []
    stack = wrap_live(model).anatomy(0).experts
    with observe_experts(stack.module, calls.append):
        model(tiny_ids(2))
    gates = calls[0].top_k_weights
    assert stack.top_k == gates.shape[-1] == 2
    assert stack.normalises_gates is norm
    assert torch.allclose(gates.sum(-1), torch.ones(len(gates))) is norm


# -- passes and exports -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), EXPORTS + MORE_EXPORTS)
def test_stock_transformers_loads_the_export_with_the_same_logits(family, kind, exported, tmp_path):
    """The run's own check (`exporters/parity.py`), without its fresh process: logits, greedy tokens, no stray keys."""
    model, folder, _ = exported(family, kind)
    ids, prompt = tiny_ids(2, 64), tiny_ids(1, 32)
    expected, greedy = live_logits(model, ids, prompt)
    save_file({"ids": ids, "prompt": prompt, "new_tokens": torch.tensor(32)}, tmp_path / "request")
    assert reload.main(str(folder), str(tmp_path / "request"), str(tmp_path / "result")) == 0
    found = load_file(tmp_path / "result")
    assert relative_difference(found["logits"], expected) <= TOLERANCE
    assert torch.equal(found["greedy"], greedy)


@pytest.mark.parametrize(("family", "kind"), EXPORTS)
def test_structural_rules_are_silent_on_the_export(family, kind, sources, exported):
    """Nothing fails, and with baseline and ledgers nothing is skipped (tokenizer rules need a template)."""
    _, folder, ledgers = exported(family, kind)
    findings = check_structure(folder, sources[family], ledgers=ledgers)
    assert [finding for finding in findings if finding.status != "pass"] == []


@pytest.mark.parametrize(("family", "kind"), EXPORTS)
def test_the_export_is_read_packed(family, kind, exported):
    """Loaded again, the codes compute what they computed before."""
    model, folder, _ = exported(family, kind)
    again, ids = load_model(str(folder)), tiny_ids(2)
    assert again.is_quantized
    assert torch.equal(last_hidden(again, ids), last_hidden(model, ids))


@pytest.mark.parametrize("family", TINY)
def test_all_linear_layers_but_routers_gates_and_head_are_packed(family, exported):
    """Codes hold every 2-D weight of the blocks but those that choose."""
    _, folder, _ = exported(family, "gptq")
    dense = [
        name for name in load_file(folder / "model.safetensors") if ".layers.0." in name and name.endswith(".weight")
    ]
    matrices = [name for name in dense if "norm" not in name]
    choosing = {
        "mixtral": ["block_sparse_moe.gate"], "olmoe": ["mlp.gate"], "qwen3_moe": ["mlp.gate"],
        "qwen2_moe": ["mlp.gate", "mlp.shared_expert_gate"],
    }  # fmt: skip
    assert sorted(matrices) == [f"model.layers.0.{name}.weight" for name in choosing.get(family, [])]


@pytest.mark.parametrize("family", MOE)
def test_pruned_experts_go_from_config_and_router(family, exported):
    """Six of eight are left under every name that counts them, with the rows of the router."""
    model, folder, _ = exported(family, "experts")
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert [getattr(config, key) for key in FAMILIES[family].expert_counts] == [6] * len(FAMILIES[family].expert_counts)
    reader = CheckpointReader(folder / "model.safetensors")
    stack = model.anatomy(0).experts
    assert reader.shape(f"{stack.router_disk_name}.weight") == (6, 64)
    assert {len(kept) for kept in model.state.kept_experts.values()} == {6}
