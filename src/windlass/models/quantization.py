"""Which modules of a checkpoint are stored in which format. Knows no file, no tensors, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from windlass.formats import WeightFormat
from windlass.models.module_names import Modules

# How the tensors of a quantised matrix are called: `checkpoint/stored.py` says
Naming = Literal["fp8", "mxfp4", "packed", "float", "gptq", "awq"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the matrices of some modules are stored."""

    naming: Naming
    format: WeightFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """What config.json says of a checkpoint's matrices.

    `groups` in order of precedence. `dense` wins over them: such modules are stored as they are.
    Of modules in `unsure`, and of all where not `is_strict`, the tensors on disk decide. Where
    `only_experts`, no other matrix is quantised.
    """

    method: str
    groups: tuple[tuple[Modules, Scheme], ...]
    dense: Modules = Modules()
    unsure: Modules = Modules()
    is_strict: bool = True
    only_experts: bool = False

    def find(self, spellings: Sequence[str], *, is_expert: bool) -> Scheme | None:
        """The scheme of a linear module, whose name may have several spellings; None for a dense
        one."""
        if (self.only_experts and not is_expert) or _any_in(spellings, self.dense):
            return None
        for modules, scheme in self.groups:
            if _any_in(spellings, modules):
                return scheme
        return None

    def is_certain(self, spellings: Sequence[str]) -> bool:
        """Whether a module with a scheme must be stored so."""
        return self.is_strict and not _any_in(spellings, self.unsure)


def _any_in(spellings: Sequence[str], modules: Modules) -> bool:
    return any(name in modules for name in spellings)
