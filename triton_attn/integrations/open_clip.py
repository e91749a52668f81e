"""OpenCLIP: its towers with other residual blocks, and back.

    import open_clip
    from triton_attn.integrations.open_clip import replace_transformer_in_model

    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained="openai")
    report = replace_transformer_in_model(model, block_type="parallel", towers=("visual",))
    print(report)
    report.undo()

Whatever has OpenCLIP's attributes will do: nothing of open_clip is imported.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from triton_attn import ArgumentError
from triton_attn.integrations.replacement import Replacement
from triton_attn.nn.enhanced_transformer import BLOCK_TYPES, EnhancedTransformer

NAME = "replace_transformer_in_model"
TOWERS = {"visual": ("visual.transformer",), "text": ("text.transformer", "transformer")}
SAME_FUNCTION = ("standard",)
RATES = {"parallel": 0.8, "linear": 1.2, "sparse": 0.9}


def replace_transformer_in_model(
    model: nn.Module,
    block_type: str = "parallel",
    towers: Sequence[str] = ("visual",),
    copy_weights: bool = True,
    **options: Any,
) -> Replacement:
    """Give the towers of an OpenCLIP model another kind of block, with its activation, norms, LayerScale, widths, dtype and device.

    Args:
        model: with visual.transformer, and transformer or text.transformer, as OpenCLIP has them.
        block_type: a type of `triton_attn.nn.EnhancedTransformer`. "standard" changes no output.
        towers: out of "visual" and "text".
        copy_weights: take over every parameter that the new block has under the same name.
        options: of the block.

    Returns:
        What was replaced, copied, left and why, and `undo()`.

    Raises:
        ArgumentError: an argument is wrong, a tower is missing, or its blocks are of a kind that cannot be read; nothing was changed.
    """
    check_choice(block_type, towers)
    planned = [(path, _build(path, _at(model, path), block_type, options)) for path in (_path(model, tower) for tower in towers)]
    report = Replacement(changes_function=block_type not in SAME_FUNCTION)
    replaced, copied, initialised = {}, [], []
    for path, new in planned:
        old = _at(model, path)
        if copy_weights:
            state, wanted = old.state_dict(), new.state_dict()
            shared = {name: x for name, x in state.items() if name in wanted and wanted[name].shape == x.shape}
            new.load_state_dict(shared, strict=False)
            copied += [f"{path}.{name}" for name in shared]
            initialised += [f"{path}.{name}" for name in wanted if name not in shared]
        else:
            initialised += [f"{path}.{name}" for name in new.state_dict()]
        given = dict(old.named_parameters())
        for name, parameter in new.named_parameters():
            parameter.requires_grad_(given[name].requires_grad if name in given else True)
        owner, _, name = path.rpartition(".")
        parent = model.get_submodule(owner)
        setattr(parent, name, new)
        report._undo.append(functools.partial(setattr, parent, name, old))
        replaced[path] = f"{new.layers} {type(new.resblocks[0]).__name__}s"
    report.replaced, report.copied, report.initialised = replaced, tuple(copied), tuple(initialised)
    return report


def check_choice(block_type: str, towers: Sequence[str]) -> None:
    """Raise ArgumentError for an unknown block, an unknown tower, or none."""
    if block_type not in BLOCK_TYPES:
        raise ArgumentError(NAME, "block_type", f"is {block_type!r}; allowed: {', '.join(map(repr, BLOCK_TYPES))}")
    unknown = [tower for tower in towers if tower not in TOWERS]
    if unknown or not towers:
        raise ArgumentError(NAME, "towers", f"is {tuple(towers)!r}; allowed: some of 'visual', 'text'")


def _path(model: nn.Module, tower: str) -> str:
    for path in TOWERS[tower]:
        try:
            model.get_submodule(path)
        except AttributeError:
            continue
        return path
    raise ArgumentError(NAME, "towers", f"has {tower!r}, but the model has no {' and no '.join(TOWERS[tower])}")


def _at(model: nn.Module, path: str) -> Any:
    return model.get_submodule(path)


def _build(path: str, old: Any, block_type: str, options: dict[str, Any]) -> EnhancedTransformer:
    """A transformer like the old one, from what its first block is made of."""
    try:
        first = old.resblocks[0]
        attn, mlp, norm = first.attn, first.mlp, first.ln_1
        width, hidden, heads = mlp.c_fc.in_features, mlp.c_fc.out_features, attn.num_heads
        scale = getattr(getattr(first, "ls_1", None), "gamma", None)
    except AttributeError as missing:
        raise ArgumentError(NAME, "model", f"has blocks in {path} that are not OpenCLIP's: {missing}") from missing
    if hasattr(attn, "in_proj_weight") and attn.in_proj_weight is None:
        raise ArgumentError(NAME, "model", f"has blocks in {path} whose keys have another width; allowed: one width")
    # before OpenCLIP 2.26 a transformer has no batch_first and takes (N, B, width)
    batch_first = hasattr(old, "batch_first") or not isinstance(attn, nn.MultiheadAttention) or attn.batch_first
    new = EnhancedTransformer(
        width,
        len(old.resblocks),
        heads,
        (hidden + 0.5) / width,  # which is cut to a whole number again
        None if scale is None else float(scale.detach().float().mean()),
        lambda: _like(mlp.gelu),
        lambda size: type(norm)(size, eps=norm.eps) if isinstance(norm, nn.LayerNorm) else type(norm)(size),
        block_type,
        batch_first,
        **options,
    )
    weight = mlp.c_fc.weight
    new = new.to(device=weight.device).train(old.training)
    given = dict(old.named_parameters())
    for name, parameter in new.named_parameters():  # in half precision OpenCLIP's norms stay in float32
        parameter.data = parameter.data.to(given.get(name, weight).dtype)
    new.grad_checkpointing = bool(getattr(old, "grad_checkpointing", False))
    return new


def _like(activation: nn.Module) -> nn.Module:
    """An activation of the same class and settings; it has no parameters."""
    return copy.deepcopy(activation)


def param_groups(model: nn.Module, base_lr: float, *, weight_decay: float = 0.0, layer_decay: float = 0.9) -> list[dict[str, Any]]:
    """Parameters with the source's learning rates: 0.8 base_lr for parallel blocks, 1.2 for linear, 0.9 for sparse, by depth for deepnorm.

    Layer l of L deepnorm layers gets base_lr layer_decay^(L - 1 - l). Parameters of one dimension (biases, norms) have no weight decay.

    Args:
        model: with any number of EnhancedTransformers inside, or of `transformers_clip`'s layers.
        base_lr: of everything else; above 0.
        weight_decay: of matrices.
        layer_decay: above 0 to 1.

    Returns:
        Groups for a torch optimizer, each parameter in one of them.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
    """
    if base_lr <= 0:
        raise ArgumentError("param_groups", "base_lr", f"is {base_lr}; allowed: above 0")
    if not 0 < layer_decay <= 1:
        raise ArgumentError("param_groups", "layer_decay", f"is {layer_decay}; allowed: above 0 to 1")
    rates: dict[int, float] = {}
    for module in model.modules():
        if isinstance(module, EnhancedTransformer) or (hasattr(module, "resblocks") and hasattr(module, "block_type")):
            transformer: Any = module
            for depth, block in enumerate(transformer.resblocks):
                rate = RATES.get(transformer.block_type, 1.0)
                if transformer.block_type == "deepnorm":
                    rate = layer_decay ** (transformer.layers - 1 - depth)
                rates |= {id(parameter): rate for parameter in block.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        decay = weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((base_lr * rates.get(id(parameter), 1.0), decay), []).append(parameter)
    return [{"params": members, "lr": lr, "weight_decay": decay} for (lr, decay), members in groups.items()]


@torch.no_grad()
def evaluate_blocks(
    model: nn.Module, batches: Sequence[Any], block_types: Sequence[str] = tuple(BLOCK_TYPES), towers: Sequence[str] = ("visual",)
) -> dict[str, dict[str, float]]:
    """The model as it is beside itself with other blocks, on the same images: how far image features move, and whether labels stay.

    Args:
        model: OpenCLIP's; left as it was.
        batches: images, or (images, labels, text features (classes, dim)) for an accuracy.
        block_types: which to try.
        towers: which to replace.

    Returns:
        For "original" and each type: "cosine", the mean cosine to the original's image features; "accuracy" where there are labels.
    """
    results: dict[str, dict[str, float]] = {}
    wanted: list[torch.Tensor] = []
    training = model.training
    model.eval()
    try:
        for kind in ("original", *block_types):
            report = None if kind == "original" else replace_transformer_in_model(model, kind, towers)
            try:
                found, right, seen = [], 0, 0
                for images, labels, text in map(_labelled, batches):
                    features = nn.functional.normalize(model.encode_image(images).float(), dim=-1)  # type: ignore[operator]
                    found.append(features)
                    if labels is not None:
                        right += int((features @ nn.functional.normalize(text.float(), dim=-1).mT).argmax(-1).eq(labels).sum())
                        seen += labels.numel()
            finally:
                if report is not None:
                    report.undo()
            wanted = wanted or found
            cosines = torch.cat([(a * b).sum(-1) for a, b in zip(found, wanted, strict=True)])
            results[kind] = {"cosine": float(cosines.mean()), **({"accuracy": right / seen} if seen else {})}
    finally:
        model.train(training)
    return results


def _labelled(batch: Any) -> Iterator[Any]:
    return iter(batch if isinstance(batch, (tuple, list)) else (batch, None, None))
