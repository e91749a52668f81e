"""transformers' CLIP: its towers with OpenCLIP's residual blocks, and back.

    from transformers import CLIPModel
    from triton_attn.integrations.transformers_clip import replace_transformer_in_model

    model = CLIPModel.from_pretrained(folder)
    report = replace_transformer_in_model(model, block_type="parallel", towers=("visual",))
    report.undo()

What fits: models that have a CLIPVisionModel or a CLIPTextModel inside, with CLIPEncoderLayers of plain linear layers. Attention
weights are not recorded any more, hidden states are; `attn_implementation` says nothing to the new blocks.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPTextModel, CLIPVisionModel

from triton_attn import ArgumentError, refusals
from triton_attn.integrations.open_clip import NAME, SAME_FUNCTION, check_choice
from triton_attn.integrations.replacement import Replacement
from triton_attn.nn._block_norms import LayerNorm
from triton_attn.nn.enhanced_transformer import EnhancedTransformer

TOWERS: dict[str, type[nn.Module]] = {"visual": CLIPVisionModel, "text": CLIPTextModel}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# OpenCLIP's name -> transformers'
MODULES = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
HOOKED = "_output_capturing_hooks_installed"  # transformers' own mark on a model whose layers record what they return


class ResidualLayer(CLIPEncoderLayer):  # type: ignore[no-untyped-call]
    """A residual block that is called as CLIPEncoderLayer is; gradient checkpointing and hidden states are the parent's."""

    def __init__(self, block: nn.Module) -> None:
        nn.Module.__init__(self)
        self.block = block

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, is_causal: bool | None = None, **kwargs: Any) -> Tensor:
        """The block.

        Args:
            hidden_states: (B, N, width).
            attention_mask: (B or 1, heads or 1, N, N), boolean with True for what is seen, or added to the scores.
            is_causal: without a mask, hide what comes later.

        Raises:
            Unsupported: output_attentions, a mask of another form, or one that the block cannot honour.
        """
        if kwargs.get("output_attentions"):
            refusals.refuse(type(self).__name__, "output_attentions", "report.undo() puts layers back that can")
        out: Tensor = self.block(hidden_states, attn_mask=self._mask(hidden_states, attention_mask, bool(is_causal)))
        return out

    def _mask(self, x: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor | None:
        """OpenCLIP's form, in two dimensions wherever all sequences and heads share it, so that a causal one is recognised."""
        if mask is None:
            return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1) if is_causal else None
        if mask.ndim != 4:
            refusals.refuse(type(self).__name__, f"effect to an attention_mask of {mask.ndim} dimensions", "allowed: 4")
        # where it is added, transformers hides with the least finite number
        mask = ~mask if mask.dtype == torch.bool else mask.masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -math.inf)
        if mask.shape[1] == 1 and (mask.shape[0] == 1 or (not torch.compiler.is_compiling() and bool((mask == mask[:1]).all()))):
            return mask[0, 0]
        block: Any = self.block
        return mask.expand(x.shape[0], block.attn.num_heads, -1, -1).flatten(0, 1)


class ResidualLayers(nn.ModuleList):
    """An encoder's layers; `param_groups` reads `block_type` and `resblocks`."""

    def __init__(self, layers: Sequence[ResidualLayer], block_type: str) -> None:
        super().__init__(layers)
        self.block_type, self.layers = block_type, len(layers)

    @property
    def resblocks(self) -> nn.ModuleList:
        return self


def replace_transformer_in_model(
    model: nn.Module,
    block_type: str = "parallel",
    towers: Sequence[str] = ("visual",),
    copy_weights: bool = True,
    **options: Any,
) -> Replacement:
    """Give the towers of transformers' CLIP another kind of block, with its activation, norms, widths, dtype, device and training mode.

    Args:
        model: with a CLIPVisionModel or a CLIPTextModel inside, or one of them.
        block_type: a type of `triton_attn.nn.EnhancedTransformer`. "standard" changes no output.
        towers: out of "visual" and "text".
        copy_weights: take over every parameter that the new block has; those of queries, keys and values become one.
        options: of the block.

    Returns:
        What was replaced, copied, left and why, and `undo()`.

    Raises:
        ArgumentError: an argument is wrong, a tower is missing, or something in it does not fit; nothing was changed.
    """
    check_choice(block_type, towers)
    planned = []
    for tower in towers:
        path, owner = _tower(model, tower)
        planned.append((path, owner, _layers(path, owner, block_type, options, copy_weights)))
    report = Replacement(changes_function=block_type not in SAME_FUNCTION)
    replaced, copied, initialised = {}, [], []
    for path, owner, (layers, taken) in planned:
        names = [name for name, _ in layers.named_parameters()]
        copied += [f"{path}.{name}" for name in names if name in taken]
        initialised += [f"{path}.{name}" for name in names if name not in taken]
        encoder, hooked = owner.encoder, owner.__dict__.get(HOOKED, False)
        report._undo.append(functools.partial(setattr, owner, HOOKED, hooked))
        report._undo.append(functools.partial(setattr, encoder, "layers", encoder.layers))
        encoder.layers = layers
        setattr(owner, HOOKED, False)  # the new layers have no hooks yet
        first: Any = layers[0]
        replaced[path] = f"{len(layers)} {type(first.block).__name__}s"
    report.replaced, report.copied, report.initialised = replaced, tuple(copied), tuple(initialised)
    return report


def _tower(model: nn.Module, tower: str) -> tuple[str, Any]:
    for path, module in model.named_modules():
        if isinstance(module, TOWERS[tower]):
            return f"{path}.encoder.layers".removeprefix("."), module
    raise ArgumentError(NAME, "towers", f"has {tower!r}, but a {type(model).__name__} has no {TOWERS[tower].__name__} inside")


def _layers(path: str, owner: Any, block_type: str, options: dict[str, Any], copy_weights: bool) -> tuple[ResidualLayers, frozenset[str]]:
    """The new layers, and which of their parameters were copied."""
    old: Any = owner.encoder.layers
    _check(path, old)
    first = old[0]
    width, hidden = first.mlp.fc1.in_features, first.mlp.fc1.out_features
    new = EnhancedTransformer(
        width,
        len(old),
        first.self_attn.num_heads,
        (hidden + 0.5) / width,  # which is cut to a whole number again
        None,
        lambda: copy.deepcopy(first.mlp.activation_fn),
        lambda size: LayerNorm(size, eps=first.layer_norm1.eps),
        block_type,
        **options,
    )
    weight, taken = first.mlp.fc1.weight, set()
    layers = ResidualLayers([ResidualLayer(block) for block in new.resblocks], block_type).to(weight.device).train(old.training)
    layer: Any
    for i, (layer, given) in enumerate(zip(layers, old, strict=True)):
        state, parameters = _state(given), dict(layer.block.named_parameters())
        for name, parameter in parameters.items():
            source = state.get(name)
            parameter.data = parameter.data.to(weight.dtype if source is None else source.dtype)
            parameter.requires_grad_(True if source is None else source.requires_grad)
        if copy_weights:
            # missing names are the new block's own
            layer.block.load_state_dict({name: x.detach() for name, x in state.items()}, strict=False)
            taken |= {f"{i}.block.{name}" for name in state.keys() & parameters.keys()}
        layer.train(given.training)
        for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if name in given.__dict__:
                setattr(layer, name, given.__dict__[name])
    return layers, frozenset(taken)


def _check(path: str, layers: nn.ModuleList) -> None:
    for i, layer in enumerate(layers):
        if type(layer) is not CLIPEncoderLayer:
            raise ArgumentError(NAME, "model", f"has a {type(layer).__name__} at {path}.{i}; allowed: CLIPEncoderLayer")
        if layer.self_attn.dropout:
            raise ArgumentError(
                NAME, "model", f"has attention_dropout {layer.self_attn.dropout} in {path}; allowed: 0, the blocks have none"
            )
        linear = [f"self_attn.{name}" for name in PROJECTIONS] + [name for name in MODULES.values() if "norm" not in name]
        for name in linear:
            found = layer.get_submodule(name)
            if type(found) is not nn.Linear:
                raise ArgumentError(NAME, "model", f"has a {type(found).__name__} at {path}.{i}.{name}; allowed: torch.nn.Linear")
        for kind in ("weight", "bias"):
            parts = [getattr(layer.get_submodule(f"self_attn.{name}"), kind) for name in PROJECTIONS]
            if len({(x.requires_grad, x.dtype) for x in parts}) > 1:
                raise ArgumentError(
                    NAME,
                    "model",
                    f"has {kind}s of {', '.join(PROJECTIONS)} at {path}.{i} that differ in dtype or requires_grad; allowed: all alike",
                )


def _state(layer: Any) -> dict[str, Tensor]:
    """A layer's parameters under OpenCLIP's names; frozen ones stay known as such."""
    state: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        parts = [getattr(layer.get_submodule(f"self_attn.{name}"), kind) for name in PROJECTIONS]
        joined = torch.cat([x.detach() for x in parts])
        state[f"attn.in_proj_{kind}"] = joined.requires_grad_(parts[0].requires_grad)
        state |= {f"{ours}.{kind}": getattr(layer.get_submodule(theirs), kind) for ours, theirs in MODULES.items()}
    return state
