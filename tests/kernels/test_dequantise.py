"""Packed matrices: any rows of any format, through files, slots, views and kernels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import quantised
from quantised import Quantiser
from quantised_cases import AWQ, FLOAT, FP8, FP8_TENSOR, INT, MXFP4, compressed, gptq
from windlass.checkpoint.part_reads import make_part_reads
from windlass.checkpoint.reader import Checkpoint
from windlass.checkpoint.stored import RowSet, packed_pieces, whole_rows
from windlass.checkpoint.views import make_views
from windlass.errors import CheckpointError
from windlass.ids import Part, WeightKey
from windlass.kernels.dequantise import dequantise
from windlass.kernels.reference import TorchKernels
from windlass.models.config import Config
from windlass.models.names import Layout
from windlass.models.quantization import Scheme
from windlass.models.quantization_config import read_quantization
from windlass.models.spec import SwiGlu
from windlass.tensors import Packed, PackedStack

N, K = 176, 160  # more than one 128-block each way, the last one ragged


class Kind(NamedTuple):
    quantiser: Quantiser
    settings: dict[str, Any]
    unit: int  # rows that cannot be cut
    width: int = K


KINDS = {
    "fp8": Kind(quantised.fp8_block(), FP8, 128),
    "fp8-bf16-scales": Kind(quantised.fp8_block(torch.bfloat16), FP8, 128),
    "fp8-block": Kind(
        quantised.fp8_block(ending=".weight_scale"),
        compressed(
            "float-quantized", strategy="block", block_structure=[128, 128], **FLOAT
        ),
        128,
    ),
    "fp8-channel": Kind(
        quantised.fp8_rows, compressed("float-quantized", strategy="channel", **FLOAT), 1, 37
    ),
    "fp8-tensor": Kind(
        quantised.fp8_tensor, compressed("float-quantized", strategy="tensor", **FLOAT), 1, 37
    ),
    "fp8-vllm": Kind(quantised.fp8_tensor, FP8_TENSOR, 1, 37),
    "mxfp4": Kind(quantised.mxfp4, MXFP4, 1),
    "int4-group": Kind(quantised.compressed(4, 16), compressed(
        "pack-quantized", strategy="group", group_size=16), 1, 37),
    "int4-asymmetric": Kind(quantised.compressed(4, 8, is_symmetric=False), compressed(
        "pack-quantized", symmetric=False, **INT), 8, 37),
    "int4-reordered": Kind(
        quantised.compressed(4, 8, is_symmetric=False, is_shuffled=True),
        compressed("pack-quantized", symmetric=False, actorder="group", **INT), 8),
    "int8-channel": Kind(quantised.compressed(8, -1), compressed(
        "pack-quantized", num_bits=8, strategy="channel"), 1, 37),
    "int8-asymmetric": Kind(quantised.compressed(8, 8, is_symmetric=False), compressed(
        "pack-quantized", num_bits=8, symmetric=False, **INT), 4),
    "gptq": Kind(quantised.gptq(4, 16), gptq(group_size=16), 8),
    "gptq-reordered": Kind(quantised.gptq(4, 8, is_shuffled=True), gptq(desc_act=True), 8),
    "gptq-v2": Kind(
        quantised.gptq(4, -1, stored_less=0), gptq(group_size=-1, checkpoint_format="gptq_v2"), 8),
    "gptq-int8": Kind(quantised.gptq(8, 8), gptq(bits=8), 4),
    "gptq-symmetric-reordered": Kind(
        quantised.gptq(4, 8, is_symmetric=True, is_shuffled=True),
        gptq(sym=True, desc_act=True), 8),
    "gptq-int8-symmetric": Kind(
        quantised.gptq(8, 8, is_symmetric=True), gptq(bits=8, sym=True), 4),
    "awq": Kind(quantised.awq(32), {**AWQ, "group_size": 32}, 8),
}  # fmt: skip


class Stored(NamedTuple):
    """A matrix on disk."""

    path: Path
    scheme: Scheme
    meant: torch.Tensor
    unit: int

    def read(
        self, rows: RowSet, *, name: str = "x.weight", is_known: bool = False
    ) -> Packed | PackedStack:
        key = WeightKey(Part.EXPERT, 0, 0)
        layout = Layout({key: tuple(packed_pieces("w", name, self.scheme, rows))}, ())
        source = Checkpoint(self.path, mode="buffered")
        part_reads = make_part_reads(key, layout, source.tensors)
        memory = torch.full((part_reads.num_bytes,), 255, dtype=torch.uint8)
        for read in part_reads.reads:
            into = memory[read.at : read.at + read.num_bytes]
            source.read(read.file, read.offset, memoryview(into.numpy().data))
        source.close()
        views = make_views(part_reads, memory, is_known=is_known)
        assert not views.has_copies
        found = views.tensors["w"]
        assert isinstance(found, Packed | PackedStack)
        return found

    def whole(self, *, is_known: bool = False) -> Packed:
        rows, width = self.meant.shape
        found = self.read(RowSet(rows, width, 0, rows), is_known=is_known)
        assert isinstance(found, Packed)
        return found


@pytest.fixture(params=KINDS)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Stored:
    return store(request.param, tmp_path)


def store(name: str, path: Path, *, rows: int = N) -> Stored:
    kind = KINDS[name]
    weight = torch.randn(rows, kind.width, generator=torch.Generator().manual_seed(2))
    tensors, meant = kind.quantiser(weight)
    prefix = "x.weight" if name == "mxfp4" else "x"
    save_file({prefix + ending: t for ending, t in tensors.items()}, path / "model.safetensors")
    return Stored(path, scheme_of(kind.settings), meant, kind.unit)


def test_every_range_of_rows_is_what_the_quantiser_meant(stored: Stored) -> None:
    packed = stored.whole()
    assert packed.shape == stored.meant.shape
    for first, last in ((0, N), (0, 1), (N - 1, N), (3, 9), (127, 129), (8, 24), (5, N - 2)):
        assert torch.equal(dequantise(packed, first, last), stored.meant[first:last])


def test_what_is_laid_out_alike_is_read_where_it_lies(stored: Stored) -> None:
    """Tensors of another slot are made of those of the first, of any format."""
    rows, width = stored.meant.shape
    key = WeightKey(Part.EXPERT, 0, 0)
    pieces = packed_pieces("w", "x.weight", stored.scheme, RowSet(rows, width, 0, rows))
    source = Checkpoint(stored.path, mode="buffered")
    part_reads = make_part_reads(key, Layout({key: tuple(pieces)}, ()), source.tensors)
    size = part_reads.num_bytes
    memory = torch.full((3 * size,), 255, dtype=torch.uint8)
    for read in part_reads.reads:
        into = memory[2 * size + read.at : 2 * size + read.at + read.num_bytes]
        source.read(read.file, read.offset, memoryview(into.numpy().data))
    source.close()
    memory[:size].copy_(memory[2 * size :])  # for the checks of the first
    first = make_views(part_reads, memory[:size]).tensors
    memory[:size].fill_(255)
    moved = first.moved(size).moved(size)
    assert list(moved) == ["w"] and len(moved) == 1 and "w" in moved
    found = moved["w"]
    assert isinstance(found, Packed)
    assert torch.equal(dequantise(found, 0, rows), stored.meant)


def test_transposed_rows(stored: Stored) -> None:
    turned = stored.whole().t()
    assert turned.shape == stored.meant.shape[::-1]
    assert torch.equal(dequantise(turned, 3, 30), stored.meant.T[3:30])
    assert torch.equal(dequantise(turned.t(), 3, 30), stored.meant[3:30])


def test_a_cut_matrix_is_its_rows(tmp_path: Path, stored: Stored) -> None:
    unit, width = stored.unit, stored.meant.shape[1]
    for first, count in ((0, unit), (unit, N - unit), (unit, min(2 * unit, N - unit))):
        if count % unit and first + count != N:
            continue
        part = stored.read(RowSet(N, width, first, count))
        assert isinstance(part, Packed) and part.shape == (count, width)
        assert torch.equal(dequantise(part, 0, count), stored.meant[first : first + count])
        assert torch.equal(dequantise(part, 1, count), stored.meant[first + 1 : first + count])


def test_every_second_row(stored: Stored) -> None:
    rows = RowSet(N, stored.meant.shape[1], 1, N // 2, 2)
    if stored.unit > 1:
        with pytest.raises(CheckpointError, match="stands for .* rows, .* in steps of 2"):
            stored.read(rows)
        return
    part = stored.read(rows)
    assert isinstance(part, Packed)
    assert torch.equal(dequantise(part, 2, 40), stored.meant[1::2][2:40])


def test_rows_that_begin_inside_a_block(stored: Stored) -> None:
    first = stored.unit // 2
    rows = RowSet(N, stored.meant.shape[1], first, N - first)
    if stored.unit > 1:
        with pytest.raises(CheckpointError, match=f"needs {N - first} from {first} on; allowed"):
            stored.read(rows)


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name].unit <= 8])
def test_heads(kernels: TorchKernels, name: str, tmp_path: Path) -> None:
    """Each of four ranges of 44 rows has 16 rows of this tensor, from its eighth on; of 48 where
    44 would cut a word."""
    stride = 48 if KINDS[name].unit == 8 else 44
    stored = store(name, tmp_path, rows=4 * stride)
    width = stored.meant.shape[1]
    stack = stored.read(RowSet(4 * stride, width, 8, 16, 1, 4, stride))
    expected = stored.meant.view(4, stride, width)[:, 8:24]
    assert isinstance(stack, PackedStack) and stack.shape == expected.shape
    check_stack(kernels, stack, expected)


def test_heads_of_whole_blocks(kernels: TorchKernels, tmp_path: Path) -> None:
    stored = store("fp8", tmp_path, rows=768)
    stack = stored.read(RowSet(768, K, 128, 256, 1, 2, 384))
    assert isinstance(stack, PackedStack)
    check_stack(kernels, stack, stored.meant.view(2, 384, K)[:, 128:])
    with pytest.raises(CheckpointError, match="an entry stands for 128 rows, .* needs 64 from 128"):
        stored.read(RowSet(768, K, 128, 64, 1, 2, 384))


def check_product(got: torch.Tensor, x: torch.Tensor, meant: torch.Tensor) -> None:
    """`got` (T, N) is x (T, K) times `meant` (N, K) but for the order of a sum, which the storage
    decides."""
    exact = x.double() @ meant.double().T
    bound = 1e-6 * (x.double().abs() @ meant.double().abs().T) + 1e-12
    assert ((got.double() - exact).abs() <= bound).all()


def check_units(multiply: Callable[[torch.Tensor], torch.Tensor], meant: torch.Tensor) -> None:
    """Rows of one 1 find the bits of `meant` (N, K), many at a time and few."""
    units = torch.eye(meant.shape[1])
    assert torch.equal(multiply(units), meant.T)
    assert torch.equal(multiply(units[-3:]), meant.T[-3:])


def check_stack(kernels: TorchKernels, stack: PackedStack, expected: torch.Tensor) -> None:
    x = torch.randn(30, stack.shape[0], stack.shape[2])
    y = kernels.batched_linear(x, stack)
    back = kernels.batched_linear(y, stack.transpose(1, 2))
    for head, meant in enumerate(expected):
        check_product(y[:, head], x[:, head], meant)
        check_product(back[:, head], y[:, head], meant.T)
    heads = stack.shape[0]
    units = torch.eye(stack.shape[2])[:, None].expand(-1, heads, -1).contiguous()
    assert torch.equal(kernels.batched_linear(units, stack), expected.permute(2, 0, 1))
    rows = torch.randn(5, stack.shape[2])
    flat = torch.cat([kernels.linear(rows, one) for one in stack.matrices], dim=1)
    assert torch.equal(kernels.linear(rows, stack), flat)


def test_kernels_multiply_what_is_meant_row_by_row(kernels: TorchKernels, stored: Stored) -> None:
    packed, bias = stored.whole(), torch.randn(N)
    x = torch.randn(300, packed.shape[1])
    whole = kernels.linear(x, packed, bias)
    assert torch.equal(whole, kernels.linear(x, packed) + bias)
    check_product(kernels.linear(x, packed), x, stored.meant)
    check_units(lambda units: kernels.linear(units, packed), stored.meant)
    check_units(lambda units: kernels.linear(units, packed.t()), stored.meant.T)
    for first, last in ((0, 1), (299, 300), (5, 9), (5, 18), (13, 300)):
        assert torch.equal(kernels.linear(x[first:last], packed, bias), whole[first:last])
    own = {"gate": packed, "up": packed, "down": packed.t()}
    got = kernels.expert_ffn(x, own, SwiGlu())
    meant = stored.meant.double()
    gate = x.double() @ meant.T
    hidden = gate * gate * gate.sigmoid()
    # an error of the gate grows with the slope of gate^2 sigmoid(gate), at most 2.2 |gate|
    error = 1e-6 * (2.2 * gate.abs() * (x.double().abs() @ meant.abs().T) + hidden.abs())
    assert ((got.double() - hidden @ meant).abs() <= error @ meant.abs() + 1e-12).all()
    for first, last in ((0, 1), (5, 9), (13, 300)):
        few = kernels.expert_ffn(x[first:last], own, SwiGlu())
        assert torch.equal(few, got[first:last])


def test_a_matrix_larger_than_a_tile(kernels: TorchKernels, tmp_path: Path) -> None:
    weight = torch.randn(2200, 1024)  # 9 MB in fp32
    tensors, meant = quantised.fp8_block()(weight)
    save_file({"x" + ending: t for ending, t in tensors.items()}, tmp_path / "model.safetensors")
    packed = Stored(tmp_path, scheme_of(FP8), meant, 128).whole()
    x = torch.randn(3, 1024)
    torch.testing.assert_close(kernels.linear(x, packed), x @ meant.T, atol=1e-3, rtol=1e-4)


def test_whole_rows_of_the_head(stored: Stored) -> None:
    unit = whole_rows(stored.scheme, RowSet(N, stored.meant.shape[1], 0, N))
    assert unit == (None if stored.scheme.naming in ("gptq", "awq") else stored.unit)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("stored_less", [0, 1])
def test_symmetric_zero_points_are_the_middle_whatever_is_stored(
    stored_less: int, kind: str, bits: int, tmp_path: Path
) -> None:
    quantise = quantised.gptq(bits, 16, is_symmetric=True, stored_less=stored_less)
    tensors, meant = quantise(torch.randn(24, 64))
    assert bool((tensors[".qzeros"] == tensors[".qzeros"][0, 0]).all())
    save_file({"x" + ending: t for ending, t in tensors.items()}, tmp_path / "model.safetensors")
    found = gptq(bits=bits, group_size=16, sym=True, checkpoint_format=kind)
    packed = Stored(tmp_path, scheme_of(found), meant, 8).whole()
    assert packed.zeros is None
    assert torch.equal(dequantise(packed, 0, 24), meant)


@pytest.mark.parametrize(
    ("bits", "words", "message"),
    [
        (4, {0: 0x66666666}, "got zero points of 6, 7, allowed all 7 or all 8 where"),
        (4, {0: 0x77777776}, "got zero points of 6, 7, allowed"),
        (4, {0: -0x77777778}, "got zero points of 7, 8, allowed"),  # both readings at once
        (4, {i: 0x66666666 for i in range(8)}, "got zero points of 6, allowed"),
        (4, {i: 0x66666666 - i for i in range(8)}, "got zero points of 0, 1, 2, 3, 4, 5, ..."),
        (8, {0: 0x7F7F7F7E}, "got zero points of 126, 127, allowed all 127 or all 128 where"),
        (8, {i: 0x77777777 for i in range(16)}, "got zero points of 119, allowed"),
    ],
)
def test_symmetric_zero_points_of_no_reading(
    bits: int, words: dict[int, int], message: str, tmp_path: Path
) -> None:
    tensors, _ = quantised.gptq(bits, 32, is_symmetric=True)(torch.randn(32, 64))
    for at, word in words.items():
        tensors[".qzeros"].view(-1)[at] = word
    save_file({"x" + ending: t for ending, t in tensors.items()}, tmp_path / "model.safetensors")
    scheme = scheme_of(gptq(bits=bits, group_size=32, sym=True))
    stored = Stored(tmp_path, scheme, torch.empty(32, 64), 8)
    with pytest.raises(CheckpointError) as caught:
        stored.whole()
    assert str(caught.value).startswith(f"tensor x.qzeros: {message}")
    stored.whole(is_known=True)  # a part that comes again is not looked at again


def scheme_of(settings: dict[str, Any]) -> Scheme:
    quantization = read_quantization(Config({"quantization_config": settings}))
    assert quantization is not None
    return quantization.groups[0][1]


@pytest.mark.parametrize("group", [-1, 20])
def test_groups_that_do_not_exist(group: int, tmp_path: Path) -> None:
    tensors, _ = quantised.gptq(4, 8, is_shuffled=True)(torch.randn(8, 160))
    tensors[".g_idx"][7] = group
    save_file({"x" + ending: t for ending, t in tensors.items()}, tmp_path / "model.safetensors")
    scheme = scheme_of(gptq(desc_act=True))
    with pytest.raises(CheckpointError, match="groups of w: found .* allowed 0 to 19"):
        Stored(tmp_path, scheme, torch.empty(8, 160), 8).whole()


# --- the tests' quantisers against the formats' own programs --------------------------------------
# By hand, with what PyPI has: matrices of 24 x 40 and 64 x 128 from `quantised` went through
# compressed-tensors 0.20.0 (PackedQuantizationCompressor, FloatQuantizationCompressor: int4 and
# int8, groups and channels, symmetric or not; fp8 by channel, tensor, block; AutoAWQConverter) and
# through AutoGPTQ 0.7.1 (qlinear_cuda.QuantLinear on unit vectors; 4 and 8 bits, g_idx in order and
# shuffled): the largest difference from `meant` was 0.


def test_mxfp4_is_what_transformers_reads() -> None:
    tensors, meant = quantised.mxfp4(torch.randn(24, 64))
    found = convert_moe_packed_tensors(
        tensors["_blocks"][None], tensors["_scales"][None], dtype=torch.float32
    )
    assert torch.equal(found[0], meant.T)


def test_fp8_is_what_transformers_reads() -> None:
    tensors, meant = quantised.fp8_block()(torch.randn(256, 384))
    found = Fp8Dequantize(None)._dequantize_one(
        tensors[".weight"], tensors[".weight_scale_inv"], output_dtype=torch.float32
    )
    assert torch.equal(found, meant)
