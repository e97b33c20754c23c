"""How many bytes an export is going to take, before any weight is read."""

from collections.abc import Mapping

from compressor.exporters.safetensors import COMPANIONS
from compressor.models import Model, WeightSite
from compressor.quant import packed_bytes
from compressor.reports import LedgerRow

ENTRY = 80  # of a safetensors header, beside the tensor's name: dtype, shape, offsets
CONFIG = 3000
SHAPE = 16  # weight_shape: two int64


def exported_bytes(model: Model, schemes: Mapping[str, LedgerRow]) -> int:
    """Bytes of `model/`: packed codes, scales and shapes as planned in `schemes`, all else in the model's dtype.

    The model's empty skeleton gives the shapes. `schemes` holds a row for each site and each stack of experts
    (`<stack>.gate_up_proj`, `<stack>.down_proj`) that is going to be quantized, with its bits and group.
    """
    itemsize = model.dtype.itemsize
    total = CONFIG + sum(tensor.numel() * itemsize + len(name) + ENTRY for name, tensor in model.rest().items())
    for k in range(model.num_blocks):
        block = model.anatomy(k)
        sites = {f"{site.path}.weight": site for site in block.sites}
        for name, parameter in block.module.named_parameters():
            full = f"{block.name}.{name}"
            stack = block.experts
            if name in sites and sites[name].name in schemes:
                total += _packed_site(sites[name], schemes[sites[name].name], itemsize)
            elif stack and name.startswith(f"{stack.path}."):
                split = 2 if name.endswith("gate_up_proj") else 1  # gate and up come apart on disk
                experts, rows, columns = parameter.shape
                row = schemes.get(full)
                one = (
                    _packed(rows // split, columns, row, itemsize, full)
                    if row
                    else rows // split * columns * itemsize + len(full) + ENTRY
                )
                total += experts * split * one
            else:
                total += parameter.numel() * itemsize + len(full) + ENTRY
    if model.path is not None:
        companions = {file for pattern in COMPANIONS for file in model.path.glob(pattern) if file.is_file()}
        total += sum(file.stat().st_size for file in companions)
    return total


def _packed_site(site: WeightSite, row: LedgerRow, itemsize: int) -> int:
    return _packed(*site.shape, row, itemsize, site.name)


def _packed(rows: int, columns: int, row: LedgerRow, itemsize: int, name: str) -> int:
    groups = 1 if row.group_size is None else columns // row.group_size
    codes = rows * packed_bytes(columns, int(row.bits))
    return codes + rows * groups * itemsize + SHAPE + 3 * (len(name) + len(".weight_packed") + ENTRY)
