"""How long `/health` takes while 16 streams decode and prompts of 1 MB come, one after the other:
`python bench/server/health.py --url http://127.0.0.1:8000 --seconds 40`. Exit 1 where the 95th
percentile is above `--most`.

Of a server that is started with the demo model:
`windlass serve demo --host-memory 1GiB --max-num-seqs 16 --moe-expert-cache-size 8`.
"""

import argparse
import http.client
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, suppress
from urllib.parse import urlsplit

STREAMS = 16
_PROMPT = "word " * 200_000  # 1 MB
_BETWEEN_S = 0.1  # looks
_PATIENCE_S = 60.0


class Load:
    """Who asks meanwhile, each in a thread of its own. `events`: lines of streams that came;
    `statuses`: of the large bodies."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._has_ended = threading.Event()
        self.events = 0
        self.statuses: Counter[int] = Counter()

    def run(self, seconds: float) -> list[float]:
        """Seconds of each look at `/health`, in ascending order. RuntimeError where one fails."""
        asking = [*[self._stream] * STREAMS, self._send_large]
        threads = [threading.Thread(target=one, daemon=True) for one in asking]
        for one in threads:
            one.start()
        try:
            return sorted(self._look(time.monotonic() + seconds))
        finally:
            self._has_ended.set()
            for one in threads:
                one.join(_PATIENCE_S)

    def _look(self, end: float) -> list[float]:
        took = []
        with closing(http.client.HTTPConnection(self._host, timeout=_PATIENCE_S)) as connection:
            while time.monotonic() < end:
                begin = time.perf_counter()
                connection.request("GET", "/health")
                answer = connection.getresponse()
                answer.read()
                if answer.status != 200:
                    raise RuntimeError(f"/health: got {answer.status}, expected 200")
                took.append(time.perf_counter() - begin)
                time.sleep(_BETWEEN_S)
        return took

    def _stream(self) -> None:
        body = {"prompt": "x", "max_tokens": 600, "stream": True, "ignore_eos": True}
        while not self._has_ended.is_set():
            connection = http.client.HTTPConnection(self._host, timeout=10 * _PATIENCE_S)
            with closing(connection), suppress(ConnectionError):
                _post(connection, "/v1/completions", body)
                answer = connection.getresponse()
                while not self._has_ended.is_set() and answer.readline():
                    self.events += 1

    def _send_large(self) -> None:
        """Prompts that are refused (too long here) or read, and ones that are tokenised alone."""
        while not self._has_ended.is_set():
            for path in ("/v1/completions", "/tokenize"):
                connection = http.client.HTTPConnection(self._host, timeout=10 * _PATIENCE_S)
                with closing(connection):
                    _post(connection, path, {"prompt": _PROMPT})
                    self.statuses[connection.getresponse().status] += 1


def _post(connection: http.client.HTTPConnection, path: str, body: dict[str, object]) -> None:
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--most", type=float, default=0.5, help="seconds, of the 95th percentile")
    options = parser.parse_args(argv)
    load = Load(urlsplit(options.url).netloc)
    took = load.run(options.seconds)
    p50, p95 = (took[int(share * (len(took) - 1))] for share in (0.5, 0.95))
    print(
        f"/health: {len(took)} looks, p50 {p50:.4f} s, p95 {p95:.4f} s, longest {took[-1]:.3f} s;"
        f" {load.events} events of {STREAMS} streams, large bodies by status {dict(load.statuses)}"
    )
    if not load.events or not load.statuses:
        print("health: nothing came beside, so this tells nothing", file=sys.stderr)
        return 1
    return int(p95 > options.most)


if __name__ == "__main__":
    sys.exit(main())
