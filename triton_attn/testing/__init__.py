"""Property-based correctness testing of Triton kernels: anybody's, on a CPU or a GPU.

`check_kernel` does it all in one call. Its parts serve alone: `strict_interpreter` makes Triton's interpreter see what a GPU does not
forgive; `compare` and `assert_matches` are the tolerance policy; `strategies` draws sizes, layouts and dtypes; `bite` plants faults
in a kernel to see whether the tests catch them.
"""

from triton_attn.testing import inputs, interpreter, numerics, seeded, strategies
from triton_attn.testing.interpreter import KernelFault, StrictnessError, strict_interpreter
from triton_attn.testing.kernel_check import Checked, CheckError, check_kernel
from triton_attn.testing.numerics import Comparison, assert_matches, assert_right, compare
from triton_attn.testing.seeded import bite

__all__ = [
    "CheckError",
    "Checked",
    "Comparison",
    "KernelFault",
    "StrictnessError",
    "assert_matches",
    "assert_right",
    "bite",
    "check_kernel",
    "compare",
    "inputs",
    "interpreter",
    "numerics",
    "seeded",
    "strategies",
    "strict_interpreter",
]
