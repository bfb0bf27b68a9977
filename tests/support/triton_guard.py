"""Makes Triton's interpreter worth believing. Without this it multiplies the bits of bf16 as
integers, cuts where a GPU rounds, and reads and writes whatever address it is given.

`install()`, with TRITON_INTERPRET=1 and before kernels are decorated:
- dots of floats are summed in fp64, those of bf16 widened, so that they show no order of sums,
  which is a GPU's to show; casts to bf16 round to the nearest, ties to even; any other arithmetic
  on bf16 raises: kernels widen first, as a GPU does.
- A dot of fp32 that would use TF32 raises: this interpreter would not show what it loses.
- memcheck: every lane that is not masked off lies within a tensor of the launch.
- racecheck: two programs of a launch that touch one byte, one of them writing, raise.
- Atomics and casts to fp8 raise: the first hide an order, the second are cut.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
_WIDEN_FIRST = "arithmetic on bf16: widen first"


def install() -> None:
    """Once per process; later calls change nothing."""
    if getattr(interpreter.InterpreterBuilder, "is_guarded", False):
        return
    builder = interpreter.InterpreterBuilder
    builder.is_guarded = True
    for name, method in _METHODS.items():
        _wrap(builder, name, method)
    for name in ("binary_op", "ternary_op", "unary_op", "create_fma"):
        _wrap(builder, name, _widened)
    for name in ("fp_ext", "fp_trunc", "si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui"):
        setattr(builder, f"create_{name}", lambda self, src, to: self.cast_impl(src, to))
    builder.create_atomic_rmw = builder.create_atomic_cas = _no_atomics
    _wrap(interpreter.GridExecutor, "__call__", _call)
    _wrap(interpreter.InterpretedFunction, "__call__", _call_inner)
    _wrap(interpreter.ReduceScanOpInterface, "check_tensor", _check_tensor)


def _wrap(owner: Any, name: str, method: Callable[..., Any]) -> None:
    """Puts `method` in the place of what it gets as its second argument."""
    old = getattr(owner, name)

    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, functools.partial(old, self), *args, **kwargs)

    setattr(owner, name, guarded)


# --- bf16 -----------------------------------------------------------------------------------------


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16, as uint16 -> fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 as uint16, to the nearest, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _dot(self: Any, old: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
    if a.dtype.scalar == tl.float32:
        assert precision == ir.INPUT_PRECISION.IEEE, "a dot of fp32 that may be TF32: not ieee"
    if not (a.dtype.is_floating() and d.dtype.is_floating()):
        return old(a, b, d, precision, *rest)
    assert _is_bf16(a) == _is_bf16(b), "a dot of bf16 and another type"
    x, y = (widen(h.data) if _is_bf16(h) else h.data for h in (a, b))
    # a BLAS has other sums for other shapes; rounded from fp64, they are those of a row alone
    product = np.matmul(x, y, dtype=np.float64).astype(np.float32)
    return Handle(product + d.data, d.dtype.scalar)


def _cast_impl(self: Any, old: Any, src: Any, to: Any) -> Any:
    source, target = src.dtype.scalar, to.scalar
    if source == tl.bfloat16 and target != tl.bfloat16:
        wide = Handle(widen(src.data), tl.float32)
        return wide if target == tl.float32 else self.cast_impl(wide, to)
    if target == tl.bfloat16 and source != tl.bfloat16:
        return Handle(narrow(src.data.astype(np.float32)), target)
    return old(src, to)


def _fp_to_fp(self: Any, old: Any, src: Any, to: Any, rounding: Any) -> Any:
    assert to.scalar.primitive_bitwidth > 8, "a cast to fp8: the interpreter would cut, not round"
    if tl.bfloat16 in (src.dtype.scalar, to.scalar) and src.dtype.scalar.primitive_bitwidth > 8:
        return self.cast_impl(src, to)
    return old(src, to, rounding)


def _widened(self: Any, old: Any, *args: Any) -> Any:
    operands = [a for a in args if isinstance(a, Handle)]
    assert args[-1] is np.where or not any(map(_is_bf16, operands)), _WIDEN_FIRST
    return old(*args)


def _check_tensor(self: Any, old: Any, inputs: Any) -> Any:
    assert not any(_is_bf16(x.handle) for x in inputs), _WIDEN_FIRST
    return old(inputs)


def _no_atomics(self: Any, *args: Any) -> Any:
    raise AssertionError("an atomic operation: its order is no program's")


# --- memory ---------------------------------------------------------------------------------------


class _Storage:
    """Who has touched each byte: 0 nobody, n + 1 the program n, -1 several."""

    def __init__(self, first: int, num_bytes: int) -> None:
        self.first, self.end = first, first + num_bytes
        self.writer = np.zeros(num_bytes, np.int32)
        self.reader = np.zeros(num_bytes, np.int32)

    def touch(self, at: np.ndarray, me: int, *, is_write: bool) -> None:
        writer, reader = self.writer[at], self.reader[at]
        assert np.isin(writer, (0, me)).all(), "race: another program writes this"
        if is_write:
            assert np.isin(reader, (0, me)).all(), "race: another program reads this"
            self.writer[at] = me
        else:
            self.reader[at] = np.where((reader == 0) | (reader == me), me, -1)


class _Launch:
    """What one launch may touch, and has touched."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.program = 0
        self.extents = [_extent(t) for t in tensors if t.numel()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.storages = [_Storage(first, size) for first, size in storages.items() if size]

    def touch(self, pointers: Any, mask: Any, *, is_write: bool) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        is_on = np.broadcast_to(mask.data.astype(bool), pointers.data.shape)
        at = np.unique(pointers.data[is_on].astype(np.int64))
        is_inside = np.zeros(at.shape, bool)
        for first, end in self.extents:
            is_inside |= (at >= first) & (at + size <= end)
        outside = int((~is_inside).sum())
        assert not outside, (
            f"{'store' if is_write else 'load'}: {outside} lanes outside every tensor"
        )
        touched = (at[:, None] + np.arange(size)).ravel()
        for storage in self.storages:
            mine = touched[(touched >= storage.first) & (touched < storage.end)]
            storage.touch(mine - storage.first, self.program + 1, is_write=is_write)


def _extent(t: torch.Tensor) -> tuple[int, int]:
    """The bytes from a tensor's first element to its last."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _tensors(args: Any) -> Iterator[torch.Tensor]:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from _tensors(arg)


_launch = _Launch([])


def _call(self: Any, old: Any, *args: Any, **kwargs: Any) -> Any:
    global _launch
    _launch = _Launch(list(_tensors((*args, *kwargs.values()))))
    with np.errstate(all="ignore"):  # a GPU says nothing of overflow and NaN
        return old(*args, **kwargs)


_patched: set[str] = set()


def _call_inner(self: Any, old: Any, *args: Any, **kwargs: Any) -> Any:
    """Of a function that a kernel calls. It would patch the language each time, which takes a
    millisecond and lasts: the launch has patched `tl`, and `core` needs it once."""
    is_own = tl.core in self.fn.__globals__.values()
    if is_own and "core" not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add("core")
    return self.rewrite()(*args, **kwargs)


def _set_grid_idx(self: Any, old: Any, x: int, y: int, z: int) -> None:
    old(x, y, z)
    width, height, _ = self.grid_dim
    _launch.program = x + width * (y + height * z)


def _masked_load(self: Any, old: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
    _launch.touch(pointers, mask, is_write=False)
    return old(pointers, mask, *rest)


def _masked_store(self: Any, old: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
    _launch.touch(pointers, mask, is_write=True)
    return old(pointers, value, mask, *rest)


_METHODS: dict[str, Callable[..., Any]] = {
    "create_dot": _dot,
    "cast_impl": _cast_impl,
    "create_fp_to_fp": _fp_to_fp,
    "create_masked_load": _masked_load,
    "create_masked_store": _masked_store,
    "set_grid_idx": _set_grid_idx,
}
