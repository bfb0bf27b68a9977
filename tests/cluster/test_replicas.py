"""Jobs on a real Ray cluster of nodes on this machine: `make test-cluster`. The demo model."""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from ray_nodes import Driver, RayNodes, is_alive, num_records, write_rows
from windlass.options import resolve_model

pytest.importorskip("ray", reason="ray is not installed: `make test-cluster` does it")

ENGINE = ("--host-memory", "1536MiB", "--threads", "1", "--max-num-seqs", "16",
          "--max-model-len", "256")  # fmt: skip
SEED = int(os.environ.get("KILL_SEED", "0")) or int(time.time())


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: Ray's sockets lie below it."""
    path = Path(tempfile.mkdtemp(prefix="wr"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def nodes(folder: Path) -> Iterator[RayNodes]:
    (folder / "ray").mkdir()
    with RayNodes(folder / "ray") as found:
        found.start("head")
        yield found


def rows(count: int, most_tokens: int) -> list[dict[str, Any]]:
    """Of several beginnings and lengths; some sampled, some that are refused."""
    found = []
    for i in range(count):
        text = f"{'Write a sentence. ' * (1 + i % 4)}Number {i}:"
        body: dict[str, Any] = {"prompt": text, "max_tokens": 1 + (i * 7) % most_tokens}
        if i % 3 == 0:
            body |= {"temperature": 0.8, "n": 1 + i % 2}
        if i % 50 == 49:
            body["best_of"] = 7  # refused
        found.append(
            {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body}
        )
    return found


def alone(folder: Path) -> bytes:
    """What one machine makes of the rows."""
    other = folder / "alone"
    other.mkdir()
    shutil.copy(folder / "in", other / "in")
    code, _ = Driver(other, *ENGINE).wait()
    assert code in (0, 3)
    return (other / "out").read_bytes()


def check_whole(folder: Path, wanted: bytes) -> None:
    assert (folder / "out").read_bytes() == wanted
    lines = (folder / "out.journal").read_bytes().splitlines()
    names = [json.loads(line)["custom_id"] for line in lines]
    assert len(names) == len(set(names)) == wanted.count(b"\n"), "each row was stored once"


def test_three_nodes_make_the_bytes_of_one_machine(nodes: RayNodes, folder: Path) -> None:
    nodes.start("b")
    nodes.start("c")
    write_rows(folder, rows(150, 16))
    wanted = alone(folder)
    driver = Driver(folder, *ENGINE, "--replicas", "auto", "--ray-address", nodes.address, "--json")
    code, out = driver.wait()
    assert code == 3, driver.said()  # some rows were refused
    check_whole(folder, wanted)
    told = json.loads(out.splitlines()[-1])
    assert len(told["replicas"]) == 3
    assert all(part["rows"] > 0 for part in told["replicas"])
    assert sum(part["rows"] for part in told["replicas"]) == 150
    manifest = json.loads((folder / "out.manifest.json").read_text())
    alone_manifest = json.loads((folder / "alone/out.manifest.json").read_text())
    assert manifest["engine"] == alone_manifest["engine"]


class Killer:
    """Ends replicas, nodes and drivers of a job, at moments that `random` chooses."""

    def __init__(self, nodes: RayNodes, folder: Path, random: Random) -> None:
        self.nodes, self.folder, self.random = nodes, folder, random
        self.names = ["b", "c"]
        self.driver = self.start()

    def start(self) -> Driver:
        return Driver(
            self.folder, *ENGINE, "--replicas", "auto", "--ray-address", self.nodes.address
        )

    def replica(self) -> bool:
        """False where the job ended before."""
        while not (alive := [p for p in self.driver.replicas().values() if is_alive(p)]):
            if self.driver.process.poll() is not None:
                return False
            time.sleep(0.2)
        os.kill(self.random.choice(alive), signal.SIGKILL)
        return True

    def node(self) -> bool:
        name = self.random.choice(self.names)
        self.nodes.kill(name)
        self.nodes.start(name)
        return True

    def drive(self) -> bool:
        self.driver.kill()
        self.driver = self.start()
        return True


def test_twenty_kills_lose_double_and_change_nothing(nodes: RayNodes, folder: Path) -> None:
    nodes.start("b")
    nodes.start("c")
    write_rows(folder, rows(500, 16))
    wanted = alone(folder)
    print(f"KILL_SEED={SEED}")
    random = Random(SEED)
    plan = ["replica"] * 8 + ["node"] * 5 + ["drive"] * 7
    random.shuffle(plan)
    journal = folder / "out.journal"
    while plan:  # the job again, until all of them are dead
        journal.unlink(missing_ok=True)
        (folder / "out").unlink(missing_ok=True)
        killer = Killer(nodes, folder, random)
        # at a random moment: after some rows, also while others are being opened
        while plan and killer.driver.wait_for_rows(journal, random.randrange(0, 25)):
            time.sleep(random.random())
            print(f"{num_records(journal)} rows: kill {plan[-1]}", flush=True)
            if not getattr(killer, plan[-1])():
                break
            plan.pop()
        code, _ = killer.driver.wait()
        assert code == 3, killer.driver.said()
        check_whole(folder, wanted)
        print(f"the job is whole; {len(plan)} kills are left", flush=True)
    assert " rows go to others" in killer.driver.log.read_text()


def test_a_node_that_joins_is_used(nodes: RayNodes, folder: Path) -> None:
    write_rows(folder, rows(4000, 16))  # longer than a node and an engine take to start
    driver = Driver(folder, *ENGINE, "--replicas", "auto", "--ray-address", nodes.address, "--json")
    assert driver.wait_for_rows(folder / "out.journal", 5), driver.said()
    nodes.start("b")
    code, out = driver.wait()
    assert code == 3, driver.said()
    told = json.loads(out.splitlines()[-1])["replicas"]
    assert len(told) == 2 and all(part["rows"] > 0 for part in told)


def test_a_stopped_job_goes_on(nodes: RayNodes, folder: Path) -> None:
    write_rows(folder, rows(200, 16))
    wanted = alone(folder)
    arguments = (*ENGINE, "--replicas", "1", "--ray-address", nodes.address)
    driver = Driver(folder, *arguments)
    assert driver.wait_for_rows(folder / "out.journal", 20), driver.said()
    driver.process.send_signal(signal.SIGTERM)
    code, _ = driver.wait()
    assert code == 130, driver.said()
    assert "finished rows are safe" in driver.said()
    assert 20 <= num_records(folder / "out.journal") < 200
    driver = Driver(folder, *arguments)
    assert driver.wait()[0] == 3, driver.said()
    check_whole(folder, wanted)


def test_one_machine_goes_on_with_a_job_of_replicas(nodes: RayNodes, folder: Path) -> None:
    write_rows(folder, rows(200, 16))
    wanted = alone(folder)
    driver = Driver(folder, *ENGINE, "--replicas", "2", "--ray-address", nodes.address)
    assert driver.wait_for_rows(folder / "out.journal", 20), driver.said()
    driver.kill()
    assert Driver(folder, *ENGINE).wait()[0] == 3
    check_whole(folder, wanted)


def refused(folder: Path, address: str, *more: str) -> str:
    """The one line of a job that does not begin."""
    driver = Driver(folder, *ENGINE, "--replicas", "auto", "--ray-address", address, *more)
    code, _ = driver.wait()
    assert code == 2, driver.said()
    lines = [line for line in driver.said().splitlines() if line.startswith("windlass: ")]
    assert len(lines) == 1, driver.said()
    assert "Traceback" not in driver.said()
    assert not (folder / "out").exists() and not (folder / "out.journal").exists()
    return lines[0]


def test_wrong_addresses_are_one_error_each(folder: Path) -> None:
    write_rows(folder, rows(3, 4))
    with socket.create_server(("127.0.0.1", 0)) as server:  # answers nothing
        port = server.getsockname()[1]
        assert "no head of a Ray cluster answered" in refused(folder, f"127.0.0.1:{port}")
    assert "nothing answers there" in refused(folder, f"127.0.0.1:{port}")
    assert "nothing answers there" in refused(folder, "no.such.host.invalid:6379")
    assert "allowed auto, local or HOST:PORT" in refused(folder, "head")


def start_behind(nodes: RayNodes, mount: str) -> None:
    """A node b to which a folder is another one, or empty."""
    hidden = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    if subprocess.run([*hidden, "true"], capture_output=True).returncode:
        pytest.skip("needs root, to hide a folder from a process")
    nodes.start("b", before=hidden)


def test_a_node_without_the_checkpoint_is_one_error(nodes: RayNodes, folder: Path) -> None:
    model = folder / "model"
    shutil.copytree(resolve_model("demo"), model)
    start_behind(nodes, f"mount -t tmpfs none {model}")
    write_rows(folder, rows(3, 4))
    line = refused(folder, nodes.address, "--model", str(model))
    assert line.startswith("windlass: replica ") and f"{model}/config.json: not found" in line


def test_a_node_with_another_checkpoint_is_one_error(nodes: RayNodes, folder: Path) -> None:
    model, other = folder / "model", folder / "other"
    shutil.copytree(resolve_model("demo"), model)
    shutil.copytree(model, other)
    config = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**config, "top_k": 3}))
    start_behind(nodes, f"mount --bind {other} {model}")
    write_rows(folder, rows(3, 4))
    line = refused(folder, nodes.address, "--model", str(model))
    assert "model: got another one (" in line


def test_a_node_with_another_version_is_one_error(nodes: RayNodes, folder: Path) -> None:
    import windlass

    other = folder / "src"
    shutil.copytree(Path(windlass.__file__).parent, other / "windlass", symlinks=True)
    (other / "windlass/version.py").write_text('VERSION = "0.0.9"\n')
    nodes.start("b", env={"PYTHONPATH": str(other)})
    write_rows(folder, rows(3, 4))
    assert "windlass: got version 0.0.9, allowed " in refused(folder, nodes.address)


def test_ray_that_is_not_installed_is_one_error(folder: Path) -> None:
    write_rows(folder, rows(3, 4))
    (folder / "ray.py").write_text("raise ImportError('no ray')\n")
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    driver = Driver(folder, *ENGINE, "--replicas", "1", env={"PYTHONPATH": path})
    code, _ = driver.wait()
    assert code == 2 and "pip install -e '.[ray]'" in driver.said(), driver.said()
