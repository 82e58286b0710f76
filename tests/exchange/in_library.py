"""Runs inside the environment of one library, without ckd-ray: scores texts, or makes a model as users make it there.

    python in_library.py LIBRARY score FOLDER TEXTS.json OUT.json
    python in_library.py LIBRARY make FOLDER BACKBONE

TEXTS.json: {"queries": [...], "passages": [...]}. OUT.json: {"scores": one list a query, "rows": rows a query,
"versions": {...}}.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version


def score_sentence_transformers(folder: str, queries: list[str], passages: list[str]) -> tuple[list, int]:
    from sentence_transformers import MultiVectorEncoder

    model = MultiVectorEncoder(folder, device="cpu")
    q, p = model.encode_query(queries), model.encode_document(passages)
    return model.similarity(q, p).tolist(), len(q[0])


def score_pylate(folder: str, queries: list[str], passages: list[str]) -> tuple[list, int]:
    from pylate.models import ColBERT
    from pylate.scores import colbert_scores

    model = ColBERT(folder, device="cpu")
    q = model.encode(queries, is_query=True, convert_to_numpy=False, show_progress_bar=False)
    p = model.encode(passages, is_query=False, convert_to_numpy=False, show_progress_bar=False)
    # A pair at a time: in a padded batch its padding counts as zero rows, which floors every maximum at 0.
    scores = [[float(colbert_scores(rows[None], passage[None])) for passage in p] for rows in q]
    return scores, len(q[0])


def score_colbert_ai(folder: str, queries: list[str], passages: list[str]) -> tuple[list, int]:
    from colbert.infra import ColBERTConfig
    from colbert.modeling.checkpoint import Checkpoint
    from colbert.modeling.colbert import ColBERT, colbert_score

    ColBERT.loaded_extensions = True  # its C++ search kernel, which is not asked here, would be compiled
    checkpoint = Checkpoint(folder, colbert_config=ColBERTConfig(), verbose=0)
    q = checkpoint.queryFromText(queries)
    ids, mask = checkpoint.doc_tokenizer.tensorize(passages)
    p, keep = checkpoint.doc(ids, mask, keep_dims="return_mask")
    config = checkpoint.colbert_config
    return [colbert_score(row[None], p, keep, config=config).tolist() for row in q], q.shape[1]


def make_sentence_transformers(folder: str, backbone: str) -> None:
    import string

    import torch
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    torch.manual_seed(1)
    expansion = {"strategy": "fixed", "attend": True, "length": 24}
    encoder = Transformer(backbone, document_length=40, query_expansion=expansion)
    dense = Dense(
        encoder.get_embedding_dimension(),
        48,
        bias=False,
        activation_function=None,
        module_input_name="token_embeddings",
    )
    steps = [encoder, dense, MultiVectorMask(list(string.punctuation)), Normalize("token_embeddings")]
    MultiVectorEncoder(modules=steps, device="cpu").save(folder)
    # As users get it with no more than a backbone: no markers, queries as they are, 128 dimensions.
    MultiVectorEncoder(backbone, device="cpu").save(folder + "-plain")


def make_pylate(folder: str, backbone: str) -> None:
    import torch
    from pylate.models import ColBERT

    torch.manual_seed(1)
    ColBERT(backbone, device="cpu", embedding_size=48, query_length=24, document_length=40).save(folder)
    plain = ColBERT(
        backbone, device="cpu", do_query_expansion=False, query_prefix="", document_prefix="", skiplist_words=["the"]
    )
    plain.save(folder + "-plain")


def make_colbert_ai(folder: str, backbone: str) -> None:
    import os

    import torch
    from colbert.infra import ColBERTConfig
    from colbert.modeling.base_colbert import BaseColBERT

    torch.manual_seed(1)
    os.makedirs(folder)
    BaseColBERT(backbone, ColBERTConfig(dim=48, doc_maxlen=40, query_maxlen=24)).save(folder)
    os.makedirs(folder + "-plain")
    config = ColBERTConfig(attend_to_mask_tokens=True, query_token_id="[unused5]", similarity="l2")
    BaseColBERT(backbone, config).save(folder + "-plain")


SCORE = {"sentence-transformers": score_sentence_transformers, "pylate": score_pylate, "colbert-ai": score_colbert_ai}
MAKE = {"sentence-transformers": make_sentence_transformers, "pylate": make_pylate, "colbert-ai": make_colbert_ai}

if __name__ == "__main__":
    library, mode, *paths = sys.argv[1:]
    if mode == "make":
        MAKE[library](*paths)
    else:
        import torch

        torch.set_num_threads(2)
        with open(paths[1], encoding="utf-8") as file:
            texts = json.load(file)
        with torch.inference_mode():
            scores, rows = SCORE[library](paths[0], texts["queries"], texts["passages"])
        versions = {name: version(name) for name in (library, "torch", "transformers")}
        with open(paths[2], "w", encoding="utf-8") as file:
            json.dump({"scores": scores, "rows": rows, "versions": versions}, file)
