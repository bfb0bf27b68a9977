"""What a pass works on is made by the device that it lives on."""

import ast
from pathlib import Path

import torch

import windlass
from windlass.device.host_memory import HostAllocator

SOURCE = Path(windlass.__file__).parent
MAKERS = {"arange", "empty", "from_numpy", "frombuffer", "full", "ones", "tensor", "zeros"}
# frequencies and angles are computed by the host, and then given to the device
BY_HOST = {
    "decoder/block.py": {"tensor"},
    "decoder/rope.py": {"arange", "tensor"},
    "runtime/host_attention.py": {"empty", "tensor"},
    "runtime/host_experts.py": {"arange", "empty", "tensor"},
}


def _made(path: Path) -> set[str]:
    """Functions of torch that make tensors without being told where."""
    calls = (
        node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
    )
    return {
        f.attr
        for f in calls
        if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) and f.value.id == "torch"
        and f.attr in MAKERS
    }  # fmt: skip


def test_no_tensor_of_a_pass_is_made_elsewhere():
    paths = [p for room in ("decoder", "kvcache", "runtime", "weights") for p in
             (SOURCE / room).glob("*.py")]  # fmt: skip
    assert len(paths) > 20
    found = {str(p.relative_to(SOURCE)): made for p in paths if (made := _made(p))}
    assert found == BY_HOST


def test_the_host_takes_numbers_and_keeps_its_tensors():
    memory = HostAllocator()
    made = memory.tensor([], dtype=torch.int64)
    assert (made.shape, made.dtype) == ((0,), torch.int64)
    assert memory.tensor([True, False], dtype=torch.bool).tolist() == [True, False]
    x = torch.ones(3)
    assert memory.tensor(x, dtype=torch.float32).data_ptr() == x.data_ptr()
