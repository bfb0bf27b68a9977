"""Lists in OpenAI's shape: `limit` at a time, from behind `after`."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from windlass.errors import RequestError
from windlass.protocol.fields import refuse_unknown, shorten


class Listed(Protocol):
    """What has an id."""

    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=Listed)


def paged(
    newest_first: Sequence[T],
    query: Mapping[str, str],
    *,
    limits: tuple[int, int],
    show: Callable[[T], dict[str, Any]],
    also: Collection[str] = (),
) -> dict[str, Any]:
    """`limits`: how many are shown if `limit` does not say, and at most. `also`: other parameters
    that `query` may have. Raises RequestError naming the parameter."""
    refuse_unknown(query, ("after", "limit", *also))
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError(f"order: got {shorten(order)}, allowed asc or desc", param="order")
    default, most = limits
    limit = query.get("limit", str(default))
    if not (limit.isdecimal() and len(limit) < 9 and 1 <= int(limit) <= most):
        raise RequestError(f"limit: got {shorten(limit)}, allowed 1 to {most}", param="limit")
    listed = list(newest_first if order == "desc" else reversed(newest_first))
    after, first = query.get("after"), 0
    if after is not None:
        places = [place for place, one in enumerate(listed, 1) if one.id == after]
        if not places:
            raise RequestError(f"after: got {shorten(after)}, which is not in the list",
                               param="after")  # fmt: skip
        first = places[0]
    page = listed[first : first + int(limit)]
    return {
        "object": "list",
        "data": [show(one) for one in page],
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
        "has_more": first + len(page) < len(listed),
    }
