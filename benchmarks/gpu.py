"""Ten minutes on one GPU: whether it computes what the CPU does, where it waits, and how near to its limit it comes.

    python benchmarks/gpu.py [--quick] [--device cpu|cuda] [--only PART ...]

One process, without Ray and without a download: encoders of the sizes of BERT-base and MiniLM with random weights, and
a tokenizer that is built here. Every part prints a JSON object on a line of its own when it ends, so that a run that is
cut short still tells something:

    right      encoder, codes, searches, MaxSim, objectives and training steps against the CPU
    syncs      how often the CPU waits for the GPU in a batch of the encoder and in a training step, by place
    encoder    passages a second by precision and token budget, and the share of the rate of a large matrix product
    shard      seconds to encode, code, check and write one shard
    search     exact search and candidates among random coded rows, and the hours that MS MARCO would take
    training   seconds of a contrastive and of a collective step

The exit status is 1 when a comparison fails or a part ends with an error. `--device cpu` shows that the benchmark
works: tiny sizes, and numbers that say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from common import figure, machine, note
from torch import Tensor

from ckd_ray.arrays import Float32Array, Int64Array, IntArray
from ckd_ray.collective.losses import BatchScores
from ckd_ray.config.schema import DistillConfig
from ckd_ray.distill.inputs import Part, StepInputs
from ckd_ray.distill.objectives import LOSS_KEYS, OBJECTIVES
from ckd_ray.distill.step import TrainingStep
from ckd_ray.distill.task import TrainingTask
from ckd_ray.distill.teacher import TeacherInputs
from ckd_ray.errors import first_line
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.model.encoder import Precision, TextEncoder, choose_precision
from ckd_ray.model.length_buckets import GPU_OVERHEAD, OVERHEAD, even_parts, length_groups, token_budget_batches
from ckd_ray.model.maxsim import maxsim
from ckd_ray.retrieve.centroids import CentroidIndex
from ckd_ray.retrieve.exact import Scorer, search_all, search_among
from ckd_ray.retrieve.nearest import nearest_rows
from ckd_ray.retrieve.rows import FlatRows, RangeRows, ShardRows
from ckd_ray.store import Ragged, Shard, shard_name, write_shard
from ckd_ray.store.codec import Groups, Residual, load_codec, save_codec
from ckd_ray.store.codec_training import group_centroids

T = TypeVar("T")
Lists = tuple[Float32Array, Int64Array]
# Layers, dimensions and heads.
SHAPES = {"bert_base": (12, 768, 12), "minilm": (6, 384, 12), "tiny": (2, 64, 2)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Words of the tokenizer, and rows of the word table.
WORDS, VOCABULARY = 1000, 30_522
# MS MARCO: stored rows, labelled training queries, rows of a query.
STORED_ROWS, QUERIES, QUERY_ROWS = 600e6, 502_939, 32
# Queries of a training batch that are encoded together; a larger batch is encoded in parts.
PART_QUERIES = 36


@dataclass(frozen=True)
class Bench:
    """Where, and how much."""

    device: str
    quick: bool = False

    @property
    def gpu(self) -> bool:
        """Whether a GPU is measured."""
        return self.device == "cuda"

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of `SHAPES`; the first one also writes a shard and trains."""
        return ("bert_base", "minilm") if self.gpu else ("tiny",)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Those of an encoder."""
        return ("fp32", "bf16", "fp16") if self.gpu else ("fp32", "bf16")

    def size(self, cpu: T, quick: T, full: T) -> T:
        """The size that holds here; the last two are for a GPU."""
        return (quick if self.quick else full) if self.gpu else cpu

    def encoder(self, model: ColBERT, precision: Precision, budget: int | Literal["auto"] = "auto") -> TextEncoder:
        """An encoder on the device, of a copy of the model."""
        return TextEncoder(copy.deepcopy(model), device=self.device, token_budget=budget, precision=precision)

    def auto_precision(self, model: ColBERT) -> Precision:
        """What `precision: auto` is on a GPU, without measuring it on a CPU."""
        return choose_precision(model, "auto" if self.gpu else "fp32", self.device)[0]

    def timed(self, call: Callable[[], T]) -> tuple[float, T]:
        """Seconds until the device has done it, and what it gives."""
        wait = torch.cuda.synchronize if self.gpu else lambda: None
        wait()
        started = time.perf_counter()
        found = call()
        wait()
        return time.perf_counter() - started, found


class Report:
    """What a part has found.

    Attributes:
        settings: what the figures hold for, and tables beside them. failures: comparisons and errors, as sentences.
    """

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.figures: dict[str, dict[str, Any]] = {}
        self.failures: list[str] = []

    def state(
        self, name: str, value: float, goal: float | None = None, better: Literal["higher", "lower"] = "higher"
    ) -> None:
        """A figure; NaN and infinity stand as null."""
        self.figures[name] = figure(value if math.isfinite(value) else None, goal, better)

    def seconds(self, name: str, value: float) -> None:
        """A figure in seconds."""
        self.state(f"{name}_seconds", value, better="lower")

    def check(self, name: str, value: float, goal: float, better: Literal["higher", "lower"] = "lower") -> None:
        """A comparison: a figure that must reach its goal. NaN reaches none."""
        self.state(name, value, goal, better)
        if not (value <= goal if better == "lower" else value >= goal):
            bound = "most" if better == "lower" else "least"
            self.failures.append(f"{name}: {value:.6g}, expected at {bound} {goal:g}")

    def check_share(self, name: str, value: float, goal: float = 1.0) -> None:
        """A comparison: a share that must be at least its goal."""
        self.check(name, value, goal, "higher")

    def same_lists(self, name: str, found: Lists, wanted: Lists) -> None:
        """A comparison: every score and every passage is the same, in the same order."""
        self.check_share(name, min(agreement(f, w) for f, w in zip(found, wanted, strict=True)))

    def attempt(self, name: str, call: Callable[[], None]) -> None:
        """`call()`; an error is a failure, and what comes after it is still measured."""
        try:
            call()
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"{name}: {type(error).__name__}: {first_line(error)}")


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes on a GPU; on a CPU they are tiny anyway")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU where there is one")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part alone (may be repeated)")
    args = parser.parse_args(argv)
    before = machine()
    bench = Bench(args.device or ("cuda" if torch.cuda.is_available() else "cpu"), args.quick)
    if not bench.gpu:
        torch.set_num_threads(1)  # more would wait for each other where the sizes are so small
    failed = False
    for name in args.only or PARTS:
        note(f"gpu: {name}")
        report, started = Report(), time.perf_counter()
        report.attempt(name, partial(PARTS[name], bench, report))
        seconds = round(time.perf_counter() - started, 1)
        report.settings |= {"device": bench.device, "quick": bench.quick, "seconds": seconds}
        print(json.dumps({"part": name, "machine": before} | vars(report), allow_nan=False), flush=True)
        failed |= bool(report.failures)
    return int(failed)


# What is measured with.


@cache
def random_model(name: str) -> ColBERT:
    """An encoder of `SHAPES` with random weights, on the CPU, and a tokenizer of the words w0, w1, ... Copy it before
    it is moved or trained."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    marks = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep", "mask")}
    words = [*marks.values(), "[unused0]", "[unused1]", *".,;:!?-()", *(f"w{i}" for i in range(WORDS))]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    layers, hidden, heads = SHAPES[name]
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        initializer_range=0.5 * hidden**-0.5,  # that of BERT-base, at any width
    )
    torch.manual_seed(17)
    backbone = BertModel(config, add_pooling_layer=False)
    model = ColBERT(backbone, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks), ColBERTSettings())
    model.set_dropout(0.0)
    return model


def random_texts(count: int, seed: int = 17, median: float = 72, spread: float = 0.4) -> list[str]:
    """Texts of 4 to 177 words, log-normal as MS MARCO's passages are; one word of ten is punctuation."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(median), spread, count), 4, 177).astype(int)
    numbers = rng.integers(-WORDS // 10, WORDS, int(lengths.sum())).tolist()
    words = [f"w{number}" if number >= 0 else "." for number in numbers]
    return [" ".join(words[start:stop]) for start, stop in pairwise([0, *np.cumsum(lengths).tolist()])]


def unit_rows(*shape: int, seed: int = 17) -> Tensor:
    """Random unit rows, float16 as in a store."""
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1).half()


def random_codec(centroids_KD: Tensor, groups: Groups | None = None) -> Residual:
    """residual2 with buckets for random unit rows."""
    step = 0.5 * centroids_KD.shape[1] ** -0.5
    cutoffs, weights = torch.tensor([-1, 0, 1]) * step, torch.tensor([-1.8, -0.5, 0.5, 1.8]) * step
    return Residual("residual2", centroids_KD, cutoffs, weights, groups=groups)


def shards_in_memory(codec: Residual, *parts: tuple[int, IntArray, Any]) -> ShardRows:
    """A store's range whose shards (first passage, lengths, codes) are in memory."""
    shards = [SimpleNamespace(first=f, lengths=n.astype(np.int32), codes=c, codec=codec) for f, n, c in parts]
    return ShardRows(shards, codec.dim)  # type: ignore[arg-type]


def operations(model: ColBERT, lengths: IntArray) -> float:
    """Multiplications and additions of passages: every linear layer for each token, and attention's two products."""
    config = model.backbone.config
    linear = sum(2 * m.in_features * m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear))
    attention = config.num_hidden_layers * 4 * config.hidden_size * np.square(lengths, dtype=float).sum()
    return float(lengths.sum() * linear + attention)


@cache
def matmul_rate(bench: Bench, precision: Precision, size: int | None = None) -> float:
    """Operations a second of a large square product, best of five."""
    size, repeat = size or bench.size(512, 8192, 8192), bench.size(1, 10, 10)
    a, b = (torch.randn(size, size, device=bench.device).to(DTYPES[precision]) for _ in range(2))
    a @ b
    best = min(bench.timed(lambda: [a @ b for _ in range(repeat)])[0] for _ in range(5))
    return repeat * 2 * size**3 / best


def agreement(found: Any, wanted: Any) -> float:
    """The share of equal numbers; 0 where the shapes differ."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    return float((found == wanted).mean()) if found.shape == wanted.shape else 0.0


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest number wanted; infinite where the shapes differ."""
    if found.shape != wanted.shape:
        return math.inf
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


# right


def right(bench: Bench, report: Report) -> None:
    """Every comparison, whatever becomes of the others."""
    for compare in COMPARISONS:
        report.attempt(compare.__name__, partial(compare, bench, report))


def compare_encoders(bench: Bench, report: Report) -> None:
    """Batches on the device against one passage at a time on the CPU. Passages of 64 tokens need no mask."""
    texts = {"ragged": random_texts(bench.size(24, 48, 48)), "unmasked": random_texts(20, median=61.5, spread=0.0)}
    for name in bench.encoders:
        model = random_model(name)
        for kind, tokens in ((kind, model.tokenizer.passages(some)) for kind, some in texts.items()):
            alone = TextEncoder(copy.deepcopy(model), token_budget=1).passages(tokens)
            for precision in bench.precisions:
                found, prefix = bench.encoder(model, precision, 1024).passages(tokens), f"{name}_{precision}_{kind}"
                order = (np.concatenate([e.lengths, e.token_ids]) for e in (found, alone))
                report.check_share(f"{prefix}_order", agreement(*order))
                rows, wanted = found.embeddings_TD.double(), alone.embeddings_TD.double()
                if precision == "fp32":
                    report.check(f"{prefix}_error", float((rows - wanted).abs().max()), 1e-3)
                else:
                    report.check_share(f"{prefix}_cosine", float(torch.cosine_similarity(rows, wanted).min()), 0.999)


def compare_codes(bench: Bench, report: Report) -> None:
    """Codes of random rows, more of them than a GPU codes at a time, with one group of centroids and with many."""
    rows_TD, centroids_KD = unit_rows(bench.size(3000, 600_000, 600_000), 64), unit_rows(4096, 64, seed=18).float()
    grouped = random_codec(*group_centroids(centroids_KD, 17))
    for name, codec in (("codes", random_codec(centroids_KD[:256])), ("codes_by_group", grouped)):
        same_T = (codec.encode(rows_TD, bench.device) == codec.encode(rows_TD, "cpu")).all(1)
        report.check_share(f"{name}_agreement", float(same_T.mean()), 0.999)


def compare_rankings(bench: Bench, report: Report) -> None:
    """Every search against a literal one in float64: passages without rows, equal passages, queries of unequal length,
    lists that are longer than the collection. A wrong id that is planted must be a failure."""
    rng, device, count = np.random.default_rng(17), bench.device, 600
    codec, lengths = random_codec(unit_rows(64, 32)), rng.integers(0, 12, count)
    passages = list(unit_rows(int(lengths.sum()), 32, seed=18).split(lengths.tolist()))
    passages[300:350] = passages[:50]
    halves = ((1000, passages[:400]), (1400, passages[400:]))
    parts = [(first, np.array([*map(len, rows)]), codec.encode(torch.cat(rows))) for first, rows in halves]
    source = shards_in_memory(codec, *parts)
    queries_BQD = unit_rows(12, 8, 32, seed=19)
    for i in range(12):
        queries_BQD[i, 8 - i % 5 :] = 0
    scores_BN, scorer = literal_scores(queries_BQD, source), Scorer(queries_BQD, source, device)
    for name, depth, first_pass in (("auto", 50, None), ("float32", 50, "float32"), ("all", count + 100, None)):
        found = search_all(scorer, depth, first_pass)  # type: ignore[arg-type]
        report.same_lists(f"exact_search_{name}", found, literal_lists(scores_BN, depth, 1000))
    scores, ids = literal_lists(scores_BN, 50, 1000)
    wrong, trial = ids.copy(), Report()
    wrong[-1, -1] += 1
    trial.same_lists("planted", (scores, wrong), (scores, ids))
    report.check_share("planted_id_is_seen", float(len(trial.failures)))
    few = [rng.permutation(count)[: 20 + 5 * i] for i in range(12)]
    report.same_lists("search_among", search_among(scorer, few, 30), literal_lists(scores_BN, 30, 1000, few))
    indexes = [CentroidIndex(source, codec, 8, where) for where in (device, "cpu")]
    best, wanted = (index.candidates(*index.probes(queries_BQD), 100) for index in indexes)
    report.same_lists("centroid_candidates", best, wanted)
    few = [row[row >= 0] - 1000 for row in wanted[1]]
    report.same_lists("centroid_search", search_among(scorer, few, 30), literal_lists(scores_BN, 30, 1000, few))
    vectors_MD = unit_rows(40, 32, seed=20)
    away_MT = (source.take(np.arange(source.num_rows)).double()[None] - vectors_MD[:, None].double()).square().sum(2)
    distances, positions = nearest_rows(vectors_MD, source, 10, device=device)
    nearest = literal_lists(-away_MT.float().numpy(), 10, 0)
    report.same_lists("nearest_rows", (-distances.numpy(), positions.numpy()), nearest)


def literal_scores(queries_BQD: Tensor, source: RangeRows) -> Float32Array:
    """(B, N) scores of all passages, one after the other: float64 adds products of float16 rows exactly."""
    rows_TD, queries_BQD = source.take(np.arange(source.num_rows)).double(), queries_BQD.double()
    empty_B, bounds = -(queries_BQD != 0).any(2).sum(1).float(), pairwise(source.offsets.tolist())
    columns = [(queries_BQD @ rows_TD[a:b].T).amax(2).sum(1).float() if a < b else empty_B for a, b in bounds]
    return torch.stack(columns, 1).numpy()


def literal_lists(scores_BN: Float32Array, depth: int, first: int, few: list[Int64Array] | None = None) -> Lists:
    """The best `depth` of each row, or of its own columns `few`: equal scores by index, -inf and -1 at the end."""
    scores = np.full((len(scores_BN), depth), -np.inf, np.float32)
    ids = np.full((len(scores_BN), depth), -1, np.int64)
    for i, row in enumerate(scores_BN):
        own = np.sort(few[i]) if few else np.arange(len(row))
        best = own[np.argsort(-row[own], kind="stable")][:depth]
        scores[i, : len(best)], ids[i, : len(best)] = row[best], best + first
    return scores, ids


def worst_difference(bench: Bench, call: Callable[..., Tensor], *tensors: Tensor) -> float:
    """The largest `difference` between the device and the CPU of what `call` gives for the tensors, and of the
    gradients of its weighted sum."""
    found: list[list[Tensor]] = []
    for device in (bench.device, "cpu"):
        leaves = [tensor.clone().to(device).requires_grad_() for tensor in tensors]
        out = call(*leaves)
        (out * torch.linspace(0.5, 1.5, out.numel(), device=device).view_as(out)).sum().backward()
        found.append([out.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)])  # type: ignore[union-attr]
    return max((difference(*pair) for pair in zip(*found, strict=True)), key=lambda x: math.inf if math.isnan(x) else x)


def compare_maxsim(bench: Bench, report: Report) -> None:
    """Scores and gradients of queries, passages and weights, with masked rows and passages without rows."""
    torch.manual_seed(17)
    tensors = torch.randn(4, 8, 32), torch.randn(20, 12, 32), torch.rand(4, 8)
    mask_NL = torch.arange(12) < torch.arange(20)[:, None] % 13
    kinds = {"maxsim_l2": ("l2", False), "maxsim_floor": ("l2", True), "maxsim_cosine": ("cosine", False)}
    for name, (similarity, floor) in kinds.items():

        def score(q: Tensor, p: Tensor, w: Tensor, similarity: Any = similarity, floor: bool = floor) -> Tensor:
            return maxsim(q, p, mask_NL.to(q.device), w, similarity, zero_row_floor=floor)

        report.check(f"{name}_error", worst_difference(bench, score, *tensors), 1e-4)


def compare_objectives(bench: Bench, report: Report) -> None:
    """Loss and gradient of each objective with each of its losses, some passages left out."""
    torch.manual_seed(17)
    student_BN, teacher_BN = 3 * torch.randn(6, 24), torch.randn(6, 24) - 20
    positives_B = torch.arange(6) * 4
    valid_BN = (torch.rand(6, 24) < 0.8).scatter(1, positives_B[:, None], True)
    for name, objective in OBJECTIVES.items():
        for loss in LOSS_KEYS if objective.has_teacher else ("kl",):
            section = DistillConfig.model_validate({"objective": name, "loss": loss, "smoothing": 0.1, "denoise": 0.5})

            def loss_of(student_BN: Tensor, objective: Any = objective, section: Any = section) -> Tensor:
                positives, valid, teacher = (x.to(student_BN.device) for x in (positives_B, valid_BN, teacher_BN))
                scores = BatchScores(student_BN, positives, valid, 4, teacher if objective.has_teacher else None)
                return objective.loss(scores, section, 2.0).loss_B

            prefix = f"{name}_{loss}" if objective.has_teacher else name
            report.check(f"{prefix}_error", worst_difference(bench, loss_of, student_BN), 1e-4)


def compare_steps(bench: Bench, report: Report) -> None:
    """Loss and gradients of a whole step, of the batch at once and in three parts, against the CPU's of the batch at
    once; and the same step twice with dropout, whose masks follow from its number."""
    for name in ("contrastive", "collective"):
        wanted = one_step(name, "cpu")
        for suffix, parts in (("", 1), ("_accumulated", 3)):
            found = one_step(name, bench.device, parts)
            report.check(f"step_{name}{suffix}_loss_error", difference(found[0], wanted[0]), 1e-4)
            report.check(f"step_{name}{suffix}_gradient_error", difference(found[1], wanted[1]), 1e-3)
    losses = [one_step("contrastive", bench.device, dropout=0.1)[0] for _ in range(2)]
    report.check("step_dropout_repeats_error", difference(*losses), 1e-5)


def one_step(objective: str, device: str, accumulate: int = 1, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """Loss and all gradients of a step of a tiny encoder in float32, on the CPU."""
    model = copy.deepcopy(random_model("tiny")).to(device).train()
    step, inputs = training_step(model, objective, "fp32", 6, 3, accumulate, dropout)
    loss = step(inputs.to(torch.device(device)))
    return loss.cpu(), torch.cat([p.grad.flatten().cpu() for p in model.parameters()])  # type: ignore[union-attr]


COMPARISONS = (
    compare_encoders, compare_codes, compare_rankings, compare_maxsim, compare_objectives, compare_steps
)  # fmt: skip


# Training steps, for `right`, `syncs` and `training`.


def training_step(
    model: ColBERT,
    objective: str,
    precision: Precision,
    queries: int,
    negatives: int = 7,
    accumulate: int = 1,
    dropout: float = 0.1,
) -> tuple[TrainingStep, StepInputs]:
    """A step, and a batch of random texts, grouped as `InputReader` does; the teacher's rows are as from a store."""
    given = {"objective": objective, "batch_size": queries, "negatives": negatives, "accumulate": accumulate}
    settings = DistillConfig.model_validate({**given, "encoder_share": 0.0, "bm25_share": 0.0})
    task = TrainingTask("distill", "", "", "benchmark", 17, settings, precision=precision, dropout=dropout)
    model.set_dropout(dropout)
    tokenizer, dim, gpu = model.tokenizer, model.settings.dim, model.device.type == "cuda"
    query_ids, query_mask = tokenizer.queries(random_texts(queries, seed=18, median=8))
    tokens = tokenizer.passages(random_texts(queries * (1 + negatives), seed=19))
    lengths = np.array([len(ids) for ids in tokens])
    parts, groups = [], []
    spans = np.array_split(np.arange(queries), accumulate)
    for span, members in zip(spans, even_parts(lengths, accumulate), strict=True):
        found = [members[group] for group in length_groups(lengths[members], GPU_OVERHEAD if gpu else OVERHEAD)]
        padded = [tokenizer.pad([tokens[i] for i in group], 8 if gpu else 1) for group in found]
        parts.append(Part(query_ids[span], query_mask[span], padded))
        groups += found
    teacher = None
    if OBJECTIVES[objective].reads_rows:
        kept = np.array([tokenizer.keeps(ids).sum() for ids in tokens], np.int32)
        stored = unit_rows(int(kept.sum()), dim, seed=20).split(kept.tolist())
        passages = [Ragged(torch.cat([stored[i] for i in group]), kept[group], kept[:0]).padded() for group in groups]
        expansions = unit_rows(queries, settings.expansion_size, dim, seed=21).float()
        idf = torch.linspace(0.1, 8.0, expansions.shape[1]).expand(queries, -1)
        teacher = TeacherInputs(expansions, idf, unit_rows(queries, QUERY_ROWS, dim, seed=22), passages)
    valid_BN, columns_n = torch.ones(queries, len(tokens), dtype=torch.bool), torch.from_numpy(np.concatenate(groups))
    inputs = StepInputs(0, parts, columns_n, torch.arange(queries) * (1 + negatives), valid_BN, teacher)
    return TrainingStep(model, task, precision, scale=2.0), inputs


def update(step: TrainingStep, inputs: StepInputs, optimizer: torch.optim.Optimizer) -> None:
    """A step as a worker takes it: to the device, forward, backward, clip, AdamW."""
    model = step.bare.colbert
    optimizer.zero_grad(set_to_none=True)
    loss = float(step(inputs.to(model.device)))
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
    optimizer.step()


def trained_model(bench: Bench) -> tuple[ColBERT, torch.optim.Optimizer, Precision]:
    """The first encoder in training mode on the device, its optimiser, and the precision of its training."""
    model = copy.deepcopy(random_model(bench.encoders[0]))
    precision = bench.auto_precision(model)
    model.to(bench.device).train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True), precision


# The other parts.


def syncs(bench: Bench, report: Report) -> None:
    """Synchronisations that torch warns of, in ten batches and in five steps of each objective; the first are left
    out, which compile and choose kernels."""
    if not bench.gpu:
        report.settings["left_out"] = "only a GPU is waited for"
        return
    model, optimizer, precision = trained_model(bench)
    subject = bench.encoder(random_model(bench.encoders[0]), precision, 8192)
    tokens = subject.model.tokenizer.passages(random_texts(2000))
    lengths = np.array([len(ids) for ids in tokens])
    batches = list(token_budget_batches(lengths, subject.token_budget, subject.multiple))[:10]
    chosen = [tokens[i] for batch in batches for i in batch]
    calls: dict[str, tuple[int, Callable[[], Any]]] = {"batch": (len(batches), lambda: subject.passages(chosen))}
    for name in ("contrastive", "collective"):
        step, inputs = training_step(model, name, precision, 9)
        calls[f"{name}_step"] = 5, lambda step=step, inputs=inputs: [update(step, inputs, optimizer) for _ in range(5)]
    for name, (times, call) in calls.items():
        call()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        places = counted_places(caught)
        report.state(f"syncs_a_{name}", sum(places.values()) / times, better="lower")
        report.settings[name] = {"times": times, "places": places}


def counted_places(caught: list[warnings.WarningMessage]) -> dict[str, int]:
    """How many warnings of synchronisations each FILE:LINE has, the most first."""
    found = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    return dict(Counter(f"{'/'.join(Path(w.filename).parts[-3:])}:{w.lineno}" for w in found).most_common())


def encoder(bench: Bench, report: Report) -> None:
    """Passages a second by precision and budget, after a first call. The figures are those of the best budget; the
    operations are those of the tokens, without padding."""
    budgets = bench.size((1024, 4096), (8192, 65_536), (8192, 32_768, 131_072, 262_144))
    for name in bench.encoders:
        model = random_model(name)
        tokens = model.tokenizer.passages(random_texts(bench.size(64, 4096, 16_384)))
        for precision in bench.precisions:
            limit, rates, shares = matmul_rate(bench, precision), {}, []
            for budget in budgets:
                subject, first = bench.encoder(model, precision, budget), tokens[: budget // 80]
                subject.passages(first)
                rate = len(first) / bench.timed(partial(subject.passages, first))[0]
                # Two seconds, and four batches: the first and the last of them have less to do.
                chosen = tokens[: max(4 * len(first), int(rate * bench.size(0.2, 1.0, 2.0)))]
                seconds, _ = bench.timed(partial(subject.passages, chosen))
                lowered = f" (of which memory held {subject.token_budget})" * (subject.token_budget < budget)
                rates[f"{budget}{lowered}"] = round(len(chosen) / seconds, 1)
                shares.append(operations(model, np.array([len(ids) for ids in chosen])) / seconds / limit)
            report.state(f"{name}_{precision}_passages_per_second", max(rates.values()))
            report.state(f"{name}_{precision}_share_of_matmul", max(shares), 0.5)
            report.settings[f"{name}_{precision}_passages_per_second_by_budget"] = rates
            report.settings[f"matmul_tflops_{precision}"] = round(limit / 1e12, 3)


def shard(bench: Bench, report: Report) -> None:
    """Seconds of each thing that an actor of the embed stage does with a shard; then the shard is read and checked."""
    model = random_model(bench.encoders[0])
    subject = bench.encoder(model, bench.auto_precision(model))
    tokens = model.tokenizer.passages(random_texts(bench.size(64, 4096, 16_384)))
    subject.passages(tokens[: len(tokens) // 8])
    encode, encoded = bench.timed(partial(subject.passages, tokens))
    rows_TD = encoded.embeddings_TD
    with tempfile.TemporaryDirectory() as folder:
        centroids_KD = unit_rows(bench.size(4096, 1 << 14, 1 << 17), subject.dim, seed=18).float()
        digest = save_codec(random_codec(*group_centroids(centroids_KD, 17)), folder)
        codec = load_codec("residual2", subject.dim, folder, digest)
        codec.encode(rows_TD[:4096], bench.device)
        code, codes_TC = bench.timed(partial(codec.encode, rows_TD, bench.device))
        ready: Any = SimpleNamespace(name=codec.name, dim=codec.dim, digest=digest, encode=lambda *_: codes_TC)
        uri, columns = f"{folder}/{shard_name(0)}", {"lengths": encoded.lengths, "token_ids": encoded.token_ids}
        place = {"fingerprint": "benchmark", "index": 0, "first": 0}
        write = partial(write_shard, uri, **place, **columns, embeddings_TD=rows_TD, codec=ready)
        written, _ = bench.timed(write)
        content = Path(uri).read_bytes()
        file, _ = bench.timed(partial(Path(f"{folder}/copy").write_bytes, content))
        opened = Shard(uri)
        opened.verify()
        report.check_share("shard_codes_read", agreement(opened.codes, codes_TC))
    # The checksums are what writing a shard takes beyond writing as many bytes.
    for name, seconds in {"encode": encode, "code": code, "checksum": written - file, "write": file}.items():
        report.seconds(name, seconds)
    report.state("passages_per_second", len(tokens) / (encode + code + written))
    report.settings |= {"encoder": bench.encoders[0], "precision": subject.precision, "passages": len(tokens)}
    report.settings |= {"rows": len(rows_TD), "bytes": len(content), "centroids": len(centroids_KD)}


def search(bench: Bench, report: Report) -> None:
    """Exact search among codes, and among rows that the device holds; then search by centroids. The hours are those of
    this device for the labelled training queries of MS MARCO, so many queries at a time."""
    rng, device = np.random.default_rng(17), bench.device
    lengths = np.clip(rng.lognormal(np.log(66), 0.4, bench.size(500, 20_000, 100_000)), 0, 180).astype(np.int64)
    total, codec = int(lengths.sum()), random_codec(unit_rows(bench.size(256, 1 << 13, 1 << 14), 128))
    codes = rng.integers(0, 256, (total, codec.bytes_per_token), np.uint8)
    codes[:, :4] = rng.integers(0, codec.num_centroids, (total, 1), np.int32).view(np.uint8)
    coded = shards_in_memory(codec, (0, lengths, codes))
    queries_BQD = unit_rows(bench.size(4, 256, 256), QUERY_ROWS, 128, seed=19)
    share = len(queries_BQD) / QUERIES * total / STORED_ROWS
    report.settings |= {"passages": len(lengths), "rows": total, "queries": len(queries_BQD)}
    report.settings |= {"centroids": codec.num_centroids}

    def exact(name: str, source: RangeRows, first_pass: Any) -> None:
        few = FlatRows(unit_rows(2000, 128), np.full(100, 20))
        search_all(Scorer(queries_BQD, few, device), 10, first_pass)
        seconds, _ = bench.timed(lambda: search_all(Scorer(queries_BQD, source, device), 100, first_pass))
        report.state(f"exact_{name}_queries_per_second", len(queries_BQD) / seconds)
        report.state(f"exact_{name}_tflops", 2e-12 * total * queries_BQD.numel() / seconds)
        report.state(f"exact_{name}_msmarco_hours", seconds / share / 3600, better="lower")

    decode, rows_TD = bench.timed(partial(codec.decode, codes))
    report.state("decoded_rows_per_second", total / decode)
    report.attempt("float32", lambda: exact("float32", coded, "float32"))
    report.attempt("auto", lambda: exact("auto", coded, None))
    report.attempt("decoded", lambda: exact("decoded", FlatRows(rows_TD.to(device), lengths), None))
    index, few_BQD = CentroidIndex(coded, codec, 32, device), queries_BQD[:32]
    index.probes(few_BQD)
    probe, probes = bench.timed(partial(index.probes, few_BQD))
    gather, lists = bench.timed(lambda: index.candidates(*probes, 1024))
    few = [row[row >= 0] for row in lists[1]]
    rank, _ = bench.timed(lambda: search_among(Scorer(few_BQD, coded, device), few, 100))
    for name, seconds in {"probe": probe, "gather": gather, "rank": rank}.items():
        report.seconds(f"centroids_{name}_a_query", seconds / len(few_BQD))
    # Every server of a store probes, gathers and ranks for every query.
    report.state("centroids_server_hours", (probe + gather + rank) / len(few_BQD) * QUERIES / 3600, better="lower")


def training(bench: Bench, report: Report) -> None:
    """Seconds of a contrastive and of a collective step on the same texts, in turn; medians. The share of the matrix
    rate counts three times the operations of the forward pass, without padding."""
    model, optimizer, precision = trained_model(bench)
    report.settings |= {"encoder": bench.encoders[0], "precision": precision, "negatives": 7, "dropout": 0.1}
    for queries in bench.size((2, 4), (9, 36, 128, 512), (9, 36, 128, 512)):
        accumulate, seconds = max(1, round(queries / PART_QUERIES)), {"contrastive": [], "collective": []}
        steps = {name: training_step(model, name, precision, queries, accumulate=accumulate) for name in seconds}
        held = False
        try:
            for _ in range(1 + bench.size(2, 3, 10)):
                for name, subject in steps.items():
                    seconds[name].append(bench.timed(partial(update, *subject, optimizer))[0])
            held = True
        except torch.OutOfMemoryError:
            report.settings[f"left_out_{queries}"] = "the memory does not hold it"
        if not held:  # not in the block above, where the error keeps the step's memory
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            continue
        contrastive, collective = (float(np.median(values[1:])) for values in seconds.values())
        report.seconds(f"contrastive_{queries}", contrastive)
        report.seconds(f"collective_{queries}", collective)
        report.state(f"collective_over_contrastive_{queries}", collective / contrastive, 1.05, "lower")
        masks = [mask for part in steps["contrastive"][1].parts for _, mask in part.groups]
        lengths = np.concatenate([np.full(queries, QUERY_ROWS), *(mask.sum(1).numpy() for mask in masks)])
        share = 3 * operations(model, lengths) / contrastive / matmul_rate(bench, precision)
        report.state(f"contrastive_{queries}_share_of_matmul", share, 0.5)
        report.settings[f"parts_{queries}"] = accumulate


PARTS = {part.__name__: part for part in (right, syncs, encoder, shard, search, training)}


if __name__ == "__main__":
    sys.exit(main())
