"""The native library: where it is, its C structures and functions (native/include/windlass_cpu.h).
Knows pointers and sizes, no torch."""

import ctypes as c
from functools import cache
from pathlib import Path
from typing import Any

ABI_VERSION = 6
FILE = Path(__file__).parent / "libwindlass_cpu.so"

CODES = {"f32": 0, "bf16": 1, "f16": 2, "e4m3": 3, "e2m1": 4, "int8": 5, "int4": 6}
PACKINGS = {"rows": 0, "gptq": 1, "awq": 2, "gptq8": 3}
SCALES = {"none": 0, "f32": 1, "bf16": 2, "f16": 3, "e8m0": 4}
ZEROS = {"none": 0, "rows": 1, "gptq": 2, "awq": 3}
SCORES = {"softmax": 0, "sigmoid": 1, "logits": 2}
NORMS = {"none": 0, "sum": 1, "euclid": 2, "plus": 3}

_i32, _i64, _f32, _ptr = c.c_int32, c.c_int64, c.c_float, c.c_void_p


class Matrix(c.Structure):
    copy: object = None  # of a weight that cannot be read in place: it lives as long as this

    _fields_ = [
        ("code", _i32), ("packing", _i32), ("scale_type", _i32), ("zero_type", _i32),
        ("n", _i64), ("k", _i64),
        ("codes", _ptr), ("stride_n", _i64), ("stride_k", _i64),
        ("scales", _ptr), ("scale_stride_n", _i64), ("scale_stride_k", _i64),
        ("block_n", _i64), ("block_k", _i64),
        ("zeros", _ptr), ("zero_stride", _i64), ("zero_add", _i64),
        ("groups", _ptr),
    ]  # fmt: skip


class Product(c.Structure):
    _fields_ = [
        ("x", _ptr), ("ldx", _i64), ("w", c.POINTER(Matrix)), ("bias", _ptr),
        ("out", _ptr), ("ldo", _i64),
    ]  # fmt: skip


class Expert(c.Structure):
    _fields_ = [
        ("gate", _ptr), ("up", _ptr), ("down", _ptr),  # to a Matrix each
        ("gate_bias", _ptr), ("up_bias", _ptr), ("down_bias", _ptr),
        ("rows", _ptr), ("places", _ptr), ("num_rows", _i64),
    ]  # fmt: skip


class Network(c.Structure):
    """An expert, and the matrices that it points to."""

    _fields_ = [("expert", Expert), ("matrices", Matrix * 3)]


class Tile(c.Structure):
    _fields_ = [("row", _i64), ("num_rows", _i64), ("position", _i64), ("pages", _ptr)]


class Cache(c.Structure):
    _fields_ = [
        ("data", _ptr), ("page_stride", _i64), ("head_stride", _i64), ("token_stride", _i64),
        ("width", _i64), ("type", _i32), ("scales", _ptr),
    ]  # fmt: skip


class Attention(c.Structure):
    _fields_ = [
        ("q", _ptr), ("out", _ptr),
        ("num_heads", _i64), ("num_kv_heads", _i64), ("key_dim", _i64), ("value_dim", _i64),
        ("scale", _f32), ("window", _i64), ("sinks", _ptr), ("page_tokens", _i64),
        ("keys", Cache), ("values", Cache), ("tiles", _ptr), ("num_tiles", _i64),
    ]  # fmt: skip


class Routing(c.Structure):
    _fields_ = [
        ("score", _i32), ("norm", _i32), ("norm_by", _f32), ("scale", _f32), ("top_k", _i64),
        ("num_groups", _i64), ("kept_groups", _i64), ("rank_by_two", _i32), ("bias", _ptr),
        ("factors", _ptr),
    ]  # fmt: skip


class Argument(c.Union):
    _fields_ = [("p", _ptr), ("i", _i64), ("f", c.c_double)]


class Call(c.Structure):
    _fields_ = [("function", _i32), ("label", _i32), ("arguments", Argument * 13)]


SIGNATURES: dict[str, list[Any]] = {
    "wl_products": [_ptr, _i64, _i64, _i32],
    "wl_experts": [_ptr, _i64, _ptr, _i64, _ptr, _i64, _i32, _f32, _f32, _i32],
    "wl_routed": [_ptr, _i64, _ptr, _i64, _ptr, _i64, _ptr, _ptr, _ptr, _i32, _f32, _f32, _i32],
    "wl_attend": [c.POINTER(Attention)],
    "wl_rms_norm": [_ptr, _i64, _ptr, _i64, _i64, _i64, _ptr, _i32, _f32, _f32],
    "wl_combine": [_ptr, _ptr, _ptr, _ptr, _ptr, _i64, _i64, _i64, _f32],
    "wl_rotate": [_ptr, _i64, _i64, _i64, _i64, _i64, _ptr, _ptr, _i64, _i32],
    "wl_write_rows": [_ptr, _i64, _i64, _i64, _i64, _i64, c.POINTER(Cache), _ptr, _ptr, _i64],
    "wl_copy_rows": [_ptr, _i64, _i64, _i64, _i64, _i64, _ptr, _i64, _i64],
    "wl_gate": [_ptr, _i64, _i64, _ptr, _i32],
    "wl_route": [_ptr, _i64, _i64, c.POINTER(Routing), _ptr, _ptr, _ptr],
    "wl_group": [_ptr, _i64, _i64, _i64, _ptr, _ptr, _ptr],
    "wl_run": [_ptr, _i64, _ptr],
    "wl_read": [_ptr, _i64, c.POINTER(_f32)],
    "wl_widen": [c.POINTER(Matrix), _ptr],
    "wl_use": [c.c_char_p],
    "wl_set_threads": [_i32],
}
# Functions that `wl_run` can call.
CAPTURABLE = {
    "wl_products": 0, "wl_experts": 1, "wl_attend": 2, "wl_rms_norm": 3, "wl_combine": 4,
    "wl_rotate": 5, "wl_write_rows": 6, "wl_route": 7, "wl_group": 8,
    "wl_routed": 9, "wl_copy_rows": 10, "wl_gate": 11,
}  # fmt: skip


def load() -> c.CDLL | str:
    """The library, or in words why there is none. Loaded once."""
    return _load(FILE)


@cache
def _load(path: Path) -> c.CDLL | str:
    if not path.exists():
        return "is not built (no compiler at installation?)"
    try:
        library = c.CDLL(str(path))
        version = library.wl_abi_version()
    except (OSError, AttributeError) as error:
        return f"cannot be loaded: {error}"
    if version != ABI_VERSION:
        return f"has interface {version}, expected {ABI_VERSION}: build it again"
    for name, types in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, _i32
    for name in ("wl_available", "wl_in_use"):
        getattr(library, name).restype = c.c_char_p
    if not library.wl_available():
        return "needs AVX2, FMA and F16C, which this processor lacks"
    return library


def instruction_sets(library: c.CDLL) -> list[str]:
    """What this machine can run, best last."""
    text: bytes = library.wl_available()
    return text.decode().split(",")


def use(library: c.CDLL, name: str) -> None:
    """From now on calls run with this instruction set, one of `instruction_sets`. For tests and
    benchmarks: the best is in use from the start."""
    assert name in instruction_sets(library), f"{name}: not one of {instruction_sets(library)}"
    check(library.wl_use(name.encode()), "wl_use")


def in_use(library: c.CDLL) -> str:
    """The instruction set that calls run with."""
    text: bytes = library.wl_in_use()
    return text.decode()


def check(code: int, what: str) -> None:
    """Raises MemoryError where a call had no memory; other codes are programming errors."""
    if code == 2:
        raise MemoryError(f"{what}: no memory for scratch")
    assert code == 0, f"{what}: refused with {code}"
