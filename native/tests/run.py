"""Builds the native tests in every way and runs them: `make test-native`. Standard library only.

    python native/tests/run.py [--jobs N]

What is not installed is skipped by name: a compiler, objdump, an emulator.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import build_native  # noqa: E402

BUILDS = HERE.parents[1] / "build/native"
_NO_FORK = ("--skip", "a_forked_child_computes")
# Of an emulated processor: what the library must find there. No emulator that Debian has knows
# AVX-512: those instruction sets run where the machine has them, and are compiled everywhere.
_PROCESSORS = {"qemu64": "", "Haswell": "avx2", "max": "avx2"}


class Failed(Exception):
    """A step that did not pass; its output has been printed."""


def main() -> int:
    """0 if every step passed or was skipped."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    jobs = parser.parse_args().jobs
    if (lack := build_native.missing()) is not None:
        print(f"test-native: skipped: {lack}")
        return 0
    try:
        _plain(jobs)
        _sanitized(jobs, "address,undefined")
        _sanitized(jobs, "thread", "--quick", "--set", "avx2")  # one pool for all sets
    except Failed as failure:
        print(f"test-native: {failure}")
        return 1
    return 0


def _plain(jobs: int) -> None:
    """As it is installed, with warnings as errors: which instructions are where, and on processors
    that lack some."""
    folder = BUILDS / "test"
    program = _build(folder, jobs, "-DWERROR=ON")
    if shutil.which("objdump") is None:
        print("instructions: skipped: no objdump (Debian: binutils)")
    else:
        check = HERE / "check_instructions.py"
        _step("instructions", sys.executable, check, folder / build_native.NAME)
    _step("tests", program, "--quick")
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        print("other processors: skipped: no qemu-x86_64 (Debian: qemu-user)")
        return
    for processor, found in _PROCESSORS.items():
        if processor == "Haswell":
            arguments = ("--only", "every_storage_widens_exactly")
        else:
            arguments = _NO_FORK
        _step(
            f"processor {processor}", emulator, "-cpu", processor, program,
            "--quick", "--expect", found, *arguments,
        )  # fmt: skip


def _sanitized(jobs: int, sanitizer: str, *arguments: str) -> None:
    """With the tile registers of AMX in software, where the processor has none."""
    options = (f"-DSANITIZE={sanitizer}", "-DAMX_EMULATED=ON")
    program = _build(BUILDS / sanitizer.replace(",", "-"), jobs, *options)
    _step(f"sanitizer {sanitizer}", program, *arguments)


def _build(folder: Path, jobs: int, *options: str) -> Path:
    build_native.configure(folder, "-DTESTS=ON", *options)
    _step(f"build {folder.name}", *build_native.build_command(folder, jobs))
    return folder / "tests/test_native"


def _step(name: str, *command: object) -> None:
    """Runs a command; prints how long it took, and its output if it fails."""
    start = time.monotonic()
    done = subprocess.run(
        [str(one) for one in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        print(done.stdout[-20_000:])
        raise Failed(f"{name}: exit status {done.returncode}")
    print(f"{name}: passed in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
