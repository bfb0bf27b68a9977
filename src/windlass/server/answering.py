"""From the event loop to the engine's thread and back: one answer under way."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from windlass.engine.outputs import RequestOutput
from windlass.engine.request import Delta, Request
from windlass.engine.service import Service
from windlass.errors import UsageError
from windlass.protocol.openai import ApiRequest


class Answer:
    """All that comes of one body. Of one task; `close` gives up what has not ended, within the pass
    under way."""

    def __init__(
        self, service: Service, api: ApiRequest, key: str, *, most_s: float | None = None
    ) -> None:
        """Submits every prompt. Raises RequestError if one cannot run here, UsageError when no more
        are taken. `key`: names the requests, and their seeds where they have none. `most_s`: that
        all may take."""
        loop = asyncio.get_running_loop()
        self._most_s = most_s
        self._end = None if most_s is None else loop.time() + most_s
        self._changed = asyncio.Event()
        self._number = {f"{key}-{i}": i for i in range(len(api.prompts))}
        self.outputs: dict[int, RequestOutput] = {}  # that have ended, by the prompt's number

        def tell() -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._changed.set)

        streams = api.delivery.stream
        self._stream = service.open(deltas=streams, on_change=tell)
        self._stream.submit(
            [
                Request(
                    name,
                    prompt.token_ids,
                    prompt.params,
                    seed_key=name,
                    wants_deltas=streams,
                    is_named=False,
                )  # fmt: skip
                for name, prompt in zip(self._number, api.prompts, strict=True)
            ]
        )

    async def deltas(self, ping_s: float | None) -> AsyncIterator[tuple[int, Delta] | None]:
        """Pieces with their prompt's number as they come, until all have ended; None each time that
        nothing has come for `ping_s`. Raises what ended the service, and TimeoutError."""
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            # asked before: what comes between this and `take` is taken
            has_ended = not self._stream.open_ids or self._stream.is_over
            came = self._stream.take(0)
            for output in came.finished:
                self.outputs[self._number[output.request_id]] = output
            for delta in came.deltas:
                yield self._number[delta.request_id], delta
            if came.deltas or came.finished:
                continue
            if has_ended:
                break
            left = None if self._end is None else self._end - loop.time()
            if left is not None and left <= 0:
                raise TimeoutError(f"the answer has taken {self._most_s:g} s, the most allowed")
            try:
                waits = [one for one in (ping_s, left) if one is not None]
                await asyncio.wait_for(self._changed.wait(), min(waits, default=None))
            except TimeoutError:
                if ping_s is not None and (left is None or ping_s < left):
                    yield None
        if len(self.outputs) < len(self._number):
            raise UsageError("the server has ended before the answer did")

    async def whole(self) -> list[RequestOutput]:
        """The outputs in the order of the prompts, once all have ended."""
        async for _ in self.deltas(None):
            pass
        return [self.outputs[i] for i in range(len(self.outputs))]

    def close(self) -> None:
        """Idempotent."""
        self._stream.close()
