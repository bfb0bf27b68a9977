"""Builds the native library with CMake. Called by setup.py at installation and by `make native`,
which builds into src/. Standard library only."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME = "libwindlass_cpu.so"
IN_PLACE = HERE.parent / "src/windlass/kernels/cpu" / NAME
FOLDER = HERE.parent / "build/native/release"
COST = "torch's kernels will be used (few rows: up to 10 times slower)"


def missing() -> str | None:
    """What a build lacks here, in words."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"needs Linux on x86-64, not {platform.system()} on {platform.machine()}"
    compilers = [name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name]
    if not any(shutil.which(name.split()[0]) for name in compilers):
        return "no C++ compiler"
    if _tool("cmake") is None:
        return "no cmake"
    if _tool("ninja") is None and shutil.which("make") is None:
        return "no ninja, no make"
    return None


def build(target: Path, *, folder: Path = FOLDER) -> None:
    """Compiles in `folder` and puts the library at `target`. Raises CalledProcessError."""
    configure(folder)
    _run(*build_command(folder, os.cpu_count() or 1), "--target", "windlass_cpu")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    shutil.copyfile(folder / NAME, partial)
    partial.replace(target)  # processes that run the old one keep it


def configure(folder: Path, *options: str) -> None:
    """Makes or refreshes a build folder. Raises CalledProcessError."""
    cmake, ninja = _tool("cmake"), _tool("ninja")
    assert cmake is not None, "missing() was not asked"
    # tools of an isolated installation are elsewhere each time
    tool = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]
    if _generator(folder) not in (None, tool[1]):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _run(cmake, "-S", HERE, "-B", folder, *tool, "-DCMAKE_BUILD_TYPE=Release", *options)


def build_command(folder: Path, jobs: int) -> list[str]:
    """What compiles a configured folder."""
    return [_tool("cmake") or "cmake", "--build", str(folder), "--parallel", str(jobs)]


def _tool(name: str) -> str | None:
    """A program beside this Python, which need not be on the path, or on the path."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def _generator(folder: Path) -> str | None:
    cache = folder / "CMakeCache.txt"
    lines = cache.read_text().splitlines() if cache.exists() else []
    found = [line.partition("=")[2] for line in lines if line.startswith("CMAKE_GENERATOR:")]
    return found[0] if found else None


def _run(*command: object) -> None:
    """Runs a command; its output is shown if it fails."""
    done = subprocess.run([str(one) for one in command], capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-20_000:], done.stderr[-20_000:], sep="\n", file=sys.stderr)
        done.check_returncode()


def main() -> int:
    """Builds in place. Without the tools that is no error; a failed build is."""
    if (lack := missing()) is not None:
        print(f"native kernels: not built: {lack}; {COST}", file=sys.stderr)
        return 0
    try:
        build(IN_PLACE)
    except subprocess.CalledProcessError as error:
        print(f"native kernels: the build failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
