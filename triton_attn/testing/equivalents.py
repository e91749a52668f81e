"""Seeded faults that change nothing a call can show, by `seeded.Fault.key`, each with the argument why."""

ONE_STEP = "the rows and runs of dense attention have step 1; patterns with other steps bring their own rows"
ONLY_WORK = "visits more keys than it must, and hides them again"

EQUIVALENT: dict[str, str] = {
    "forward_kernel: end = tl.load(end_ptr + batch) -> nothing": ONLY_WORK,
    "forward_kernel: lane_m * step -> lane_m": ONE_STEP,
    "forward_kernel: (tl.minimum(count, BLOCK_M) - 1) * step -> tl.minimum(count, BLOCK_M) - 1": ONE_STEP,
    "forward_kernel: tl.minimum(count, BLOCK_M) - 1 -> tl.minimum(count, BLOCK_M) + 1": ONLY_WORK,
    "sigmoid: x >= 0 -> x > 0": "both sides are one half at 0",
    "backward_kernel: tl.where(inside, dy * p * (1.0 + y * (1.0 - p)), 0.0) -> dy * p * (1.0 + y * (1.0 - p))": (
        "dy is 0 beyond the end, so it differs only where a sum there overflows; test_causal_conv1d has that call"
    ),
}
