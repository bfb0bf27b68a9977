"""Headers of weight files on the hub, without the weights: a folder that reads like the checkpoint,
each file a hole of its size behind the real header."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from windlass.hub.repository import Hub, Snapshot

_AT_ONCE = 8
_LARGEST_HEADER = 100_000_000  # safetensors' own limit
_PAUSES_S = (0.5, 2.0, 5.0)  # before each new try


def write_headers(snapshot: Snapshot, missing: Sequence[str], into: Path) -> None:
    """Fills the empty folder `into`: links to what the cache has, the header of what is missing.
    Raises CheckpointError where they do not come."""
    for path in snapshot.folder.rglob("*"):
        if path.is_file():
            link = into / path.relative_to(snapshot.folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.absolute())
    hub = Hub(snapshot.repo)
    with hub.reporting(), ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda file: _write(hub, snapshot, file, into / file), missing))


def _write(hub: Hub, snapshot: Snapshot, file: str, path: Path) -> None:
    """A broken header is written as it is: whoever reads it says what is wrong."""
    size = snapshot.remote(file).size
    text = _read(hub, snapshot.commit, file, (0, min(size, 8)))
    length = int.from_bytes(text, "little")
    if 8 < 8 + length <= min(size, _LARGEST_HEADER):
        text += _read(hub, snapshot.commit, file, (8, 8 + length))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(text)
        stream.truncate(size)


def _read(hub: Hub, commit: str, file: str, span: tuple[int, int]) -> bytes:
    for pause in _PAUSES_S:
        try:
            return _read_once(hub, commit, file, span)
        except Exception as error:
            if not hub.is_passing(error):
                raise
            time.sleep(pause)
    return _read_once(hub, commit, file, span)


def _read_once(hub: Hub, commit: str, file: str, span: tuple[int, int]) -> bytes:
    begin, end = span
    with hub.stream(commit, file, begin, end) as response:
        before = 0 if response.status_code == 206 else begin
        found = bytearray()
        for chunk in response.iter_bytes():
            found += chunk
            if len(found) >= before + end - begin:
                break  # a server that sends all is not heard to the end
    return bytes(found[before : before + end - begin])
