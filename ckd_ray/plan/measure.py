"""The short calibration: what this machine does in a second, by the code of the stages themselves.

A collection of a few hundred passages is built in a temporary folder; its passages are tokenised, encoded and written,
both trainings take a few steps on it, and it is searched and labelled. Nothing here starts Ray. On a CPU each core has
a thread of its own where the stage has a process a core, so that rates are those of busy cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckd_ray.config import CollectionConfig, Config
from ckd_ray.config.schema import TrainingConfig
from ckd_ray.data import Collection, build_collection
from ckd_ray.distill.inputs import InputReader
from ckd_ray.distill.objectives import BASELINE, objective_of
from ckd_ray.distill.step import TrainingStep
from ckd_ray.distill.task import TrainingTask
from ckd_ray.errors import UserError
from ckd_ray.model import ColBERT
from ckd_ray.model.encoder import Encoded, TextEncoder, choose_precision
from ckd_ray.plan.cluster import accelerator_of
from ckd_ray.plan.measure_search import search_rates
from ckd_ray.plan.rates import Rates, StepRate
from ckd_ray.plan.sizes import Sample, Sizes, with_tokens
from ckd_ray.progress import say
from ckd_ray.runs.directory import RunDir
from ckd_ray.store import EmbeddingStore, shard_name, write_manifest, write_shard
from ckd_ray.store.codec import Float16

PASSAGES, QUERIES = 288, 96
_BUILT_ROWS = 6000
# The sample is cut to what a core encodes in about this time, but not below the least.
_ENCODING_S, _FEWEST = 30.0, 96
# A step of the whole batch is left out where the small ones say that it would take longer.
_LONGEST_STEP_S = 15.0
_STEPS = 3


@dataclass
class Workshop:
    """The temporary run that everything is measured on."""

    config: Config
    model: ColBERT
    sample: Sample
    folder: Path
    device: torch.device
    precision: Any

    @property
    def run(self) -> str:
        """The run directory."""
        return str(self.folder)


def measure(config: Config, model: ColBERT, sizes: Sizes, sample: Sample) -> tuple[Rates, Sizes]:
    """All rates, and the sizes with the tokens of the sample's passages.

    Args:
        sample: at least one labelled training query, and some passages.
    """
    started, load = time.perf_counter(), os.getloadavg()[0]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    cores = os.cpu_count() or 1
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    precision, reason = choose_precision(model, config.embed.precision, device, threads=1)
    sample = _affordable(model, sample, device, precision)
    say(f"plan: measuring on {len(sample.passages)} passages, {precision} ({reason})")
    with tempfile.TemporaryDirectory(prefix="ckd-ray-plan-") as folder:
        shop = Workshop(config, model, sample, Path(folder), device, precision)
        values: dict[str, Any] = {"process_start_s": _process_start()}
        values |= _building(shop)
        tokens, text = _tokenising(shop)
        say("plan: encoding")
        encoded, encoding = _encoding(shop, tokens, cores)
        values |= text | encoding
        sizes = with_tokens(sizes, float(np.mean([len(t) for t in tokens])), float(encoded.lengths.mean()))
        store, queries = _stores(shop, encoded)
        say("plan: searching and labelling")
        values |= search_rates(shop.run, config, model, store, queries, cores, device)
        say("plan: training steps")
        values["training"] = {stage: _training(shop, stage) for stage in ("teacher", "distill")}
        values["checkpoint_s"] = _checkpoint(shop)
    taken = time.perf_counter() - started
    say(f"plan: measured in {taken:.0f} s")
    where = _processor()
    name = torch.cuda.get_device_name(0) if gpu else None
    rates = Rates(
        machine=f"{where}, {name}" if name else where,
        cores=cores,
        device=device.type,
        accelerator=accelerator_of(name) if name else None,
        backbone=config.model.backbone,
        precision=precision,
        seconds=round(taken, 1),
        load=round(load, 2),
        **encoder_shape(model, sizes.tokens),
        **values,
    )
    return rates, sizes


def _affordable(model: ColBERT, sample: Sample, device: torch.device, precision: Any) -> Sample:
    """The sample, cut where a large encoder would take minutes for it; labelled passages come first and stay."""
    tokens = model.tokenizer.passages([text for _, text in sample.passages[:8]])
    encoder = TextEncoder(model, device=device, precision=precision)
    each = timed(lambda: encoder.passages(tokens), 1, device) / max(1, len(tokens)) * torch.get_num_threads()
    count = max(_FEWEST, int(_ENCODING_S / each))
    if count >= len(sample.passages):
        return sample
    passages = sample.passages[:count]
    here = {name for name, _ in passages}
    labels = [label for label in sample.labels if label[1] in here]
    asked = {query for query, _ in labels}
    return Sample(passages, [query for query in sample.queries if query[0] in asked], labels)


def encoder_shape(model: ColBERT, tokens: float) -> dict[str, Any]:
    """Parameters, layers and hidden size of an encoder, and the operations of a token's forward pass.

    Two a parameter outside of the embedding tables, and 4 L H a layer for attention over L tokens.
    """
    total = sum(p.numel() for p in model.parameters())
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    layers = int(getattr(model.backbone.config, "num_hidden_layers", 1))
    hidden = int(model.backbone.config.hidden_size)
    return {
        "parameters": total,
        "embedding_parameters": max(1, tables),
        "layers": layers,
        "hidden": hidden,
        "token_flops": 2.0 * (total - tables) + 4.0 * tokens * hidden * layers,
    }


def timed(call: Callable[[], Any], rounds: int = 3, device: torch.device | None = None) -> float:
    """The median seconds of a call, after one that warms up."""
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        call()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:]))


def _process_start() -> float:
    """What every worker process of a stage does first."""
    started = time.perf_counter()
    code = "import ray, torch, transformers, pandas, pyarrow.parquet; from transformers import AutoModel, AutoTokenizer"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def _building(shop: Workshop) -> dict[str, float]:
    """The collection stage on the sample's texts over and over, and then on the sample itself, which stays."""
    passages, queries, labels = shop.sample.passages, shop.sample.queries, shop.sample.labels
    source = shop.folder / "source"
    many = max(len(passages), _BUILT_ROWS)
    seconds = []
    for rows, asked in ((many, 1), (many, max(2000, len(queries)))):
        _write_source(
            source,
            [(f"p{i}", passages[i % len(passages)][1]) for i in range(rows)],
            [(f"q{i}", queries[i % len(queries)][1]) for i in range(asked)],
            [(f"q{i}", f"p{i % rows}") for i in range(asked)],
        )
        started = time.perf_counter()
        build_collection(_settings(source), str(shop.folder / "built"))
        seconds.append(time.perf_counter() - started)
    _write_source(source, passages, queries, labels)
    build_collection(_settings(source), shop.run)
    built = max(2000, len(queries))
    return {
        "build_passage_s": seconds[0] / many,
        "build_query_s": max(1e-6, (seconds[1] - seconds[0]) / built),
        "corpus_share": sum(f.stat().st_size for f in Path(RunDir(str(shop.folder)).corpus).glob("part-*"))
        / max(1, sum(len(text.encode("utf-8", "replace")) for _, text in passages)),
    }


def _settings(source: Path) -> CollectionConfig:
    return CollectionConfig(format="msmarco", path=str(source))


def _write_source(
    folder: Path, passages: list[tuple[str, str]], queries: list[tuple[str, str]], labels: list[tuple[str, str]]
) -> None:
    folder.mkdir(exist_ok=True)
    rows = (f"{name}\t{' '.join(text.split())}\n" for name, text in passages)
    (folder / "collection.tsv").write_text("".join(rows), encoding="utf-8", errors="replace")
    rows = (f"{name}\t{' '.join(text.split())}\n" for name, text in queries)
    (folder / "queries.train.tsv").write_text("".join(rows), encoding="utf-8", errors="replace")
    (folder / "qrels.train.tsv").write_text("".join(f"{q}\t0\t{p}\t1\n" for q, p in labels), encoding="utf-8")
    for split in ("dev", "test"):
        (folder / f"queries.{split}.tsv").write_text(f"{labels[0][0]}\ta query\n", encoding="utf-8")
        (folder / f"qrels.{split}.tsv").write_text(f"{labels[0][0]}\t0\t{labels[0][1]}\t1\n", encoding="utf-8")


def _tokenising(shop: Workshop) -> tuple[list[Any], dict[str, float]]:
    texts = [text for _, text in shop.sample.passages]
    tokens = shop.model.tokenizer.passages(texts)
    seconds = timed(lambda: shop.model.tokenizer.passages(texts), 2)
    return tokens, {"tokenize_token_s": seconds / max(1, sum(len(t) for t in tokens))}


def _encoding(shop: Workshop, tokens: list[Any], cores: int) -> tuple[Encoded, dict[str, float]]:
    """Passages by the encoder of an actor: on a CPU in as many threads as there are cores, one each."""
    encoder = TextEncoder(
        shop.model, device=shop.device, token_budget=shop.config.embed.token_budget, precision=shop.precision
    )
    encoder.passages(tokens[:8])
    total = sum(len(t) for t in tokens)
    if shop.device.type == "cuda":
        encoded = encoder.passages(tokens)
        seconds = timed(lambda: encoder.passages(tokens), 2, shop.device)
        return encoded, {"encode_token_s": seconds / total, **_writing(shop, encoded)}

    def encode(part: list[Any]) -> tuple[Encoded, float]:
        started = time.perf_counter()
        return encoder.passages(part), time.perf_counter() - started

    bounds = np.linspace(0, len(tokens), cores + 1).astype(int).tolist()
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(lambda _: encoder.passages(tokens[:8]), range(cores)))
            parts = list(pool.map(encode, (tokens[low:high] for low, high in pairwise(bounds))))
    finally:
        torch.set_num_threads(before)
    whole = Encoded(
        np.concatenate([part.lengths for part, _ in parts]),
        np.concatenate([part.token_ids for part, _ in parts]),
        torch.cat([part.embeddings_TD for part, _ in parts]),
    )
    return whole, {"encode_token_s": sum(seconds for _, seconds in parts) / total, **_writing(shop, whole)}


def _stores(shop: Workshop, encoded: Encoded) -> tuple[EmbeddingStore, EmbeddingStore]:
    """The sample as the stores of a run: passages, and the training queries."""
    encoder = TextEncoder(shop.model, device=shop.device, precision=shop.precision)
    asked = Collection.open(shop.run).queries("train").texts
    found = [("passages", encoded), ("queries.train", encoder.queries(asked))]
    return tuple(_write_store(Path(RunDir(str(shop.folder)).embeddings) / name, value) for name, value in found)  # type: ignore[return-value]


def _write_store(folder: Path, encoded: Encoded) -> EmbeddingStore:
    write_shard(
        str(folder / shard_name(0)),
        fingerprint="plan",
        index=0,
        first=0,
        lengths=encoded.lengths,
        token_ids=encoded.token_ids,
        embeddings_TD=encoded.embeddings_TD,
        codec=Float16(encoded.embeddings_TD.shape[1]),
    )
    write_manifest(str(folder), "plan", 1)
    return EmbeddingStore.open(str(folder))


def _training(shop: Workshop, stage: str) -> StepRate:
    """Steps of a small and of the whole batch, by the loop of a worker (read ahead, backward, clip, AdamW)."""
    section = shop.config.teacher if stage == "teacher" else shop.config.distill
    batch = min(section.batch_size, len(shop.sample.labels) or 1)
    small = max(2, batch // 4)
    points = [_steps(shop, stage, small)]
    if points[0][1] * batch / small <= _LONGEST_STEP_S:
        points.append(_steps(shop, stage, batch))
    elif small >= 4:
        points.insert(0, _steps(shop, stage, small // 2))
    tokens, seconds, _ = (np.array(column) for column in zip(*points, strict=True))
    if len(points) == 1 or tokens[1] <= tokens[0]:
        slope, fixed = seconds[-1] / tokens[-1], 0.0
    else:
        slope = max(1e-12, (seconds[1] - seconds[0]) / (tokens[1] - tokens[0]))
        fixed = seconds[1] - slope * tokens[1]
        if fixed < 0:  # noise: through the origin and the larger batch
            slope, fixed = seconds[1] / tokens[1], 0.0
    mean = float(np.mean([len(ids) for ids in shop.model.tokenizer.passages([t for _, t in shop.sample.passages])]))
    plain = points[-1][2] * (shop.config.model.query_maxlen + (1 + section.negatives) * mean)
    return StepRate(float(fixed), float(slope), float(tokens[-1] / plain))


def _steps(shop: Workshop, stage: str, batch: int) -> tuple[float, float, int]:
    """(tokens a step, seconds a step, batch)."""
    task = _task(shop, stage, batch)
    model = shop.model.to(shop.device).train()
    step = TrainingStep(model, task, "bf16" if shop.precision == "bf16" else "fp32", teacher=None)
    if task.recomputes_teacher:
        import copy

        step = TrainingStep(model, task, step.precision, teacher=copy.deepcopy(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    reader = InputReader(task, model.tokenizer, device=shop.device)
    seconds, tokens, stream = [], [], reader.stream(0)
    last = time.perf_counter()
    for inputs in stream:
        optimizer.zero_grad(set_to_none=True)
        float(step(inputs.to(shop.device)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), task.settings.clip_norm)
        optimizer.step()
        if shop.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds.append(now - last)
        tokens.append(sum(p.query_ids_bQ.numel() + sum(ids.numel() for ids, _ in p.groups) for p in inputs.parts))
        last = now
    model.eval()
    # The first step warms up. The mean, as tokens differ from step to step.
    return float(np.mean(tokens[1:])), float(np.mean(seconds[1:])), batch


def _task(shop: Workshop, stage: str, batch: int) -> TrainingTask:
    config = shop.config
    section: TrainingConfig = config.teacher if stage == "teacher" else config.distill
    changed: dict[str, Any] = {"steps": _STEPS + 1, "batch_size": batch, "learning_rate": 1e-9, "score_scale": 1.0}
    if stage != "teacher" and objective_of(config).reads_pairs:
        changed["objective"] = BASELINE.name  # scores of pairs are read, not computed, in a step: the work is the same
    section = section.model_copy(update=changed)
    return TrainingTask(
        stage=stage, run=shop.run, start="", fingerprint="plan", seed=config.run.seed, settings=section,
        dropout=config.model.dropout, positive_grade=1,
    )  # fmt: skip


def _checkpoint(shop: Workshop) -> float:
    """What `WorkerState.save` writes: the model, and two moments a parameter; Ray Train copies it once more."""
    state = {i: (torch.zeros_like(p), torch.zeros_like(p)) for i, p in enumerate(shop.model.parameters())}

    def save() -> None:
        with tempfile.TemporaryDirectory(dir=shop.folder) as folder:
            shop.model.save(Path(folder) / "model")
            torch.save(state, Path(folder) / "optimizer.pt")

    return 2 * timed(save, 1)


def _writing(shop: Workshop, encoded: Encoded) -> dict[str, float]:
    """A shard's bytes, with document frequencies and checksums."""
    folder = shop.folder / "written"
    size = encoded.embeddings_TD.numel() * 2
    return {"write_byte_s": timed(lambda: _write_store(folder, encoded), 2) / max(1, size)}


def _processor() -> str:
    import platform

    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        name = ""
    return name or platform.processor() or platform.machine()


def load_model(config: Config) -> ColBERT:
    """The encoder that the run starts from: the given teacher, or the backbone.

    Raises:
        UserError: it cannot be loaded here.
    """
    from ckd_ray.pipeline.loading import load_backbone, load_teacher

    given = config.teacher.checkpoint
    try:
        return load_backbone(config) if given is None else load_teacher(given, config)
    except UserError as error:
        raise UserError(
            error.problem,
            where=error.where,
            expected=error.expected,
            found=error.found,
            fix="rates from a machine that has the encoder do without it here: --rates FILE --passages N --queries N "
            "--tokens-per-passage X",
        ) from None
