"""What the server shows of its machine: counters, rows, tiers and experts, as JSON and as a stream
for the page. Nothing is looked at while nobody asks."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from windlass.engine.engine_stats import EngineStats
from windlass.engine.live_view import LiveView
from windlass.server.metrics import named_values
from windlass.server.state import Loaded, ServerState
from windlass.server.watchers import Warmth
from windlass.weights.stats import Place

_EVERY_S = 0.5


async def stats(state: ServerState, request: Request) -> Response:
    """The engine's counters as JSON, and where each expert is; null while loading."""
    loaded = state.loaded
    if loaded is None:
        return JSONResponse(None)
    return JSONResponse(await asyncio.to_thread(_whole, state, loaded))


def _whole(state: ServerState, loaded: Loaded) -> dict[str, Any]:
    found, view = loaded.service.stats(), loaded.service.look()
    return {
        **_shown(state, found, view),
        "running": found.running,
        "waiting": found.waiting,
        "running_batch": found.running_batch,
        "waiting_batch": found.waiting_batch,
        "batches": state.batch_stats(),
        "kv_cache_usage": found.kv_cache_usage,
        "passes": found.passes,
        "prompt_tokens": found.prompt_tokens,
        "generated_tokens": found.generated_tokens,
        "pass_seconds": found.pass_s,
        "wait_seconds": found.wait_s,
        "bytes_read": found.bytes_read,
        "peak_memory_bytes": found.peak_rss_bytes,
        "expert_shares": found.expert_shares,
        "prefix_cache_queries": found.prefix_cache_queries,
        "prefix_cache_hits": found.prefix_cache_hits,
        "drafts": asdict(found.drafts) if found.drafts is not None else None,
        "phases": found.phases_json(),
        "experts": {**_places(view), **_details(view)},
    }


def _shown(state: ServerState, found: EngineStats, view: LiveView) -> dict[str, Any]:
    """What the stream tells too."""
    return {
        "open_requests": state.num_open,
        "metrics": named_values(found),
        "prefetch": found.speculation,
        "forecast_sources": found.forecast_sources,
        "rows": [row._asdict() for row in view.rows],
        "tiers": [asdict(tier) for tier in view.tiers],
    }


def _places(view: LiveView) -> dict[str, Any]:
    """A string for each layer, with the digit of a `Place` for each expert, by tier."""
    tiers = {}
    for name, found in view.experts.items():
        rows = {layer: bytearray(b"0" * view.num_experts) for layer in view.layers}
        for key, place in found.places.items():
            rows[key.layer][key.index] = 48 + place
        tiers[name] = [row.decode() for row in rows.values()]
    return {
        "layers": list(view.layers),
        "num_experts": view.num_experts,
        "places": {place.value: place.name.lower() for place in Place},
        "tiers": tiers,
    }


def _uses(view: LiveView) -> dict[int, list[int]]:
    """Of each expert by layer, in the tier that passes take it from."""
    counts = {layer: [0] * view.num_experts for layer in view.layers}
    for key, count in next(iter(view.experts.values())).uses.items():
        counts[key.layer][key.index] = count
    return counts


def _details(view: LiveView) -> dict[str, Any]:
    """Lists for each layer: how often each expert was used, and seconds since it was evicted from
    the first tier, -1 for never."""
    gone = {layer: [-1.0] * view.num_experts for layer in view.layers}
    for key, seconds in next(iter(view.experts.values())).gone_s.items():
        gone[key.layer][key.index] = round(seconds, 1)
    return {"uses": list(_uses(view).values()), "evicted_seconds": list(gone.values())}


async def stream(state: ServerState, request: Request) -> Response:
    """What the page shows, twice a second, as server-sent events."""
    with ExitStack() as stack:
        stack.enter_context(state.watchers.watching())
        kept = stack.pop_all()
    return StreamingResponse(
        _events(state, kept),
        media_type="text/event-stream",
        headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
    )


async def _events(state: ServerState, kept: ExitStack) -> AsyncIterator[str]:
    warmth = Warmth()
    with kept:
        while not state.is_draining:
            yield f"data: {await asyncio.to_thread(_event, state, warmth)}\n\n"
            await asyncio.sleep(_EVERY_S)


def _event(state: ServerState, warmth: Warmth) -> str:
    loaded = state.loaded
    if loaded is None:
        return json.dumps({"status": "loading", "message": state.failure or state.loading})
    found, view = loaded.service.stats(), loaded.service.look()
    rates = state.watchers.rates(loaded.service, found.running)
    return json.dumps(
        {
            "status": "ok",
            **_shown(state, found, view),
            "experts": {
                **_places(view),
                "used": any(found.uses for found in view.experts.values()),
                "warmth": warmth.look(_uses(view)),
            },
            "expected": rates._asdict() if rates is not None else None,
        },
        separators=(",", ":"),
    )
