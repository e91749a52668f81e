"""Hugging Face transformers: any model that goes through its attention interface runs on `triton_attn.attention`.

    import triton_attn.integrations.transformers
    from transformers import AutoModel

    triton_attn.integrations.transformers.register()
    model = AutoModel.from_pretrained(folder, attn_implementation="triton_attn")  # or model.set_attn_implementation("triton_attn")

The model computes what it computes with `attn_implementation="sdpa"`:

- A mask decides alone. Without one a call is causal if the keyword `is_causal`, else `module.is_causal`, else True says so, and
  there is more than one query. It starts at the first key: keys beyond the queries are the empty end of a static cache.
- Padding, packed sequences and sliding windows arrive in the mask, which is why the mask function is registered too. A sliding
  window that no mask carries and that would hide a key raises. Several packed sequences without a mask (`cu_seq_lens_q`) are
  `attention_varlen`'s: one call for all windows of a vision tower.
- Honoured beyond sdpa: attention sinks (`s_aux`), exactly, through the log-sum-exp.
- Every other keyword that is neither None nor False nor known to be plumbing raises `Unsupported` with its name: `softcap`,
  `sinks`, `indices`, `output_attentions=True`, a paged `cache`, and whatever a later transformers adds. So does a model whose
  attention does not go through the interface.

`register("local_global_attention", window=64)` makes another mechanism known, under a name of its own, which it returns.

`patch_mamba()` does the same for Mamba and FalconMamba, whose mixers have no interface: it exchanges the functions that they call.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, eager_mask, sdpa_mask

from triton_attn import ArgumentError, Unsupported, attention, attention_varlen
from triton_attn.integrations.mechanisms import Choice, chosen
from triton_attn.integrations.transformers_mamba import patch_mamba as patch_mamba
from triton_attn.integrations.transformers_mamba import patched

NAME = "triton_attn"
# some modules tell the lengths of packed sequences only to a name that has "flash" in it, and call once for each sequence else
PACKED_NAME = "triton_attn_flash_varlen"

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
        _refuse_a_window_without_a_mask(module, key, sliding_window)
        lengths = others.get("cu_seq_lens_q")
        if lengths is not None and lengths.numel() - 1 > query.shape[0]:
            _refuse(module, position_bias=position_bias, s_aux=s_aux)
            return _packed(module, query, key, value, others, dropout, scaling, is_causal)
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


def register(mechanism: str = "attention", *, name: str | None = None, **options: Any) -> str:
    """Make an attention implementation known to transformers, and return its name; a second call changes nothing.

    Args:
        mechanism: "attention" is known as "triton_attn" and computes what "sdpa" computes. Another mechanism of
            `triton_attn.nn.TokenAttention`, such as "local_global_attention", computes its own: for encoders, and where it has a causal
            form, for decoders without a cache. Padding acts; every other mask raises.
        name: "triton_attn_" and the mechanism if None. Options belong to a name: two sets of them need two names.
        options: the mechanism's own, such as window=64.

    Raises:
        ArgumentError: there is no such mechanism or option, or the name says something else to transformers.
    """
    choice = chosen("register", mechanism, options)
    known = name or (NAME if choice.exact else f"{NAME}_{mechanism}")
    if name is not None and ("flash" in name or "/" in name or name in ("eager", "sdpa", "flex_attention", NAME)):
        raise ArgumentError("register", "name", f"is {name!r}; allowed: one without 'flash' and '/' that transformers does not have")
    # without a mask function transformers hands over no mask at all, and padded batches are silently wrong
    AttentionInterface.register(known, attention_forward if choice.exact else functools.partial(mechanism_forward, choice=choice))
    AttentionMaskInterface.register(known, mask_function if choice.exact else padding_mask)
    if choice.exact:
        AttentionInterface.register(PACKED_NAME, attention_forward)
        AttentionMaskInterface.register(PACKED_NAME, mask_function)
    return known


def mechanism_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    *,
    choice: Choice,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Another mechanism where transformers calls attention; the mask is `padding_mask`'s."""
    _refuse_unknown(module, others)
    _refuse(module, position_bias=others.get("position_bias"), s_aux=others.get("s_aux"), cu_seq_lens_q=others.get("cu_seq_lens_q"))
    _refuse_a_window_without_a_mask(module, key, sliding_window)
    if attention_mask is not None and attention_mask.ndim != 2:
        raise Unsupported(f"{choice.mechanism} takes no mask of shape {tuple(attention_mask.shape)}, only padding (B, N)")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if causal and query.shape[2] != key.shape[2]:
        raise Unsupported(f"{choice.mechanism} has no cache of keys inside of transformers; generate with use_cache=False")
    if causal and not choice.causal:
        raise Unsupported(f"{choice.mechanism} cannot hide the future, which {type(module).__name__} asks for")
    padding = None if attention_mask is None else attention_mask == 0
    out = choice.attend(query, key, value, key_padding_mask=padding, causal=causal, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def padding_mask(
    *args: Any,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor | None:
    """Padding alone, (B, keys); what else a mask would say raises."""
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise Unsupported(
            "only padding and causality reach a mechanism; this model asks for windows, packed sequences or a mask of its own"
        )
    return None if attention_mask is None else attention_mask[:, -kv_length:]


def plan(caller: str, model: Any, choice: Choice, planned: dict[str, Any], skipped: dict[str, str]) -> None:
    """What `patch` will do to a transformers model: place -> (what will stand there, how to put it there)."""
    mixers = [module for module in model.modules() if type(module).__module__.endswith(("modeling_mamba", "modeling_falcon_mamba"))]
    if any("Mixer" in type(module).__name__ for module in mixers):
        where = "transformers' functions for Mamba"
        if choice.exact and not patched():
            planned[where] = "triton_attn's, for every model", lambda: patch_mamba().undo
        else:
            skipped[where] = "they are ours already" if choice.exact else f"a scan is no attention, which {choice.mechanism} replaces"
        return
    where = "the attention interface"
    if not model._can_set_attn_implementation() or _mask_kind(type(model.config)) == "none":
        skipped[where] = f"{type(model).__name__} has attention of its own and would never call it"
        return
    if not choice.causal and any(getattr(module, "is_causal", False) is True for module in model.modules()):
        raise ArgumentError(caller, "mechanism", f"is {choice.mechanism!r}, which cannot hide the future as {type(model).__name__} does")
    name = NAME if choice.exact else f"{NAME}_patch_{next(_names)}"
    planned[where] = f'attn_implementation="{name}"', functools.partial(_switch, model, name, choice)


_names = itertools.count(1)


def _switch(model: Any, name: str, choice: Choice) -> Callable[[], None]:
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    before = [(config, config._attn_implementation_internal) for config in configs.values() if hasattr(config, "_attn_implementation")]

    def back() -> None:
        for config, implementation in before:
            config._attn_implementation_internal = implementation

    if choice.exact:
        register()
    else:
        register(choice.mechanism, name=name, **choice.options)
    try:
        model.set_attn_implementation(name)
    except Exception:
        back()
        raise
    if choice.exact:
        for module in model.modules():
            if _packs(module):
                module.config._attn_implementation_internal = PACKED_NAME
    return back


def _packs(module: torch.nn.Module) -> bool:
    """Whether a module gets packed sequences, and calls once for all if the implementation's name has "flash" in it."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "cu_seqlens" in code.co_varnames and "is_flash_attention_requested" in code.co_names


def _packed(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    others: dict[str, Any],
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
) -> tuple[torch.Tensor, None]:
    """Sequences one behind the other, in a batch of one."""
    if query.shape[0] != 1:
        raise Unsupported(f"{type(module).__name__} packs sequences in a batch of {query.shape[0]}; allowed: 1")
    ends = others["cu_seq_lens_q"], others["cu_seq_lens_k"] if others.get("cu_seq_lens_k") is not None else others["cu_seq_lens_q"]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attention_varlen(q, k, v, *ends, causal=causal, scale=scaling, dropout_p=dropout)[None], None


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


def _refuse(module: torch.nn.Module, **given: torch.Tensor | None) -> None:
    for name, tensor in given.items():
        if tensor is not None:
            raise Unsupported(f"{type(module).__name__} asks for {name}, which this call cannot give")


def _refuse_a_window_without_a_mask(module: torch.nn.Module, key: torch.Tensor, window: int | None) -> None:
    if window is not None and key.shape[2] > window:
        raise Unsupported(f"{type(module).__name__} asks for sliding_window={window} over {key.shape[2]} keys, but gives no attention_mask")


def _biased(mask: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor | None:
    if mask is None or bias is None:
        return mask if bias is None else bias
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else bias + mask
