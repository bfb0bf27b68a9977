"""MoE-Lightning's optimiser as published (backend/optimizer.py of its artifact): a baseline that
the roofline's own functions are checked with. fp16, one GPU; bytes, seconds, FLOP.

Its policy: attention on the host, experts on the GPU, keys and values on the host; `mu` sequences
per micro-batch, `n_ub` micro-batches, a share `resident` of the expert weights on the GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from windlass.perf.roofline import Level, Machine, Task, seconds

GPU, HOST = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Model, lengths and machine, in the paper's symbols."""

    layers: int
    h1: int
    h2: int
    n_q: int
    n_kv: int
    n_e: int
    k: int
    s: int  # prompt
    n: int  # generated
    m_g: float
    m_c: float
    b_cg: float
    b_g: float
    b_c: float
    p_g: float
    p_c: float

    @property
    def machine(self) -> Machine:
        levels = (Level("device", self.p_g, self.b_g), Level("host", self.p_c, self.b_c))
        return Machine(levels, (self.b_cg,))

    @property
    def h_kv(self) -> int:
        return self.h1 * self.n_kv // self.n_q

    @property
    def d_h(self) -> int:
        return self.h1 // self.n_q

    @property
    def w_i(self) -> int:
        """Bytes of one layer's experts."""
        return 6 * self.h1 * self.h2 * self.n_e

    @property
    def w_other(self) -> float:
        """Bytes of all attention weights."""
        return (4 * self.h1**2 + 4 * self.h1**2 * self.n_kv / self.n_q) * self.layers

    @property
    def gpu_limit(self) -> float:
        return 0.86 * self.m_g

    @property
    def host_limit(self) -> float:
        return 0.8 * self.m_c


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the optimiser found and the figures it printed."""

    mu: int
    n_ub: int
    low: float  # least and most share of resident experts that fits
    high: float
    link_s: float
    ffn_s: float
    cpu_s: float
    tokens_s: float
    gpu_bytes: float
    host_bytes: float
    inter_bytes: float
    home_bytes: float

    @property
    def sequences(self) -> int:
        return self.mu * self.n_ub

    @property
    def layer_s(self) -> float:
        return max(self.link_s, self.ffn_s, self.cpu_s)


def evaluate(one: Setting, mu: int, n_ub: int) -> Policy | None:
    """The policy (mu, n_ub) with as many resident experts as fit; None if it does not fit."""
    sequences, tokens = mu * n_ub, one.s + one.n
    inter = 2.4 * mu * one.k * one.s * (one.h1 + 3 * one.h2)
    home = max(
        4 * one.h1 * sequences,
        4 * one.h1 * mu * one.s + 2 * one.h1 * sequences * one.s + 8 * one.s * one.h_kv * mu,
    )
    gpu = one.w_other + home + inter + 2 * one.w_i
    host = 4 * tokens * one.h_kv * sequences * one.layers + 2 * one.h1 * sequences * one.s
    high = min(1.0, (one.gpu_limit - gpu) / (one.w_i * (one.layers - 2)))
    low = max(0.0, 1 - (one.host_limit - host) / (one.w_i * (one.layers + 2)))
    if low > high:
        return None
    ffn = Task("ffn", 6 * mu * one.h1 * one.h2 * one.k,
               (2 * mu * one.h1 + 2 * mu * one.h2 + one.w_i, 0))  # fmt: skip
    attention = Task("attention", 2 * mu * tokens * one.n_q * (one.d_h + 1),
                     (0, 4 * mu * one.h1 + 4 * mu * tokens * one.h_kv))  # fmt: skip
    link_s = one.w_i * (1 - high) / one.b_cg
    ffn_s = n_ub * seconds(one.machine, ffn, at=GPU, home=GPU)
    cpu_s = n_ub * seconds(one.machine, attention, at=HOST, home=HOST)
    pass_s = max(link_s, ffn_s, cpu_s) * one.layers
    streamed = 2 * one.w_i * (1 - high)
    return Policy(
        mu=mu, n_ub=n_ub, low=low, high=high, link_s=link_s, ffn_s=ffn_s, cpu_s=cpu_s,
        tokens_s=sequences * one.n / (pass_s * (one.n - 1)),
        gpu_bytes=one.w_other + one.w_i * one.layers * high + home + streamed + inter,
        host_bytes=one.w_i * one.layers * (1 - high) + host + streamed,
        inter_bytes=inter, home_bytes=home,
    )  # fmt: skip


def optimise(one: Setting, *, step: int = 32) -> tuple[Policy, Policy, int]:
    """The best policy, the best with another (mu, n_ub), and the mu at which the search ended."""
    best: Policy | None = None
    others: list[Policy] = []
    for mu in _sizes(step):
        if evaluate(one, mu, 1) is None:
            assert best is not None
            return best, max((p for p in others if p is not best), key=lambda p: p.tokens_s), mu
        n_ub, before = 1, 0.0
        last = None
        while (found := evaluate(one, mu, n_ub)) is not None and found.tokens_s >= before:
            last = found
            before, n_ub = found.tokens_s, n_ub + 1
            if best is None or found.tokens_s >= best.tokens_s:
                best = found
        if last is not None:
            others.append(last)
    raise AssertionError("the sizes have no end")


def _sizes(step: int) -> Iterator[int]:
    yield from (1, 2, 3)
    mu = 4
    while True:
        yield mu
        mu += step
