"""One file per mechanism: its public function and its catalogue row. To add one, add a line."""

from triton_attn.functional.add_layer_norm import ROW as add_layer_norm
from triton_attn.functional.attention import ROW as attention
from triton_attn.functional.attention_varlen import ROW as attention_varlen
from triton_attn.functional.causal_conv1d import ROW as causal_conv1d
from triton_attn.functional.dilated_attention import ROW as dilated_attention
from triton_attn.functional.hydra_attention import ROW as hydra_attention
from triton_attn.functional.linear_attention import ROW as linear_attention
from triton_attn.functional.local_global_attention import ROW as local_global_attention
from triton_attn.functional.meta_hydra_attention import ROW as meta_hydra_attention
from triton_attn.functional.norm_matched_add import ROW as norm_matched_add
from triton_attn.functional.performer_attention import ROW as performer_attention
from triton_attn.functional.pool_tokens import ROW as pool_tokens
from triton_attn.functional.selective_scan import ROW as selective_scan
from triton_attn.functional.strided_attention import ROW as strided_attention
from triton_attn.functional.subset_attention import ROW as subset_attention

ROWS = (
    attention,
    attention_varlen,
    strided_attention,
    local_global_attention,
    subset_attention,
    dilated_attention,
    linear_attention,
    performer_attention,
    hydra_attention,
    meta_hydra_attention,
    pool_tokens,
    selective_scan,
    causal_conv1d,
    add_layer_norm,
    norm_matched_add,
)
