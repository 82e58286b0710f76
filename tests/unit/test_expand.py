"""Expansions of a batch against a literal version a query at a time; votes, idf, and odd feedback."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ckd_ray.collective import Expansions, expand
from ckd_ray.collective.expand import _highest
from ckd_ray.collective.kmeans import kmeans, start_positions
from ckd_ray.collective.votes import elect_tokens, inverse_document_frequency

pytestmark = pytest.mark.usefixtures("clustering")

DIM, VOCABULARY, PASSAGES = 16, 60, 500
RANDOM = np.random.default_rng(11)
# A collection of token embeddings to find neighbours in, and how many passages hold each token.
STORE = torch.nn.functional.normalize(torch.from_numpy(RANDOM.normal(size=(400, DIM)).astype(np.float32)), dim=1)
STORE_TOKENS = RANDOM.integers(0, VOCABULARY, 400)
DF = RANDOM.integers(0, PASSAGES, VOCABULARY)
SPECIAL = np.array([0, 1, 2])


def nearest(centroids: Tensor) -> np.ndarray:
    """Ten nearest of the store; row by row, so that a row's answer does not depend on the others."""
    order = [(STORE - c).square().sum(1).argsort(stable=True)[:10] for c in centroids]
    return STORE_TOKENS[torch.stack(order).numpy()]


def passages(*lengths: int, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.nn.functional.normalize(torch.randn(n, DIM, generator=random), dim=1) for n in lengths]


def run(
    feedback: list[list[Tensor]], neighbours: Callable[[Tensor], np.ndarray] = nearest, **more: object
) -> Expansions:
    arguments = {"document_frequencies": DF, "num_passages": PASSAGES, "special_token_ids": SPECIAL, **more}
    return expand(feedback, neighbours=neighbours, **arguments)


def literal(query: list[Tensor], clusters: int = 24) -> list[tuple[np.ndarray, float, int]]:
    """(centroid, idf, token) of one query, highest idf first."""
    points = torch.cat(query)
    start = points[start_positions([len(p) for p in query], clusters)]
    found = kmeans(points[None], torch.ones(1, len(points), dtype=torch.bool), start[None])
    kept = []
    for centroid in found.centroids_BKD[0]:
        votes = [t for t in nearest(centroid[None])[0].tolist() if t >= 0 and t not in SPECIAL.tolist()]
        if votes:
            token = Counter(votes).most_common(1)[0][0]
            kept.append((centroid.numpy(), float(np.log((1 + PASSAGES) / (1 + DF[token]))), token))
    return sorted(kept, key=lambda entry: -entry[1])


def test_a_batch_equals_the_literal_version() -> None:
    feedback = [passages(*RANDOM.integers(1, 60, 3).tolist(), seed=s) for s in range(12)] + [passages(70, seed=50)]
    found = run(feedback)
    for i, query in enumerate(feedback):
        wanted = literal(query)
        n = len(wanted)
        assert int(found.counts_B[i]) == n
        assert found.token_ids_BK[i, :n].tolist() == [token for *_, token in wanted]
        np.testing.assert_allclose(found.idf_BK[i, :n], [idf for _, idf, _ in wanted], rtol=1e-6)
        np.testing.assert_allclose(found.embeddings_BKD[i, :n], np.stack([c for c, *_ in wanted]), atol=1e-5)
        assert not found.embeddings_BKD[i, n:].any() and not found.idf_BK[i, n:].any()


def test_company_and_order_change_no_bit() -> None:
    feedback = [passages(*RANDOM.integers(0, 90, 3).tolist(), seed=s) for s in range(40)]
    together, reversed_ = run(feedback), run(feedback[::-1])
    for i in (0, 7, 23, 39):
        alone = run([feedback[i]])
        for name in ("embeddings_BKD", "idf_BK", "token_ids_BK", "counts_B"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i]), name
            assert torch.equal(getattr(together, name)[i], getattr(reversed_, name)[39 - i]), name


def test_select_multiplies_cuts_and_pads() -> None:
    found = run([passages(4), passages(50, 50, seed=1)])
    embeddings, weights = found.select(10, beta=2.5)
    assert embeddings.shape == (2, 10, DIM)
    assert torch.equal(weights, 2.5 * found.idf_BK[:, :10])
    count = int(found.counts_B[0])
    assert count <= 4 and not weights[0, count:].any() and not embeddings[0, count:].any()
    assert (weights[1].diff() <= 0).all()
    wide, wide_weights = found.select(30, beta=1.0)
    assert wide.shape == (2, 30, DIM) and not wide_weights[:, 24:].any()


def test_odd_feedback_has_a_defined_outcome() -> None:
    empty = torch.zeros(0, DIM)
    whole = passages(9, 9, seed=3)
    found = run([[], [empty], whole, [empty, *whole, empty], passages(1, seed=4)], clusters=6)
    assert found.counts_B.tolist()[:2] == [0, 0]
    assert not found.embeddings_BKD[:2].any() and not found.idf_BK[:2].any()
    # Empty passages are as if they were not in the list.
    assert torch.equal(found.embeddings_BKD[2], found.embeddings_BKD[3])
    assert int(found.counts_B[4]) <= 1
    assert run([]).counts_B.tolist() == []


def test_fewer_tokens_than_clusters_make_one_centroid_a_token() -> None:
    (query,) = passages(5, seed=6)
    found = run([[query]], neighbours=lambda centroids: np.full((len(centroids), 10), 7))
    assert int(found.counts_B) == 5
    assert torch.equal(found.embeddings_BKD[0, :5], query)  # equal idf: the order of the clusters stays


def test_the_same_passage_twice_gives_each_centroid_once() -> None:
    (query,) = passages(6, seed=7)
    found = run([[query, query]], neighbours=lambda centroids: np.full((len(centroids), 10), 7), clusters=12)
    assert int(found.counts_B) == 6
    assert sorted(found.embeddings_BKD[0, :6].tolist()) == sorted(query.tolist())


def test_no_vote_left_drops_the_centroid() -> None:
    query = passages(30, seed=8)
    all_special = run([query], neighbours=lambda centroids: np.tile(SPECIAL[[0, 1, 2, -1]], (len(centroids), 1)))
    nobody = run([query], neighbours=lambda centroids: np.full((len(centroids), 10), -1))
    for found in (all_special, nobody):
        assert found.counts_B.tolist() == [0]
        assert not found.select(10, 1.0)[1].any()


def test_votes_by_hand() -> None:
    neighbours = np.array(
        [
            [5, 6, 6, 5],  # a tie goes to the first met
            [0, 0, 0, 9],  # special ids do not count
            [9, 4, 4, -1],  # the most frequent wins
            [-1, -1, 3, 8],  # nor does a missing neighbour
            [0, 1, -1, 2],  # nobody left
        ]
    )
    tokens, votes = elect_tokens(neighbours, SPECIAL)
    assert tokens.tolist() == [5, 9, 4, 3, -1]
    assert votes.tolist() == [2, 1, 2, 1, 0]


def test_idf_by_hand() -> None:
    idf = inverse_document_frequency(np.array([0, 1, 2]), np.array([0, 9, 99]), 99)
    assert idf.tolist() == pytest.approx([np.log(100), np.log(10), 0.0])


def test_the_feedback_may_vote_itself() -> None:
    # Two tight groups far apart; a special token is nearest to the second.
    left, right = torch.eye(2, DIM)
    query = torch.stack([left, left, left, right, right, right])
    found = expand(
        [[query]],
        neighbours=None,
        document_frequencies=DF,
        num_passages=PASSAGES,
        special_token_ids=SPECIAL,
        clusters=2,
        voters=3,
        tokens=[[np.array([20, 21, 20, 0, 30, 31])]],
        token_vote="feedback",
    )
    assert set(found.token_ids_BK[0].tolist()) == {20, 30}


def test_half_precision_feedback() -> None:
    query = [p.half() for p in passages(40, 30, seed=9)]
    half, full = run([query]), run([[p.float() for p in query]])
    assert torch.equal(half.embeddings_BKD, full.embeddings_BKD) and half.embeddings_BKD.dtype == torch.float32


def test_what_is_refused() -> None:
    query = passages(10, seed=10)
    query[0][3, 2] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        run([passages(10), query])
    with pytest.raises(ValueError, match="tokens"):
        run([passages(10)], token_vote="feedback")
    with pytest.raises(ValueError, match="neighbours"):
        expand([passages(10)], document_frequencies=DF, num_passages=PASSAGES)


@pytest.mark.parametrize("wrong", [{"voters": 0}, {"clusters": 0}])
def test_no_voters_or_no_clusters_are_refused(wrong: dict[str, int]) -> None:
    values: dict[str, Any] = {"document_frequencies": np.ones(5), "num_passages": 2, "token_vote": "feedback"}
    with pytest.raises(ValueError, match="1 or more"):
        expand([[torch.randn(3, 4)]], tokens=[[np.arange(3)]], **values, **wrong)


def test_centroids_in_special_cells_are_dropped() -> None:
    """Votes by the feedback: the centroids that the collection crowds with special tokens go, the rest stay as they
    are."""
    query = passages(30, seed=8)
    arguments = {
        "document_frequencies": DF,
        "num_passages": PASSAGES,
        "special_token_ids": SPECIAL,
        "tokens": [[np.arange(30) + 5]],
        "token_vote": "feedback",
        "clusters": 6,
    }
    whole = expand([query], **arguments)
    seen: list[Tensor] = []

    def special(centroids: Tensor) -> np.ndarray:
        seen.append(centroids)
        return np.arange(len(centroids)) == 2

    found = expand([query], in_special_cell=special, **arguments)
    assert len(seen[0]) == 6 and found.counts_B.tolist() == [5]
    dropped = seen[0][2]
    kept = [i for i in range(6) if not torch.equal(whole.embeddings_BKD[0, i], dropped)]
    assert torch.equal(found.embeddings_BKD[0, :5], whole.embeddings_BKD[0, kept])
    assert torch.equal(found.idf_BK[0, :5], whole.idf_BK[0, kept])
    assert not found.embeddings_BKD[0, 5:].any()


def test_equal_scores_keep_the_order_of_the_text() -> None:
    generator = torch.Generator().manual_seed(2)
    for values in (3, 1000):  # nearly all tied, nearly none
        scores_BKT = torch.randint(0, values, (4, 6, 50), generator=generator).float()
        scores_BKT[0, 0, 5:] = -torch.inf  # fewer points than are asked for
        wanted = scores_BKT.sort(dim=-1, descending=True, stable=True).indices[:, :, :10]
        assert torch.equal(_highest(scores_BKT, 10), wanted)
