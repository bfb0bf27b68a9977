"""How many experts of a layer are missed where text repeats its routing, by how sequences take
turns. Pure arithmetic, for choosing alone: passes on the clock are routed evenly, where it makes no
difference whose row comes next.

Fitted to simulations of the real routing of two small trained models (6 layers of 24 and 12 of 64
experts, top 4) with the eviction that keeps what a sequence will use soonest:
- one sequence, 10 to 67 % resident, and 2, 4 and 8 in lockstep, a third resident: of what a pass
  needs, the share u of the layer's experts, (1 - held) ** (0.7 - log u) is missed: the fewer it
  needs, the more of it is there. Misses beside those of one sequence within 10 %.
- n rows of one sequence need as many experts as 5.5 log(1 + n / 5) independent ones, within 3 %
  from 1 to 32 rows, the same for both models.
- bursts of 16 and 32 tokens, a third resident: 1.07 and 1.04 (24 experts), 1.24 and 1.12 (64)
  times the misses of one sequence; simulated 1.04 and 1.02, 1.30 and 1.15.
It needs an eviction that knows each sequence's own uses of its last 8 to 64 tokens. With averages
over all text (half life 4096) bursts and lockstep read as much as one sequence does; with those of
the last rows, whosever they are, bursts of 16 read more than lockstep (1.7 times one sequence).
Not known: larger models, top 8, sequences of one subject, more than 8 sequences in lockstep (with a
third of 64 experts resident the formula has lockstep ahead again from 46 on), other shares than a
third where several take turns.
"""

from math import exp, log, log1p

from windlass.models.spec import Moe
from windlass.perf.flops import active_experts

_ALIKE = 5.5  # independent rows that a sequence's grow by, each time that they grow e-fold
_MOST_EVEN = 0.999  # share of the experts that a row uses, as far as logarithms go


def missed_together(moe: Moe, held: float, rows: int) -> float:
    """Experts that a pass of `rows` rows, each of another sequence, misses in a layer; the share
    `held` of all is in memory."""
    share = active_experts(moe.num_experts, moe.top_k, rows) / moe.num_experts
    return float(moe.num_experts * share * (1 - held) ** (0.7 - log(share))) if held < 1 else 0.0


def missed_in_burst(moe: Moe, held: float, tokens: int) -> float:
    """The same of a pass of one row on average, where a sequence has `tokens` of them before the
    next: it fetches what it uses, but for what others have left by chance, until what is held is
    its own; then it misses as if it were alone."""
    alone = missed_together(moe, held, 1)
    if not alone:
        return 0.0
    needs = -log1p(-min(_MOST_EVEN, moe.top_k / moe.num_experts))
    until_own = min(float(tokens), 5 * (exp(-log1p(-held) / (needs * _ALIKE)) - 1))
    used = active_experts(moe.num_experts, moe.top_k, _ALIKE * log1p(until_own / 5))
    return max(alone, (used * (1 - held) + (tokens - until_own) * alone) / tokens)
