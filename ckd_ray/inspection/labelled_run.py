"""A run opened to read its labels, and the distributions that training takes its targets from. Needs no Ray.

Shapes: N passages, Q query rows, E expansion embeddings, D dimensions, L rows a passage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ckd_ray.arrays import Int64Array, IntArray
from ckd_ray.collective.losses import BatchScores, soft_labels, temperatures
from ckd_ray.collective.scores import candidate_scores, expansion_weights, teacher_scores
from ckd_ray.config.schema import DistillConfig
from ckd_ray.data import Collection
from ckd_ray.data.collection import Queries
from ckd_ray.data.positives import Positives
from ckd_ray.distill.objectives import OBJECTIVES
from ckd_ray.ensemble.reader import EnsembleReader
from ckd_ray.ensemble.weights import WEIGHTS
from ckd_ray.errors import UserError
from ckd_ray.files import exists, file_signature, filesystem_of, join, read_json
from ckd_ray.labels.files import ExpansionReader
from ckd_ray.model.maxsim import counted_rows
from ckd_ray.retrieve.rankings import read_ranking_matrix
from ckd_ray.runs.artifact import is_finished, manifest_file
from ckd_ray.runs.directory import LABELS
from ckd_ray.runs.finished import FinishedRun, open_finished
from ckd_ray.store import EmbeddingStore

# Only the training queries have labels.
SPLIT = "train"


@dataclass(frozen=True)
class Distributions:
    """The probabilities that each kind of label gives the same N passages, float64 (N,) each.

    Attributes:
        one_hot: 1 at the labelled passage, equal shares at several ones, 0 everywhere without one.
        teacher: soft labels without expansion embeddings; collective: with them. Each sums to 1.
        teacher_scores, collective_scores: the scores from which these two are computed by a softmax.
    """

    one_hot: Tensor
    teacher: Tensor
    collective: Tensor
    teacher_scores: Tensor
    collective_scores: Tensor


class LabelledRun:
    """Opened by `LabelledRun.open(run)`. Nothing is read before it is needed.

    Attributes:
        paths: the folders of what was opened.
        config: the configuration of `paths.folder`.
    """

    def __init__(self, finished: FinishedRun) -> None:
        self.paths = paths = finished.paths
        self.config = config = finished.record["config"]
        self.expansions = ExpansionReader.open(paths.labels, SPLIT)
        known = {key: value for key, value in config["distill"].items() if key in DistillConfig.model_fields}
        self.settings = DistillConfig.model_validate(known)
        self.collection = Collection.open(paths.root)
        self.passages = EmbeddingStore.open(paths.passages)
        self._queries = EmbeddingStore.open(paths.query_embeddings(SPLIT))

    @classmethod
    def open(cls, run: str) -> LabelledRun:
        """Open a run, or a variant of one, by what `open_finished` accepts.

        Raises:
            UserError: it is not a run, or its label stage has not finished; names the command that finishes it.
        """
        return cls.of(open_finished(run))

    @classmethod
    def of(cls, finished: FinishedRun) -> LabelledRun:
        """Like `open`, for a run that is open already."""
        paths = finished.paths
        if not is_finished(paths.labels):
            name = finished.record["config"]["run"]["name"]
            command = f"ckd-ray {'label' if paths.labels_name == LABELS else 'tune'}"
            raise UserError(
                "this run has no labels yet",
                where=paths.labels,
                fix=f"{command}, with the configuration of this run (--config FILE or --set; run.name={name})",
            )
        return cls(finished)

    @cached_property
    def queries(self) -> Queries:
        """Ids and texts of the training queries."""
        return self.collection.queries(SPLIT)

    @cached_property
    def positives(self) -> Positives:
        """Labelled passages of the training queries, from collection.positive_grade on."""
        return self.collection.positives(SPLIT, self.config["collection"]["positive_grade"])

    @cached_property
    def similarity(self) -> Any:
        """The teacher's similarity, from its checkpoint."""
        return read_json(join(self.paths.teacher, "colbert.json"))["similarity"]

    @cached_property
    def ensemble(self) -> EnsembleReader | None:
        """The scores of further scorers, where the teacher's score has them."""
        scorers, folder = OBJECTIVES[self.settings.objective].scorers(self.settings), self.paths.ensemble
        if not scorers or not exists(join(folder, WEIGHTS)):
            return None
        return EnsembleReader.open(folder, self.settings, scorers)

    @cached_property
    def rankings(self) -> npt.NDArray[Any]:
        """The teacher's rankings of the training queries, (Q, depth): best first, -1 where a ranking ends."""
        return read_ranking_matrix(self.paths.rankings, SPLIT)

    @cached_property
    def vocabulary(self) -> dict[int, str]:
        """Token id to token, from the teacher's tokenizer.json, which is the vocabulary that labels refer to."""
        # Not with `transformers`, whose import takes seconds.
        from tokenizers import Tokenizer

        fs, path = filesystem_of(join(self.paths.teacher, "tokenizer.json"))
        with fs.open_input_stream(path) as stream:
            tokenizer = Tokenizer.from_str(stream.read().decode("utf-8"))
        return {i: token for token, i in tokenizer.get_vocab().items()}

    def with_labelled(self, query: int, ranking: IntArray) -> Int64Array:
        """The passages of a ranking of the query, then the labelled ones that are not among them."""
        ranked, labelled = ranking[ranking >= 0].astype(np.int64), self.positives.of(query)
        return np.concatenate([ranked, labelled[~np.isin(labelled, ranked)]])

    def distributions(self, query: int, passages_N: Int64Array) -> Distributions:
        """The three distributions of a query over `passages_N` (dense indices).

        As in training, the labelled passage is raised to the highest score. Of several labelled passages each is the
        positive once, without the others, and the result is the mean. A query without a label is not trained on; its
        scores are softmaxed as they are.
        """
        queries, expansions, weights = self._asked(query)
        floor = self.settings.zero_row_floor
        rows_NLD, mask_NL = self.passages.gather(passages_N).padded()

        def score(weights_BE: Tensor) -> Tensor:
            found = teacher_scores(
                queries, expansions, weights_BE, rows_NLD, mask_NL, self.similarity, zero_row_floor=floor
            )
            return found[0].double()

        plain = score(torch.zeros_like(weights))
        collective = self._with_ensemble(score(weights), query, passages_N)
        labelled = torch.from_numpy(np.isin(passages_N, self.positives.of(query)))
        one_hot = labelled.double() / max(1, int(labelled.sum()))
        return Distributions(one_hot, self._soft(plain, labelled), self._soft(collective, labelled), plain, collective)

    def collective_scores(self, query: int, passages_N: Int64Array) -> Tensor:
        """`Distributions.collective_scores` alone, float64 (N,), without padding and without the other scores."""
        queries, expansions, weights = self._asked(query)
        rows, floor = self.passages.gather(passages_N), self.settings.zero_row_floor
        scores_N = candidate_scores(
            queries[0], expansions[0], weights[0], rows.embeddings_TD, rows.lengths, self.similarity,
            zero_row_floor=floor,
        )  # fmt: skip
        return self._with_ensemble(scores_N.double(), query, passages_N)

    def _asked(self, query: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of a query (1, Q, D), its expansion (1, E, D) and the weights of that (1, E)."""
        expansions, idf = self.expansions.select(np.array([query]), self.settings.expansion_size)
        queries = self._queries.gather(np.array([query])).embeddings_TD.float()[None]
        return queries, expansions, self._weights(idf, queries)

    def _with_ensemble(self, scores_N: Tensor, query: int, passages_N: Int64Array) -> Tensor:
        if self.ensemble is None:
            return scores_N
        further_1N, _ = self.ensemble.of_batch(np.array([query]), passages_N)
        return scores_N + further_1N[0].double()

    def centroid_weights(self, query: int, idf: Sequence[float], depths: Sequence[int] = ()) -> list[float]:
        """The weight of each centroid of a query in the teacher's score; 0 beyond `distill.expansion_size`.

        Args:
            idf: of the centroids, depth by depth, the highest first in each.
            depths: the depth of each centroid, where the labels have several.
        """
        queries = self._queries.gather(np.array([query])).embeddings_TD[None]
        size = self.settings.expansion_size
        block = np.searchsorted(self.expansions.depths, depths) if len(depths) else np.zeros(len(idf), np.int64)
        place = np.arange(len(idf)) - np.searchsorted(block, block)  # within its block
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
        # `temperature: auto` takes the spread over the query's candidates, which are these passages.
        rows = BatchScores(scores_BN, positives_B, valid_BN, 1, scores_BN)
        temperature_B = temperatures(rows, self.settings.temperature)
        if not len(turns):
            return (scores_N / temperature_B[0]).softmax(0)
        return soft_labels(scores_BN, positives_B, temperature_B, valid_BN).mean(0)


def labelled_run_once(run: str) -> LabelledRun:
    """A labelled run, opened once a process, and again when its labels have been made anew."""
    return _labelled_run(run, *file_signature(manifest_file(open_finished(run).paths.labels)))


@lru_cache(maxsize=1)
def _labelled_run(run: str, size: int, changed: int) -> LabelledRun:
    return LabelledRun.open(run)
