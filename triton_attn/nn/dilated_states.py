"""State dicts of other dilated attentions, renamed for ours. Tensors in, the same tensors out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from triton_attn import ArgumentError
from triton_attn.arguments import ArgumentTypeError

State = Mapping[str, Tensor]
_PARTS = ("q_proj", "k_proj", "v_proj")


def from_dilated_attention_pytorch(state: State, *, improved: bool = False) -> dict[str, Tensor]:
    """fkodom's MultiheadDilatedAttention: q_proj, k_proj, v_proj, norm, out_proj.

    Args:
        state: of one module, whatever its prefix was, taken off.
        improved: for `ImprovedMultiheadDilatedAttention`, whose three projections are one.

    Returns:
        A state for `MultiheadDilatedAttention`.

    Raises:
        ArgumentError: a name is missing or unknown.
    """
    _known("from_dilated_attention_pytorch", state, (*_PARTS, "out_proj"), ("norm",))
    return _joined(state) if improved else dict(state)


def from_darcstar(state: State, *, improved: bool = True) -> dict[str, Tensor]:
    """DarcStar's fork, both layouts: [qkv_proj, norm, out_proj], and [qkv_proj or q_proj, k_proj, v_proj; q_ln, k_ln, out_proj].

    In the second layout both classes use q_ln as the norm before out_proj, and the improved one nothing else of the two. The other class
    normalises queries and keys with q_ln and k_ln before that, which `qk_norm=True` does here; q_ln is then in the state twice, once as
    norm.

    Args:
        state: of one module.
        improved: for `ImprovedMultiheadDilatedAttention`; False: for `MultiheadDilatedAttention`.

    Returns:
        The renamed state.

    Raises:
        ArgumentError: a name is missing or unknown.
    """
    who = "from_darcstar"
    fused = "qkv_proj.weight" in _given(who, state)
    _known(who, state, ("qkv_proj", "out_proj") if fused else (*_PARTS, "out_proj"), ("norm", "q_ln", "k_ln"))
    renamed = dict(state)
    if "q_ln.weight" in state and "norm.weight" not in state:
        last = {name.replace("q_ln.", "norm."): x for name, x in state.items() if not name.startswith("k_ln.")}
        renamed = last if fused else {**state, **last}
    if improved:
        return renamed if fused else _joined(renamed)
    return _split(renamed) if fused else renamed


def from_torchscale(state: State, *, improved: bool = False) -> dict[str, Tensor]:
    """torchscale's DilatedAttention: q_proj, k_proj, v_proj, out_proj, inner_attn_ln where it was built with subln.

    Args:
        state: of one module, built without xpos_rel_pos: queries and keys that xpos turns after their projections are another function.
        improved: for `ImprovedMultiheadDilatedAttention`.

    Returns:
        A state for `MultiheadDilatedAttention`; with layer_norm=False where there is no inner_attn_ln.

    Raises:
        ArgumentError: a name is missing or unknown.
    """
    who = "from_torchscale"
    if any(name.startswith("xpos.") for name in _given(who, state)):
        complaint = (
            "has xpos.scale: its queries and keys are turned by xpos after their projections, which MultiheadDilatedAttention does not"
        )
        raise ArgumentError(who, "state", f"{complaint}; allowed: the state of a module without xpos_rel_pos")
    kept = {name.replace("inner_attn_ln.", "norm."): x for name, x in state.items()}
    _known(who, kept, (*_PARTS, "out_proj"), ("norm",))
    return _joined(kept) if improved else kept


def _given(who: str, state: State) -> State:
    if not isinstance(state, Mapping):
        raise ArgumentTypeError(who, "state", f"is a {type(state).__name__}; allowed: a mapping of names to tensors")
    return state


def _known(who: str, state: State, needed: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    """Weights of all that is needed, biases of all or none."""
    missing = [f"{layer}.weight" for layer in needed if f"{layer}.weight" not in _given(who, state)]
    if not missing and any(f"{layer}.bias" in state for layer in needed):
        missing = [f"{layer}.bias" for layer in needed if f"{layer}.bias" not in state]
    unknown = [name for name in state if name.rpartition(".")[0] not in (*needed, *allowed)]
    if missing or unknown:
        found = "; ".join(f"{what} {', '.join(names[:8])}" for what, names in (("lacks", missing), ("has unknown", unknown)) if names)
        raise ArgumentError(who, "state", f"{found}; allowed: the weights of {', '.join(needed)}, and {', '.join(allowed)}")


def _joined(state: State) -> dict[str, Tensor]:
    """Three projections in one."""
    joined = {name: x for name, x in state.items() if name.partition(".")[0] not in _PARTS}
    for parameter in ("weight", "bias"):
        if f"q_proj.{parameter}" in state:
            joined[f"qkv_proj.{parameter}"] = torch.cat([state[f"{part}.{parameter}"] for part in _PARTS])
    return joined


def _split(state: State) -> dict[str, Tensor]:
    """One projection in three."""
    split = {name: x for name, x in state.items() if not name.startswith("qkv_proj.")}
    for parameter in ("weight", "bias"):
        if f"qkv_proj.{parameter}" in state:
            split |= {f"{part}.{parameter}": x for part, x in zip(_PARTS, state[f"qkv_proj.{parameter}"].chunk(3), strict=True)}
    return split
