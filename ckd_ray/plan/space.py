"""Bytes: what a stage leaves in the run directory, and what its processes hold at their peak. Arithmetic alone.

Constants were read off finished runs of MedQuAD (plan.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckd_ray.config import Config
from ckd_ray.config.schema import TrainingConfig
from ckd_ray.plan.rates import Rates, StepRate
from ckd_ray.plan.search_time import cells
from ckd_ray.plan.sizes import Sizes
from ckd_ray.store.codec import bytes_per_token
from ckd_ray.store.codec_training import choose_centroids

if TYPE_CHECKING:
    from ckd_ray.plan.estimate import Layout

GIB = 2.0**30
# A process with Ray, torch and transformers loaded; the driver has pandas, pyarrow and the measures as well.
PROCESS, DRIVER = 0.45 * GIB, 0.55 * GIB
# A GPU process holds kernels and workspaces beside its tensors.
GPU_CONTEXT = 0.7 * GIB
_ID_BYTES, _QUERY_BYTES, _LABEL_BYTES = 12, 60, 30
_RANK_ROW, _MATRIX_ROW, _RUN_ROW = 9, 4, 44
_HELD_LABEL, _HELD_QUERY = 400, 250  # Python objects of the driver


def store_bytes(config: Config, sizes: Sizes, shards: int, splits: tuple[str, ...]) -> dict[str, float]:
    """V (C + 4) with token ids, 24 a passage, document frequencies of each shard; queries in fp16.

    C: bytes a token of the codec; the document frequencies name about a seventh of a shard's tokens, 8 bytes each.
    """
    m = config.model
    rows = sizes.vectors * (bytes_per_token(config.embed.codec, m.dim) + 4)
    named = 8 * min(30_000.0, sizes.vectors / shards / 7) * shards
    queries = sum(sizes.queries.get(split, 0) for split in splits) * m.query_maxlen * (2 * m.dim + 4)
    codec = 0.0 if config.embed.codec == "fp16" else choose_centroids(int(sizes.vectors)) * 2.0 * m.dim
    return {"passages": rows + 24.0 * sizes.passages + named + codec, "queries": float(queries)}


def stage_storage(name: str, config: Config, sizes: Sizes, rates: Rates, layout: Layout) -> dict[str, float]:
    """Bytes by folder of the run directory.

    rankings: q K (9 in Parquet + 4 in the matrix). labels: q clusters (4 (D + 1) in the array + 4 D in Parquet, of
    which 95 % are kept) for each depth. A checkpoint: 4 P. index (faiss, local runs): 24 V + 4 C D. evaluation: 2 q K
    (57). baselines: q K (44) each.
    """
    m, train = config.model, sizes.queries.get("train", 0)
    weights = 4.0 * rates.parameters + 1e6
    if name == "collection":
        corpus = sizes.passages * (sizes.text_bytes * rates.corpus_share + 2 * _ID_BYTES)
        return {"corpus": corpus, "queries": float(sizes.all_queries * _QUERY_BYTES + sizes.labels * _LABEL_BYTES)}
    if name == "teacher":
        return {"teacher": weights}
    if name == "embed":
        found = store_bytes(config, sizes, layout.shards, tuple(sizes.queries))
        return {f"embeddings/{key}": size for key, size in found.items()}
    if name == "retrieve":
        kept = {"rankings": float(train * min(config.retrieve.depth, sizes.passages) * (_RANK_ROW + _MATRIX_ROW))}
        if layout.retrieve.engine == "faiss" and not layout.remote:
            kept["index"] = 24.0 * sizes.vectors + 4.0 * m.dim * cells(config, sizes)
        return kept
    if name == "label":
        clusters = config.label.clusters * len(config.label.depths)
        return {"labels": train * clusters * (4.0 * (m.dim + 1) + 0.95 * 4 * m.dim)}
    if name == "cross_encoder":
        depth = config.cross_encoder.depth
        scored = 1 + (config.distill.negatives_depth if depth == "auto" else depth)
        return {"cross_scores": 12.0 * train * scored}
    if name == "distill":
        return {"student": weights}
    splits = tuple(config.evaluate.splits)
    rows = 2.0 * sum(sizes.queries.get(s, 0) for s in splits) * min(config.evaluate.depth, sizes.passages)
    found = store_bytes(config, sizes, layout.shards, splits)
    return {
        **{f"student_embeddings/{key}": size for key, size in found.items()},
        "evaluation": rows * (_RUN_ROW + _RANK_ROW + _MATRIX_ROW),
        **({"baselines": len(config.evaluate.baselines) * rows / 2 * _RUN_ROW} if config.evaluate.baselines else {}),
    }


def stage_memory(name: str, config: Config, sizes: Sizes, rates: Rates, layout: Layout) -> dict[str, float]:
    """Peak bytes of the driver, of one actor (encoder, server, worker or task), and of one GPU."""
    m = config.model
    if name == "collection":
        held = 8.0 * sizes.passages + _HELD_LABEL * sizes.labels + _HELD_QUERY * sizes.all_queries
        return {"driver": DRIVER + held}
    found = {"driver": DRIVER + 12.0 * sizes.passages + _HELD_QUERY * sizes.all_queries}
    on_gpu = layout.gpus > 0
    if name in ("teacher", "distill"):
        if name == "teacher" and config.teacher.checkpoint is not None:
            return found
        section = config.teacher if name == "teacher" else config.distill
        workers = layout.teacher_workers if name == "teacher" else layout.distill_workers
        tokens = step_tokens(section, m.query_maxlen, sizes, rates.training[name])
        tensors = training_bytes(tokens / workers / section.accumulate, rates, on_gpu)
        held = PROCESS + _HELD_LABEL * sizes.labels + 4.0 * rates.parameters
        return {
            **found,
            "actor": held + (0 if on_gpu else tensors),
            **({"gpu": GPU_CONTEXT + tensors} if on_gpu else {}),
        }
    if name == "retrieve":
        index = PROCESS + layout.retrieve.index_bytes
        return {**found, "actor": index, **({"gpu": GPU_CONTEXT + 2 * GIB} if layout.retrieve.gpus else {})}
    if name == "label":
        return {**found, "actor": PROCESS + 3.0 * (1 << 17) * m.dim * 4}
    encoder, device = encoder_bytes(config, sizes, rates, layout)
    return {**found, "actor": encoder, **({"gpu": device} if on_gpu else {})}


def encoder_bytes(config: Config, sizes: Sizes, rates: Rates, layout: Layout) -> tuple[float, float]:
    """(process, GPU) of an encoder: weights (twice on a CPU, whose linear layers are copied), activations of a batch,
    and the rows of one shard with their coded form."""
    m, budget = config.model, config.embed.token_budget
    tokens = (8192 if layout.actor_gpus else 1440) if budget == "auto" else budget
    activations = tokens * rates.hidden * 20.0 * (2 if layout.actor_gpus else 4)
    coded = bytes_per_token(config.embed.codec, m.dim)
    shard = layout.shard_passages * sizes.kept * (2 * m.dim + coded + 8)
    weights = 4.0 * rates.parameters
    if layout.actor_gpus:
        return PROCESS + shard + weights, GPU_CONTEXT + 1.5 * weights + activations
    return PROCESS + shard + 2 * weights + activations, 0.0


def step_tokens(section: TrainingConfig, query_maxlen: int, sizes: Sizes, step: StepRate) -> float:
    """Tokens that a step encodes: B (Q + (1 + negatives) tokens), and the padding that was measured."""
    return section.batch_size * (query_maxlen + (1 + section.negatives) * sizes.tokens) * step.padding


def training_bytes(tokens: float, rates: Rates, on_gpu: bool) -> float:
    """Weights, gradients and two moments (16 P), and 34 hidden numbers a token and layer of activations (Korthikanti et
    al. 2022, without the attention matrices, which are not kept), of 4 bytes, or 2 under bf16.

    Args:
        tokens: that a worker encodes at a time.
    """
    return 16.0 * rates.parameters + tokens * rates.layers * 34.0 * rates.hidden * (1 if on_gpu else 2)
