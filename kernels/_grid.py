"""How many programs one launch may have."""


class GridError(ValueError):
    """More programs than one launch can have."""


def grid(programs: int) -> tuple[int]:
    """A grid of so many programs along its first axis, which is the long one."""
    if programs >= 2**31:
        raise GridError(f"{programs} programs; a launch has fewer than 2^31, so split the batch")
    return (programs,)
