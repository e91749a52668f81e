"""Local-global attention by blocks of queries, each against the keys around it and the globals."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn.portable import _banded, _near
from triton_attn.portable._grouped import sdpa
from triton_attn.portable._rows import Piece, by_rows

SHORT = 256  # a sequence whose every score is cheaper than a loop over heads or blocks, but for a narrow window


def local_global_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    global_key: Tensor | None = None,
    global_value: Tensor | None = None,
    global_tokens: int = 0,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Local-global attention in O(N (window + globals)) time and O(N) memory."""
    n = query.shape[2]
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    half, tokens = min(window // 2, n), min(global_tokens, n)
    ahead = 0 if causal else half
    places = torch.arange(n, device=query.device)

    def piece(start: int, stop: int, rule: Tensor | None) -> Piece:
        if key_padding_mask is not None:
            shown = ~key_padding_mask[:, None, None, start:stop]
            rule = shown if rule is None else rule & shown
        return Piece(key[:, :, start:stop], value[:, :, start:stop], places[start:stop], rule)

    def local(start: int, stop: int) -> list[Piece]:
        low, high = max(start - half, tokens), min(stop + ahead, n)
        distance = places[low:high] - places[start:stop, None]
        pieces = [piece(low, high, (distance >= -half) & (distance <= ahead))]
        if global_key is not None and global_value is not None:
            labels = torch.arange(n, n + global_key.shape[2], device=query.device)
            pieces.append(Piece(global_key, global_value, labels))
        elif tokens:
            pieces.append(piece(0, tokens, None))
        return pieces

    def everywhere(start: int, stop: int) -> list[Piece]:
        return [piece(0, n, places <= places[start:stop, None] if causal else None)]

    scale = query.shape[-1] ** -0.5 if scale is None else scale
    alone = dropout_p == 0 and not return_lse
    banded = key_padding_mask is None and alone and tokens < n and _banded.serves(query, key, value)
    if alone and n <= SHORT and not torch.compiler.is_compiling() and not (banded and _near.pays(n, half, ahead)):
        seen = torch.ones(n, n, dtype=torch.bool, device=query.device).tril_(half).triu_(-half)
        seen[:tokens] = seen[:, :tokens] = True
        seen = seen.tril_() if causal else seen
        if key_padding_mask is not None:
            seen = seen & ~key_padding_mask[:, None, None]
        if global_key is not None and global_value is not None:
            key, value = torch.cat((key, global_key), 2), torch.cat((value, global_value), 2)
            seen = F.pad(seen, (0, global_key.shape[2]), value=True)
        return sdpa(query, key, value, seen, scale=scale)
    if banded:
        more = (key[:, :, :tokens], value[:, :, :tokens]) if global_key is None or global_value is None else (global_key, global_value)
        near = _banded.banded(query[:, :, tokens:], key[:, :, tokens:], value[:, :, tokens:], *more, half, ahead, scale)
        if not tokens:
            return near
        # a causal global token sees the global tokens before it
        keys, values = (key[:, :, :tokens], value[:, :, :tokens]) if causal else (key, value)
        far = sdpa(query[:, :, :tokens], keys, values, None, is_causal=bool(causal), scale=scale)
        return torch.cat((far, near), 2)
    summaries = tokens if global_key is None else global_key.shape[2]
    rows = max(half, 64)
    blocks = by_rows(
        query[:, :, tokens:], local, rows + half + ahead + summaries, first=tokens, most=rows, scale=scale, dropout_p=dropout_p, seed=seed
    )
    if not tokens:
        return blocks if return_lse else blocks[0]
    rest = by_rows(query[:, :, :tokens], everywhere, n, scale=scale, dropout_p=dropout_p, seed=seed)
    out, lse = (torch.cat(pair, 2) for pair in zip(rest, blocks, strict=True))
    return (out, lse) if return_lse else out
