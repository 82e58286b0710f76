"""From sizes, rates and a layout to the time, memory and storage of every stage. Arithmetic alone: no Ray, no clock.

A stage is a list of parts, each with its seconds and with what it waits for; the parts follow one another. What does
not shrink with the cluster (the driver, one server, processes that start) stands as parts of its own.

In the formulas: N passages of `tokens` (read by the encoder) and `kept` (stored) tokens; V = N kept, token embeddings;
q queries of Q rows; D dimensions; K results a query; S servers; P parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ckd_ray.config import Config
from ckd_ray.config.schema import TrainingConfig
from ckd_ray.plan.baselines import baseline_parts
from ckd_ray.plan.rates import Rates, StepRate
from ckd_ray.plan.search_time import Part, Servers, search_parts, vote_parts
from ckd_ray.plan.sizes import Sizes
from ckd_ray.plan.space import stage_memory, stage_storage, step_tokens
from ckd_ray.store.codec import bytes_per_token
from ckd_ray.store.codec_training import choose_centroids, sample_size

# Fixed times of Ray's stages, as multiples of what a new process takes to import everything (`process_start_s`), and
# seconds that do not depend on it. Read off the times of the files of one quick start (plan.md).
EMBED_START = (1.0, 5.0)
SERVE_START = (1.0, 2.0)
TRAIN_START = (2.0, 4.0)
TASKS_START = (0.3, 1.5)
# The driver's own imports, before the first stage that needs the encoder.
DRIVER_START = (1.0, 1.0)
# `ray.train.report` blocks for about one period of the controller's polling (distill/trainer.py sets 0.2 s).
REPORT_S = 0.2
# Between the GPUs of one machine, bytes a second: PCIe 4.
LOCAL_LINK = 2e10
_KMEANS_ITERATIONS = 6


@dataclass(frozen=True)
class Layout:
    """How a run is placed (layout.py): what each stage has to work with.

    Attributes:
        stages: those that run, in order. node_cpus, node_gpus: of the largest node.
        shard_passages, last_passages: of the largest shard, and of the last.
        actors, actor_threads, actor_gpus, feeders: of the embed stage; feeders in CPUs.
        votes: `feedback`, `exact`, `faiss` or `estimate`; vote: the servers of exact and faiss votes.
        network_bytes: a second and machine. remote: the run's storage is a URI.
    """

    stages: tuple[str, ...]
    cpus: float
    node_cpus: float
    gpus: float
    node_gpus: float
    nodes: int
    shards: int
    shard_passages: int
    last_passages: int
    actors: int
    actor_threads: int
    actor_gpus: float
    feeders: float
    retrieve: Servers
    votes: str
    vote: Servers | None
    evaluate: Servers
    teacher_workers: int
    distill_workers: int
    network_bytes: float = 1.25e9
    remote: bool = False
    memory: float = 0.0
    accelerator: str | None = None
    smallest_node_gib: float = 0.0


@dataclass(frozen=True)
class StagePlan:
    """A stage: its parts, bytes that it leaves in the run directory by folder, and peak bytes of its processes."""

    name: str
    parts: tuple[Part, ...]
    storage: dict[str, float]
    memory: dict[str, float]

    @property
    def seconds(self) -> float:
        """The parts one after the other."""
        return sum(part.seconds for part in self.parts)

    @property
    def bound(self) -> Part | None:
        """The longest part."""
        return max(self.parts, key=lambda part: part.seconds, default=None)

    def cost(self, usd_an_hour: float | None) -> float | None:
        """All machines are paid for as long as the stage lasts, whether they work or not."""
        return None if usd_an_hour is None else usd_an_hour * self.seconds / 3600


@dataclass(frozen=True)
class Plan:
    """All stages of a run."""

    stages: tuple[StagePlan, ...]

    @property
    def seconds(self) -> float:
        """Of the run."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def storage(self) -> float:
        """Bytes that the run directory holds at the end."""
        return sum(sum(stage.storage.values()) for stage in self.stages)

    @property
    def bound(self) -> StagePlan:
        """The longest stage."""
        return max(self.stages, key=lambda stage: stage.seconds)

    @property
    def serial_seconds(self) -> float:
        """What does not shrink with more machines: the driver's work, one server's, and processes that start."""
        return sum(part.seconds for stage in self.stages for part in stage.parts if not part.scales)


def estimate(config: Config, sizes: Sizes, rates: Rates, layout: Layout) -> Plan:
    """The plan of a run from an empty directory, every stage done once and nothing lost."""
    work: dict[str, Callable[[], list[Part]]] = {
        "collection": lambda: collection_parts(sizes, rates),
        "teacher": lambda: teacher_parts(config, sizes, rates, layout),
        "embed": lambda: embed_parts(config, sizes, rates, layout, tuple(sizes.queries)),
        "retrieve": lambda: retrieve_parts(config, sizes, rates, layout),
        "label": lambda: label_parts(config, sizes, rates, layout),
        "cross_encoder": lambda: cross_encoder_parts(config, sizes, rates, layout),
        "distill": lambda: training_parts(
            config, config.distill, sizes, rates, layout, "distill", layout.distill_workers
        ),
        "evaluate": lambda: evaluate_parts(config, sizes, rates, layout),
    }
    stages = []
    for name in layout.stages:
        parts = tuple(part for part in work[name]() if part.seconds > 0)
        storage = stage_storage(name, config, sizes, rates, layout)
        stages.append(StagePlan(name, parts, storage, stage_memory(name, config, sizes, rates, layout)))
    return Plan(tuple(stages))


def collection_parts(sizes: Sizes, rates: Rates) -> list[Part]:
    """One process: reading the source as it was read here (docstrings are parsed, files cost next to nothing beside
    the rest), then N `build_passage_s` + queries `build_query_s`."""
    built = sizes.passages * rates.build_passage_s + sizes.all_queries * rates.build_query_s
    read = sizes.read_seconds or 0.0
    return [Part("read the source", read, "driver"), Part("check and write", built, "driver")]


def _start(factors: tuple[float, float], rates: Rates, name: str = "start processes") -> Part:
    return Part(name, factors[0] * rates.process_start_s + factors[1], "start")


def _choice(config_precision: str, sizes: Sizes, rates: Rates) -> Part:
    """`precision: auto` on a CPU: 8 encodings of 8 passages of up to 128 tokens, in one thread."""
    asked = config_precision == "auto" and rates.device == "cpu"
    return Part("choose the precision", 8 * 8 * 128 * rates.encode_token_s if asked else 0.0, "driver")


def teacher_parts(config: Config, sizes: Sizes, rates: Rates, layout: Layout) -> list[Part]:
    """Training, or copying the checkpoint that is given."""
    if config.teacher.checkpoint is not None:
        return [
            _start(DRIVER_START, rates, "load the libraries"),
            Part("copy the checkpoint", rates.checkpoint_s, "driver"),
        ]
    return training_parts(config, config.teacher, sizes, rates, layout, "teacher", layout.teacher_workers)


def step_seconds(step: StepRate, rates: Rates, layout: Layout, tokens: float, workers: int) -> float:
    """A step: fixed + token_s * tokens / W, and the exchange of gradients.

    On a CPU the rate was measured with all of `rates.cores`; a worker has its node's cores shared among the node's
    workers. Gradients: a ring of W workers moves 2 (W - 1) / W * 4 P bytes through every link.

    Args:
        tokens: of the whole batch.
    """
    slower = 1.0
    if rates.device == "cpu":
        each = layout.node_cpus / max(1, -(-workers // layout.nodes))
        slower = rates.cores / max(1.0, each)
    # Ray packs workers onto one machine where it can.
    together = workers <= (layout.node_gpus if layout.gpus else layout.node_cpus)
    link = LOCAL_LINK if together else layout.network_bytes
    exchange = 2 * (workers - 1) / workers * 4 * rates.parameters / link
    return step.fixed_s + step.token_s * tokens / workers * slower + exchange


def training_parts(
    config: Config, section: TrainingConfig, sizes: Sizes, rates: Rates, layout: Layout, stage: str, workers: int
) -> list[Part]:
    """steps * step + checkpoints + measurements on dev, after the start of controller and workers.

    Checkpoints: every `checkpoint_every` steps and at the end, written by one worker while the others wait.
    """
    step = rates.training[stage]
    steps = section.steps
    tokens = step_tokens(section, config.model.query_maxlen, sizes, step)
    each = step_seconds(step, rates, layout, tokens, workers)
    saved = -(-steps // section.checkpoint_every)
    parts = [
        _start(DRIVER_START if stage == "teacher" else (0.0, 0.0), rates, "load the libraries"),
        _start(TRAIN_START, rates),
        _choice(section.precision, sizes, rates),
        Part("training steps", steps * each, "encoder", scales=rates.device == "cuda"),
        Part("checkpoints", saved * (rates.checkpoint_s + REPORT_S), "one worker"),
    ]
    if section.evaluate_every:
        tokens = min(section.dev_passages, sizes.passages) * sizes.tokens
        tokens += section.dev_queries * config.model.query_maxlen
        spread = workers if rates.device == "cuda" else layout.node_cpus
        measured = steps // section.evaluate_every * tokens * rates.encode_token_s / spread
        parts.append(Part("measurements on dev", measured, "encoder"))
    return parts


def embed_parts(config: Config, sizes: Sizes, rates: Rates, layout: Layout, splits: tuple[str, ...]) -> list[Part]:
    """(N tokens + q Q) encode_token_s over the actors, and half a shard that the last actor is alone with.

    Tokenising and writing cost the actors' own cores on a CPU; on GPUs feeders tokenise beside the encoders, and the
    slower of the two counts. A residual codec is learned first from a sample, and coding a row compares it with the
    centroids next to it, on the actor's CPU.
    """
    m, e = config.model, config.embed
    queries = sum(sizes.queries.get(split, 0) for split in splits)
    read = sizes.passages * sizes.tokens
    encode = (read + queries * m.query_maxlen) * rates.encode_token_s
    tokenise = read * rates.tokenize_token_s
    write = (sizes.vectors + queries * m.query_maxlen) * 2 * m.dim * rates.write_byte_s
    code = 0.0 if e.codec == "fp16" else _coding(sizes.vectors, m.dim, rates)
    if layout.actor_gpus:
        lanes = layout.actors * min(1.0, layout.actor_gpus)
        encode_s, feed_s = (encode + write + code) / lanes, tokenise / layout.feeders
        waits = "encoder" if encode_s >= feed_s else "tokenizer"
        busy = max(encode_s, feed_s)
    else:
        lanes = min(layout.cpus, layout.actors * layout.actor_threads)
        busy, waits = (encode + tokenise + write + code) / lanes, "encoder"
    if code > max(encode, 1e-12):
        waits = "codec"
    tail = 0.5 * busy * lanes * layout.last_passages / sizes.passages * (1 - 1 / max(1.0, lanes))
    sent = (sizes.vectors * bytes_per_token(e.codec, m.dim)) / (layout.network_bytes * layout.nodes)
    parts = [
        _start(EMBED_START, rates),
        _choice(e.precision, sizes, rates),
        Part("encode", busy, waits, scales=True),
        Part("last shards", tail, waits),
        Part("write to the storage", sent if layout.remote else 0.0, "network", scales=True),
    ]
    if e.codec != "fp16":
        parts += _codec_parts(config, sizes, rates, layout, lanes)
    return parts


def _coding(vectors: float, dim: int, rates: Rates) -> float:
    """Core seconds of finding every row's centroid: sqrt(K) groups and 12 of them in full where K >= 4,096, else K."""
    count = choose_centroids(int(vectors))
    compared = count if count < 4096 else count**0.5 * 13
    return vectors * compared * 2 * dim / rates.assign_ops


def _codec_parts(config: Config, sizes: Sizes, rates: Rates, layout: Layout, lanes: float) -> list[Part]:
    """The sample that the codec is learned from, embedded; then 6 rounds of k-means on one machine's cores."""
    sample, count = sample_size(int(sizes.vectors)), choose_centroids(int(sizes.vectors))
    encode = sample / max(1.0, sizes.kept) * sizes.tokens * rates.encode_token_s / lanes
    learn = _KMEANS_ITERATIONS * sample * count * 2 * config.model.dim / (rates.assign_ops * layout.node_cpus)
    return [
        Part("encode the codec's sample", encode, "encoder", scales=True),
        Part("learn the codec", learn, "one machine"),
    ]


def retrieve_parts(config: Config, sizes: Sizes, rates: Rates, layout: Layout) -> list[Part]:
    """Start of the servers, then `search_parts`; recall against exact search where the engine is another."""
    count, servers = sizes.queries.get("train", 0), layout.retrieve
    parts = [_start(SERVE_START, rates), _start(TASKS_START, rates, "start tasks")]
    parts += search_parts(config, sizes, rates, layout, servers, count, config.retrieve.depth)
    if servers.engine != "exact":
        work = 2.0 * config.model.query_maxlen * sizes.vectors * config.model.dim
        asked = min(count, int(min(256.0, max(8.0, 6e11 / max(1.0, work)))))
        exact = replace(servers, engine="exact")
        found = search_parts(config, sizes, rates, layout, exact, asked, min(100, config.retrieve.depth))
        seconds = sum(part.seconds for part in found if part.name.startswith(("score", "exact")))
        parts.append(Part("measure recall", seconds, "exact search", scales=True))
    return parts


def label_parts(config: Config, sizes: Sizes, rates: Rates, layout: Layout) -> list[Part]:
    """q (expand_query_s, and crowded_query_s for the estimate) over all CPUs, and the votes of the collection."""
    count = sizes.queries.get("train", 0)
    each = rates.expand_query_s + (rates.crowded_query_s if layout.votes == "estimate" else 0.0)
    parts = [_start(TASKS_START, rates, "start tasks")]
    if layout.vote is not None:
        parts.append(_start(SERVE_START, rates))
    parts.append(Part("cluster and vote", count * each / layout.cpus, "cores", scales=True))
    return parts + vote_parts(config, sizes, rates, layout, count)


def cross_encoder_parts(config: Config, sizes: Sizes, rates: Rates, layout: Layout) -> list[Part]:
    """Scores from a file cost next to nothing. A classifier is taken for as large as the encoder planned for:
    q (1 + depth) pairs of a query and a passage, at encode_token_s."""
    if config.cross_encoder.scores is not None:
        return [Part("read the scores", 1.0, "driver")]
    depth = config.cross_encoder.depth
    pairs = sizes.queries.get("train", 0) * (1 + (config.distill.negatives_depth if depth == "auto" else depth))
    tokens = min(float(config.cross_encoder.maxlen), sizes.tokens + 12)
    lanes = layout.gpus or layout.cpus
    return [
        _start(EMBED_START, rates),
        Part("score pairs", pairs * tokens * rates.encode_token_s / lanes, "encoder", scales=True),
    ]


def evaluate_parts(config: Config, sizes: Sizes, rates: Rates, layout: Layout) -> list[Part]:
    """The student embeds the corpus again; both systems search; the driver writes and measures 2 q K rows. Then the
    baselines (baselines.py)."""
    splits = tuple(split for split in config.evaluate.splits if sizes.queries.get(split))
    count = sum(sizes.queries[split] for split in splits)
    depth = min(config.evaluate.depth, sizes.passages)
    parts = embed_parts(config, sizes, rates, layout, splits)
    for system in ("teacher", "student"):
        parts.append(_start(SERVE_START, rates, f"start servers ({system})"))
        found = search_parts(config, sizes, rates, layout, layout.evaluate, count, depth)
        parts += [replace(part, name=f"{part.name} ({system})") for part in found]
    parts.append(Part("run files and measures", 2 * count * depth * rates.evaluate_row_s, "driver"))
    starts = [_start(factors, rates, "start processes (encoder as it is)") for factors in (EMBED_START, SERVE_START)]
    return parts + baseline_parts(config, sizes, rates, layout, starts, count, depth)


def to_dict(plan: Plan, usd_an_hour: float | None, sizes: Sizes, rates: Rates, layout: Layout) -> dict[str, Any]:
    """As JSON: seconds, bytes and USD of every stage with its parts, and what bounds."""
    stages = [
        {
            "stage": stage.name,
            "seconds": round(stage.seconds, 1),
            "cost_usd": _rounded(stage.cost(usd_an_hour)),
            "bound": stage.bound.waits if stage.bound else None,
            "parts": [
                {"name": p.name, "seconds": round(p.seconds, 2), "waits_for": p.waits, "scales": p.scales}
                for p in stage.parts
            ],
            "storage_bytes": {name: round(size) for name, size in stage.storage.items()},
            "memory_bytes": {name: round(size) for name, size in stage.memory.items()},
        }
        for stage in plan.stages
    ]
    hours = plan.seconds / 3600
    peaks: dict[str, float] = {}
    for stage in plan.stages:
        for name, size in stage.memory.items():
            peaks[name] = max(peaks.get(name, 0.0), size)
    longest = plan.bound
    return {
        "stages": stages,
        "seconds": round(plan.seconds, 1),
        "serial_seconds": round(plan.serial_seconds, 1),
        "cost_usd": _rounded(None if usd_an_hour is None else usd_an_hour * hours),
        "storage_bytes": round(plan.storage),
        "memory_bytes": {name: round(size) for name, size in peaks.items()},
        "bound": {"stage": longest.name, "waits_for": longest.bound.waits if longest.bound else None},
        "collection": vars(sizes),
        "layout": {**vars(layout), "retrieve": vars(layout.retrieve), "evaluate": vars(layout.evaluate),
                   "vote": vars(layout.vote) if layout.vote else None},
        "rates": rates.to_dict(),
        "assumptions": list(rates.assumptions),
    }  # fmt: skip


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
