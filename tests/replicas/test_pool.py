"""A job on replicas that do not exist: what runs where, who dies, what the manifest and the user
are told."""

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from amounts import some
from fake_cluster import FakeCluster, FakeReplica, line_of, node
from windlass.batch.crew import mixed_engines
from windlass.batch.job import OpenJob
from windlass.batch.job_options import JobOptions
from windlass.batch.manifest import SettingsDiffer
from windlass.batch.progress import Snapshot
from windlass.errors import JobError, UsageError
from windlass.options import EngineOptions
from windlass.ray.layout import spread, takes
from windlass.ray.messages import ReplicaSpec
from windlass.ray.pool import Pool
from windlass.ray.roster import Wish

NUM_ROWS = 120


class Log:
    """Progress that remembers."""

    is_due = True

    def __init__(self) -> None:
        self.said: list[str] = []
        self.snapshots: list[Snapshot] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def note(self, text: str) -> None: ...

    def update(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None: ...


class Never:
    def is_stopping(self) -> bool:
        return False


def options(folder: Path, *, strict: bool = False) -> JobOptions:
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
        for i in range(NUM_ROWS)
    ]
    (folder / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return JobOptions(
        input_file=folder / "in", output_file=folder / "out", error_file=None,
        served_names=("m",), identity={}, recorded={}, max_model_len=None, created=1,
        strict=strict,
    )  # fmt: skip


def run(
    job: JobOptions, cluster: FakeCluster, number: int | None = None, *, stopping: Any = None,
    **engine: Any,
) -> tuple[Pool, Log]:  # fmt: skip
    log = Log()
    spec = ReplicaSpec(options=EngineOptions(**engine), served_names=("m",), created=1)
    pool = Pool(cluster, Wish(number, spec, "this", None), clock=cluster.clock)
    with OpenJob(job, log) as opened:
        opened.run_by(pool, stopping or Never())
        if opened.is_done:
            opened.write_output()
    return pool, log


def manifest(job: JobOptions) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(job.manifest_file.read_text())
    return found


WANTED = b"".join(map(line_of, range(NUM_ROWS)))


def test_rows_run_on_all_nodes_and_come_out_in_order(tmp_path: Path) -> None:
    cluster = FakeCluster([node("a"), node("b"), node("c")])
    job = options(tmp_path)
    pool, log = run(job, cluster)
    assert job.output_file.read_bytes() == WANTED
    assert sum(part.rows for part in pool.parts()) == NUM_ROWS
    assert len(pool.parts()) == 3 and all(part.rows > 10 for part in pool.parts())
    total = pool.stats()
    assert total is not None and total.generated_tokens == 2 * NUM_ROWS
    assert log.snapshots[-1].rows == NUM_ROWS
    assert "replica 1 on host-a: " in pool.parts()[0].line()
    assert manifest(job)["engine"] == {"kernels": "cpu", "seed": 0, "max_model_len": 1024}


@pytest.mark.parametrize("seed", range(some(30, 300)))
def test_deaths_at_any_moment_lose_and_double_nothing(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    cluster = FakeCluster([node(n, address=random.choice("xyz")) for n in "abcd"], random)
    cluster.speeds = {name: random.choice([1.0, 3.0, 10.0]) for name in "abcd"}
    deaths = 0

    def dies(replica: FakeReplica) -> bool:
        nonlocal deaths
        deaths += (died := random.random() < 0.04)
        return died

    def joins_and_leaves() -> None:
        if random.random() < 0.03:
            cluster.alive.append(node(f"n{random.random()}"))
        elif random.random() < 0.03 and len(cluster.alive) > 1:
            cluster.alive.remove(random.choice(cluster.alive))

    cluster.dies, cluster.on_wait = dies, joins_and_leaves
    job = options(tmp_path)
    for _ in range(200):  # what gives up is resumed, as a user would
        try:
            run(job, cluster)
            break
        except JobError as error:
            assert "no replica is left" in str(error)
    assert job.output_file.read_bytes() == WANTED
    records = [json.loads(text) for text in job.journal_file.read_text().splitlines()]
    assert deaths and len(records) == NUM_ROWS, "no row was stored twice"


def test_a_dead_ones_rows_go_to_others_and_it_is_started_again(tmp_path: Path) -> None:
    cluster = FakeCluster([node("a"), node("b")])
    cluster.speeds = {"a": 5.0, "b": 5.0}
    killed: list[set[int]] = []

    def dies(replica: FakeReplica) -> bool:
        if replica.node.id == "b" and replica.done > 5 and not killed:
            killed.append(set(replica.rows))
            return True
        return False

    cluster.dies = dies
    job = options(tmp_path)
    pool, log = run(job, cluster)
    assert job.output_file.read_bytes() == WANTED
    assert Counter(where.id for where, *_ in cluster.started) == {"a": 1, "b": 2}
    (said,) = [text for text in log.said if "died" in text]
    assert said == f"replica 2 on host-b: died; {len(killed[0])} rows go to others"
    assert [part.is_gone for part in pool.parts()] == [False, True, False]
    total = pool.stats()
    assert total is not None and total.generated_tokens == 2 * NUM_ROWS


def test_a_node_that_only_kills_replicas_is_left_out(tmp_path: Path) -> None:
    cluster = FakeCluster([node("a"), node("b")])
    cluster.dies = lambda replica: replica.node.id == "b"
    job = options(tmp_path)
    _, log = run(job, cluster, 1)
    assert job.output_file.read_bytes() == WANTED
    cluster = FakeCluster([node("b")])
    cluster.dies = lambda replica: True
    job = options(tmp_path)
    job.output_file.unlink()
    job.journal_file.unlink()
    with pytest.raises(JobError, match="no replica is left to compute: replica 3 on host-b: died"):
        run(job, cluster)
    assert len(cluster.started) == 3


def test_who_has_a_place_waits_for_nobody_that_is_gone(tmp_path: Path) -> None:
    cluster = FakeCluster([node("a", address="one"), node("b", address="one")])
    cluster.silent = {"b"}

    def leaves() -> None:
        if cluster.now > 20:
            cluster.alive = cluster.alive[:1]

    class Late:
        def is_stopping(self) -> bool:
            return cluster.now > 1000

    cluster.on_wait = leaves
    job = options(tmp_path)
    run(job, cluster, stopping=Late())
    assert job.output_file.read_bytes() == WANTED


def test_a_node_that_joins_is_used_where_all_are_asked_for(tmp_path: Path) -> None:
    for number, expected in ((None, {"a", "b"}), (1, {"a"})):
        cluster = FakeCluster([node("a")])
        cluster.speeds = {"a": 1.0, "b": 20.0}

        def joins(cluster: FakeCluster = cluster) -> None:
            if cluster.now > 5 and len(cluster.alive) == 1:
                cluster.alive.append(node("b"))

        cluster.on_wait = joins
        folder = tmp_path / str(number)
        folder.mkdir()
        job = options(folder)
        run(job, cluster, number)
        assert {replica.node.id for replica, rows in cluster.fed if rows} == expected
        assert job.output_file.read_bytes() == WANTED


def test_replicas_get_one_context_that_fits_everywhere(tmp_path: Path) -> None:
    cluster = FakeCluster([node("a"), node("b")])
    cluster.lengths = {"a": 4096, "b": 512}
    job = options(tmp_path)
    run(job, cluster)
    assert manifest(job)["engine"]["max_model_len"] == 512
    lengths = {
        replica.node.id: replica.spec.options.max_model_len
        for replica, _ in cluster.fed
        if replica.spec is not None
    }
    assert lengths["a"] == 512


def test_other_kernels_are_in_the_manifest_before_a_row_runs(tmp_path: Path) -> None:
    job = options(tmp_path)
    cluster = FakeCluster([node("a"), node("b")])
    cluster.kernels = {"b": "triton"}
    seen: list[Any] = []
    cluster.on_wait = lambda: seen.append(manifest(job)) if cluster.fed else None
    _, log = run(job, cluster)
    assert seen[0]["engine"]["kernels"] == ["cpu", "triton"]
    assert "results are of several kernels, as the manifest says: cpu; triton" in log.said


def test_strict_refuses_other_kernels(tmp_path: Path) -> None:
    job = options(tmp_path, strict=True)
    cluster = FakeCluster([node("a"), node("b")])
    cluster.kernels = {"b": "triton"}
    with pytest.raises(UsageError, match="cpu; triton: --strict allows one kind of kernels"):
        run(job, cluster)
    assert not cluster.fed and not job.journal_file.exists()


def test_one_with_other_kernels_that_joins_is_told_or_left_out(tmp_path: Path) -> None:
    for strict in (False, True):
        folder = tmp_path / str(strict)
        folder.mkdir()
        job = options(folder, strict=strict)
        cluster = FakeCluster([node("a")])
        cluster.speeds, cluster.kernels = {"a": 2.0, "b": 2.0}, {"b": "triton"}

        def joins(cluster: FakeCluster = cluster) -> None:
            if cluster.now > 5 and len(cluster.alive) == 1:
                cluster.alive.append(node("b"))

        cluster.on_wait = joins
        run(job, cluster)
        assert job.output_file.read_bytes() == WANTED
        names = {replica.node.id for replica, rows in cluster.fed if rows}
        assert names == ({"a"} if strict else {"a", "b"})
        assert manifest(job)["engine"]["kernels"] == ("cpu" if strict else ["cpu", "triton"])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("refusals", "replica 2 on host-b: model: got '/x', allowed a checkpoint folder"),
        ("versions", "replica 2 on host-b: windlass: got version 9.9, allowed"),
        ("checkpoints", "replica 2 on host-b: model: got another one"),
    ],
)
def test_a_node_that_cannot_take_part_is_one_error(tmp_path: Path, what: str, message: str) -> None:
    cluster = FakeCluster([node("a"), node("b")])
    wrong = {"refusals": "model: got '/x', allowed a checkpoint folder", "versions": "9.9"}
    getattr(cluster, what)["b"] = wrong.get(what, "other")
    job = options(tmp_path)
    with pytest.raises(UsageError) as caught:
        run(job, cluster)
    assert str(caught.value).startswith(message)
    assert not cluster.fed and not job.journal_file.exists()


def test_nothing_is_waited_for_without_an_end(tmp_path: Path) -> None:
    cluster = FakeCluster([node("a")])
    cluster.silent = {"a"}
    with pytest.raises(JobError, match="not started for 2 min"):
        run(options(tmp_path), cluster)
    with pytest.raises(JobError, match="no node has a processor"):
        run(options(tmp_path), FakeCluster([]))


def test_a_stop_keeps_what_has_ended(tmp_path: Path) -> None:
    cluster = FakeCluster([node("a"), node("b")])
    cluster.speeds = {"a": 2.0, "b": 2.0}
    job = options(tmp_path)

    class After:
        def is_stopping(self) -> bool:
            return cluster.now > 10

    pool, _ = run(job, cluster, stopping=After())
    done = sum(part.rows for part in pool.parts())
    assert 0 < done < NUM_ROWS and not job.output_file.exists()
    cluster = FakeCluster([node("a")])
    pool, log = run(job, cluster)
    assert log.said[0].endswith(f"{done} of {NUM_ROWS} rows done")
    assert sum(part.rows for part in pool.parts()) == NUM_ROWS - done
    assert job.output_file.read_bytes() == WANTED


def test_a_machines_memory_is_divided_among_its_replicas(tmp_path: Path) -> None:
    for given, memory in (({}, 6_000), ({"host_memory": 8_000}, 4_000)):
        cluster = FakeCluster([node("a", cpus=2)])
        folder = tmp_path / str(memory)
        folder.mkdir()
        run(options(folder), cluster, 2, **given)
        opened = {replica: replica.spec.options for replica, _ in cluster.fed if replica.spec}
        assert [(own.host_memory, own.threads) for own in opened.values()] == [(memory, 2)] * 2
        assert cluster.started == [(cluster.alive[0], 1.0, 0)] * 2


def test_layout() -> None:
    plain = EngineOptions()
    a, b, gpus = node("a"), node("b"), node("g", gpus=4, cpus=16)
    assert spread([a, b], None, plain, {}) == {"a": 1, "b": 1}
    assert spread([a, b, gpus], None, plain, {}) == {"a": 1, "b": 1, "g": 4}
    assert spread([a, b], 3, plain, {}) == {"a": 2, "b": 1}
    assert spread([a, gpus], 3, plain, {}) == {"a": 1, "g": 2}
    assert spread([gpus], 1, EngineOptions(device="cpu"), {}) == {"g": 1}
    assert spread([a, gpus], None, EngineOptions(device="cuda"), {}) == {"a": 0, "g": 4}
    # what is lost waits for another node, and does not crowd those that are there
    assert spread([a], 2, plain, {"a": 1}) == {"a": 1}
    assert spread([a, b], 2, plain, {"a": 1}) == {"a": 1, "b": 1}
    with pytest.raises(UsageError, match="replicas: got 5, allowed up to 4: one for each device"):
        spread([gpus], 5, plain, {})
    assert takes(gpus, 4, plain) == (4.0, 1)
    assert takes(a, 4, plain) == (0.5, 0)


def test_what_a_resume_may_mix() -> None:
    cpu, gpu = {"kernels": "cpu", "seed": 0}, {"kernels": "triton", "seed": 0}
    out = Path("out")
    mixed = {"kernels": ["cpu", "triton"], "seed": 0}
    assert mixed_engines(None, [cpu, cpu], out) == cpu
    assert mixed_engines(None, [gpu, cpu], out) == mixed
    assert mixed_engines(cpu, [gpu, cpu], out) == mixed
    assert mixed_engines(mixed, [cpu], out) == mixed
    assert mixed_engines(None, [{**cpu, "arithmetic": "avx2"}], out) == cpu
    told = mixed_engines(
        None, [{**cpu, "arithmetic": "avx2"}, {**cpu, "arithmetic": "avx512"}], out
    )
    assert told["kernels"] == ["cpu (avx2)", "cpu (avx512)"]
    by_row = mixed_engines(None, [gpu, {**gpu, "generated_experts": "rows"}], out)
    assert by_row == {"kernels": ["triton", "triton rows"], "seed": 0}
    for stored, found in (
        (cpu, [gpu]),
        (mixed, [{"kernels": "other", "seed": 0}]),
        (cpu, [{**cpu, "seed": 1}]),
        (None, [cpu, {**cpu, "seed": 1}]),
    ):
        with pytest.raises(SettingsDiffer):
            mixed_engines(stored, found, out)
