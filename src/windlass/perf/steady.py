"""A whole job as a steady state, in closed form: good enough to rank plans by. Pure arithmetic."""

from collections.abc import Callable

from windlass.schedule.batch import CHUNK_TOKENS
from windlass.workload import Workload


def steady_seconds(
    work: Workload, alive: int, rows: float, seconds: Callable[[float, float], float]
) -> float:
    """Seconds of the job with `alive` sequences at once and at most `rows` rows per pass: the first
    sequences' prompts, then passes until all tokens are generated, some of which carry the prompts
    of those who come later. `seconds(decode rows, prompt rows)`: of one pass."""
    output = work.mean_output_tokens
    prompt = work.mean_prompt_tokens - work.mean_shared_tokens  # that is computed
    count = work.num_sequences
    filling = max(1.0, alive * prompt / rows)
    passes = max(max(work.output_tokens) - 1, count * (output - 1) / alive, 0)
    later = max(0.0, work.computed_prompt_tokens - alive * prompt)
    most = max(rows - alive, CHUNK_TOKENS)  # prompt rows beside the rows that decode
    mixed = later / most
    begin = filling * seconds(0, max(1.0, alive * prompt / filling))
    middle = mixed * seconds(alive, min(most, later)) if later else 0.0
    decode = count * (output - 1) / max(passes, 1)
    rest = max(0.0, passes - mixed) * seconds(max(1.0, decode), 0) if passes else 0.0
    return begin + middle + rest
