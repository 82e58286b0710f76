"""A run opened for reading its labels, and the distributions that training would take its targets from. No Ray.

Shapes: N passages, Q query rows, E expansion embeddings, D dimensions, L rows a passage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ckd_ray.collective.losses import BatchScores, soft_labels, temperatures
from ckd_ray.collective.scores import counted_rows, expansion_weights, teacher_scores
from ckd_ray.config.schema import DistillConfig
from ckd_ray.data import Collection
from ckd_ray.data.collection import Queries
from ckd_ray.data.positives import Positives
from ckd_ray.errors import UserError
from ckd_ray.files import exists, filesystem_of, join, last_part, read_json
from ckd_ray.labels.files import ExpansionReader
from ckd_ray.runs.finished import FinishedRun, open_finished
from ckd_ray.runs.layout import labels_folder
from ckd_ray.store import EmbeddingStore

Int64Array = npt.NDArray[np.int64]
# Only the training queries have labels.
SPLIT = "train"


@dataclass(frozen=True)
class Distributions:
    """What each way of labelling says about the same passages; every array is (N,) and sums to 1.

    Attributes:
        one_hot: 1 at the labelled passage (shared out when there are several; 0 everywhere when there is none).
        teacher: soft labels without expansion; collective: with it.
        teacher_scores, collective_scores: the scores behind them.
    """

    one_hot: Tensor
    teacher: Tensor
    collective: Tensor
    teacher_scores: Tensor
    collective_scores: Tensor


class LabelledRun:
    """Opened by `LabelledRun.open(run)`; what is not asked for is not read.

    Attributes:
        folder: what was opened; run: what holds collection, teacher, embeddings and rankings, the same but for a
            variant (see `FinishedRun`); labels: where its labels are.
        config: that of `folder`.
    """

    def __init__(self, finished: FinishedRun, labels: str) -> None:
        self.folder, self.run, self.labels = finished.folder, (run := finished.base), labels
        self.config = config = finished.record["config"]
        self.expansions = ExpansionReader.open(labels, SPLIT)
        known = {key: value for key, value in config["distill"].items() if key in DistillConfig.model_fields}
        self.settings = DistillConfig.model_validate(known)
        self.collection = Collection.open(run)
        self.passages = EmbeddingStore.open(join(run, "embeddings", "passages"))
        self._queries = EmbeddingStore.open(join(run, "embeddings", f"queries.{SPLIT}"))

    @classmethod
    def open(cls, run: str) -> LabelledRun:
        """A run, or a variant of one, as `open_finished` takes it.

        Raises:
            UserError: it is no run, or its label stage has not finished; says which command finishes it.
        """
        finished = open_finished(run)
        labels = labels_of(finished)
        if not exists(join(labels, "manifest.json")):
            name = finished.record["config"]["run"]["name"]
            command = f"ckd-ray {'label' if last_part(labels) == 'labels' else 'tune'}"
            raise UserError(
                "this run has no labels yet",
                where=labels,
                fix=f"{command}, with the configuration of this run (--config FILE or --set; run.name={name})",
            )
        return cls(finished, labels)

    @cached_property
    def queries(self) -> Queries:
        """Ids and texts of the training queries."""
        return self.collection.queries(SPLIT)

    @cached_property
    def positives(self) -> Positives:
        """Labelled passages of the training queries, from collection.positive_grade on."""
        qrels = self.collection.qrels(SPLIT)
        grade = self.config["collection"]["positive_grade"]
        count = len(self.queries.ids)
        return Positives.from_qrels(count, qrels.query_index, qrels.passage_index, qrels.relevance, grade)

    @cached_property
    def similarity(self) -> Any:
        """The teacher's similarity, from its checkpoint."""
        return read_json(join(self.run, "teacher", "colbert.json"))["similarity"]

    def distributions(self, query: int, passages_N: Int64Array) -> Distributions:
        """The three distributions over `passages_N` for a query (dense indices).

        As in training, a labelled passage is raised to the highest score, and when there are several, each is the
        positive in turn while the others are left out; the mean over these turns is shown. A query without a label
        takes no part in training: its scores are softmaxed as they are.
        """
        s = self.settings
        expansions, idf = self.expansions.select(np.array([query]), s.expansion_size)
        queries = self._queries.gather(np.array([query])).embeddings_TD.float()[None]
        weights = self._weights(idf, queries)
        rows_NLD, mask_NL = self.passages.gather(passages_N).padded()

        def score(weights_BE: Tensor) -> Tensor:
            found = teacher_scores(
                queries, expansions, weights_BE, rows_NLD, mask_NL, self.similarity, zero_row_floor=s.zero_row_floor
            )
            return found[0].double()

        plain, collective = score(torch.zeros_like(weights)), score(weights)
        labelled = torch.from_numpy(np.isin(passages_N, self.positives.of(query)))
        one_hot = labelled.double() / max(1, int(labelled.sum()))
        return Distributions(one_hot, self._soft(plain, labelled), self._soft(collective, labelled), plain, collective)

    def centroid_weights(self, query: int, idf: Sequence[float], depths: Sequence[int] = ()) -> list[float]:
        """What each of a query's centroids (of each depth, highest idf first) weighs in its teacher's score; 0 behind
        `distill.expansion_size`.

        Args:
            depths: the depth of each, where the labels have several.
        """
        queries = self._queries.gather(np.array([query])).embeddings_TD[None]
        size = self.settings.expansion_size
        block = np.searchsorted(self.expansions.depths, depths) if len(depths) else np.zeros(len(idf), np.int64)
        place = np.arange(len(idf)) - np.searchsorted(block, block)  # inside of its block
        counts = np.flatnonzero(place < size)
        at = block[counts] * size + place[counts]
        counting_1E = torch.zeros(1, self.expansions.blocks * size, dtype=torch.float64)
        counting_1E[0, at] = torch.tensor(idf, dtype=torch.float64)[counts]
        weights = np.zeros(len(idf))
        weights[counts] = self._weights(counting_1E, queries)[0, at].numpy()
        found: list[float] = weights.tolist()
        return found

    def _weights(self, idf_BE: Tensor, queries_BQD: Tensor) -> Tensor:
        s, rows_B = self.settings, counted_rows(queries_BQD)
        depths = self.expansions.blocks
        return expansion_weights(idf_BE, rows_B, beta=s.beta, share=s.expansion_share, depths=depths)

    def _soft(self, scores_N: Tensor, labelled_N: Tensor) -> Tensor:
        turns = labelled_N.nonzero()[:, 0]
        positives_B = turns if len(turns) else torch.zeros(1, dtype=torch.int64)
        valid_BN = (~labelled_N).repeat(len(positives_B), 1)
        valid_BN[torch.arange(len(positives_B)), positives_B] = True
        scores_BN = scores_N.repeat(len(positives_B), 1)
        # The other passages are the query's candidates, over which `temperature: auto` takes the spread.
        rows = BatchScores(scores_BN, positives_B, valid_BN, 1, scores_BN)
        temperature_B = temperatures(rows, self.settings.temperature)
        if not len(turns):
            return (scores_N / temperature_B[0]).softmax(0)
        return soft_labels(scores_BN, positives_B, temperature_B, valid_BN).mean(0)


def labels_of(finished: FinishedRun) -> str:
    """The folder with the labels that the student of a run is distilled from: a search keeps those of other settings
    than the run's beside them."""
    if finished.folder != finished.base and exists(join(finished.base, "run.json")):
        mine = finished.record.get("config", {}).get("label")
        if mine and mine != read_json(join(finished.base, "run.json")).get("config", {}).get("label"):
            return join(finished.base, labels_folder(mine))
    return join(finished.base, "labels")


def vocabulary(run: str) -> dict[int, str]:
    """Token id to token, from the teacher's tokenizer.json; read without `transformers`, whose import takes seconds.

    The ids that labels hold are those of the file that the teacher was saved with.
    """
    from tokenizers import Tokenizer

    fs, path = filesystem_of(join(run, "teacher", "tokenizer.json"))
    with fs.open_input_stream(path) as stream:
        tokenizer = Tokenizer.from_str(stream.read().decode("utf-8"))
    return {i: token for token, i in tokenizer.get_vocab().items()}
