"""Parity of clustering, votes and expansions with the published implementation (README.md in this folder)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_ray.collective import expand
from ckd_ray.collective.kmeans import kmeans, start_positions
from ckd_ray.collective.votes import elect_tokens

pytestmark = pytest.mark.usefixtures("clustering")

QUERIES = 4


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "feedback.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(scope="module")
def feedback(golden: dict[str, np.ndarray]) -> list[list[torch.Tensor]]:
    flat = list(torch.split(torch.from_numpy(golden["embeddings"]), golden["lengths"].reshape(-1).tolist()))
    return [flat[3 * q : 3 * q + 3] for q in range(QUERIES)]


def test_start(golden: dict[str, np.ndarray], feedback: list[list[torch.Tensor]]) -> None:
    for query, passages in enumerate(feedback):
        rows = start_positions([len(p) for p in passages], 24)
        assert np.array_equal(torch.cat(passages)[rows].numpy(), golden["start"][query])


def test_centroids_and_clusters(golden: dict[str, np.ndarray], feedback: list[list[torch.Tensor]]) -> None:
    first = 0
    for query, passages in enumerate(feedback):
        points = torch.cat(passages)[None]
        mask = torch.ones(points.shape[:2], dtype=torch.bool)
        found = kmeans(
            points, mask, torch.from_numpy(golden["start"][query])[None], torch.ones(1, 24, dtype=torch.bool)
        )
        assert np.abs(found.centroids_BKD[0].numpy() - golden["centroids"][query]).max() < 1e-3
        assert np.array_equal(found.labels_BT[0].numpy(), golden["labels"][first : first + points.shape[1]])
        first += points.shape[1]


def test_votes(golden: dict[str, np.ndarray]) -> None:
    tokens, votes = elect_tokens(golden["neighbours"].reshape(-1, 10), golden["silent_ids"])
    assert np.array_equal(tokens, golden["tokens"].reshape(-1))
    elected = golden["tokens"].reshape(-1) >= 0
    assert np.array_equal(votes[elected], golden["votes"].reshape(-1)[elected])


def test_expansions(golden: dict[str, np.ndarray], feedback: list[list[torch.Tensor]]) -> None:
    """All four queries in one call, each centroid answered with the published neighbours of the nearest published
    one."""

    def neighbours(centroids: torch.Tensor) -> np.ndarray:
        published = torch.from_numpy(golden["centroids"]).reshape(-1, 128)
        nearest = torch.cdist(centroids, published).argmin(1).numpy()
        return golden["neighbours"].reshape(-1, 10)[nearest]

    found = expand(
        feedback,
        neighbours=neighbours,
        document_frequencies=golden["df"],
        num_passages=int(golden["num_passages"]),
        special_token_ids=golden["silent_ids"],
    )
    embeddings, weights = found.select(10, beta=1.0)
    assert np.array_equal(found.token_ids_BK[:, :10].numpy(), golden["expansion_tokens"])
    assert np.abs(weights.numpy() - golden["weights"]).max() < 1e-4
    assert np.abs(embeddings.numpy() - golden["expansion"]).max() < 1e-3
