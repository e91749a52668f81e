"""Hugging Face transformers: any model that goes through its attention interface runs on `triton_attn.attention`.

    import triton_attn.integrations.transformers
    from transformers import AutoModel

    triton_attn.integrations.transformers.register()
    model = AutoModel.from_pretrained(folder, attn_implementation="triton_attn")  # or model.set_attn_implementation("triton_attn")

The model computes what it computes with `attn_implementation="sdpa"`:

- A mask decides alone. Without one a call is causal if the keyword `is_causal`, else `module.is_causal`, else True says so, and
  there is more than one query. It starts at the first key: keys beyond the queries are the empty end of a static cache.
- Padding, packed sequences and sliding windows arrive in the mask, which is why the mask function is registered too. A sliding
  window that no mask carries and that would hide a key raises, and so do several packed sequences without a mask.
- Honoured beyond sdpa: attention sinks (`s_aux`), exactly, through the log-sum-exp.
- Every other keyword that is neither None nor False nor known to be plumbing raises `Unsupported` with its name: `softcap`,
  `sinks`, `indices`, `output_attentions=True`, a paged `cache`, and whatever a later transformers adds. So does a model whose
  attention does not go through the interface.

`patch_mamba()` does the same for Mamba and FalconMamba, whose mixers have no interface: it exchanges the functions that they call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import bidirectional_mask_function, eager_mask, sdpa_mask

from triton_attn import Unsupported, attention, causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update

NAME = "triton_attn"

# what transformers 5.23 lets fall through to the attention call and sdpa rightly ignores: said to other layers, to the mask, to
# the loss, or to flash kernels that take the lengths instead of a mask
# fmt: off
PLUMBING = frozenset({
    "attention_mask", "cache_params", "cu_seq_lens_k", "cu_seq_lens_q", "decoder_attention_mask", "decoder_input_ids",
    "decoder_inputs_embeds", "decoder_position_ids", "deterministic", "encoder_outputs", "grid_thw", "input_ids", "inputs_embeds",
    "max_length_k", "max_length_q", "num_items_in_batch", "output_hidden_states", "output_router_logits", "past_key_values",
    "position_embeddings", "position_ids", "return_dict", "seq_idx", "use_cache",
})
# fmt: on

# these refuse sdpa for their sinks alone; others that do add their mask to the scores, and need it as a float
SINKS = frozenset({"flint", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"})


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls: (b h m d), (b g n d), (b g n e) -> (b m h e), contiguous."""
    _refuse_unknown(module, others)
    if attention_mask is None:
        _refuse_what_only_a_mask_could_say(module, query, key, sliding_window, others.get("cu_seq_lens_q"))
        causal = bool(query.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal))
    else:
        causal = False
    if 1 in (query.shape[0], key.shape[0]):  # learned queries come with batch 1
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (t.expand(batch, -1, -1, -1) for t in (query, key, value))

    options: dict[str, Any] = {
        "mask": _biased(attention_mask, position_bias),
        "causal": "top_left" if causal else False,
        "scale": scaling,
        "dropout_p": dropout,
    }
    if s_aux is None:
        out = attention(query, key, value, **options)
    else:
        out, lse = attention(query, key, value, return_lse=True, **options)
        # a sink is one more key with a value of zero
        out = (out * torch.sigmoid(lse - s_aux.reshape(1, -1, 1)).unsqueeze(-1)).to(query.dtype)
    return out.transpose(1, 2).contiguous(), None


def mask_function(*args: Any, config: Any = None, **options: Any) -> torch.Tensor | None:
    """`sdpa_mask`, with padding that is the same for every query kept as one row; float masks for models that know no other."""
    kind = _mask_kind(type(config))
    if kind == "none":
        raise Unsupported(f"{config.model_type} models have attention of their own and would never call triton_attn")
    # with sdpa, and only under that name, Gemma 4 gives up dropping queries behind the mask's back
    if kind == "always":
        options["allow_is_causal_skip"] = False
    queries: Any = options.get("q_length")
    one_row = kind == "boolean" and queries is not None and options.get("mask_function") is bidirectional_mask_function
    make = eager_mask if kind == "float" else sdpa_mask
    mask: torch.Tensor | None = make(*args, **(options | {"q_length": 1} if one_row else options))
    return mask.expand(-1, -1, queries, -1) if one_row and mask is not None else mask


def register() -> None:
    """Make `attn_implementation="triton_attn"` known to transformers; a second call changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    # without it transformers hands over no mask at all, and padded batches are silently wrong
    AttentionMaskInterface.register(NAME, mask_function)


def _mask_kind(config: type) -> str:
    return _mask_kind_of(config)


# what is cached is a constant to torch.compile, which would else trace it
_mask_kind._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _mask_kind_of(config: type) -> str:
    family = getattr(config, "model_type", "")
    models = [model for model in _subclasses(PreTrainedModel) if model.config_class is config]
    if models and not any(model._can_set_attn_implementation() for model in models):
        return "none"
    if not all(model._supports_sdpa for model in models) and family not in SINKS:
        return "float"
    return "always" if family.startswith("gemma4") else "boolean"


def _subclasses(model: Any) -> list[Any]:
    return [deeper for child in model.__subclasses__() for deeper in (child, *_subclasses(child))]


def _refuse_unknown(module: torch.nn.Module, others: dict[str, Any]) -> None:
    for name, given in others.items():
        if given is not None and given is not False and name not in PLUMBING:
            what = f"a {type(given).__name__}" if isinstance(given, torch.Tensor) else repr(given)
            raise Unsupported(
                f"{type(module).__name__} asks attention for {name} ({what}), which triton_attn would have to ignore; "
                'give this model attn_implementation="eager" or "sdpa"'
            )


def _refuse_what_only_a_mask_could_say(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, window: int | None, lengths: torch.Tensor | None
) -> None:
    if window is not None and key.shape[2] > window:
        raise Unsupported(f"{type(module).__name__} asks for sliding_window={window} over {key.shape[2]} keys, but gives no attention_mask")
    if lengths is not None and lengths.numel() - 1 > query.shape[0]:
        raise Unsupported(f"{type(module).__name__} packs {lengths.numel() - 1} sequences (cu_seq_lens_q), but gives no attention_mask")


def _biased(mask: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor | None:
    if mask is None or bias is None:
        return mask if bias is None else bias
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else bias + mask


@dataclass(frozen=True)
class MambaPatch:
    """What `patch_mamba` exchanged, and the way back; as a context manager it goes back at the end."""

    originals: tuple[tuple[ModuleType, str, Callable[..., Any]], ...]

    @property
    def replaced(self) -> tuple[str, ...]:
        """The full names of the functions that were exchanged."""
        return tuple(f"{module.__name__}.{name}" for module, name, _ in self.originals)

    def undo(self) -> None:
        """Put the originals back; a second call changes nothing."""
        global _patched
        if _patched is self:
            for module, name, original in self.originals:
                setattr(module, name, original)
            _patched = None

    def __enter__(self) -> MambaPatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()

    def __str__(self) -> str:
        return "\n".join(f"{name} is triton_attn's" for name in self.replaced)


_patched: MambaPatch | None = None


def patch_mamba() -> MambaPatch:
    """Let Hugging Face's Mamba and FalconMamba, models that exist and models to come, compute with triton_attn.

    The functions that their mixers look up are exchanged: scan, convolution and one step of each. In training mode the fused function of
    mamba_ssm, where that is installed, is not asked. A second call while patched changes nothing and returns the same.

    Returns:
        What was replaced; its `undo()` puts everything back.

    Raises:
        Unsupported: this transformers has other functions; nothing was exchanged.
    """
    global _patched
    if _patched is not None:
        return _patched
    from transformers.models.falcon_mamba import modeling_falcon_mamba
    from transformers.models.mamba import modeling_mamba

    modules = (modeling_mamba, modeling_falcon_mamba)
    missing = [f"{module.__name__}.{name}" for module in modules for name in _MAMBA if not hasattr(module, name)]
    if missing:
        raise Unsupported(f"patch_mamba knows transformers 5.23; transformers {transformers.__version__} lacks {', '.join(missing)}")
    _patched = MambaPatch(tuple((module, name, getattr(module, name)) for module in modules for name in _MAMBA))
    for module, name, _ in _patched.originals:
        setattr(module, name, _MAMBA[name])
    return _patched


def _scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    *rest: Any,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    **options: Any,
) -> Any:
    """transformers chooses among its own ways to scan; there is one here."""
    return selective_scan(hidden_states, dt, *rest, **options)


def _convolution(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None, **others: Any
) -> torch.Tensor:
    for name, given in others.items():
        if given is not None and name not in PLUMBING - {"seq_idx"}:
            raise Unsupported(f"a Mamba mixer asks its convolution for {name}, which its scan would ignore; pack no sequences, pad them")
    ours = activation if activation in ("silu", "swish") else None
    out: torch.Tensor = causal_conv1d(hidden_states, weight, bias, ours)
    return out if ours == activation else ACT2FN[activation](out)


def _convolution_step(
    hidden_states: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    ours = activation if activation in ("silu", "swish") else None
    out = causal_conv1d_update(hidden_states, conv_state, weight, bias, ours)
    return out if ours == activation else ACT2FN[activation](out)


def _no_fused_function(*args: Any, **options: Any) -> None:
    """Nothing: then the mixer goes on step by step."""


_MAMBA: dict[str, Callable[..., Any]] = {
    "mamba_selective_scan": _scan,
    "mamba_selective_state_update": selective_state_update,
    "causal_conv1d_fn": _convolution,
    "causal_conv1d_update": _convolution_step,
    "mamba_inner_fn": _no_fused_function,
}
