"""What the processes of each stage hold at their peak, in bytes. Arithmetic alone.

The constants are peaks of processes in finished runs of MedQuAD (docs/explanation/plan.md).
"""

from __future__ import annotations

from ckd_ray.config import Config
from ckd_ray.model.length_buckets import CPU_TOKENS, gpu_token_budget
from ckd_ray.plan.hardware import ACCELERATORS, Shape
from ckd_ray.plan.layout import Layout
from ckd_ray.plan.sizes import Sizes
from ckd_ray.plan.work import step_tokens
from ckd_ray.store.codec import bytes_per_token

GIB = 2.0**30
# A process with Ray, torch and transformers loaded; the driver has pandas, pyarrow and the measures as well.
PROCESS, DRIVER = 0.45 * GIB, 0.55 * GIB
# A GPU process holds kernels and workspaces beside its tensors.
GPU_CONTEXT = 0.7 * GIB
# Python objects of the driver, and numbers of a passage.
_HELD_LABEL, _HELD_QUERY, _HELD_PASSAGE = 400, 250, 12
_PADDING = 1.25  # tokens encoded for each token of the texts, in a training step


def stage_memory(stage: str, config: Config, sizes: Sizes, shape: Shape, layout: Layout) -> dict[str, float]:
    """Peak bytes of the driver, of one actor (encoder, server, worker or task), and of one GPU."""
    labels = _HELD_LABEL * sizes.labels
    found = {"driver": DRIVER + _HELD_PASSAGE * sizes.passages + _HELD_QUERY * sizes.all_queries}
    if stage == "collection":
        return {"driver": found["driver"] + labels}
    if stage == "teacher" and config.teacher.checkpoint is not None:
        return found
    on_gpu = layout.cluster.gpus > 0
    if stage in ("teacher", "distill"):
        section = config.teacher if stage == "teacher" else config.distill
        tokens = step_tokens(section, config, sizes) * _PADDING / layout.workers[stage] / section.accumulate
        tensors = training_bytes(tokens, shape, on_gpu, recomputed=section.gradient_checkpointing)
        held = PROCESS + labels + 4.0 * shape.parameters
        return found | ({"actor": held, "gpu": GPU_CONTEXT + tensors} if on_gpu else {"actor": held + tensors})
    if stage == "retrieve":
        servers = layout.servers[layout.engine]
        found["actor"] = PROCESS + servers.memory
        return found | ({"gpu": GPU_CONTEXT + 2 * GIB} if servers.gpus else {})
    if stage == "label":
        return found | {"actor": PROCESS + 3.0 * (1 << 17) * config.model.dim * 4}
    encoder, device = encoder_bytes(config, sizes, shape, layout)
    return found | {"actor": encoder} | ({"gpu": device} if on_gpu else {})


def encoder_bytes(config: Config, sizes: Sizes, shape: Shape, layout: Layout) -> tuple[float, float]:
    """(process, GPU) of an encoder: weights (twice on a CPU, which copies linear layers), activations of a batch, and
    the rows of one shard with their coded form."""
    dim, budget, on_gpu = config.model.dim, config.embed.token_budget, layout.pool.gpus_per_actor > 0
    if budget == "auto":
        gpu = ACCELERATORS.get(layout.cluster.accelerator or "")
        budget = gpu_token_budget(gpu.memory_gib if gpu else 0.0) if on_gpu else CPU_TOKENS
    activations = budget * shape.hidden * 20.0 * (2 if on_gpu else 4)
    shard = layout.shard_passages * sizes.kept * (2 * dim + bytes_per_token(config.embed.codec, dim) + 8)
    weights = 4.0 * shape.parameters
    if on_gpu:
        return PROCESS + shard + weights, GPU_CONTEXT + 1.5 * weights + activations
    return PROCESS + shard + 2 * weights + activations, 0.0


def training_bytes(tokens: float, shape: Shape, on_gpu: bool, *, recomputed: bool = False) -> float:
    """16 bytes a parameter (weights, gradients, two moments), and 34 hidden numbers a token and layer of activations
    (Korthikanti et al. 2022, without the attention matrices, which are not kept), of 4 bytes, or 2 under bf16.

    Args:
        tokens: that a worker encodes at a time.
        recomputed: `gradient_checkpointing`, which keeps the inputs of all layers and the activations of one.
    """
    kept = 2.0 * shape.layers + 34.0 if recomputed else 34.0 * shape.layers
    return 16.0 * shape.parameters + tokens * kept * shape.hidden * (1 if on_gpu else 2)
