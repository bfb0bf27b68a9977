"""A batch job on the replicas of a cluster, from its files to its files."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from windlass.batch.job import LeftRows, OpenJob, Summary
from windlass.batch.job_options import JobOptions
from windlass.batch.progress import JobProgress
from windlass.batch.runner import Stopping
from windlass.engine.engine_stats import EngineStats
from windlass.engine.tokenizer import load as load_tokenizer
from windlass.hub.locate import Located, identity_of
from windlass.models.registry import read_spec
from windlass.options import DEMO, EngineOptions, default_params, read_config, resolve_model
from windlass.ray.actors import connected
from windlass.ray.messages import KnownWork, ReplicaSpec
from windlass.ray.pool import Part, Pool
from windlass.ray.roster import Wish


@dataclass(frozen=True, slots=True)
class ReplicaWish:
    """`number` None: as many as the cluster has room for. `given`: options as they were given,
    `located`: with their folders here."""

    number: int | None
    address: str
    given: EngineOptions
    located: Located


def run_on_replicas(
    options: JobOptions,
    wish: ReplicaWish,
    *,
    progress: JobProgress,
    stopping: Stopping,
    has_opened: Callable[[], None],
) -> tuple[Summary, list[Part]]:
    """As `run_job`, and what each replica did. `has_opened`: called once the cluster is there;
    from then on `stopping` is asked. Raises also UsageError for what the cluster lacks."""
    with OpenJob(options, progress) as job:
        load_s = run_s = 0.0
        stats: EngineStats | None = None
        parts: list[Part] = []
        if not job.is_done:
            progress.note(f"connecting to Ray at {wish.address}")
            with connected(wish.address) as cluster:
                has_opened()
                own = _wish(wish, job, options, len(cluster.nodes()))
                pool = Pool(cluster, own)
                job.run_by(pool, stopping)
                load_s, run_s = pool.load_s, pool.run_s
                parts, stats = pool.parts(), pool.stats()
        summary = replace(job.summary(), load_s=load_s, run_s=run_s, stats=stats)
        if summary.is_complete:
            job.write_output()
    return summary, parts


def _wish(wish: ReplicaWish, job: OpenJob, options: JobOptions, num_nodes: int) -> Wish:
    here = wish.located.options
    tokenizer = identity_of(resolve_model(here.tokenizer)) if here.tokenizer else None
    there = replace(_portable(wish.given, here), max_model_len=job.max_model_len)
    spec = ReplicaSpec(
        options=there,
        served_names=options.served_names,
        created=job.created,
        name=options.name,
        max_retries=options.max_retries,
        tool_call_parser=options.tool_call_parser,
        reasoning_parser=options.reasoning_parser,
        work=_work(job.left, replace(here, max_model_len=job.max_model_len), wish, num_nodes),
    )
    return Wish(wish.number, spec, identity_of(resolve_model(here.model)), tokenizer)


def _work(left: LeftRows, here: EngineOptions, wish: ReplicaWish, num_nodes: int) -> KnownWork:
    """The share of one replica. Long rows count as if the longest context could be had."""
    folder = resolve_model(here.model)
    tokenizer_folder = resolve_model(here.tokenizer) if here.tokenizer else folder
    tokenizer = load_tokenizer(tokenizer_folder, model_folder=folder)
    longest = here.max_model_len or read_spec(read_config(folder))[0].max_positions
    job = left.job(tokenizer, default_params(folder, here), longest)
    if job is not None:
        shares = max(1, wish.number or num_nodes)
        count = max(1, job.workload.num_sequences // shares)
        job = job._replace(workload=job.workload.evenly(count))
    wants_grammars = left.file.wants_grammars
    return KnownWork(job, left.longest_row_bytes(longest), wants_grammars)


def _portable(given: EngineOptions, here: EngineOptions) -> EngineOptions:
    """The options for other machines: folders by their whole path, names on the hub with the commit
    that was found here."""

    def place(name: str, folder: str) -> tuple[str, str | None]:
        if name == DEMO:
            return name, None
        if (path := Path(name).expanduser()).exists():
            return str(path.resolve()), None
        repository, _, commit = identity_of(resolve_model(folder)).rpartition("@")
        return repository, commit

    model, revision = place(given.model, here.model)
    found = replace(given, model=model, revision=revision, tokenizer_revision=None)
    if given.tokenizer is None or here.tokenizer is None:
        return found
    tokenizer, revision = place(given.tokenizer, here.tokenizer)
    return replace(found, tokenizer=tokenizer, tokenizer_revision=revision)
