"""Structural rules one by one: what is measured follows its definition, what is read follows the format."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from compressor.algorithms.rounding import round_to_nearest
from compressor.gates.structure.content import packed_failures
from compressor.gates.structure.files import file_failures
from compressor.gates.structure.finding import MOST_SHOWN, failed, settled
from compressor.gates.structure.history import Sparsity, read_history
from compressor.gates.structure.nearness import measure_nearness
from compressor.gates.structure.scheme import BadScheme, read_claims
from compressor.gates.structure.stored import Packed
from compressor.quant import QuantizedTensor, QuantSpec, pack_codes

INDEX = "model.safetensors.index.json"


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """Two shards with their index."""
    parts = {
        "model-00001-of-00002.safetensors": {"a": torch.ones(2, 2), "b": torch.ones(3)},
        "model-00002-of-00002.safetensors": {"c": torch.ones(4)},
    }
    for name, tensors in parts.items():
        save_file(tensors, tmp_path / name, metadata={"format": "pt"})
    weight_map = {key: name for name, tensors in parts.items() for key in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 44}, "weight_map": weight_map}))
    return tmp_path


def files_found(folder):
    return {(finding.rule, finding.where) for finding in file_failures(folder)}


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_shards_that_agree_with_their_index_pass(shards):
    """4 + 3 + 4 numbers of 4 bytes are the 44 that the index declares."""
    assert files_found(shards) == set()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda i: i["weight_map"].update(a="model-00002-of-00002.safetensors"), "a"),
        (lambda i: i["weight_map"].pop("b"), "b"),
        (lambda i: i["weight_map"].update(d="model-00001-of-00002.safetensors"), "d"),
        (lambda i: i["metadata"].update(total_size=45), INDEX),
        (lambda i: i.pop("weight_map"), INDEX),
    ],
)
def test_an_index_that_lies_is_found(shards, change, expected):
    """A key in the wrong shard, unlisted, listed but absent; a wrong total; no map at all."""
    edit_index(shards, change)
    assert files_found(shards) == {("files.weights", expected)}


def test_a_key_in_two_shards_is_found(shards):
    """Loaders would take either."""
    save_file({"c": torch.zeros(4), "b": torch.ones(3)}, shards / "model-00002-of-00002.safetensors", {"format": "pt"})
    edit_index(shards, lambda i: i["metadata"].pop("total_size"))
    assert ("files.weights", "b") in files_found(shards)


def test_a_shard_of_an_export_with_more_shards_is_found(shards):
    """`-of-00003` among two shards."""
    os.rename(shards / "model-00002-of-00002.safetensors", shards / "model-00002-of-00003.safetensors")
    edit_index(shards, lambda i: i["weight_map"].update(c="model-00002-of-00003.safetensors"))
    assert files_found(shards) == {("files.weights", "model-00002-of-00003.safetensors")}


def test_nothing_outside_the_folder_is_read(shards):
    """Neither by an index nor by a link."""
    edit_index(shards, lambda i: i["weight_map"].update(c="../elsewhere.safetensors"))
    (shards / "vocab.txt").symlink_to("/etc/hostname")
    assert files_found(shards) >= {("files.inside", INDEX), ("files.inside", "vocab.txt")}


def test_a_pickle_is_known_by_its_content(shards):
    """A torch file is a zip, whatever it is called."""
    torch.save({"a": torch.ones(2)}, shards / "notes.dat")
    assert files_found(shards) == {("files.pickle", "notes.dat")}


# -- what is measured --------------------------------------------------------------------------------------------------


def packed(quantized: QuantizedTensor) -> Packed:
    shape = (quantized.codes.shape[0], quantized.codes.shape[1])
    return Packed(pack_codes(quantized.codes, quantized.spec.bits), quantized.scales, None, quantized.spec, shape)


def weight(rows: int = 256, columns: int = 512) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("group", [32, None])
def test_rounding_costs_one_unit_of_noise(bits, group):
    """The unit is the error of rounding to the grid that just holds the largest weight: uniform, step^2 / 12."""
    quantized = round_to_nearest(weight(), QuantSpec(bits, group), search=False, dtype=torch.float32)
    near = measure_nearness(packed(quantized), weight())
    assert near.noise == pytest.approx(1.0, abs=0.03)
    assert near.offset == pytest.approx(0.0, abs=0.01)
    assert (near.over, near.far) == (0.0, 0.0)


def test_correlation_and_noise_follow_their_definitions():
    """Against float64 over the whole matrix at once."""
    spec = QuantSpec(4, 32)
    quantized = round_to_nearest(weight(), spec, dtype=torch.bfloat16)
    near = measure_nearness(packed(quantized), weight())
    ours, theirs = quantized.dequantize().double(), weight().double()
    assert near.correlation == pytest.approx(float((ours * theirs).sum() / (ours.norm() * theirs.norm())), rel=1e-6)
    groups = theirs.unflatten(1, (-1, 32))
    step = torch.maximum(-groups.amin(-1) / 8, groups.amax(-1) / 7)
    unit = (32 * step.square().sum() / 12).sqrt()
    assert near.noise == pytest.approx(float((ours - theirs).norm() / unit), rel=1e-6)


def test_scales_of_the_next_group_spread_the_gains():
    """Codes are right, so correlation stays high: the spread of gains and steps beyond the largest weight tell."""
    quantized = round_to_nearest(weight(), QuantSpec(4, 32), dtype=torch.float32)
    rolled = QuantizedTensor(quantized.codes, quantized.scales.roll(1, 1), None, quantized.spec)
    good, bad = measure_nearness(packed(quantized), weight()), measure_nearness(packed(rolled), weight())
    assert good.complaint(4, trained=False) is None
    assert bad.correlation > 0.9
    assert bad.complaint(4, trained=False).about == "scales"
    assert good.spread < 0.02 < 0.15 < bad.spread


def test_one_scale_out_of_thousands_is_noticed():
    """A tenfold scale of a single group hardly moves any figure of the whole weight."""
    quantized = round_to_nearest(weight(), QuantSpec(4, 32), dtype=torch.float32)
    scales = quantized.scales.clone()
    scales[17, 3] *= 10
    near = measure_nearness(packed(QuantizedTensor(quantized.codes, scales, None, quantized.spec)), weight())
    assert near.far == 1 / scales.numel()
    assert near.complaint(4, trained=False).about == "scales"


def test_zeros_of_a_pruned_weight_do_not_count():
    """With half of the weights zero the rest is as near as before."""
    dense = weight()
    kept = dense.abs() > dense.abs().median()
    quantized = round_to_nearest(dense * kept, QuantSpec(4, 32), dtype=torch.float32)
    share = float((dense * kept).norm() / dense.norm())  # what is left of the weight correlates by its share
    assert measure_nearness(packed(quantized), dense).correlation == pytest.approx(share, abs=0.005)
    assert measure_nearness(packed(quantized), dense, pruned=True).correlation > 0.99


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("search", [False, True])
def test_codes_of_every_width_reach_the_ends_of_their_grid(bits, search):
    """Codes that were made for one bit fewer do not."""
    shape = torch.tensor([256, 512])
    quantized = round_to_nearest(weight(), QuantSpec(bits, 64), search=search, dtype=torch.bfloat16)
    assert list(packed_failures("w", packed(quantized), shape)) == []
    if bits in (4, 3):
        fewer = round_to_nearest(weight(), QuantSpec(bits - 1, 64), search=search, dtype=torch.bfloat16)
        coarse = packed(QuantizedTensor(fewer.codes, fewer.scales, None, quantized.spec))
        [finding] = packed_failures("w", coarse, shape)
        assert (finding.rule, finding.where) == ("values.codes", "w.weight_packed")


def test_bits_after_the_end_of_a_row_must_be_zero():
    """A row of 36 codes of 4 bits leaves half a word."""
    spec = QuantSpec(4, None)
    quantized = round_to_nearest(weight(8, 36), spec, dtype=torch.bfloat16)
    whole = packed(quantized)
    assert list(packed_failures("w", whole, torch.tensor([8, 36]))) == []
    whole.words[3, -1] |= 1 << 20
    assert [f.rule for f in packed_failures("w", whole, torch.tensor([8, 36]))] == ["values.codes"]


# -- config, history ---------------------------------------------------------------------------------------------------


def claims(**changes):
    group = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64, "dynamic": False}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": group | changes}},
            "ignore": ["lm_head", "re:.*mlp\\.gate$"],
        }
    }


def test_claims_are_read_as_loaders_read_them():
    """Exact names, or patterns from the beginning of the name."""
    read = read_claims(claims())
    assert read.spec_of("model.layers.0.mlp.gate_proj") == QuantSpec(4, 64)
    assert read.spec_of("lm_head") is None
    assert read.spec_of("model.layers.3.mlp.gate") is None
    assert read.spec_of("my.lm_head") == QuantSpec(4, 64)
    assert read_claims({}).spec_of("model.layers.0.mlp.gate_proj") is None


@pytest.mark.parametrize(
    "changes",
    [{"num_bits": 5}, {"strategy": "channel"}, {"group_size": None}, {"actorder": "group"}, {"type": "float"}],
)
def test_a_scheme_that_the_format_does_not_have_is_refused(changes):
    """Bits, group and strategy that contradict each other, activation order, floats."""
    with pytest.raises(BadScheme, match="group_0"):
        read_claims(claims(**changes))


def row(name, action, reason="", **more):
    return {"name": name, "action": action, "reason": reason, "bits": 16, "group_size": None, **more}


def test_a_history_puts_ledgers_together():
    """Experts that were cut twice are counted from the source; pruned weights stay pruned through training."""
    cut = [{"weights": [], "blocks": [{"index": 2, "kept_experts": kept}]} for kept in ([1, 3, 5, 7], [0, 2])]
    masked = {"weights": [row("a", "pruned", "2 of 4 kept"), row("b", "pruned", "50% of each row zero")]}
    trained = {"weights": [row("a.weight", "trained"), row("n.weight", "trained")]}
    packed = {"weights": [row("a", "quantized", bits=4, group_size=64)]}
    history = read_history([*cut, masked, trained, packed])
    assert history.kept_experts == {2: (1, 5)}
    assert history.sparsity("a") == Sparsity(kept=2, group=4)
    assert history.sparsity("b") == Sparsity(share=0.5)
    assert history.trained == {"a", "n"}
    assert history.quantized == {"a": (4, 64)}
    assert not read_history(None).known


def test_long_lists_of_failures_are_cut():
    """The last line says how many more there are."""
    found = settled({"r": "holds", "s": "holds too"}, [failed("r", f"t{i}", "broken") for i in range(50)])
    assert [f.status for f in found] == ["fail"] * (MOST_SHOWN + 1) + ["pass"]
    assert found[MOST_SHOWN].text == f"and {50 - MOST_SHOWN} more like the ones before"
