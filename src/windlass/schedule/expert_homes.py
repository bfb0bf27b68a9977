"""Which experts the host computes for generated rows, beside a device. Names only."""

from functools import cache

_STEP = 0.6180339887498949  # of the golden ratio: layers begin at places far from each other


@cache
def host_experts(layer: int, num_experts: int, share: float) -> tuple[bool, ...]:
    """Of a layer's experts, a share of 0 to 1, evenly spread: nothing else decides it, so that the
    bits of a row do not depend on what else is in its pass."""
    first = layer * _STEP % 1 if share < 1 else 0.0
    steps = [int(first + expert * share) for expert in range(num_experts + 1)]
    return tuple(steps[i] < steps[i + 1] for i in range(num_experts))
