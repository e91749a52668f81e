"""The pages of docs/migrate: the code after runs, and computes what the code before does."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.test_pages import GIVEN as OF_PAGES
from tests.test_residual_blocks import CLIP, WIDTH, N
from triton_attn.models import AdaptedCLIPWithCrossAttention, VisionTransformer

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "migrate").glob("*.md"))
BLOCK = re.compile(r'```python title="(Before|After)(?:, )?([^"]*)"\n(.*?)```', re.DOTALL)
INSTALLABLE = {"torch": "torch", "performer_pytorch": "performer_pytorch"}  # on a CPU, without a compiler
Names = dict[str, Any]


def close(found: Tensor, expected: Tensor, *, within: float = 1e-4) -> None:
    torch.testing.assert_close(found.double(), expected.double(), atol=within, rtol=within)


def softmax(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, bias: Any = 0.0, scale: float | None = None) -> Tensor:
    """By its definition, in float64: (B, N, H, D); seen (..., N, M), True where a query sees a key."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    out: Tensor = (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2)
    return out


def lower(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def in_turn(packed: Any, ends: list[int], seen: Callable[[int], Tensor | None]) -> Tensor:
    """Each sequence by itself."""
    parts = [[x[None, a:b] for x in packed] for a, b in itertools.pairwise(ends)]
    return torch.cat([softmax(q, k, v, seen(q.shape[1]))[0] for q, k, v in parts])


# what a page takes for granted


def given_torch() -> Names:
    heads = dict(zip(("query", "key", "value"), torch.randn(3, 2, 4, 10, 16), strict=True))
    return {**heads, "x": torch.randn(2, 10, 64), "padded": torch.arange(10) >= torch.tensor([[10], [7]])}


def given_flash_attn() -> Names:
    ends = torch.tensor([0, 5, 17], dtype=torch.int32)
    given: Names = dict(zip("qkv", torch.randn(3, 2, 12, 4, 16), strict=True))
    return given | {"packed": torch.randn(3, 17, 4, 16).unbind(), "ends": ends, "longest": 12, "qkv": torch.randn(2, 12, 3, 4, 16)}


def given_mamba_ssm() -> Names:
    u, delta, z = torch.randn(3, 2, 8, 20).unbind()
    tensors = {"A": -torch.rand(8, 4), "B": torch.randn(2, 4, 20), "C": torch.randn(2, 4, 20), "D": torch.randn(8)}
    state = torch.randn(2, 8, 4)
    more = {"weight": torch.randn(8, 4), "bias": torch.randn(8), "delta_bias": torch.randn(8), "state": state, "first": state.clone()}
    return {"u": u, "delta": delta, "z": z, **tensors, **more}


def given_performer_pytorch() -> Names:
    weights = {f"{name}.weight": torch.randn(64, 64) / 16 for name in ("to_q", "to_k", "to_v", "to_out")}
    return {"x": torch.randn(2, 12, 64), "state": weights | {"fast_attention.projection_matrix": torch.randn(48, 16)}}


def given_aa_clip() -> Names:
    pytest.importorskip("transformers")
    names: Names = {"torch": torch, "triton_attn": __import__("triton_attn")}
    exec(OF_PAGES["clip_cross_attention"], names)  # noqa: S102  our own
    other = AdaptedCLIPWithCrossAttention(names["clip"])
    state = {"text_adapter": other.text_adapter.state_dict(), "text_cross_attn": other.text_cross_attn.state_dict()}
    torch.save({"epoch": 1, **state, "text_optimizer": {}}, "text_adapter_cross_attn.pth")
    return {"clip": names["clip"], "images": names["images"], "tokens": names["normal_tokens"][:2], "state": state}


def given_longnet() -> Names:
    weights = {f"{name}.weight": torch.randn(64, 64) / 8 for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    state = weights | {name.replace("weight", "bias"): torch.randn(64) for name in weights}
    given: Names = dict(zip("qkv", torch.randn(3, 2, 32, 4, 16), strict=True))
    return given | {"x": torch.randn(2, 32, 64), "state": state | {"norm.weight": torch.ones(64), "norm.bias": torch.zeros(64)}}


def given_linear_vit() -> Names:
    small: Names = {"num_classes": 10, "dim": 48, "depth": 2, "heads": 4}
    theirs = VisionTransformer(attention_type="ripple", attention_options={"variant": "v1"}, **small)
    return {"images": torch.randn(2, 3, 32, 32), "theirs": theirs, "state": theirs.state_dict()}


GIVEN: dict[str, Callable[[], Names]] = {
    "torch": given_torch,
    "flash_attn": given_flash_attn,
    "xformers": lambda: {**given_flash_attn(), "bias": torch.randn(2, 4, 12, 12)},
    "mamba_ssm": given_mamba_ssm,
    "performer_pytorch": given_performer_pytorch,
    "openclip_blocks": lambda: {"model": CLIP(), "tokens": torch.randn(2, N, WIDTH)},
    "hierarchical_vlm": lambda: {"x": torch.randn(2, 20, 64), "memory_tokens": torch.randn(2, 6, 64)},
    "aa_clip": given_aa_clip,
    "longnet": given_longnet,
    "linear_vit": given_linear_vit,
}


# what holds after a block: (title of the block, names after it, names after the code before)


def check_torch(title: str, names: Names, before: Names) -> None:
    if not title:
        for result in ("out", "weights", "attended"):
            close(names[result], before[result])
    else:
        assert len(names["report"].replaced) == 2
        kept = ~names["padded"]
        close(names["encoded"][kept], names["model"](names["x"], src_key_padding_mask=names["padded"])[kept])


def check_flash_attn(title: str, names: Names, before: Names) -> None:
    if title:
        close(names["out"], softmax(*names["qkv"].unbind(2)))
        return
    close(names["out"], softmax(names["q"], names["k"], names["v"], lower(12)))
    close(names["packed_out"], in_turn(names["packed"], [0, 5, 17], lambda n: lower(n).triu(-4)))


def check_xformers(title: str, names: Names, before: Names) -> None:
    q, k, v = (names[name] for name in "qkv")
    close(names["out"], softmax(q, k, v, lower(12)))
    close(names["packed_out"], in_turn(names["packed"], [0, 5, 17], lambda n: None))
    close(names["biased"], softmax(q, k, v, bias=names["bias"].double(), scale=0.25))


def check_mamba_ssm(title: str, names: Names, before: Names) -> None:
    u, z, A, D = (names[name].double() for name in ("u", "z", "A", "D"))
    x = F.silu(F.conv1d(F.pad(u, (3, 0)), names["weight"].double()[:, None], names["bias"].double(), groups=8))
    close(names["x"], x)
    delta = F.softplus(names["delta"] + names["delta_bias"][:, None]).double()

    def step(h: Tensor, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        B, C = (names[name][:, None, :, t].double() for name in "BC")
        dt = delta[..., t, None]
        h = (dt * A).exp() * h + dt * x[..., None] * B
        return h, (h * C).sum(-1) + D * x

    h, outputs = torch.zeros(2, 8, 4, dtype=torch.float64), []
    for t in range(20):
        h, y = step(h, x[..., t], t)
        outputs.append(y * F.silu(z[..., t]))
    close(names["y"], torch.stack(outputs, -1))
    close(names["last"], h)
    state, y = step(names["first"].double(), u[..., 0], 0)
    close(names["step"], y)
    close(names["state"], state)


def check_performer_pytorch(title: str, names: Names, before: Names) -> None:
    if "theirs" in before:
        close(names["out"], before["out"], within=5e-3)
    x, state = names["x"], names["state"]
    q, k, v = ((x @ state[f"to_{name}.weight"].T).double().unflatten(-1, (4, 16)).transpose(1, 2) for name in "qkv")
    W = state["fast_attention.projection_matrix"].double()
    q, k = ((y @ W.T - y.square().sum(-1, keepdim=True) / 2).exp() for y in (q / 2, k / 2))  # 16 ** -0.25
    heads = q @ (k.mT @ v) / (q @ k.sum(-2)[..., None])
    expected = heads.transpose(1, 2).flatten(2) @ state["to_out.weight"].T.double() + state.get("to_out.bias", torch.zeros(64))
    close(names["out"], expected, within=5e-3)


def check_openclip_blocks(title: str, names: Names, before: Names) -> None:
    tower, x = names["model"].visual.transformer, names["tokens"]
    original: Any = CLIP().visual.transformer
    if title:
        assert torch.equal(tower(x), original(x))
        return
    y = x
    for block in original.resblocks:
        normed = block.ln_1(y)
        attended = block.attn(normed, normed, normed, need_weights=False)[0]
        y = y + block.ls_1(attended) + block.ls_2(block.mlp(block.ln_2(y)))
    close(tower(x), y)
    assert [group["lr"] for group in names["groups"]] == pytest.approx([0.8e-5] * len(names["groups"]))
    assert names["tower"](torch.randn(2, 5, 64)).shape == (2, 5, 64)


def check_hierarchical_vlm(title: str, names: Names, before: Names) -> None:
    local, x = names["local"].double(), names["x"].double()
    q, k, v = (getattr(local, f"{name}_proj")(x).unflatten(-1, (4, 16)) for name in "qkv")
    near = (torch.arange(20)[:, None] - torch.arange(20)).abs() <= 4
    heads = (softmax(q, k, v, near) + softmax(q, k[:, :2], v[:, :2])) / 2
    close(names["out"], local.out_proj(heads.flatten(2)))
    assert {name.split(".")[0] for name in names["block"].state_dict()} == {"attention", "ffn", "norm1", "norm2"}
    assert names["strided"].shape == names["fused"].shape == names["linear"](names["x"]).shape == (2, 20, 64)


def check_aa_clip(title: str, names: Names, before: Names) -> None:
    model = names["model"]
    if title:
        loaded = model.text_cross_attn.state_dict()
        assert all(torch.equal(loaded[name], x) for name, x in names["state"]["text_cross_attn"].items())
        return
    assert [tuple(level.shape[:1]) for level in names["levels"]] == [(2,)] * 4
    model.eval()
    alone = []
    for context, tokens in zip(names["context"].split(1), names["tokens"].split(1), strict=True):
        model.set_image_context(context)
        alone.append(model.encode_text(tokens))
    model.set_image_context(names["context"])
    close(model.encode_text(names["tokens"]), torch.cat(alone))
    model.clear_image_context()


def met(head: int, lengths: list[int], rates: list[int]) -> Tensor:
    """In how many branches a query and a key of a head meet, 32 tokens, 4 heads: LongNet by torchscale's offsets."""
    t = torch.arange(32)
    count = torch.zeros(32, 32, dtype=torch.float64)
    for w, r in zip(lengths, rates, strict=True):
        chosen = t % w % r == head // math.ceil(4 / r)
        count += (t[:, None] // w == t // w) & chosen[:, None] & chosen
    return count


def check_longnet(title: str, names: Names, before: Names) -> None:
    q, k, v = (names[name] for name in "qkv")
    if title:
        later = v.clone()
        later[:, 20:] = 9.0
        again = names["grouped"](q, k, later, is_causal=True)
        assert torch.equal(again[:, :20], names["grouped_out"][:, :20])
        assert bool((names["grouped_out"].abs().amax((0, 1, 3)) > 0).all())  # no head is idle
        return
    logs = torch.stack([met(head, [8, 16, 32], [1, 2, 4]) for head in range(4)]).log()
    close(names["out"], softmax(q, k, v, lower(32), bias=logs))
    layer = names["layer"]
    assert torch.equal(layer.q_proj.weight, names["state"]["q_proj.weight"])
    assert names["mixed"].shape == (2, 32, 64)


def check_linear_vit(title: str, names: Names, before: Names) -> None:
    assert names["logits"].shape == (2, 10)
    if title:
        assert torch.equal(names["model"].eval()(names["images"]), names["theirs"].eval()(names["images"]))


CHECKS: dict[str, Callable[[str, Names, Names], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """(Before or After, the rest of the title, code) in the order of the page."""
    yield from BLOCK.findall(page.read_text())


@pytest.mark.filterwarnings("ignore")  # other libraries' own
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_after_computes_what_it_replaces(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = GIVEN[page.stem]()
    before: Names = {}
    for kind, title, code in blocks(page):
        compiled = compile(code, f"{page.name}, {kind} {title}", "exec")
        if kind == "After":
            exec(compiled, names)  # noqa: S102  our own pages
            CHECKS[page.stem](title, names, before)
        elif find_spec(INSTALLABLE.get(page.stem, "no_such_library")):
            exec(compiled, names)  # noqa: S102
            before = dict(names)
            names["state"] = names["theirs"].state_dict() if "theirs" in names else None


def test_every_page_has_code_before_and_after_and_a_check_and_a_row_in_the_overview() -> None:
    overview = (ROOT / "docs" / "migrate.md").read_text()
    assert {page.stem for page in PAGES} == {*GIVEN} == {*CHECKS}
    for page in PAGES:
        first, second, *_ = [kind for kind, *_ in blocks(page)]
        assert (first, second) == ("Before", "After")
        assert len(list(blocks(page))) == page.read_text().count("```python")
        assert f"(migrate/{page.name})" in overview
