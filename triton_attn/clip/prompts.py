"""AA-CLIP's sentences about a whole and a damaged thing: 6 and 10."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from triton_attn import ArgumentError
from triton_attn.models import AdaptedCLIPWithCrossAttention

NORMAL = ("{}", "a {}", "the {}")
ABNORMAL = ("a damaged {}", "a broken {}", "a {} with flaw", "a {} with defect", "a {} with damage")
TEMPLATES = ("{}.", "a photo of {}.")

Tokenizer = Callable[[list[str]], Tensor]
States = tuple[Tensor, Tensor]  # token numbers of the normal and of the abnormal sentences, (P, T) each


def sentences(thing: str) -> tuple[list[str], list[str]]:
    """What is said of a thing when it is whole, and when it is not."""
    found = [[template.format(state.format(thing)) for state in states for template in TEMPLATES] for states in (NORMAL, ABNORMAL)]
    return found[0], found[1]


def tokens_of(class_names: Sequence[str], tokenizer: Tokenizer, called: Mapping[str, str] | None = None) -> dict[str, States]:
    """Token numbers of each class's sentences.

    Args:
        class_names: names of folders.
        tokenizer: sentences -> (P, T) token numbers.
        called: what a class is called in sentences; by default its name, with spaces for underscores.
    """
    things = {name: (called or {}).get(name, name.replace("_", " ")) for name in dict.fromkeys(class_names)}
    return {name: tuple(tokenizer(said) for said in sentences(thing)) for name, thing in things.items()}  # type: ignore[misc]


def check_classes(tokens: Mapping[str, States], class_names: Sequence[str]) -> None:
    """That there are sentences of all classes.

    Raises:
        ArgumentError: there are not; the message names the classes.
    """
    unknown = sorted(set(class_names) - set(tokens))
    if unknown:
        said = f"has {', '.join(map(repr, unknown))}, of which there are no sentences; allowed: {', '.join(tokens)}"
        raise ArgumentError("train-clip-adapter", "class_names", said)


def embeddings(
    model: AdaptedCLIPWithCrossAttention, tokens: Mapping[str, States], class_names: Sequence[str], context: Tensor | None
) -> Tensor:
    """(B, joint width, 2): both states of what each of B images shows, beside its own context, or beside none.

    One call encodes all sentences. Without a context, or with context_reduce="mean", images of a class share theirs.
    """
    check_classes(tokens, class_names)
    if context is not None and model.context_reduce == "mean":
        context = context.mean(0, keepdim=True)
    each = context is not None and len(context) == len(class_names)
    rows = list(class_names) if each else sorted(set(class_names))
    if each and len(set(rows)) == 1:
        rows = rows[:1]  # their first block runs once
    normal, abnormal = (torch.stack([tokens[name][state] for name in rows]) for state in range(2))
    found = model.get_adapted_text_embedding((normal, abnormal), context)
    if each:
        return found
    return found[torch.tensor([rows.index(name) for name in class_names], device=found.device)]
