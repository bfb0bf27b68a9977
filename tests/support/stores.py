"""Weight stores over fake devices, and what callers do with them."""

from collections.abc import Mapping, Sequence

import torch
from hypothesis import strategies as st

from fakes import FakeSource, expert_layout, expert_tensors, experts
from windlass.device.base import Device
from windlass.errors import BudgetError
from windlass.ids import Part, WeightKey
from windlass.prefetch.policies import FarthestNextUse
from windlass.prefetch.tiers import LowerPolicy, UpperPolicy, takers
from windlass.weights.eviction import EvictionPolicy
from windlass.weights.hints import Hint
from windlass.weights.store import Arrivals, Lease, WeightStore
from windlass.weights.supply import FileSupply
from windlass.weights.tier_supply import TierSupply
from windlass.weights.transfer import Carrier


def make_store(
    device: Device,
    *,
    num_layers: int = 3,
    num_experts: int = 4,
    slots: int = 4,
    policy: EvictionPolicy | None = None,
) -> tuple[WeightStore, dict[str, torch.Tensor]]:
    tensors = expert_tensors(num_layers, num_experts, rows=64, columns=160)  # 5 pages each
    source = FakeSource(tensors, gap_bytes=6)
    supply = FileSupply(expert_layout(tensors), source, Carrier(device, 4096 * 4))
    policy = policy or FarthestNextUse(num_layers)
    return WeightStore(supply, {Part.EXPERT: slots}, policy=policy), tensors


def make_chain(
    host: Device,
    device: Device,
    *,
    host_slots: int,
    slots: int,
    num_layers: int = 3,
    policy: EvictionPolicy | None = None,
) -> tuple[WeightStore, dict[str, torch.Tensor]]:
    """A store over `device` whose parts come from one over `host`."""
    kept = {Part.EXPERT} if slots >= 4 * num_layers else ()
    lower = LowerPolicy(FarthestNextUse(num_layers), takers(kept, [4] * num_layers, 0))
    upper = UpperPolicy(policy or FarthestNextUse(num_layers), lower)
    below, tensors = make_store(host, num_layers=num_layers, slots=host_slots, policy=lower)
    supply = TierSupply(below, Carrier(device, 4096 * 4))
    above = WeightStore(supply, {Part.EXPERT: slots}, policy=upper)
    above.cache.feed.tell(lower.came_above)
    return above, tensors


def hint(
    store: WeightStore, keys: list[WeightKey], turn: int, probability: float = 1.0, *, now: int = 0
) -> None:
    """Hints at `keys`, all at `turn`, in this order behind earlier ones, in all tiers."""
    added = [Hint(1000 * turn + i, key, turn, probability >= 1) for i, key in enumerate(keys)]
    store.cache.hint(now, added, [])
    if store.supply.below is not None:
        store.supply.below.hint(now, added, [])


def is_equal(found: object, expected: torch.Tensor) -> bool:
    """Whether a view is a plain tensor with these values."""
    return isinstance(found, torch.Tensor) and torch.equal(found, expected)


def assert_is_expert(lease: Lease, tensors: Mapping[str, torch.Tensor]) -> None:
    for name in ("gate", "up", "down"):
        expected = tensors[f"{lease.key.layer}.{lease.key.index}.{name}"]
        assert is_equal(lease.tensors[name], expected), (lease.key, name)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["lease", "release", "demand", "next", "ready", "leave", "prefetch"]),
        st.integers(0, 2),
        st.sets(st.integers(0, 3), min_size=1),
        st.floats(0.05, 1),
    ),
    max_size=25,
)


def _act(
    name: str,
    keys: list[WeightKey],
    probability: float,
    store: WeightStore,
    leases: list[Lease],
    demands: list[Arrivals],
) -> None:
    if name == "lease":
        leases.append(store.lease(keys[0]))
    elif name == "release" and leases:
        leases.pop(0).release()
    elif name == "demand":
        demands.append(store.arrivals(keys))
    elif name == "next" and demands:
        next(demands[0])
    elif name == "ready" and demands:
        more = demands[0].ready(2)
        assert len({lease.key for lease in more}) == len(more) <= 2
    elif name == "leave" and demands:
        demands.pop().close()
    elif name == "prefetch":
        hint(store, keys, keys[0].layer, probability, now=keys[0].layer - 1)


def operate(
    operations: Sequence[tuple[str, int, set[int], float]],
    store: WeightStore,
    tensors: Mapping[str, torch.Tensor],
    slots: int,
) -> None:
    """`operations`, one after the other; what must hold is checked after each, all is given back at
    the end."""
    leases: list[Lease] = []
    demands: list[Arrivals] = []
    for name, layer, indices, probability in operations:
        try:
            keys = experts(layer, sorted(indices))
            _act(name, keys, probability, store, leases, demands)
        except BudgetError:
            assert len(leases) + sum(len(demand._leases) for demand in demands) >= slots
        except StopIteration:
            demands.pop(0)
        for lease in [*leases, *(one for demand in demands for one in demand._leases)]:
            if lease._entry is not None:
                assert_is_expert(lease, tensors)
        store.check()
    for lease in leases:
        lease.release()
    for demand in demands:
        demand.close()
