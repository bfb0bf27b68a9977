"""Installs a wheel in a clean environment and answers prompts with it, away from the source tree.

    smoke_wheel.py WHEEL [--constraints FILE] [--python PYTHON]

Nothing is imported from the tree. Fails if an extra came along, if a file is missing, if an answer
does, or if an error about an extra is not one line.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKED = (
    "windlass/py.typed",
    "windlass/data/demo/model.safetensors",
    "windlass/hardware/presets/laptop.toml",
    "/licenses/LICENSE",
)
STRAY = ("tests/", "bench/", "scripts/", "demo/", "native/")
EXTRAS = ("transformers", "matplotlib", "pytest", "safetensors")
LOOK = """
import importlib.util, pathlib, sys, windlass
found = [name for name in sys.argv[2:] if importlib.util.find_spec(name)]
assert not found, f"installed without having been asked for: {found}"
assert pathlib.Path(sys.argv[1]) in pathlib.Path(windlass.__file__).parents, windlass.__file__
"""
ROWS = [
    {
        "custom_id": f"row-{number}",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "demo", "prompt": prompt, "max_tokens": 8, "temperature": 0},
    }
    for number, prompt in enumerate(["The history of", "def main():", "The"])
]


class Installed:
    """A virtual environment in `folder` with the wheel in it, and nothing else of ours."""

    def __init__(self, folder: Path, python: str) -> None:
        self.folder = folder
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
        subprocess.run([python, "-m", "venv", folder / "venv"], check=True, env=self.env)

    def run(self, *words: str | Path, rc: int = 0) -> str:
        """What a program of the environment prints; exits unless it ends as `rc`."""
        said = " ".join("..." if "\n" in str(word) else str(word) for word in words)
        print(f"$ {said}", flush=True)
        done = subprocess.run(
            [self.folder / "venv/bin" / words[0], *words[1:]],
            cwd=self.folder,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.returncode != rc:
            sys.exit(f"{done.stdout}\n{said}: ended with {done.returncode}, expected {rc}")
        return done.stdout


def check_files(wheel: Path) -> None:
    """What must and must not be packed."""
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
    for wanted in PACKED:
        assert any(name.endswith(wanted) for name in names), f"{wheel.name}: no {wanted}"
    stray = [name for name in names if name.startswith(STRAY)]
    assert not stray, f"{wheel.name}: has {stray}"
    native = any(name.endswith("libwindlass_cpu.so") for name in names)
    size = wheel.stat().st_size / 2**20
    print(f"{wheel.name}: {len(names)} files, {size:.1f} MiB, native kernels: {native}")


def install(venv: Installed, wheel: Path, constraints: Path) -> None:
    quiet = ("--quiet", "--disable-pip-version-check")
    venv.run("pip", "install", *quiet, "-c", constraints, wheel)
    venv.run("python", "-c", LOOK, venv.folder, *EXTRAS)


def check_commands(venv: Installed) -> None:
    print(venv.run("windlass", "--version").strip())
    commands = ("run-batch", "generate", "quantize", "plan", "doctor", "synth")
    overview = venv.run("windlass", "--help")
    missing = [command for command in commands if command not in overview]
    assert not missing, f"windlass --help: no {missing}"
    for command in commands:
        venv.run("windlass", command, "--help")


def check_answers(venv: Installed) -> None:
    """The shipped model answers the same by itself, in a file of prompts, and again."""
    (venv.folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    texts = []
    for name in ("first.jsonl", "second.jsonl"):
        venv.run("windlass", "run-batch", "-i", "in.jsonl", "-o", name, "--model", "demo")
        rows = [json.loads(line) for line in (venv.folder / name).read_text().splitlines()]
        assert [row["custom_id"] for row in rows] == [row["custom_id"] for row in ROWS], rows
        assert not any(row["error"] for row in rows), rows
        texts.append([row["response"]["body"]["choices"][0]["text"] for row in rows])
    assert texts[0] == texts[1] and all(texts[0]), texts
    prompt = ROWS[0]["body"]["prompt"]  # type: ignore[index]
    said = venv.run("windlass", "generate", prompt, "--max-tokens", "8", "--temperature", "0")
    assert texts[0][0].strip() in said, (texts[0][0], said)
    print("\n".join(f"  {text!r}" for text in texts[0]))


def check_missing_extra(venv: Installed) -> None:
    """A checkpoint without tokenizer.json asks for the extra in one line."""
    (venv.folder / "slow").mkdir()
    (venv.folder / "slow/vocab.json").write_text("{}")
    words = ("windlass", "generate", "x", "--tokenizer", "slow")
    said = venv.run(*words, rc=1)
    assert "pip install transformers" in said and "Traceback" not in said, said


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--constraints", type=Path, default="constraints.txt")
    parser.add_argument("--python", default=sys.executable, help="makes the environment")
    args = parser.parse_args()
    check_files(args.wheel)
    with tempfile.TemporaryDirectory(prefix="windlass-wheel-") as folder:
        venv = Installed(Path(folder).resolve(), args.python)
        install(venv, args.wheel.resolve(), args.constraints.resolve())
        check_commands(venv)
        check_answers(venv)
        check_missing_extra(venv)
    print(f"{args.wheel.name}: installs and runs")


if __name__ == "__main__":
    main()
