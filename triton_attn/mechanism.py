"""The catalogue's vocabulary: what a mechanism is, takes, gives and costs. A leaf: no torch, no triton.

Axes have one letter each, everywhere in the package: `b` batch, `h` heads, `g` key and value heads, `m` queries, `n` keys,
`d` query and key width, `e` value width, `r` branches of queries.
In recurrences `l` time, `d` channels, `s` state, `q` sequences, `p` = `q` + 1 their offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from inspect import Parameter, signature
from typing import Any, Literal

Sizes = Mapping[str, int]
Options = Mapping[str, Any]
Tensors = Mapping[str, Any]  # name -> torch.Tensor or None; `Any`, because this file knows no torch


@dataclass(frozen=True)
class Input:
    """A tensor argument: its axes, and what its values are. Masks, padding, offsets, seeds and what is `optional` may be absent."""

    axes: str
    kind: Literal["values", "mask", "padding", "index", "offsets", "seed"] = "values"
    differentiable: bool = False
    optional: bool = False
    into: str = ""  # the axis that an index points into, and that offsets divide
    # no autocast casts what is held in float32, or float64 beside float64; parameters may also have the inputs' own dtype
    dtype: Literal["like inputs", "float32", "float32 or like inputs"] = "like inputs"
    sign: int = 0  # of the values worth drawing; 0: either
    ordered: bool = False  # its gradient lies in memory in its own order of axes

    @property
    def required(self) -> bool:
        return self.kind in ("values", "index") and not self.optional


@dataclass(frozen=True)
class Output:
    """A returned tensor: its axes, its dtype where that is not the inputs', and whose order of axes in memory it has."""

    axes: str
    dtype: Literal["like inputs", "float32"] = "like inputs"
    ordered_as: str = ""  # an input; none: contiguous
    differentiable: bool = True  # no: counts, for one


@dataclass(frozen=True)
class Case:
    """One call: sizes by axis letter, options by argument name. A mask or padding is named by how to draw it."""

    name: str
    sizes: Sizes
    options: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What a forward call must do at the least, whoever does it."""

    flops: float  # matrix products only; a multiply-add is two
    bytes: float  # each input read once, each output written once
    exponentials: float = 0.0


@dataclass(frozen=True)
class Launch:
    """One Triton launch of a kernel, as the tile tables and the compile gate name it."""

    name: str
    gradients: tuple[str, ...] = ()  # of which inputs it computes them; none: a forward launch
    shared: bool = False  # takes the forward launch's place where programs share the keys


@dataclass(frozen=True)
class Code:
    """What importing a kernel gives: its two functions, the tiles of each launch, and what a call's tiles depend on."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    spaces: Mapping[str, Any]  # launch name -> tiles.Space
    key: Callable[[Tensors, Options], Any]  # -> tiles.Key
    splits: Callable[[Tensors, Options], int] = lambda tensors, options: 1  # how many programs share the keys of a call


@dataclass(frozen=True)
class Kernel:
    """One Triton implementation of a mechanism.

    `load` imports it, and triton no earlier. `refuses` lists why it cannot serve these tensors, beyond what the row says.
    Capabilities are those whose code was compiled and checked.
    """

    name: str
    capabilities: tuple[tuple[int, int], ...]
    load: Callable[[], Code]
    launches: tuple[Launch, ...]
    refuses: Callable[[Tensors, Options], list[str]] = lambda tensors, options: []


class Law(Enum):
    """A property that holds whatever the numbers are; `testing.laws` checks each on every row that names it."""

    ROWS_SUM_TO_ONE = "values of one give an output of one"
    LATER_STEPS_CHANGE_NOTHING = "steps after one change neither its output nor get a gradient from it"
    RESUMES_ANYWHERE = "two parts, the state handed on, give what the whole gives"
    PACKED_IS_SEPARATE = "sequences packed into one row give what each gives alone"
    MASKED_IS_ABSENT = "steps that are masked may hold NaN and could as well be missing"
    FUTURE_CHANGES_NOTHING = "keys after a query change neither its output nor get a gradient from it"
    PADDING_CHANGES_NOTHING = "appended keys that are masked change no bit"
    KEY_ORDER_CHANGES_NOTHING = "permuting keys and values together changes nothing"
    BATCH_CHANGES_NOTHING = "an item alone gives the bits it gives in a batch"
    RESUMES = "one call is two, the second beginning with the state of the first"
    BRANCH_ORDER_CHANGES_NOTHING = "permuted branches give permuted outputs, bit by bit"
    REDUCES_TO_ATTENTION = "with the arguments that leave nothing out it is dense attention"


@dataclass(frozen=True)
class Reduction:
    """When a mechanism is dense attention: the arguments to change, given those of a call, and dense attention by its definition."""

    arguments: Callable[[Tensors, Options], Mapping[str, Any]]
    equals: Callable[..., Any]
    dense: tuple[str, ...] = ("query", "key", "value", "key_padding_mask", "causal", "scale")


@dataclass(frozen=True)
class Mechanism:
    """A row of the catalogue. Tests, benchmarks, command line, report and docs all read it."""

    name: str
    summary: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    portable: Callable[..., Any]
    bound: Callable[..., Any]
    kernels: tuple[Kernel, ...]  # newest capability first
    inputs: Mapping[str, Input]
    options: Mapping[str, str]  # operator schema type by argument name
    outputs: Mapping[str, Output]
    more: str  # the argument that asks for the outputs after the first
    work: Callable[[Sizes, Options, int], Work]  # sizes, options, bytes per element
    cases: tuple[Case, ...]  # small, every option: what verify runs
    probes: Callable[[int, bool], tuple[Case, ...]]  # padded width, plain: the calls that need most registers, for the compiler
    workloads: Mapping[str, tuple[Case, ...]]  # by device type: what bench runs
    peers: Mapping[str, Callable[..., Any]]
    laws: tuple[Law, ...] = ()
    equal_lengths: Callable[[Options], bool] = lambda options: options.get("causal") is True  # whether m must be n
    reduction: Reduction | None = None
    exact_pairs: bool = True  # whether `work` counts each pair that the reference sees once, whatever the values of indices
    derived: Callable[[Sizes, Options], Sizes] = lambda sizes, options: {}  # axes that follow from other axes
    packed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # arguments of `function` that are tuples of inputs
    backward_share: float = 2.5  # products of a backward pass, as a multiple of the forward's
    draws: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # sizes worth drawing, of axes that are not as usual
    public: tuple[str, ...] = ()  # arguments that act before dispatch, and that no implementation sees

    @property
    def differentiable(self) -> tuple[str, ...]:
        return tuple(name for name, given in self.inputs.items() if given.differentiable)

    @property
    def defaults(self) -> dict[str, Any]:
        """What options are where a call leaves them out."""
        parameters = signature(self.reference).parameters
        return {name: parameters[name].default for name in self.options if parameters[name].default is not Parameter.empty}

    @property
    def call(self) -> Callable[..., Any]:
        """`function` by the names of the row: inputs apart from each other, outputs in one tuple. Others have such signatures."""
        if not self.packed:
            return self.function
        return partial(_call_packed, self.function, self.packed, self.more)

    def fitted(self, sizes: Sizes, options: Options) -> dict[str, int]:
        """Sizes that belong together, from sizes that need not."""
        fitted = dict(sizes)
        if self.equal_lengths(options):
            fitted["n"] = fitted["m"]
        return {**fitted, **self.derived(fitted, options)}


def _call_packed(function: Callable[..., Any], packed: Mapping[str, tuple[str, ...]], more: str, **arguments: Any) -> Any:
    for name, parts in packed.items():
        given = tuple(arguments.pop(part, None) for part in parts)
        arguments[name] = None if all(part is None for part in given) else given
    returned = function(**arguments)
    return (returned[0], *returned[1]) if arguments.get(more) else returned
