"""Every block of code on every page runs, in the order of the page, with what the page takes for granted."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import triton_attn
import triton_attn.models
import triton_attn.nn

ROOT = Path(__file__).parent.parent
# tests/test_migration.py runs those of docs/migrate
PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "```python" in path.read_text() and path.parent.name != "migrate"]
# what a page says "query" and "x" to
HEADS = "query, key, value = torch.randn(3, 2, 4, 40, 64).unbind()"
GIVEN = {
    "add_layer_norm": "x, residual = torch.randn(2, 3, 10, 16).unbind(); weight, bias = torch.randn(2, 16).unbind()",
    "attention": f"{HEADS}; padded = torch.arange(40) >= torch.tensor([[40], [30]])",
    "attention_varlen": "query, key, value = torch.randn(3, 578, 4, 16).unbind()",
    "causal_conv1d": """
x, weight, bias = torch.randn(2, 8, 20), torch.randn(8, 4), torch.randn(8)
state, conv_state = torch.randn(2, 8, 3), torch.randn(2, 8, 4)
one = torch.randn(2, 8)
""",
    "clip_cross_attention": """
import transformers
text = {"hidden_size": 768, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "vocab_size": 99}
text.update(max_position_embeddings=77, bos_token_id=0, eos_token_id=98, pad_token_id=1)
vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 24, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=768))
images = torch.randn(2, 3, 16, 16)
normal_tokens, abnormal_tokens = torch.randint(2, 97, (2, 3, 77)).unbind()
normal_tokens[:, -1] = abnormal_tokens[:, -1] = 98
text_features = torch.randn(2, 77, 768)
state = triton_attn.nn.CrossAttentionModule(dim=768, num_heads=8).state_dict()
""",
    "dilated_attention": "query, key, value = torch.randn(3, 1, 8, 64, 16).unbind()",
    "drop_in": "theirs = torch.nn.MultiheadAttention(512, 8, batch_first=True); x = torch.randn(2, 5, 512)",
    "hierarchical": """
x, mask = torch.randn(2, 70, 768), torch.arange(70) >= torch.tensor([[70], [50]])
local_features, memory_tokens, memory = torch.randn(2, 70, 768), torch.randn(2, 6, 768), torch.randn(2, 6, 768)
block = triton_attn.nn.HierarchicalAttentionBlock(768, 12, "local_global", global_mode="first", combine="average")
torch.save(block.state_dict(), "theirs.pt")
""",
    "hydra_attention": f"{HEADS}; query_branches = torch.stack((query, query), 1)",
    "integrations": """
model = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
x = torch.randn(2, 9, 32)
""",
    "linear_attention": f"{HEADS}; next_query, next_key, next_value = torch.randn(3, 2, 4, 64).unbind()",
    "linear_vit": 'state = triton_attn.models.VisionTransformer(32, 4, 100, attention_type="ripple").state_dict()',
    "local_global_attention": f"{HEADS}; kg, vg = torch.randn(2, 2, 4, 3, 64).unbind()",
    "mamba": """
mamba_ssm_state = triton_attn.nn.MambaLayer(dim=768).state_dict()
x, mask = torch.randn(2, 6, 768), torch.arange(6) >= torch.tensor([[6], [4]])
batch_size, prompt, token = 2, torch.randn(2, 5, 768), torch.randn(2, 1, 768)
""",
    "meta_hydra_attention": f"{HEADS}; query_branches = torch.stack((query, query), 1)",
    "norm_matched_add": "x, branch = torch.randn(2, 3, 10, 16).unbind(); weight = torch.full((1,), 0.1)",
    "performer_attention": HEADS,
    "pool_tokens": "x, mask = torch.randn(2, 3, 196, 16), torch.rand(2, 196) > 0.8",
    "selective_scan": """
u, delta, z = torch.randn(3, 2, 8, 20).unbind()
A, B, C, D, delta_bias = -torch.rand(8, 4), torch.randn(2, 4, 20), torch.randn(2, 4, 20), torch.randn(8), torch.randn(8)
state, mask = torch.randn(2, 8, 4), torch.arange(20) >= torch.tensor([[20], [12]])
x, dt, dt_bias = *torch.randn(2, 2, 8).unbind(), delta_bias
""",
    "sparse_attention": f"{HEADS}; saliency = torch.rand(2, 40)",
    "strided_attention": HEADS,
    "subset_attention": HEADS,
    "transformers": """
import transformers
small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
folder = "bert"
transformers.BertModel(transformers.BertConfig(**small)).save_pretrained(folder)
mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=50, hidden_size=24, state_size=6, num_hidden_layers=2))
inputs = {"input_ids": torch.randint(1, 50, (1, 5)), "max_new_tokens": 2, "pad_token_id": 0}
""",
    "tuning": """
class Model(torch.nn.Linear):
    def forward(self, x):
        out = triton_attn.attention(x, super().forward(x), x)
        return __import__("types").SimpleNamespace(loss=out.square().mean())
model, batch = Model(16, 16), torch.randn(1, 2, 9, 16)
""",
}
SYSTEM: dict[str, Any] = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
NEEDS = {"openclip": "open_clip with its pretrained weights: tests/test_open_clip.py makes the same calls on random ones"}
LIBRARIES = {"clip_cross_attention": "transformers", "transformers": "transformers"}


@pytest.mark.filterwarnings("ignore")  # other libraries' own, and torch's of an overridden kernel
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_on_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.stem in NEEDS:
        pytest.skip(f"needs {NEEDS[page.stem]}")
    if importlib.util.find_spec(LIBRARIES.get(page.stem, "torch")) is None:
        pytest.skip(f"needs {LIBRARIES[page.stem]}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name, value in SYSTEM.items():
        monkeypatch.setenv(name, value)
    torch.manual_seed(0)
    names: dict[str, Any] = {"torch": torch, "triton_attn": triton_attn}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    try:
        for block in (GIVEN.get(page.stem, ""), *blocks):
            exec(compile(block, page.name, "exec"), names)  # noqa: S102  our own pages
    finally:
        torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_nothing_is_given_to_a_page_that_is_not_there() -> None:
    assert {*GIVEN, *NEEDS, *LIBRARIES} <= {page.stem for page in PAGES}
