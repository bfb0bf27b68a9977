"""What a script for a GPU asks of few rows: what launches cost, how near one sequence comes to an
oracle, how soon an error is told."""

import time
from functools import partial
from unittest.mock import patch

from gpu.engine_runs import Runs, run_all
from gpu.report import Report
from windlass.device.lane import Lane
from windlass.engine.engine import Engine
from windlass.ids import Part
from windlass.models.spec import Moe
from windlass.perf.sizes import Problem
from windlass.plan import Plan
from windlass.replay.routing_trace import read_trace
from windlass.replay.run import ratio_machine
from windlass.replay.study import NamedMachine, StudyWishes, study
from windlass.replay.trace_file import Trace

_OF_ORACLE = 1 / 1.3
_ERROR_S = 1.0


class FewRows:
    """The checks of one size; each opens its own engines."""

    def __init__(self, runs: Runs, report: Report) -> None:
        self._runs, self._report = runs, report
        self._layer_s = 0.0  # one row, all weights on the device

    def one_row(self) -> None:
        """What a layer takes for one row with all weights on the device, and what of that is not
        reading its weights: launches and Python. By the difference of two numbers of layers."""
        few, more = self._runs.size.few_layers
        (short_s, _), (long_s, engine_plan) = (self._row_s(layers) for layers in (few, more))
        layer_s = (long_s - short_s) / (more - few)
        if layer_s <= 0:
            self._report.skip("launches at one row", f"{more} layers took no longer than {few}: "
                              f"{1e6 * long_s:.0f} and {1e6 * short_s:.0f} us")  # fmt: skip
            return
        self._layer_s = layer_s
        host, device = engine_plan.host, self._runs.place.profile.device
        assert device is not None, "a profile without a device"
        moved = (host.of(Part.BLOCK).slot_bytes or 0) + self._top_k * self._expert_bytes
        least = moved / device.memory_rate
        self._report.add(
            "launches at one row", passed=None, layer_us=1e6 * self._layer_s,
            reading_us=1e6 * least, other_us=1e6 * (self._layer_s - least),
            beside_layers_us=1e6 * (short_s - few * self._layer_s),
        )  # fmt: skip

    def _row_s(self, layers: int) -> tuple[float, Plan]:
        """The quickest of some passes of one row through so many layers."""
        runs, folder = self._runs, self._runs.size.folder(self._runs.place.folder, layers)
        whole = runs.options(model=str(folder), device_memory=None, max_num_seqs=1,
                             max_model_len=self._one_len, moe_expert_cache_size=None)  # fmt: skip
        with runs.open(whole) as engine:
            above = engine.plan.above
            assert (
                above is not None and above.of(Part.EXPERT).slots == above.of(Part.EXPERT).num_parts
            ), f"{layers} layers do not fit the device"
            run_all(engine, runs.requests(1))
            for one in runs.requests(1, output_tokens=runs.size.one_tokens):
                engine.add(one)
            took = []
            while engine.has_work:
                begin = time.perf_counter()
                engine.step()
                took.append(time.perf_counter() - begin)
            return min(took), engine.plan

    def one_sequence(self) -> None:
        """One sequence in the size's share of the device, beside an oracle that knows all routing
        and has the same link. Weights are random, and so is the routing."""
        runs = self._runs
        path = runs.place.folder / f"{runs.size.name}.trace"
        path.unlink(missing_ok=True)
        alone = runs.options(max_num_seqs=1, max_model_len=self._one_len, routing_trace=path)
        with runs.open(alone) as engine:
            requests = runs.requests(1, output_tokens=runs.size.one_tokens)
            ran = runs.run(engine, requests)
            above = engine.plan.above
        assert above is not None, "a plan without the device"
        decode = ran.phases["decode"]
        token_s = decode.seconds / decode.passes
        experts = above.of(Part.EXPERT)
        share = experts.slots / (experts.num_parts or 1)
        numbers = {**ran.numbers, "token_ms": 1e3 * token_s, "resident": share}
        self._report.add("one sequence: memory within its budget", passed=ran.keeps_budget,
                         **numbers)  # fmt: skip
        if not self._layer_s:
            self._report.skip("one sequence: oracle", "what a layer takes was not measured")
            return
        rho = self._top_k * self._expert_bytes / ran.link_rate / self._layer_s
        trace = read_trace(Trace(path))
        machine = NamedMachine("this", rho, partial(ratio_machine, trace, rho=rho))
        found = study(trace, StudyWishes(
            forecasts=(), policies=(), resident=(share,), machines=(machine,), sees=(None,),
            with_recall=False,
        ))  # fmt: skip
        oracle_s = found.runs[0].metrics.token_s * self._layer_s
        self._report.aim("one sequence: oracle over it", got=oracle_s / token_s, wanted=_OF_ORACLE,
                         oracle_ms=1e3 * oracle_s, rho=rho)  # fmt: skip

    def failing_worker(self) -> None:
        """A copy that raises is an error of the pass that waits for it, and the engine closes."""
        runs = self._runs
        raised: list[float] = []
        folder = runs.size.folder(runs.place.folder, runs.size.few_layers[1])
        few = runs.options(model=str(folder), device_memory=None, max_num_seqs=1,
                           max_model_len=self._one_len,
                           moe_expert_cache_size=str(self._top_k))  # fmt: skip

        def steps(*args: object) -> None:
            raised.append(time.perf_counter())
            raise RuntimeError("the copy engine is gone")

        with runs.open(few) as engine:
            run_all(engine, runs.requests(1))
            with patch.object(Lane, "_steps", steps):
                error = _error_of(engine, runs)
            after_s = time.perf_counter() - raised[0] if raised else float("nan")
        passed = error == "the copy engine is gone" and after_s < _ERROR_S
        self._report.add("a worker that fails", passed=passed, error=error, after_s=after_s)

    # --- of the model -----------------------------------------------------------------------------

    @property
    def _problem(self) -> Problem:
        problem = self._runs.problem
        assert problem is not None, "the planner's plan comes first"
        return problem

    @property
    def _top_k(self) -> int:
        return next(b.ffn for b in self._problem.spec.blocks if isinstance(b.ffn, Moe)).top_k

    @property
    def _expert_bytes(self) -> int:
        return self._problem.sizes.slot_bytes[Part.EXPERT]

    @property
    def _one_len(self) -> int:
        """Tokens of the longest request."""
        size = self._runs.size
        return size.prompt_tokens + max(size.one_tokens, size.output_tokens)


def _error_of(engine: Engine, runs: Runs) -> str:
    """What running a request raises."""
    try:
        run_all(engine, runs.requests(1))
    except RuntimeError as error:
        return str(error)
    return "none"
