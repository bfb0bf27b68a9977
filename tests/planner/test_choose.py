"""Which kernels are chosen, and what is said where the native library cannot be used."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from backends import LIBRARY, SETS
from windlass.errors import UsageError
from windlass.kernels.cpu import library
from windlass.kernels.select import _warn_once, choose_kernels

needs_native = pytest.mark.skipif(not SETS, reason=f"the native library {LIBRARY}")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def choose(backend: str) -> str:
    return choose_kernels(backend, threads=1, bf16_activations=False).name


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "FILE", tmp_path / "libwindlass_cpu.so")
    _warn_once.cache_clear()


@needs_native
def test_native_kernels_where_they_run(caplog: pytest.LogCaptureFixture) -> None:
    assert [choose(name) for name in ("auto", "cpu", "torch")] == ["cpu", "cpu", "torch"]
    assert not caplog.records
    assert library.load() is library.load()


@pytest.mark.usefixtures("no_library")
def test_without_the_library_one_line_says_what_it_costs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert choose("auto") == "torch"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "WARNING",
            "kernels: the native library is not built (no compiler at installation?); torch's are"
            " used (few rows: up to 10 times slower)",
        )
    ]
    assert (choose("torch"), choose("auto")) == ("torch", "torch")
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("no_library")
def test_native_kernels_that_are_asked_for_are_not_replaced() -> None:
    with pytest.raises(UsageError, match="got 'cpu', but the native library is not built"):
        choose("cpu")


def _build(source: str, folder: Path) -> Path:
    (folder / "it.c").write_text(source)
    file = folder / "libwindlass_cpu.so"
    command = ["cc", "-shared", "-fPIC", "-o", str(file), str(folder / "it.c")]
    subprocess.run(command, check=True, timeout=120)
    return file


OTHER_VERSION = "int wl_abi_version(void) { return 99; }"
# of the right version, with all names, on a processor that can run none of it
NO_SETS = "\n".join((
    f"int wl_abi_version(void) {{ return {library.ABI_VERSION}; }}",
    *(f"int {name}(void) {{ return 0; }}" for name in library.SIGNATURES),
    'const char *wl_available(void) { return ""; }',
    'const char *wl_in_use(void) { return ""; }',
))  # fmt: skip


@needs_compiler
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (OTHER_VERSION, "has interface 99, expected [0-9]+: build it again"),
        ("int something_else;", "cannot be loaded: .*wl_abi_version"),
        (NO_SETS, "needs AVX2, FMA and F16C, which this processor lacks"),
    ],
)
def test_a_library_that_cannot_be_used(
    source: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "FILE", _build(source, tmp_path))
    with pytest.raises(UsageError, match=reason):
        choose("cpu")
    assert choose("auto") == "torch"


def test_a_file_that_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "libwindlass_cpu.so"
    file.write_bytes(b"nonsense")
    monkeypatch.setattr(library, "FILE", file)
    with pytest.raises(UsageError, match="cannot be loaded"):
        choose("cpu")


@needs_native
def test_instruction_sets_and_threads_are_chosen_by_name() -> None:
    assert isinstance(LIBRARY, ctypes.CDLL)
    before = library.in_use(LIBRARY)
    assert before == SETS[-1] and SETS[0] == "avx2"
    w, x = torch.randn(40, 33), torch.randn(9, 33)
    for name in SETS:
        library.use(LIBRARY, name)
        assert library.in_use(LIBRARY) == name
        found = choose_kernels("cpu", threads=2, bf16_activations=False).linear(x, w)
        torch.testing.assert_close(found, x @ w.T, atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError, match="sse2"):
        library.use(LIBRARY, "sse2")
    assert LIBRARY.wl_get_threads() == 2
    choose_kernels("cpu", threads=1, bf16_activations=False)
    assert LIBRARY.wl_get_threads() == 1
    library.use(LIBRARY, before)
