"""OpenCLIP's residual attention block, and the blocks that stand in its place: same constructor, same call, same state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from triton_attn import ArgumentError, arguments, attention, linear_attention, refusals, sparse_attention
from triton_attn.nn._block_norms import LayerNorm, LayerScale, added_norm
from triton_attn.nn._causal_masks import hides_the_future, is_causal


class ResidualAttentionBlock(nn.Module):
    """x += ls_1(attention(ln_1 x)), then x += ls_2(mlp(ln_2 x)).

    Args:
        d_model: width of tokens.
        n_head: a divisor of d_model.
        mlp_ratio: width inside of the MLP over d_model.
        ls_init_value: initial LayerScale; None for none.
        act_layer: class of the activation, such as OpenCLIP's QuickGELU.
        norm_layer: class of the norms.
        is_cross_attention: a norm ln_1_kv of its own for keys and values; without it k_x and v_x are discarded, as in OpenCLIP.
        batch_first: tokens are (B, N, d_model); False: (N, B, d_model), OpenCLIP's layout before 2.26.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: ResidualAttentionBlock of OpenCLIP, whose state dicts load into every block here.
    """

    honours = "any mask"  # which attn_mask it can honour; others say "a causal mask"

    def __init__(
        self,
        d_model: int,
        n_head: int,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        is_cross_attention: bool = False,
        batch_first: bool = True,
    ) -> None:
        super().__init__()
        arguments.whole(self, "d_model", d_model, 1)
        arguments.whole(self, "n_head", n_head, 1)
        if d_model % n_head:
            raise ArgumentError(self.name, "n_head", f"is {n_head}; allowed: a divisor of d_model, {d_model}")
        self.batch_first = arguments.flag(self, "batch_first", batch_first)
        self.ln_1 = norm_layer(d_model)
        # holds the parameters under OpenCLIP's names; its own forward is never called
        self.attn = nn.MultiheadAttention(d_model, n_head, batch_first=batch_first)
        self.ls_1 = LayerScale(d_model, ls_init_value) if ls_init_value is not None else nn.Identity()
        if is_cross_attention:
            self.ln_1_kv = norm_layer(d_model)
        self.ln_2 = norm_layer(d_model)
        width = int(d_model * mlp_ratio)
        layers = OrderedDict([("c_fc", nn.Linear(d_model, width)), ("gelu", act_layer()), ("c_proj", nn.Linear(width, d_model))])
        self.mlp = nn.Sequential(layers)
        self.ls_2 = LayerScale(d_model, ls_init_value) if ls_init_value is not None else nn.Identity()

    @property
    def name(self) -> str:
        """The class's, for messages."""
        return type(self).__name__

    def get_weight_dtype(self) -> torch.dtype:
        """The MLP's, as OpenCLIP asks for it."""
        weight: Any = self.mlp.c_fc
        dtype: torch.dtype = getattr(weight, "int8_original_dtype", weight.weight.dtype)
        return dtype

    def forward(self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """Attend and transform.

        Args:
            q_x: (B, N, d_model), without batch_first (N, B, d_model).
            k_x, v_x: the same of another sequence, for cross-attention; None: q_x.
            attn_mask: (N, M) or (B n_head, N, M). Boolean: True = not allowed. Floating: added to the scores. A causal one is
                recognised and stays causal in every block.

        Returns:
            Of q_x's shape.

        Raises:
            Unsupported: a mask that this block's attention cannot honour; the message says who can.
        """
        keys, values = self._norm_kv(k_x), self._norm_kv(v_x)
        normed, x = added_norm(self.ls_1(self.attention(self.ln_1(q_x), keys, values, attn_mask)), q_x, self.ln_2)
        out: Tensor = x + self.ls_2(self.mlp(normed))
        return out

    def attention(self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """Project, attend, project back; tokens are normalised already."""
        query, key, value = self._projected(q_x, q_x if k_x is None else k_x, q_x if v_x is None else v_x)
        projected: Tensor = self.attn.out_proj(self._joined(self._attend(query, key, value, attn_mask)))
        return projected

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
        if attn_mask is None:
            return attention(query, key, value)  # type: ignore[no-any-return]
        # a graph would keep what it was compiled with, whatever mask comes later
        if not torch.compiler.is_compiling() and is_causal(attn_mask):
            return attention(query, key, value, causal="top_left")  # type: ignore[no-any-return]
        if attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.attn.num_heads))  # type: ignore[no-untyped-call]
        mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(query.dtype)
        return attention(query, key, value, mask=mask)  # type: ignore[no-any-return]

    def _causal(self, attn_mask: Tensor | None) -> bool:
        """Whether a mask is causal; one that is neither is refused by those that cannot honour it."""
        if attn_mask is None:
            return False
        if not is_causal(attn_mask):
            refusals.refuse(self.name, "an attn_mask that is not causal", "ResidualAttentionBlock and ParallelResidualAttentionBlock can")
        if torch.compiler.is_compiling():
            torch._assert_async(hides_the_future(attn_mask), f"{self.name}: compiled for a causal attn_mask, called with another")
        return True

    def _norm_kv(self, x: Tensor | None) -> Tensor | None:
        return self.ln_1_kv(x) if x is not None and hasattr(self, "ln_1_kv") else None

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """(B, H, N, head_dim) each; one product where all three are one."""
        weight, bias = self.attn.in_proj_weight, self.attn.in_proj_bias
        if query is key and key is value:
            return tuple(self._heads(x) for x in nn.functional.linear(query, weight, bias).chunk(3, -1))
        parts = zip((query, key, value), weight.chunk(3), bias.chunk(3), strict=True)
        return tuple(self._heads(nn.functional.linear(x, w, b)) for x, w, b in parts)

    def _heads(self, projected: Tensor) -> Tensor:
        split = projected.view(*projected.shape[:2], self.attn.num_heads, -1)
        return split.transpose(1, 2) if self.batch_first else split.permute(1, 2, 0, 3)

    def _joined(self, heads: Tensor) -> Tensor:
        """The inverse, with heads side by side."""
        return heads.transpose(1, 2).flatten(2) if self.batch_first else heads.permute(2, 0, 1, 3).flatten(2)


class LinearAttentionResidualBlock(ResidualAttentionBlock):
    """The standard block with linear attention, phi(x) = elu(x) + 1: O(N). Causal masks stay causal, others are refused.

    Source: the linear block of an OpenCLIP fork, which sums over heads where it means tokens.
    """

    honours = "a causal mask"

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
        out: Tensor = linear_attention(query, key, value, feature_map="elu", causal=self._causal(attn_mask))
        return out

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """The fork's own names, q_proj and so on, are taken as well."""
        for parameter in ("weight", "bias"):
            names = [f"{prefix}{part}_proj.{parameter}" for part in "qkv"]
            if all(name in state_dict for name in names):
                state_dict[f"{prefix}attn.in_proj_{parameter}"] = torch.cat([state_dict.pop(name) for name in names])
            if f"{prefix}out_proj.{parameter}" in state_dict:
                state_dict[f"{prefix}attn.out_proj.{parameter}"] = state_dict.pop(f"{prefix}out_proj.{parameter}")
        super()._load_from_state_dict(state_dict, prefix, *args)


class SparseAttentionResidualBlock(ResidualAttentionBlock):
    """The standard block with attention to shared key columns and the token itself. Causal masks stay causal, others are refused.

    Args:
        sparsity_ratio: the share of keys that is kept, above 0 to 1.
        selection: "uniform", "random" (in training; evaluation is uniform), "topk" or "window", as in `triton_attn.sparse_attention`.

    The others are those of `ResidualAttentionBlock`.

    Source: the sparse block of an OpenCLIP fork, as it was meant: there the mask adds 1 and hides nothing.
    """

    honours = "a causal mask"

    def __init__(
        self, d_model: int, n_head: int, *args: Any, sparsity_ratio: float = 0.5, selection: str = "uniform", **options: Any
    ) -> None:
        super().__init__(d_model, n_head, *args, **options)
        if isinstance(sparsity_ratio, bool) or not isinstance(sparsity_ratio, (int, float)) or not 0 < sparsity_ratio <= 1:
            raise ArgumentError(self.name, "sparsity_ratio", f"is {sparsity_ratio!r}; allowed: above 0 to 1")
        self.sparsity_ratio = float(sparsity_ratio)
        self.selection = arguments.choice(self, "selection", selection, ("uniform", "random", "topk", "window"))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
        causal = self._causal(attn_mask)
        if causal and self.selection == "topk":
            # which keys are longest is known only at the end
            refusals.refuse(self.name, "a causal attn_mask with selection='topk'", "'uniform', 'random' and 'window' can")
        selection = "uniform" if self.selection == "random" and not self.training else self.selection
        own = query.shape[2] == key.shape[2]
        out: Tensor = sparse_attention(
            query, key, value, keep_ratio=self.sparsity_ratio, selection=selection, include_self=own, causal=causal
        )
        return out


class SubLNResidualAttentionBlock(ResidualAttentionBlock):
    """The standard block with a norm inside each half, before its output projection (MAGNETO's sub-LN).

    Adds ln_attn and mlp.ln to the state. OpenCLIP's checkpoints, which have neither, load strictly and leave both as they are.

    Source: Wang et al., "Foundation Transformers", 2022.
    """

    def __init__(self, d_model: int, n_head: int, mlp_ratio: float = 4.0, *args: Any, **options: Any) -> None:
        super().__init__(d_model, n_head, mlp_ratio, *args, **options)
        self.ln_attn = LayerNorm(d_model)
        layers = list(self.mlp.named_children())
        self.mlp = nn.Sequential(OrderedDict([*layers[:2], ("ln", LayerNorm(int(d_model * mlp_ratio))), layers[2]]))

    def attention(self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """As `ResidualAttentionBlock.attention`, normalised before the output projection."""
        query, key, value = self._projected(q_x, q_x if k_x is None else k_x, q_x if v_x is None else v_x)
        out = self._joined(self._attend(query, key, value, attn_mask))
        projected: Tensor = self.attn.out_proj(self.ln_attn(out))
        return projected

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        added = {f"{prefix}{name}": x for name, x in self.state_dict().items() if name.startswith(("ln_attn.", "mlp.ln."))}
        if f"{prefix}attn.in_proj_weight" in state_dict and not added.keys() & state_dict.keys():
            state_dict.update(added)
        super()._load_from_state_dict(state_dict, prefix, *args)
