"""What a checkpoint of a model holds, from its description alone."""

from windlass.checkpoint.layout import expected_stored
from windlass.models.names import NameMap
from windlass.models.spec import ModelSpec


def expected_tensors(spec: ModelSpec, names: NameMap) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint of this model as the hub has them."""
    return {name: expected.shape for name, expected in expected_stored(spec, names).items()}
