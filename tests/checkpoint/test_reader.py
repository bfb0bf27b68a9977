"""Headers and byte ranges of real safetensors files, whole and broken."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from windlass.checkpoint.reader import Checkpoint
from windlass.checkpoint.safetensors import read_headers
from windlass.device.cpu import CpuDevice
from windlass.errors import CheckpointError

Mode = Literal["auto", "dio", "buffered"]

TENSORS = {
    "a": torch.arange(3000, dtype=torch.float32).view(30, 100),
    "b": torch.randn(7, 1111).bfloat16(),
    "c": torch.randn(5, 999).half(),
    "d": torch.tensor(3.0),
}


def write_shards(folder: Path) -> dict[str, str]:
    weight_map = {"a": "x-1.safetensors", "b": "x-2.safetensors", "c": "x-2.safetensors"}
    for file in sorted(set(weight_map.values())):
        save_file({n: TENSORS[n] for n, f in weight_map.items() if f == file}, folder / file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_raw(folder: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def read_tensor(source: Checkpoint, name: str) -> bytes:
    info = source.tensors[name]
    begin = info.begin // 4096 * 4096
    size = -(-(info.end - begin) // 4096) * 4096
    device = CpuDevice(1)
    memory = device.allocate(size).data
    device.close()
    source.read(info.file, begin, memory.numpy().data)
    return memory.numpy().tobytes()[info.begin - begin : info.end - begin]


@pytest.mark.parametrize("mode", ["auto", "dio", "buffered"])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_byte_is_what_safetensors_reads(tmp_path: Path, mode: Mode, sharded: bool):
    names = list(TENSORS)
    if sharded:
        names = list(write_shards(tmp_path))
    else:
        save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = Checkpoint(tmp_path, mode=mode)
    assert sorted(source.tensors) == sorted(names)
    assert source.mode == ("buffered" if mode == "buffered" else "dio")
    for name in names:
        info = source.tensors[name]
        assert info.shape == tuple(TENSORS[name].shape)
        expected = TENSORS[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert read_tensor(source, name) == expected
        with safe_open(tmp_path / info.file, "pt") as reference:
            assert torch.equal(reference.get_tensor(name), TENSORS[name])
    source.close()
    source.close()


def test_headers_need_no_torch(tmp_path: Path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    code = (
        "import sys, pathlib; from windlass.checkpoint.safetensors import read_headers;"
        f"print(len(read_headers(pathlib.Path({str(tmp_path)!r}))), 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["4", "False"]


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN_HEADERS = [
    (b"[1, 2", rb"expected JSON, found b'\[1, 2'"),
    (b"\xff\xfe", r"expected JSON"),
    ([1], r"expected a JSON object, found list"),
    (b'{"w": 1, "w": 2}', r"expected every name once, found w twice"),
    ({"w": 3}, r"tensor w: expected dtype, shape and data_offsets, found 3"),
    ({"w": entry(dtype="Q4")}, r"tensor w: expected a dtype of .*BF16.*, found 'Q4'"),
    ({"w": entry(dtype=["F32"])}, r"tensor w: expected a dtype of"),
    ({"w": entry(shape=[-2])}, r"tensor w: expected a shape, found \[-2\]"),
    ({"w": entry(shape=[True, 2])}, r"tensor w: expected a shape"),
    ({"w": entry(offsets=[0])}, r"tensor w: expected data_offsets .*found \[0\]"),
    ({"w": entry(offsets=[0, "8"])}, r"tensor w: expected data_offsets"),
    ({"w": entry(offsets=[8, 0])}, r"tensor w: expected 8 bytes .*found data_offsets \[8, 0\]"),
    ({"w": entry(shape=[3])}, r"tensor w: expected 12 bytes for F32 \[3\], found .*8 bytes"),
    ({"v": entry(), "w": entry(offsets=[4, 12])}, r"tensor w: .* after v .*overlap"),
    ({"v": entry(), "w": entry(offsets=[12, 20])}, r"tensor w: expected bytes .*end of the file"),
]


@pytest.mark.parametrize(("header", "message"), BROKEN_HEADERS)
def test_a_broken_header_is_one_error_that_names_file_and_tensor(
    tmp_path: Path, header: object, message: str | bytes
):
    path = write_raw(tmp_path, header, b"\0" * 16)
    pattern = message.decode() if isinstance(message, bytes) else message
    with pytest.raises(CheckpointError, match=pattern) as caught:
        read_headers(tmp_path)
    assert str(path) in str(caught.value)


def test_holes_and_empty_tensors_are_fine(tmp_path: Path):
    empty = entry(shape=[0], offsets=[4, 4])
    write_raw(tmp_path, {"v": entry(), "e": empty, "w": entry(offsets=[12, 20])}, b"\0" * 20)
    assert set(read_headers(tmp_path)) == {"v", "e", "w"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a safetensors file, found 0 bytes"),
        (b"\1\2\3", "found 3 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "header of at most 35 bytes, found"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "found a length of 1099511627776"),
    ],
)
def test_what_is_no_safetensors_file_is_said(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_headers(tmp_path)


def test_a_truncated_file_is_found_before_any_read(tmp_path: Path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    os.truncate(tmp_path / "model.safetensors", size - 1)
    with pytest.raises(
        CheckpointError, match=rf"expected bytes .* to {size}, found the end .*{size - 1}"
    ):
        Checkpoint(tmp_path)


def test_no_checkpoint_at_all(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or .*found neither"):
        read_headers(tmp_path)
    with pytest.raises(CheckpointError, match="expected a folder"):
        read_headers(tmp_path / "absent")


@pytest.mark.parametrize(
    "changes",
    [{"z": "x-1.safetensors"}, {"c": None}, {"b": "x-1.safetensors"}, {}],
    ids=["one too many", "one too few", "another file", "as it is"],
)
def test_the_files_themselves_say_what_they_hold(tmp_path: Path, changes: dict[str, str | None]):
    weight_map = write_shards(tmp_path)
    expected = read_headers(tmp_path)
    assert {name: info.file for name, info in expected.items()} == weight_map
    changed = {**weight_map, **changes}
    write_index(tmp_path, {name: file for name, file in changed.items() if file is not None})
    assert read_headers(tmp_path) == expected


def test_of_a_tensor_in_two_files_the_index_decides(tmp_path: Path):
    weight_map = write_shards(tmp_path)
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, tmp_path / "x-1.safetensors")
    for file in ("x-1.safetensors", "x-2.safetensors"):
        write_index(tmp_path, {**weight_map, "b": file})
        assert read_headers(tmp_path)["b"].file == file
    del weight_map["b"]
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=r"x-2.*tensor b: .*found in x-1\.safetensors too"):
        read_headers(tmp_path)


def test_an_index_that_names_files_that_are_not_there(tmp_path: Path):
    weight_map = write_shards(tmp_path)
    write_index(tmp_path, {**weight_map, "z": "x-3.safetensors", "y": "x-4.safetensors"})
    with pytest.raises(CheckpointError, match=r"x-3\.safetensors: .*tensor z.*2 files are absent"):
        read_headers(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, ["a"], {"a": 3}, {"a": "../a"}, {"a": "/etc/a"}])
def test_an_index_without_sense(tmp_path: Path, weight_map: object):
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=r"index\.json: .*expected .*, found"):
        read_headers(tmp_path)


@pytest.mark.parametrize("mode", ["dio", "buffered"])
def test_short_reads_are_continued(tmp_path: Path, monkeypatch, mode: Mode):
    save_file(TENSORS, tmp_path / "model.safetensors")
    real = os.preadv
    sizes = iter([5000, 4096, 4097, 8192] * 100)
    calls = []

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        assert offset % 4096 == 0, "direct I/O would refuse"
        got = min(real(fd, buffers, offset), next(sizes))
        for at in range(got, len(buffers[0])):
            buffers[0][at] = 0xFF  # what was not read is not there
        calls.append(got)
        return got

    source = Checkpoint(tmp_path, mode=mode)
    monkeypatch.setattr(os, "preadv", short)
    for name in ("a", "b"):
        expected = TENSORS[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert read_tensor(source, name) == expected
    assert len(calls) > 4
    source.close()


def test_an_io_error_names_file_and_place(tmp_path: Path, monkeypatch):
    save_file(TENSORS, tmp_path / "model.safetensors")
    source = Checkpoint(tmp_path)

    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected .*Input/output error"):
        read_tensor(source, "a")
    source.close()


def test_a_read_that_ends_early_is_an_error(tmp_path: Path, monkeypatch):
    save_file(TENSORS, tmp_path / "model.safetensors")
    source = Checkpoint(tmp_path)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: 100)
    with pytest.raises(CheckpointError, match=r"expected \d+ bytes at offset 0, found only 0"):
        read_tensor(source, "a")
    source.close()


@pytest.mark.parametrize("refuse_at", ["open", "read"])
def test_without_direct_io_reads_are_buffered_and_the_cache_is_dropped(
    tmp_path: Path, monkeypatch, refuse_at: str
):
    save_file(TENSORS, tmp_path / "model.safetensors")
    real_open, real_preadv, real_advise = os.open, os.preadv, os.posix_fadvise
    direct: set[int] = set()
    advice: list[tuple[int, int, int]] = []

    def refusing_open(path, flags, *rest):
        if flags & os.O_DIRECT and refuse_at == "open":
            raise OSError(22, "Invalid argument")
        fd = real_open(path, flags, *rest)
        (direct.add if flags & os.O_DIRECT else direct.discard)(fd)
        return fd

    def refusing_preadv(fd, buffers, offset):
        if fd in direct:
            raise OSError(22, "Invalid argument")
        return real_preadv(fd, buffers, offset)

    def advise(fd, offset, length, kind):
        advice.append((offset, length, kind))
        real_advise(fd, offset, length, kind)

    monkeypatch.setattr(os, "open", refusing_open)
    monkeypatch.setattr(os, "preadv", refusing_preadv)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    with pytest.raises(CheckpointError, match="direct I/O: expected on every file, refused"):
        Checkpoint(tmp_path, mode="dio")
    source = Checkpoint(tmp_path)
    assert source.mode == "buffered"
    expected = TENSORS["a"].view(-1).view(torch.uint8).numpy().tobytes()
    assert read_tensor(source, "a") == expected
    info = source.tensors["a"]
    assert (info.begin // 4096 * 4096, 12288, os.POSIX_FADV_DONTNEED) in advice
    source.close()


def test_a_file_that_cannot_be_opened(tmp_path: Path):
    save_file(TENSORS, tmp_path / "real")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot be read: Is a directory"):
        Checkpoint(tmp_path)
