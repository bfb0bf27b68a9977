"""What `windlass quantize` writes, as data: bits, groups, tensor names and shapes of the format
pack-quantized of compressed-tensors, and its quantization_config. No torch, no files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from windlass.errors import UsageError

FORMATS: Mapping[str, int] = {"int4": 4, "int8": 8}
GROUPS = (32, 64, 128)
_DEFAULT_GROUP = {"int4": 128, "int8": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerScheme:
    """Symmetric integers of `bits`, one scale for `group` elements of a row; 0: for a whole row."""

    bits: int
    group: int

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def per_word(self) -> int:
        """Codes in an int32."""
        return 32 // self.bits

    @property
    def name(self) -> str:
        return f"int{self.bits}, " + (
            f"groups of {self.group}" if self.group else "one scale per row"
        )

    def group_of(self, width: int) -> int:
        """Elements that share a scale in rows of `width`."""
        return self.group or width

    def refusal(self, width: int) -> str | None:
        """Why rows of `width` cannot be stored; None where they can."""
        if width % (self.group or self.per_word):
            return f"rows of {width} are no multiple of {self.group or self.per_word}"
        return None


def make_scheme(format_name: str, group: int | None) -> IntegerScheme:
    """By the names that users give. Raises UsageError."""
    if format_name not in FORMATS:
        raise UsageError(f"format: got {format_name!r}, allowed {', '.join(FORMATS)}")
    if group is not None and group not in GROUPS:
        raise UsageError(f"group: got {group}, allowed {', '.join(map(str, GROUPS))}")
    return IntegerScheme(
        bits=FORMATS[format_name], group=_DEFAULT_GROUP[format_name] if group is None else group
    )


def tensors_of(
    scheme: IntegerScheme, module: str, shape: tuple[int, int], scale_dtype: str
) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """(name, type, shape) of the three tensors of a matrix (N, K): codes, scales, and the shape."""
    rows, width = shape
    return (
        (f"{module}.weight_packed", "I32", (rows, width // scheme.per_word)),
        (f"{module}.weight_scale", scale_dtype, (rows, width // scheme.group_of(width))),
        (f"{module}.weight_shape", "I64", (2,)),
    )


def quantization_config(scheme: IntegerScheme, ignored: Sequence[str]) -> dict[str, Any]:
    """As llm-compressor writes it, which vLLM and transformers read: all linear modules but those
    `ignored`."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group or None,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "mse",
        "observer_kwargs": {},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }
