"""One file per mechanism: its public function and its catalogue row. To add one, add a line."""

from triton_attn.functional.attention import ROW as attention

ROWS = (attention,)
