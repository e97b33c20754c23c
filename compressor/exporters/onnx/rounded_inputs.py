"""Parity of graphs whose layers round their inputs to int8: the graph without its rounding, then the rounding.

A float sum whose last bit differs can move a code by one, and what comes after is another, equally right, rounding of
the same model: after a few layers two exact implementations have nothing of their rounding errors in common
(docs/decisions.md, 2026-11-22). So the file's own graph is compared with its rounding taken out, as tightly as any
other, and with its rounding by how far it may be moved.

T tokens, V vocabulary.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import IntegrityError
from compressor.layers import packed_weights
from compressor.runtimes import open_onnx

MOST = 2.0  # independent rounding errors of two implementations differ by 1.4 times one of them
PRODUCT = "MatMulInteger"


def rounds_inputs(module: nn.Module) -> bool:
    """Whether any layer of a live model rounds its inputs."""
    return any(packed.spec.activation_bits for packed in packed_weights(module).values())


@torch.inference_mode()
def logits_of(module: Any, ids_T: Tensor) -> Tensor:
    """Logits `[1, T, V]` of a live model."""
    return module(ids_T[None]).logits


@contextlib.contextmanager
def unrounded_inputs(module: nn.Module) -> Iterator[None]:
    """Layers of a live model take their inputs as they are for a while; codes and scales of weights stay."""
    specs = [(packed, packed.spec) for packed in packed_weights(module).values()]
    try:
        for packed, spec in specs:
            packed.spec = replace(spec, activation_bits=None)
        yield
    finally:
        for packed, spec in specs:
            packed.spec = spec


@contextlib.contextmanager
def unrounded_graph(folder: Path) -> Iterator[Path]:
    """A folder with the same graph and data, in which products of integers take their inputs before the rounding.

    Their weights are turned into floats when a product runs, one layer's at a time. The folder itself where there are
    none.
    """
    import onnx

    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    if not any(node.op_type == PRODUCT for node in proto.graph.node):
        yield folder
        return
    made = {output: node for node in proto.graph.node for output in node.output}
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unrounded-") as scratch:
        one = onnx.numpy_helper.from_array(torch.ones(()).numpy(), "unrounded/one")
        proto.graph.initializer.append(one)
        nodes = list(proto.graph.node)
        del proto.graph.node[:]
        for node in nodes:
            if node.op_type == PRODUCT:
                codes, weight, *_ = node.input
                steps, dense = made[codes].input[0], f"{node.name}/dense"
                proto.graph.node.append(onnx.helper.make_node("DequantizeLinear", [weight, one.name], [dense]))
                node = onnx.helper.make_node("MatMul", [steps, dense], node.output, name=node.name)
            proto.graph.node.append(node)
        for file in folder.iterdir():
            if file.is_file() and file.name != "model.onnx":
                try:
                    os.link(file, Path(scratch) / file.name)
                except OSError:  # a file system without hard links
                    shutil.copyfile(file, Path(scratch) / file.name)
        onnx.save(proto, Path(scratch) / "model.onnx")
        yield Path(scratch)


def check_rounding(folder: Path, ids_T: Tensor, rounded_1TV: Tensor, unrounded_1TV: Tensor) -> dict[str, float]:
    """How far the graph's rounding is from the model's, and the model's from none, as spreads of the logits.

    IntegrityError where the first is more than twice the second, which is what a wrong rounding would give.
    """
    found = open_onnx(folder, accuracy_level=0)(ids_T[None]).logits
    apart, cost = (float((logits - rounded_1TV).square().mean().sqrt()) for logits in (found, unrounded_1TV))
    if not apart <= MOST * cost:
        raise IntegrityError(
            f"{folder}: with inputs rounded to int8 the logits are {apart:.2e} from the model's, more than {MOST:g} "
            f"times the {cost:.2e} that the model's own rounding moves them"
        )
    return {"apart": apart, "cost": cost}
