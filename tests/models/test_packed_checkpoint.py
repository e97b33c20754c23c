"""A checkpoint in our own layout (docs/format.md) is read packed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.algorithms.rounding import round_to_nearest
from compressor.calibration import last_hidden
from compressor.errors import IntegrityError
from compressor.models import load_model, wrap_live
from compressor.quant import QuantSpec, pack_codes
from tests.tiny_models import save_tiny, tiny_ids, tiny_model

SPECS = [
    QuantSpec(bits=4, group_size=32), QuantSpec(bits=3, group_size=32), QuantSpec(bits=8, group_size=None),
    QuantSpec(bits=4, group_size=32, symmetric=False),
]  # fmt: skip


def packed_tensors(name, weight, spec):
    """The four tensors of one weight, by the names of compressed-tensors; zero points packed along the outputs."""
    quantized = round_to_nearest(weight, spec, search=False, dtype=weight.dtype)
    tensors = {
        f"{name}.weight_packed": pack_codes(quantized.codes, spec.bits),
        f"{name}.weight_scale": quantized.scales,
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }
    if quantized.zeros is not None:
        tensors[f"{name}.weight_zero_point"] = pack_codes(quantized.zeros.T.contiguous(), spec.bits).T.contiguous()
    return tensors


def is_packed(name):
    return ("self_attn" in name and "_proj" in name) or ".experts." in name or ("mlp." in name and "_proj" in name)


def packed_folder(folder, family, spec):
    """A saved tiny model with its projections and experts packed."""
    save_tiny(folder, family)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors |= packed_tensors(name.removesuffix(".weight"), tensor, spec) if is_packed(name) else {name: tensor}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_packed_checkpoint_computes_what_its_codes_say(tmp_path, family, spec):
    """Hidden states equal those of the dense model with the rounded weights."""
    model = load_model(str(packed_folder(tmp_path, family, spec)))
    dense = tiny_model(family)
    with torch.no_grad():
        for k in range(2):
            block = wrap_live(dense).anatomy(k)
            for site in block.sites:
                site.write(round_to_nearest(site.read(), spec, search=False, dtype=torch.float32).dequantize())
            if block.experts:
                block.experts.write(
                    *(
                        round_to_nearest(w, spec, search=False, dtype=torch.float32).dequantize()
                        for w in block.experts.read()
                    )
                )
    assert model.is_quantized
    assert torch.equal(last_hidden(model, tiny_ids()), last_hidden(wrap_live(dense), tiny_ids()))


def test_specs_are_read_off_the_tensors(tmp_path):
    """3 bits in groups of 32, asymmetric, from shapes alone."""
    spec = QuantSpec(bits=3, group_size=32, symmetric=False)
    model = load_model(str(packed_folder(tmp_path, "llama", spec)))
    with model.open_block(0) as block:
        assert {site.module.packed.spec for site in block.sites} == {spec}


@pytest.mark.parametrize("part", ["weight_scale", "weight_shape"])
def test_a_missing_part_is_named(tmp_path, part):
    """IntegrityError with the tensor's name."""
    folder = packed_folder(tmp_path, "llama", SPECS[0])
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(f"model.layers.1.mlp.up_proj.{part}")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=rf"layers\.1\.mlp\.up_proj\.{part}"):
        with load_model(str(folder)).open_block(1):
            pass
