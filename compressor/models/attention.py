"""Attention of our decoding loop: rotation, what a token sees, and the products, as pure functions.

B sequences, S new tokens, T tokens with those before them, H query heads, K key and value heads, W width of a head, R
rotary frequencies.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float,
    causal: bool,
) -> Tensor:
    """Values mixed for each query, `[B, H, S, W]`; `mask` as `seen_keys` gives it, None with `causal` for a prompt.

    Where one token is new, the heads that share keys are rows of one product. `softcap` (0: none) bends the scores.
    """
    batch, heads, new, width = query.shape
    share = heads // keys.shape[1]
    if softcap:
        if mask is None and causal:
            mask = seen_keys(keys.shape[2] - new, new, None, None, query.device, always=True)
        return _attend_capped(query, keys, values, mask, scale, softcap)
    if new == 1:
        grouped = query.reshape(batch, -1, share, width)
        mixed = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
        return mixed.reshape(batch, heads, 1, width)
    return scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=share > 1
    )


def _attend_capped(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Scores stay below the cap (Gemma 2), for which there is no kernel."""
    share, new = query.shape[1] // keys.shape[1], query.shape[2]
    grouped = query.unflatten(1, (-1, share)).flatten(2, 3)  # [B, K, share * S, W]
    scores = softcap * (grouped @ keys.transpose(-1, -2) * (scale / softcap)).tanh()
    scores = scores.unflatten(2, (share, new))
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(2), -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype).flatten(2, 3)
    return (weights @ values).unflatten(2, (share, new)).flatten(1, 2)


def turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """The first 2R numbers of each head, rotated in halves as transformers does; the rest as they are."""
    cos, sin = turn
    width = cos.shape[-1]
    rotated = x[..., :width]
    rotated = torch.addcmul(rotated * cos, rotated.roll(width // 2, -1), sin)
    return rotated if width == x.shape[-1] else torch.cat([rotated, x[..., width:]], dim=-1)


def seen_keys(
    past: int,
    new: int,
    window: int | None,
    attention_mask: Tensor | None,
    device: torch.device,
    *,
    always: bool = False,
) -> Tensor | None:
    """Which keys a new token sees, bool `[B or 1, 1, S, T]`; None where it is all before it (or the last `window`)."""
    total = past + new
    if attention_mask is None and not always and (new == 1 or (past == 0 and (window is None or window >= total))):
        return None
    keys, queries = torch.arange(total, device=device), torch.arange(past, total, device=device).unsqueeze(1)
    seen = keys <= queries
    if window is not None:
        seen &= keys > queries - window
    seen = seen[None, None]
    if attention_mask is None:
        return seen
    seen = seen & attention_mask[:, None, None, :].bool()
    # A row that is padding sees itself: nothing would be left to average, and NaN spreads
    return seen | (keys == queries)
