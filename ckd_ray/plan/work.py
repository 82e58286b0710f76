"""The work of each stage in units. A calibration fits what a unit costs, and a plan multiplies.

In the formulas: N passages of `tokens` (read by the encoder) and `kept` (stored) tokens; V = N kept token embeddings; q
queries of Q rows; K results a query; C cells or centroids. A product is that of two token embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckd_ray.collective.special_cells import SAMPLE, choose_cells as choose_special_cells
from ckd_ray.config import Config
from ckd_ray.config.schema import TrainingConfig
from ckd_ray.distill.objectives import scorers_of
from ckd_ray.plan.layout import Layout
from ckd_ray.plan.sizes import Sizes
from ckd_ray.retrieve.faiss_index import choose_cells
from ckd_ray.retrieve.shard_range import RERANK_FACTOR
from ckd_ray.store.codec_training import choose_centroids, sample_size

# From so many centroids on, a row is compared with the square root of them, and with some groups in full.
_GROUPED_FROM, _GROUPS = 4096, 13


@dataclass(frozen=True)
class Unit:
    """How people read a unit of work.

    Attributes:
        name: of the part of a stage. waits: what would have to be faster.
        lanes: the kind of devices that share it (`Layout.lanes`); None where one process does it all.
    """

    name: str
    waits: str
    lanes: str | None = None


UNITS = {
    "text": Unit("check and write", "driver"),
    "step": Unit("start kernels", "GPU"),
    "teacher token": Unit("training steps", "encoder", "teacher"),
    "distill token": Unit("training steps", "encoder", "distill"),
    "token": Unit("encode", "encoder", "encode"),
    "pair token": Unit("score pairs", "encoder", "encode"),
    "codec product": Unit("learn and apply the codec", "codec", "cores"),
    "exact product": Unit("score all passages", "exact search", "exact"),
    "exact row": Unit("exact scores of the best", "exact search"),
    "faiss product": Unit("build and search the index", "one server", "faiss"),
    "centroids product": Unit("read the lists and score candidates", "exact search", "centroids"),
    "query": Unit("cluster and vote", "cores", "cores"),
    "scored pair": Unit("score candidates by the ensemble", "cores", "cores"),
    "vote product": Unit("cluster, and votes of the collection", "cores", "cores"),
    "measured row": Unit("exact scores of the best, run files and measures", "driver"),
    "bm25_token_s": Unit("index BM25", "one process"),
    "bm25_score_s": Unit("search BM25", "one process"),
}


def unit_of(name: str) -> Unit:
    """The unit of that name. `STAGE start` is the fixed part of a stage, in which processes start."""
    return UNITS.get(name) or Unit("start", "start")


def stage_work(stage: str, config: Config, sizes: Sizes, layout: Layout) -> dict[str, float]:
    """Units of work of one stage, by name."""
    train, q_rows = sizes.queries.get("train", 0), config.model.query_maxlen
    work = {f"{stage} start": 1.0}
    if stage == "collection":
        return work | {"text": float(sizes.passages + sizes.all_queries)}
    if stage == "teacher":
        return work | ({} if config.teacher.checkpoint else training_work(config.teacher, config, sizes, stage))
    if stage == "distill":
        return work | training_work(config.distill, config, sizes, stage)
    if stage == "embed":
        codec = {} if config.embed.codec == "fp16" else {"codec product": _codec_products(sizes)}
        return work | {"token": sizes.passages * sizes.tokens + sizes.all_queries * q_rows} | codec
    if stage == "retrieve":
        return work | search_work(layout.engine, config, sizes, train, config.retrieve.depth)
    if stage == "label":
        return work | _labels(config, sizes, layout)
    if stage == "ensemble":
        scorers = scorers_of(config.distill)
        vectors = sizes.passages * sizes.tokens + train * q_rows
        pairs = float(train * min(config.distill.negatives_depth, sizes.passages) * len(scorers))
        return work | {"scored pair": pairs} | ({"token": vectors} if "encoder" in scorers else {})
    if stage == "cross_encoder":
        if config.cross_encoder.scores is not None:  # no calibration reads them: they are of the real collection
            return {"text": float(train)}
        depth = config.cross_encoder.depth
        pairs = train * (1 + (config.distill.negatives_depth if depth == "auto" else depth))
        return work | {"pair token": pairs * min(float(config.cross_encoder.maxlen), sizes.tokens + q_rows / 2)}
    return work | _evaluation(config, sizes, layout)


def training_work(section: TrainingConfig, config: Config, sizes: Sizes, stage: str) -> dict[str, float]:
    """A step encodes B queries with a positive and the negatives each; dev is encoded whenever it is measured. The
    gradients of a layer take twice its forward pass, so computing that again adds a third."""
    again = 4 / 3 if section.gradient_checkpointing else 1.0
    work = {
        f"{stage} token": again * section.steps * step_tokens(section, config, sizes),
        "step": float(section.steps),
    }
    if section.evaluate_every:
        tokens = min(section.dev_passages, sizes.passages) * sizes.tokens
        tokens += section.dev_queries * config.model.query_maxlen
        work["token"] = section.steps // section.evaluate_every * tokens
    return work


def step_tokens(section: TrainingConfig, config: Config, sizes: Sizes) -> float:
    """Tokens that a training step encodes, without padding."""
    passage = min(sizes.tokens, float(section.doc_maxlen or sizes.tokens))
    return section.batch_size * (config.model.query_maxlen + (1 + section.negatives) * passage)


def search_work(engine: str, config: Config, sizes: Sizes, queries: int, depth: int) -> dict[str, float]:
    """`exact`: q Q V products, and K passages a query that are scored again in float64.

    `faiss`: V C products to build, q Q (C + nprobe V / C) to look into cells, and 16 K passages a query to score.
    `centroids`: q Q (C + nprobe V / C), and `candidates` passages a query.
    """
    r, rows = config.retrieve, float(queries * config.model.query_maxlen)
    depth = min(depth, sizes.passages)
    if engine == "exact":
        return {"exact product": rows * sizes.vectors, "exact row": float(queries * depth)}
    pair = sizes.kept * config.model.query_maxlen
    if engine == "faiss":
        cells = choose_cells(int(sizes.vectors)) if r.cells == "auto" else min(r.cells, int(sizes.vectors) // 39)
        cells, scored = max(1, cells), min(sizes.passages, RERANK_FACTOR * depth)
        return {"faiss product": _index_products(cells, r.nprobe, sizes, rows) + queries * scored * pair}
    cells, scored = choose_centroids(int(sizes.vectors)), min(sizes.passages, max(depth, r.candidates))
    look = rows * (cells + min(r.nprobe, cells) * sizes.vectors / cells)
    return {"centroids product": look + queries * scored * pair}


def _index_products(cells: int, nprobe: int, sizes: Sizes, rows: float) -> float:
    return sizes.vectors * cells + rows * (cells + min(nprobe, cells) * sizes.vectors / cells)


def _labels(config: Config, sizes: Sizes, layout: Layout) -> dict[str, float]:
    """The search for votes for all centroids of the expansions (docs/explanation/method.md, step 4), beside which
    clusters cost little. Without a search: clusters of each query, and for the estimate the cells of a sample."""
    queries = float(sizes.queries.get("train", 0) * len(config.label.depths))
    vectors = queries * config.label.clusters
    if layout.votes == "feedback":
        return {"query": queries}
    if layout.votes == "estimate":
        sample = min(SAMPLE, int(sizes.vectors))
        return {"query": queries, "exact product": float(sample * choose_special_cells(sample))}
    if layout.votes == "exact":
        return {"vote product": vectors * sizes.vectors}
    return {"vote product": _index_products(choose_cells(int(sizes.vectors)), config.retrieve.nprobe, sizes, vectors)}


def _codec_products(sizes: Sizes) -> float:
    """Every row is compared with centroids, which were learned from a sample."""
    count = choose_centroids(int(sizes.vectors))
    compared = count if count < _GROUPED_FROM else _GROUPS * count**0.5
    return sizes.vectors * compared + float(sample_size(int(sizes.vectors))) * count


def _evaluation(config: Config, sizes: Sizes, layout: Layout) -> dict[str, float]:
    """The student embeds the corpus again, and so does the encoder as it is, unless the ensemble had it do so; teacher
    and student search; run files and measures of all systems; BM25 reads N passages, and scores N a query."""
    e, queries = config.evaluate, sizes.evaluated(config)
    bm25 = "bm25" in e.baselines and sizes.passages <= e.bm25_passages
    encoder = "encoder" in e.baselines
    passes = 1 + (encoder and not ("ensemble" in layout.stages and "encoder" in scorers_of(config.distill)))
    tokens = sizes.passages * sizes.tokens
    work = {"token": passes * (tokens + queries * config.model.query_maxlen)}
    found = search_work(layout.evaluate_engine, config, sizes, 2 * queries, e.depth)
    found.pop("exact row", None)  # part of a measured row
    work |= found
    work["measured row"] = float((2 + encoder + bm25) * queries * min(e.depth, sizes.passages))
    if bm25:
        work |= {"bm25_token_s": tokens, "bm25_score_s": float(queries * sizes.passages)}
    return work


FOLDERS = {
    "collection": ("corpus", "queries"),
    "teacher": ("teacher",),
    "embed": ("embeddings",),
    "retrieve": ("rankings", "index"),
    "label": ("labels",),
    "ensemble": ("ensemble",),
    "cross_encoder": ("cross_scores",),
    "distill": ("student",),
    "evaluate": ("student_embeddings", "evaluation", "baselines"),
}


def storage_units(folder: str, config: Config, sizes: Sizes) -> float:
    """What the bytes of a folder grow with; 0 where they do not grow."""
    train, queries, q_rows = sizes.queries.get("train", 0), sizes.evaluated(config), config.model.query_maxlen
    units = {
        "corpus": sizes.passages * sizes.tokens,
        "queries": sizes.all_queries,
        "embeddings": sizes.vectors + sizes.all_queries * q_rows,
        "rankings": train * min(config.retrieve.depth, sizes.passages),
        "index": sizes.vectors,
        "labels": train * len(config.label.depths),
        "ensemble": train * min(config.distill.negatives_depth, sizes.passages),
        "cross_scores": train,
        "student_embeddings": sizes.vectors + queries * q_rows,
        "evaluation": queries * min(config.evaluate.depth, sizes.passages),
        "baselines": queries * min(config.evaluate.depth, sizes.passages),
    }
    return float(units.get(folder, 0))
