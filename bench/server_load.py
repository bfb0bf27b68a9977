"""`windlass serve` under mixed load in a memory cgroup of its budget: bursts, clients that leave,
slow readers, bad requests, and a batch behind them.

    python bench/server_load.py [--minutes 30] [--budget 1GiB] [--model demo] [--json FILE]

Then all clients end, and what is left is looked at: no row, no page of keys and values, no open
answer; counters that add up; memory in the last third of the time beside that of the middle third;
the same answer to the same request before and after.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
from limits import ENTER, MemoryGroup, run_bench
from machine import describe

from windlass.cli.flags import size
from windlass.units import MIB, format_bytes

_MARGIN = (
    64 * MIB
)  # of the group beyond the budget: files that the kernel counts while they are read
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_SAMPLE_S = 5.0
_SAME = {"prompt": "In the beginning", "max_tokens": 40, "temperature": 0.9, "seed": 5,
         "logprobs": 2}  # fmt: skip
_BAD: tuple[tuple[str, Any], ...] = (
    (_CHAT, {}), (_CHAT, {"messages": "x"}), (_CHAT, {"messages": [{"role": "user"}]}),
    (_COMPLETIONS, {"prompt": "x", "max_tokens": -1}), (_COMPLETIONS, {"prompt": [[1, "x"]]}),
    (_COMPLETIONS, {"prompt": "x", "no_such_field": 1}), (_COMPLETIONS, [1, 2, 3]),
    (_COMPLETIONS, {"prompt": "x " * 40_000}), (_CHAT, {"model": "another", "messages": []}),
)  # fmt: skip


class Load:
    """Clients of one server, until `end`."""

    def __init__(self, client: httpx.AsyncClient, end: float, seed: int) -> None:
        self._client = client
        self._end = end
        self._chance = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.first_s: list[float] = []
        self.health_s: list[float] = []
        self.samples: list[dict[str, float]] = []

    async def until_the_end(
        self, kind: Callable[[], Coroutine[Any, Any, None]], pause_s: float
    ) -> None:
        """`kind` again and again, with pauses about as long as that."""
        while time.monotonic() < self._end:
            await kind()
            await asyncio.sleep(pause_s * self._chance.uniform(0.5, 1.5))

    def _body(self, **more: Any) -> dict[str, Any]:
        words = " ".join(self._chance.choice(("sea", "wind", "rope", "stone", "light")) for _ in
                         range(self._chance.choice((3, 10, 60, 250))))  # fmt: skip
        return {"messages": [{"role": "user", "content": words}],
                "max_tokens": self._chance.choice((4, 20, 60, 150)), **more}  # fmt: skip

    async def burst(self) -> None:
        """Twelve at once, whole answers."""
        answers = await asyncio.gather(
            *(self._client.post(_CHAT, json=self._body()) for _ in range(12))
        )
        for answer in answers:
            self.counts[f"burst {answer.status_code}"] += 1

    async def stream(self, *, chunks: int | None = None, pause_s: float = 0.0) -> None:
        """A stream, read to the end or for some chunks, with a pause after each."""
        begin, number = time.monotonic(), 0
        kind = "leaver" if chunks is not None else "slow reader" if pause_s else "stream"
        async with self._client.stream("POST", _CHAT, json=self._body(stream=True)) as answer:
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                number += 1
                if number == 2:
                    self.first_s.append(time.monotonic() - begin)
                if chunks is not None and number >= chunks:
                    break
                if pause_s:
                    await asyncio.sleep(pause_s)
        self.counts[kind] += 1

    async def leaver(self) -> None:
        await self.stream(chunks=self._chance.randint(1, 12))

    async def slow(self) -> None:
        await self.stream(pause_s=0.15)

    async def bad(self) -> None:
        path, body = self._chance.choice(_BAD)
        answer = await self._client.post(path, json=body)
        assert 400 <= answer.status_code < 500, (path, body, answer.text)
        assert set(answer.json()) == {"error"}, answer.text
        self.counts[f"bad {answer.status_code}"] += 1

    async def batch(self) -> None:
        """A batch of 60 rows, to its end."""
        rows = "".join(
            json.dumps({"custom_id": str(i), "method": "POST", "url": _CHAT, "body": self._body()})
            + "\n"
            for i in range(60)
        )
        sent = await self._client.post(
            "/v1/files", data={"purpose": "batch"}, files={"file": ("rows.jsonl", rows)}
        )
        made = await self._client.post(
            "/v1/batches",
            json={
                "input_file_id": sent.json()["id"],
                "endpoint": _CHAT,
                "completion_window": "24h",
            },
        )
        path = f"/v1/batches/{made.json()['id']}"
        while (now := (await self._client.get(path)).json())["status"] in (
            "validating", "in_progress", "finalizing"
        ):  # fmt: skip
            await asyncio.sleep(1)
        assert now["status"] == "completed", now
        lines = (await self._client.get(f"/v1/files/{now['output_file_id']}/content")).text
        assert len(lines.splitlines()) == 60
        self.counts["batch rows"] += 60
        for name in (now["input_file_id"], now["output_file_id"]):
            await self._client.delete(f"/v1/files/{name}")

    async def sample(self, group: MemoryGroup | None, process: int) -> None:
        begin = time.monotonic()
        answer = await self._client.get("/health")
        self.health_s.append(time.monotonic() - begin)
        assert answer.status_code == 200, answer.text
        status = Path(f"/proc/{process}/status").read_text()
        (resident,) = re.findall(r"VmRSS:\s+(\d+)", status)
        self.samples.append(
            {
                "at_s": begin,
                "resident_bytes": int(resident) * 1024,
                "group_bytes": group.used_bytes() if group else 0,
            }
        )


@asynccontextmanager
async def _served(
    options: argparse.Namespace, folder: Path, group: MemoryGroup | None
) -> AsyncIterator[tuple[httpx.AsyncClient, "subprocess.Popen[str]"]]:
    command = [
        sys.executable, "-m", "windlass.cli", "serve", "--port", "0", "--model", options.model,
        "--host-memory", f"{options.budget // MIB}MiB", "--max-num-seqs", "16",
        "--data-dir", str(folder), "--moe-expert-cache-size", options.slots,
    ]  # fmt: skip
    if group is not None:
        command = ["sh", "-c", ENTER, "sh", str(group.members), *command]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            port = ""
            for line in process.stderr:
                print(line, end="", file=sys.stderr)
                if found := re.match(r"listening at \S+:(\d+)", line):
                    port = found[1]
                if line.startswith("ready"):
                    break
            asyncio.get_running_loop().run_in_executor(None, process.stderr.read)
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits
            ) as client:
                yield client, process
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, "the server did not end well"
        finally:
            process.kill()


async def _run(
    options: argparse.Namespace, folder: Path, group: MemoryGroup | None
) -> dict[str, Any]:
    async with _served(options, folder, group) as (client, process):
        before = (await client.post(_COMPLETIONS, json=_SAME)).json()["choices"]
        load = Load(client, time.monotonic() + 60 * options.minutes, options.seed)
        kinds = [
            (load.burst, 6.0), (load.leaver, 0.7), (load.leaver, 0.7), (load.stream, 1.0),
            (load.slow, 1.0), (load.slow, 1.0), (load.bad, 0.3), (load.batch, 1.0),
        ]  # fmt: skip

        async def samples() -> None:
            await load.sample(group, process.pid)

        await asyncio.gather(
            *(load.until_the_end(kind, pause) for kind, pause in kinds),
            load.until_the_end(samples, _SAMPLE_S),
        )
        after = (await client.post(_COMPLETIONS, json=_SAME)).json()["choices"]
        assert before == after, "another answer than before"
        for _ in range(100):
            left = (await client.get("/v1/stats")).json()
            if not left["running"]:
                break
            await asyncio.sleep(0.1)
        text = (await client.get("/metrics")).text
        return _document(options, load, left, text, group)


def _document(
    options: argparse.Namespace,
    load: Load,
    left: dict[str, Any],
    metrics: str,
    group: MemoryGroup | None,
) -> dict[str, Any]:
    ended = {
        reason: float(value)
        for reason, value in re.findall(
            r'^windlass:request_success_total\{finished_reason="(\w+)".*\} (\S+)', metrics, re.M
        )
    }
    third = len(load.samples) // 3
    middle, last = (
        statistics.mean(one["resident_bytes"] for one in part)
        for part in (load.samples[third : 2 * third], load.samples[2 * third :])
    )
    sent = sum(load.counts[kind] for kind in ("burst 200", "stream", "slow reader", "leaver"))
    found = {
        "minutes": options.minutes,
        "budget_bytes": options.budget,
        "counts": dict(load.counts),
        "ended": ended,
        "left": {name: left[name] for name in ("open_requests", "running", "waiting")},
        "left_kv_bytes": sum(tier["kv_bytes"] for tier in left["tiers"]),
        "resident_middle_bytes": middle,
        "resident_last_bytes": last,
        "resident_peak_bytes": max(one["resident_bytes"] for one in load.samples),
        "group_peak_bytes": group.peak_bytes() if group else None,
        "first_token_p50_s": statistics.median(load.first_s),
        "first_token_p99_s": sorted(load.first_s)[int(0.99 * len(load.first_s))],
        "health_p95_s": sorted(load.health_s)[int(0.95 * len(load.health_s))],
        "samples": load.samples[:: max(1, len(load.samples) // 60)],
    }
    wrong = [
        what
        for what, is_right in (
            ("something is left", not any(found["left"].values())),
            ("pages are left", not found["left_kv_bytes"]),
            ("memory grows", last <= 1.03 * middle),
            ("counters do not add up", sum(ended.values()) == sent + 2),  # the same request twice
        )
        if not is_right
    ]
    print(f"middle {format_bytes(int(middle))}, last {format_bytes(int(last))}", found["counts"])
    return {**describe(), **found, "wrong": wrong}


def bench(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The document; a group where this user may make one."""
    try:
        group: MemoryGroup | None = MemoryGroup(options.budget + _MARGIN)
    except OSError as error:
        print(f"no memory cgroup: {error}", file=sys.stderr)
        group = None
    try:
        return asyncio.run(_run(options, folder, group))
    finally:
        if group is not None:
            group.remove()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--budget", type=size, default=size("1GiB"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--slots", default="8", help="experts in memory per layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--json", type=Path)
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    run_bench(parser.parse_args(), bench)
