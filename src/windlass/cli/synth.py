"""`windlass synth`: a checkpoint of random weights, for measurements at real shapes."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from windlass.cli.flags import Command, Flag, choice, integer, size
from windlass.errors import UsageError
from windlass.units import format_bytes, format_seconds, parse_bytes

FLAGS = (
    Flag(name="model-config", aliases=("--config",), metavar="FILE|PRESET", is_required=True,
         help="a config.json, or a preset; a wrong name lists the presets"),
    Flag(name="out", aliases=("-o",), read=Path, metavar="DIR", is_required=True,
         help="a new or empty folder"),
    Flag(name="num-layers", read=integer(1), metavar="N", help="instead of the configuration's"),
    Flag(name="dtype", read=choice("bfloat16", "float16", "float32"), default="bfloat16",
         metavar="TYPE", help="bfloat16 (default), float16 or float32"),
    Flag(name="shard-size", read=size, default=parse_bytes("4GiB"), metavar="SIZE",
         help="largest weight file (default 4GiB)"),
    Flag(name="seed", aliases=("-s",), read=integer(0), default=0, metavar="N",
         help="of the weights (default 0)"),
    Flag(name="json", read=None, default=False, help="end standard output with one line of JSON"),
)  # fmt: skip


def run(values: Mapping[str, Any], arguments: Sequence[str]) -> int:
    from windlass.checkpoint.synthetic import write_random_checkpoint

    begin = time.monotonic()
    num_bytes = write_random_checkpoint(
        _config(values),
        values["out"],
        dtype=values["dtype"],
        seed=values["seed"],
        shard_bytes=values["shard_size"],
    )
    seconds = time.monotonic() - begin
    print(f"{values['out']}: {format_bytes(num_bytes)} in {format_seconds(seconds)}")
    print(f"try: windlass generate -m {values['out']} -n 8 'Hello'", file=sys.stderr)
    if values["json"]:
        document = {"out": str(values["out"]), "bytes": num_bytes, "elapsed_time": seconds}
        print(json.dumps(document))
    return 0


def _config(values: Mapping[str, Any]) -> dict[str, Any]:
    from windlass.checkpoint.synthetic import preset

    name, num_layers = values["model_config"], values["num_layers"]
    path = Path(name)
    if not path.is_file():
        if "/" in name or path.suffix == ".json":
            raise UsageError(f"--config: got {name!r}: no such file")
        return preset(name, num_layers=num_layers)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--config: {path}: not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"--config: {path}: got {type(config).__name__}, allowed an object")
    if num_layers is not None:
        config["num_hidden_layers"] = num_layers
    return config


COMMAND = Command(
    name="synth",
    help="Write a checkpoint of random weights with the shapes of a configuration.",
    flags=FLAGS,
    run=run,
)
