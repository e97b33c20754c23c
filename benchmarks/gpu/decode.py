"""Tokens a second of a whole decoder: bfloat16 and four-bit weights, with CUDA graphs and without.

`python -m benchmarks.gpu.decode --out FILE.json`. A random Llama of the 8B model's shape with four layers and a small
vocabulary; B sequences, P tokens of a prompt, N new ones.
"""

import statistics
import sys
import time as clock

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.harness import Report, relative_error, run
from compressor.algorithms.rounding import round_to_nearest
from compressor.layers import CUDA, PackedLinear, PackedWeight, relayout
from compressor.models import StaticDecoder, wrap_live
from compressor.models.graphs import GraphedStep
from compressor.quant import QuantSpec
from compressor.runtimes.generating import generate

BF16 = torch.bfloat16
SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_hidden_layers": 4, "vocab_size": 8192,
}  # fmt: skip
TINY = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "vocab_size": 256,
}  # fmt: skip
SPEC = QuantSpec(4, 128)
BATCHES, PROMPT, NEW = (1, 4, 16), 128, 64
LIMIT = 2e-2  # logits of two ways through bfloat16
TRIALS = 5


def random_decoder(report: Report, *, int4: bool) -> StaticDecoder:
    torch.manual_seed(0)
    torch.set_default_device(report.device)
    torch.set_default_dtype(BF16)
    model = LlamaForCausalLM(LlamaConfig(**(SHAPE if report.on_gpu else TINY))).eval()
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")
    if int4:
        for name, layer in list(model.model.layers.named_modules()):
            if isinstance(layer, nn.Linear):
                weight = PackedWeight.of(round_to_nearest(layer.weight.detach(), SPEC, search=False))
                model.model.layers.set_submodule(name, PackedLinear(weight, None))
        relayout(model, CUDA)
    return StaticDecoder(wrap_live(model, None), model)


def check(report: Report) -> None:
    """The graph's logits are the dynamic step's, token by token, and its tokens repeat."""
    for int4 in (False, True):
        decoder = random_decoder(report, int4=int4)
        for batch in BATCHES if report.on_gpu else (2,):
            ids = prompts(decoder, batch, report)
            step = GraphedStep(decoder, batch, 256, capture=report.on_gpu)
            case = {"weights": "int4" if int4 else "bf16", "b": batch}
            report.checked("logits", logits_apart(decoder, step, ids), LIMIT, **case)
            first, again = (generate(step, ids, max_new_tokens=16, eos_token_id=()) for _ in range(2))
            report.checked("tokens again", int((first != again).sum()), 0, **case)


@torch.no_grad()
def logits_apart(decoder: StaticDecoder, step: GraphedStep, ids: Tensor) -> float:
    """The largest relative error of eight tokens after half of a prompt."""
    half, mask = ids.shape[1] // 2, torch.ones_like(ids)
    positions, device, worst = mask.cumsum(1) - 1, decoder.device, 0.0
    ours = theirs = None
    for begin, end in [(0, half), *((half + k, half + k + 1) for k in range(8))]:
        inputs = ids[:, begin:end], mask[:, :end], positions[:, begin:end]
        moved = (part.to(device) for part in inputs)
        ours = step(*inputs, past_key_values=ours and ours.past_key_values)
        theirs = decoder(*moved, past_key_values=theirs and theirs.past_key_values)
        worst = max(worst, relative_error(ours.logits, theirs.logits.double()))
    return worst


def prompts(decoder: StaticDecoder, batch: int, report: Report) -> Tensor:
    return torch.randint(decoder.decoder.vocab_size, (batch, PROMPT if report.on_gpu else 16))


def time(report: Report) -> None:
    """Greedy tokens after a prompt, whose own time is taken off."""
    for int4 in (False, True):
        decoder = random_decoder(report, int4=int4)
        for batch in BATCHES if report.on_gpu else (1,):
            ids = prompts(decoder, batch, report)
            graphed = GraphedStep(decoder, batch, 256, capture=report.on_gpu)
            for name, model in (("graph", graphed), ("eager", decoder)):
                took = token_seconds(model, ids, NEW if report.on_gpu else 4)
                weights = "int4" if int4 else "bf16"
                report.timed(f"{weights}, {name}", took, b=batch, tokens_per_s=batch / took)


def token_seconds(model: object, ids: Tensor, new: int) -> float:
    """Median seconds of a token: a text of `new` more tokens beside one of a single token."""

    def took(tokens: int) -> float:
        begin = clock.perf_counter()
        generate(model, ids, max_new_tokens=tokens, eos_token_id=())  # ends with logits read by the host
        return clock.perf_counter() - begin

    took(2)
    return statistics.median((took(1 + new) - took(1)) / new for _ in range(TRIALS))


if __name__ == "__main__":
    sys.exit(run(check, time))
