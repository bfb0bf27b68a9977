"""Registers, spills, shared memory, matrix instructions and widest loads of every kernel on every
architecture, without a GPU: `python bench/gpu/kernel_table.py [--check] kernel_table.json`.

Written, it is committed. Checked, all is compiled again, and what got worse is an error: spills
that were not there, more shared memory than an architecture has, a matrix instruction that is
gone, loads of weights below 8 bytes.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton

from gpu.ahead_of_time import Resources, compiled, resources
from gpu.launches import launches
from gpu.row_launches import row_launches

# bytes of shared memory that one block may have
SHARED = {80: 166912, 90: 232448, 120: 101376, 86: 101376, 89: 101376, 75: 65536}
LEAST_LOAD = 8

Table = dict[str, dict[str, Resources]]  # architecture -> kernel


def compile_all(capabilities: list[int]) -> Table:
    """Every kernel of `launches`; prints how far it is."""
    table: Table = {}
    for capability in capabilities:
        rows = table[f"sm_{capability}"] = {}
        seen: set[str] = set()  # tiles are planned alike for all formats
        for name, launch in chain(launches(capability), row_launches(capability)):
            for kernel, made in compiled(capability, launch).items():
                if made.hash not in seen:
                    rows[f"{name}: {kernel}"] = resources(made)
                    print(f"sm_{capability}", f"{name}: {kernel}", flush=True)
                seen.add(made.hash)
    return table


def faults(table: Table, known: Table) -> list[str]:
    """What got worse since `known`, one line each."""
    found: list[str] = []
    for architecture, rows in table.items():
        before = known.get(architecture, {})
        limit = SHARED[int(architecture.removeprefix("sm_"))]
        for name in sorted(rows.keys() ^ before.keys()):
            found.append(f"{architecture}, {name}: only in one of both; make kernel-table")
        for name in rows.keys() & before.keys():
            found += [f"{architecture}, {name}: {fault}" for fault in
                      worse(rows[name], before[name], limit)]  # fmt: skip
    return found


def worse(now: Resources, before: Resources, limit: int) -> list[str]:
    """What of one kernel did. `limit`: bytes of shared memory."""
    found = []
    if now.spills > before.spills:
        found.append(f"spills: got {now.spills}, allowed {before.spills}")
    if now.shared > max(limit, before.shared):
        found.append(f"shared memory: got {now.shared} bytes, allowed {limit}")
    if now.mma != before.mma:
        found.append(f"matrix instruction: got {now.mma or 'none'}, was {before.mma or 'none'}")
    if now.widest_load < min(LEAST_LOAD, before.widest_load):
        found.append(f"widest load: got {now.widest_load} bytes, allowed {LEAST_LOAD}")
    if now.narrow_loads > before.narrow_loads:
        found.append(f"loads below 8 bytes: got {now.narrow_loads}, allowed {before.narrow_loads}")
    return found


def read(path: Path) -> Table:
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {
        architecture: {name: Resources(**row) for name, row in rows.items()}
        for architecture, rows in stored["kernels"].items()
    }


def to_text(table: Mapping[str, Mapping[str, Resources]]) -> str:
    """One kernel per line, so that a change is one in a diff."""
    lines = [f'{{\n"triton": "{triton.__version__}",\n"kernels": {{']
    for i, (architecture, rows) in enumerate(table.items()):
        lines.append(f'"{architecture}": {{')
        lines += [
            f"{json.dumps(name)}: {json.dumps(row._asdict())}{',' * (j + 1 < len(rows))}"
            for j, (name, row) in enumerate(rows.items())
        ]
        lines.append("}" + "," * (i + 1 < len(table)))
    return "\n".join([*lines, "}}"]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument(
        "--architectures", type=int, nargs="+", help="all; checked: those of the table"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    known = [int(name.removeprefix("sm_")) for name in read(args.path)] if args.check else []
    table = compile_all(args.architectures or known or list(SHARED))
    if not args.check:
        args.path.write_text(to_text(table), encoding="utf-8")
        return 0
    found = faults(table, read(args.path))
    print("\n".join(found) or f"{sum(map(len, table.values()))} kernels are as they were")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
