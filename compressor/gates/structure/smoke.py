"""One short forward of both models: finite numbers, and predictions that have not fallen apart.

N windows, T tokens in a window, V vocabulary.
"""

from pathlib import Path

import torch
from torch import Tensor

from compressor.calibration import last_hidden
from compressor.errors import CompressorError
from compressor.gates.structure.finding import Finding, failed, settled
from compressor.models import Head, load_model

RULES = {
    "smoke.loads": "the artefact loads",
    "smoke.finite": "hidden states and logits are finite",
    "smoke.kl": "predictions are near the baseline's",
}
# Nats a token. A model that predicts nothing costs about ln(vocabulary), 8 to 12; 2 bits in a small model 1 to 2.
MOST_KL = 3.0
TOKENS_AT_ONCE = 64  # float32 logits of a large vocabulary


def smoke(candidate: Path, baseline: Path, ids_NT: Tensor, *, most_kl: float = MOST_KL) -> list[Finding]:
    """Stream a few windows (2 of 64 tokens do) through both models, block by block, in exact arithmetic."""
    return settled(RULES, _failures(candidate, baseline, ids_NT, most_kl))


def _failures(candidate: Path, baseline: Path, ids_NT: Tensor, most_kl: float) -> list[Finding]:
    try:
        ours = load_model(str(candidate))
        hidden = last_hidden(ours, ids_NT).flatten(0, 1)
    except CompressorError as error:
        return [failed("smoke.loads", "config.json", str(error))]
    if not bool(torch.isfinite(hidden).all()):
        tokens = int((~torch.isfinite(hidden)).any(-1).sum())
        return [
            failed("smoke.finite", candidate.name, f"hidden states of {tokens} of {len(hidden)} tokens are not finite")
        ]
    theirs = load_model(str(baseline))
    expected = last_hidden(theirs, ids_NT).flatten(0, 1)
    kl = mean_kl(theirs.head(), expected, ours.head(), hidden)
    if not torch.isfinite(torch.tensor(kl)):
        return [failed("smoke.finite", f"{ours.family.head}.weight", "logits are not finite")]
    if kl > most_kl:
        text = (
            f"KL from the baseline is {kl:.3g} nats a token over {len(hidden)} tokens, at most {most_kl:g} is allowed"
        )
        return [failed("smoke.kl", candidate.name, text)]
    return []


@torch.no_grad()
def mean_kl(head: Head, expected_MD: Tensor, own_head: Head, hidden_MD: Tensor) -> float:
    """Mean KL(baseline || candidate) in nats a token, in float32."""
    total = 0.0
    for theirs, ours in zip(expected_MD.split(TOKENS_AT_ONCE), hidden_MD.split(TOKENS_AT_ONCE), strict=True):
        log_p, log_q = (h.logits(x).log_softmax(-1) for h, x in ((head, theirs), (own_head, ours)))
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / len(hidden_MD)
