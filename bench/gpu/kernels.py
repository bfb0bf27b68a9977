"""The kernels on a GPU: how far from fp64, whether the bits of a row are its own, how fast.

    python bench/gpu/kernels.py --out FOLDER      on a machine with a GPU, from the source folder
    TRITON_INTERPRET=1 ... --dry --out FOLDER     tiny shapes in the guarded interpreter, no GPU

One line per check, and FOLDER/kernels.json. A check that fails does not end the others; 1 at the
end if one did.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

if find_spec("triton") is None:
    print("bench/gpu/kernels.py: skipped: no Triton, which torch for a GPU brings along")
    sys.exit(0)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton

from gpu.expert_slots import FORMATS, Layer, Sizes, make_layer
from gpu.row_checks import DRY as DRY_ROWS
from gpu.row_checks import RowSizes, row_checks
from gpu.tolerances import TOLERANCES, error
from windlass.kernels.interface import ExpertGroups
from windlass.kernels.reference import TorchKernels
from windlass.kernels.triton.launch import ExpertSlots, run_experts, run_experts_few
from windlass.kernels.triton.tiles import expert_tile, few_tile

ROOT = Path(__file__).resolve().parents[2]
SEED = 7
BF16 = torch.bfloat16
VARIANTS = {"16": 16, "32": 32, "few": 1}  # rows of a tile; few: without a dot


class Shapes(NamedTuple):
    """What is run. Lists of rows begin with the fewest."""

    checked: Sizes  # against fp64, with each of `all_formats`
    ragged: Sizes
    all_formats: tuple[str, ...]
    timed: Sizes
    top_k: int
    rows: tuple[int, ...]
    few_rows: int  # at most
    formats: tuple[str, ...]  # whose bits and rates are looked at


REAL = Shapes(Sizes(8, 2048, 768), Sizes(4, 1440, 720), tuple(FORMATS),
              Sizes(128, 2048, 768, spare=0), 8, (1, 4, 16, 64, 256, 1024, 4096, 16384), 16,
              ("bf16", "int4 g128"))  # fmt: skip
DRY = Shapes(Sizes(2, 64, 64), Sizes(2, 80, 48), ("bf16", "mxfp4"), Sizes(2, 64, 48), 1, (1, 18), 1,
             ("bf16",))  # fmt: skip


@dataclass
class Report:
    """Prints checks as they come, and keeps them."""

    checks: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, *, passed: bool, **numbers: Any) -> None:
        self.checks.append({"check": name, "passed": passed, **numbers})
        shown = ", ".join(f"{key} {value}" for key, value in numbers.items())
        print("ok  " if passed else "FAIL", name, shown, flush=True)


class Routed(NamedTuple):
    """Rows of a layer and who has which expert, on the device."""

    x_TD: torch.Tensor
    ids_TA: torch.Tensor
    groups: ExpertGroups


class Bench:
    """Runs variants of the kernels on a device: a GPU, or the interpreter's CPU."""

    def __init__(self, shapes: Shapes, *, is_dry: bool) -> None:
        self.shapes, self.report = shapes, Report()
        self.device = torch.device("cpu" if is_dry else "cuda")
        self._kernels = TorchKernels()

    def on_device(self, layer: Layer, dtype: torch.dtype) -> ExpertSlots:
        return replace(layer.experts_for(dtype), arena=layer.arena.to(self.device))

    def route(self, sizes: Sizes, rows: int) -> Routed:
        """The first rows are the same whatever their number."""
        generator = torch.Generator().manual_seed(SEED)
        most = max(self.shapes.rows)
        x_TD = torch.randn(most, sizes.hidden, generator=generator)[:rows].to(BF16)
        scores = torch.rand(most, sizes.experts, generator=generator)[:rows]
        ids_TA = scores.topk(min(self.shapes.top_k, sizes.experts))[1]
        groups = self._kernels.group(ids_TA, sizes.experts)
        on_device = [t.to(self.device) for t in (x_TD, ids_TA, *groups)]
        return Routed(on_device[0], on_device[1], ExpertGroups(*on_device[2:]))

    def launch(
        self, variant: str, routed: Routed, slots_E: torch.Tensor, experts: ExpertSlots
    ) -> tuple[Callable[[], None], torch.Tensor]:
        """A call, and the outputs by place that it fills."""
        shape = (routed.ids_TA.numel(), experts.hidden)
        out_PD = torch.full(shape, float("nan"), device=self.device)
        slots_E = slots_E.to(self.device)
        if variant == "few":
            tile = few_tile()
            return lambda: run_experts_few(
                routed.x_TD, routed.ids_TA, slots_E, experts, out_PD, tile
            ), out_PD
        tile = expert_tile(experts, BF16, rows=VARIANTS[variant])
        return lambda: run_experts(
            routed.x_TD, routed.groups, slots_E, experts, out_PD, tile
        ), out_PD

    def run(self, variant: str, routed: Routed, layer: Layer, experts: ExpertSlots) -> torch.Tensor:
        call, out_PD = self.launch(variant, routed, layer.slots_E, experts)
        call()
        return out_PD.cpu()

    # --- the checks -------------------------------------------------------------------------------

    def tolerances(self) -> None:
        """Every format, at a real shape and at one that no tile divides."""
        for what, sizes in (("real", self.shapes.checked), ("ragged", self.shapes.ragged)):
            routed = self.route(sizes, self.shapes.rows[0] + 2)
            for name in self.shapes.all_formats:
                layer = _layer(FORMATS[name], sizes)
                groups = ExpertGroups(*(t.cpu() for t in routed.groups))
                want = layer.reference(routed.x_TD.cpu(), groups)
                experts = self.on_device(layer, BF16)
                for variant in VARIANTS:
                    got = error(self.run(variant, routed, layer, experts), want)
                    allowed = TOLERANCES[torch.float32 if variant == "few" else BF16]
                    self.report.add(f"error of {name}, {what}, {variant}", passed=got < allowed,
                                    got=got, allowed=allowed)  # fmt: skip

    def bits(self) -> None:
        """Row 0 whatever the number of rows, the rows of a tile, and the slots; and twice."""
        sizes = self.shapes.timed
        for name in self.shapes.formats:
            layer = _layer(FORMATS[name], sizes)
            experts = self.on_device(layer, BF16)
            first: dict[str, torch.Tensor] = {}
            for rows in self.shapes.rows:
                for variant in VARIANTS:
                    if variant == "few" and rows > self.shapes.few_rows:
                        continue
                    got = self._first_row(variant, self.route(sizes, rows), layer, experts)
                    kind = "few" if variant == "few" else "dot"
                    self._same(f"{name}, {variant}, {rows} rows", first.setdefault(kind, got), got)
            routed = self.route(sizes, 1)
            moved = _layer(FORMATS[name], sizes._replace(spare=5))
            got = self._first_row("16", routed, moved, self.on_device(moved, BF16))
            self._same(f"{name}, other slots", first["dot"], got)
            alike = torch.equal(first["few"], first["dot"])
            self.report.add(f"{name}: few and dot alike (a fact)", passed=True, got=alike)

    def _first_row(self, *args: Any) -> torch.Tensor:
        """Outputs of the places of row 0; arguments of `run`."""
        sizes = self.shapes.timed
        return self.run(*args)[: min(self.shapes.top_k, sizes.experts)]

    def _same(self, name: str, want: torch.Tensor, got: torch.Tensor) -> None:
        self.report.add(f"bits of {name}", passed=torch.equal(want, got))

    def rates(self) -> None:
        """Microseconds, bytes of the experts that are used, and operations, by second."""
        sizes = self.shapes.timed
        for name in self.shapes.formats:
            layer = _layer(FORMATS[name], sizes)
            experts = self.on_device(layer, BF16)
            for rows in self.shapes.rows:
                routed = self.route(sizes, rows)
                used = int((routed.groups.counts_E > 0).sum())
                places = routed.ids_TA.numel()
                for variant in VARIANTS:
                    if variant == "few" and rows > self.shapes.few_rows:
                        continue
                    call, _ = self.launch(variant, routed, layer.slots_E, experts)
                    seconds = self._median_s(call)
                    self.report.add(
                        f"rate of {name}, {variant}, {rows} rows", passed=True,
                        us=round(seconds * 1e6, 1),
                        gb_per_s=round(used * layer.slot_bytes / seconds / 1e9, 1),
                        tflop_per_s=round(
                            6 * places * sizes.hidden * sizes.inner / seconds / 1e12, 3),
                    )  # fmt: skip
                    if variant != "16" and self.device.type == "cuda":
                        self._graph(f"{name}, {variant}, {rows} rows", routed, layer, experts)

    def _graph(self, name: str, routed: Routed, layer: Layer, experts: ExpertSlots) -> None:
        """Captured and replayed: the same bits, and what it takes without launches."""
        variant = "few" if ", few," in name else "32"
        call, out_PD = self.launch(variant, routed, layer.slots_E, experts)
        call()
        want = out_PD.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        out_PD.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        us = self._median_s(graph.replay) * 1e6
        self.report.add(f"graph of {name}", passed=torch.equal(out_PD, want), us=round(us, 1))

    def rows(self) -> None:
        """Attention, products and small kernels."""
        for check in row_checks(RowSizes() if self.device.type == "cuda" else DRY_ROWS):
            numbers = dict(got=check.error, allowed=check.allowed, own_bits=check.has_own_bits)
            self.report.add(check.name, passed=check.passed, **numbers, **check.rate)

    def _median_s(self, call: Callable[[], object]) -> float:
        seconds = []
        if self.device.type == "cpu":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        call()
        for _ in range(20):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(seconds)


def _layer(make: Any, sizes: Sizes) -> Layer:
    """The same weights whatever `sizes.spare`."""
    torch.manual_seed(SEED)
    return make_layer(make, sizes)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True, help="folder of kernels.json")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, in the interpreter")
    args = parser.parse_args(arguments)
    if not args.dry and not torch.cuda.is_available():
        print("bench/gpu/kernels.py: skipped: torch finds no GPU")
        return 0
    if args.dry:  # as it is, the interpreter multiplies the bits of bf16
        sys.path.insert(0, str(ROOT / "tests" / "support"))
        import triton_guard

        triton_guard.install()
    bench = Bench(DRY if args.dry else REAL, is_dry=args.dry)
    machine = "interpreter" if args.dry else torch.cuda.get_device_name()
    print(machine, "torch", torch.__version__, "triton", triton.__version__, flush=True)
    for check in (bench.tolerances, bench.bits, bench.rates, bench.rows):
        start = time.perf_counter()
        check()
        print(f"{check.__name__}: {time.perf_counter() - start:.1f} s", flush=True)
        result = {"machine": machine, "torch": torch.__version__, "triton": triton.__version__,
                  "checks": bench.report.checks}  # fmt: skip
        (args.out / "kernels.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    failed = [c["check"] for c in bench.report.checks if not c["passed"]]
    print(f"{len(bench.report.checks) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
