"""transformers with accelerate's offloading, under the cap of a GPU's memory that `engine.py` has,
on a checkpoint of the same shape with random weights.

    python bench/gpu/peer_transformers.py --size NAME --out FOLDER [--minutes 9] [--layers N]

The checkpoint is written into FOLDER first (or found there), so the disk must have room: fewer
layers want as much less. Weights that do not fit the cap stay in the host's memory and are copied
for each pass; half of the cap is left for activations and keys and values. Batches of the job's
prompts grow until one does not fit or time is up. Says so, and measures nothing, where transformers
or accelerate is missing.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from gpu.report import Report
from gpu.sizes import SIZES, Size
from windlass.checkpoint.synthetic import write_random_checkpoint
from windlass.device.process_memory import available_bytes

_WEIGHTS = 0.5  # of the cap
_BATCHES = (1, 8, 64, 256, 1024)
_SEED = 11


def missing() -> list[str]:
    """Packages that are not installed."""
    return [name for name in ("transformers", "accelerate") if find_spec(name) is None]


class Peer:
    """One model, loaded as accelerate places it; on the CPU alone where `is_dry`."""

    def __init__(self, size: Size, report: Report, *, is_dry: bool) -> None:
        self._size, self._report, self._is_dry = size, report, is_dry
        self._model: Any = None
        self._is_over = False  # a batch did not fit: larger ones are not tried

    def load(self, folder: Path) -> None:
        """Writes the checkpoint where there is none, and loads it."""
        import transformers

        begin = time.monotonic()
        if not (folder / "config.json").exists():
            write_random_checkpoint(self._size.config, folder)
        written_s = time.monotonic() - begin
        where: dict[str, Any] = {}
        if not self._is_dry:
            weights = int(_WEIGHTS * self._size.device_memory)
            most = {0: weights, "cpu": int(0.9 * available_bytes())}
            where = {"device_map": "auto", "max_memory": most}
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.bfloat16, **where
        ).eval()
        places = getattr(self._model, "hf_device_map", {})
        self._report.add(
            "load", passed=None, version=transformers.__version__, written_s=written_s,
            loaded_s=time.monotonic() - begin - written_s,
            parts_on_gpu=sum(place == 0 for place in places.values()), parts=len(places),
        )  # fmt: skip

    def batch(self, count: int) -> None:
        """Prompts of so many sequences at once, then one token of each a pass, by `forward`."""
        name = f"{count} sequences"
        if self._is_over or self._model is None:
            self._report.skip(name, "a smaller batch or loading failed")
            return
        size = self._size
        draw = torch.Generator().manual_seed(_SEED)
        limit = min(int(size.config["vocab_size"]), 32000)
        device = "cpu" if self._is_dry else "cuda"
        ids = torch.randint(3, limit, (count, size.prompt_tokens), generator=draw).to(device)
        try:
            with torch.inference_mode():
                prompt_s, decode_s = self._run(ids)
        except torch.OutOfMemoryError as error:
            self._is_over = True
            self._report.add(name, passed=None, out_of_memory=str(error).partition("\n")[0])
            return
        peak = 0 if self._is_dry else torch.cuda.max_memory_reserved()
        self._report.add(
            name, passed=peak <= size.device_memory, peak_gib=peak / 2**30,
            prompt_tokens_per_s=ids.numel() / prompt_s,
            decode_tokens_per_s=count * (size.output_tokens - 1) / decode_s,
        )  # fmt: skip

    def _run(self, ids: torch.Tensor) -> tuple[float, float]:
        """Seconds of the prompts, and of the passes behind the first token."""
        begin = time.perf_counter()
        found = self._model(ids, use_cache=True, logits_to_keep=1)
        tokens = found.logits[:, -1:].argmax(-1)
        tokens.tolist()  # waits
        middle = time.perf_counter()
        for _ in range(self._size.output_tokens - 1):
            found = self._model(
                tokens, past_key_values=found.past_key_values, use_cache=True, logits_to_keep=1
            )
            tokens = found.logits[:, -1:].argmax(-1)
            tokens.tolist()
        return middle - begin, time.perf_counter() - middle


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="transformers with accelerate under a cap.")
    add = parser.add_argument
    add("--size", required=True, choices=SIZES)
    add("--out", type=Path, required=True, help="folder of the results and of the checkpoint")
    add("--minutes", type=float, default=9.0, help="no batch begins that would end later")
    add("--layers", type=int, help="fewer, in as much less of the GPU")
    args = parser.parse_args(arguments)
    is_dry = args.size == "dry"
    absent = [] if is_dry and find_spec("transformers") else missing()
    if absent:
        print(f"bench/gpu/peer_transformers.py: skipped: {', '.join(absent)} is not installed")
        return 0
    if not is_dry and not torch.cuda.is_available():
        print("bench/gpu/peer_transformers.py: skipped: torch finds no GPU")
        return 0
    size = SIZES[args.size] if args.layers is None else SIZES[args.size].with_layers(args.layers)
    args.out.mkdir(parents=True, exist_ok=True)
    if not is_dry:  # the cap, whatever asks for it
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(size.device_memory / total)
    about = {
        "bench": "gpu/peer_transformers", "size": size.name, "layers": size.layers,
        "machine": "CPU" if is_dry else torch.cuda.get_device_name(), "torch": torch.__version__,
        "device_memory": size.device_memory, "share_for_weights": _WEIGHTS,
        "prompt_tokens": size.prompt_tokens, "output_tokens": size.output_tokens,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    report = Report(args.out / f"{size.name}-transformers.json", about, minutes=args.minutes)
    peer = Peer(size, report, is_dry=is_dry)
    folder = args.out / f"{size.name}-{size.layers}-weights"
    checks: list[tuple[str, Callable[[], None]]] = [("load", partial(peer.load, folder))]
    batches = _BATCHES[:2] if is_dry else _BATCHES
    checks += [(f"{count} sequences", partial(peer.batch, count)) for count in batches]
    return report.run(checks)


if __name__ == "__main__":
    sys.exit(main())
