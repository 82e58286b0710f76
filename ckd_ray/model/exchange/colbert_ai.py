"""Checkpoints of colbert-ai (tested with 0.2.22): one state dict, and artifact.metadata with the settings.

The state dict holds `linear.weight` and the encoder's weights under its prefix (`bert.`). colbert-ai puts the marker as
second token, pads queries with [MASK], gives punctuation of passages no row, and searches by inner products.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ckd_ray.errors import UserError
from ckd_ray.model.colbert import ColBERT, load_transformers
from ckd_ray.model.exchange import tokens
from ckd_ray.model.exchange.detect import METADATA, exported_similarity, read_object, write_json
from ckd_ray.model.exchange.weights import as_matrix, read_tensor
from ckd_ray.model.settings import ColBERTSettings

NAME = "colbert-ai"


def read(folder: Path, defaults: ColBERTSettings) -> ColBERT:
    """The model in a checkpoint folder of colbert-ai; what it does not say has colbert-ai's own default."""
    metadata = read_object(folder / METADATA, optional=True)
    if isinstance(metadata.get("config"), dict):
        metadata = metadata["config"]
    similarity = exported_similarity(folder)
    metadata |= {"similarity": similarity} if similarity else {}
    weight = as_matrix(read_tensor(folder, "linear.weight"), str(folder))
    backbone, hf = load_transformers(str(folder), str(folder))
    settings = settings_of(metadata, weight.shape[0], str(folder / METADATA))
    model = ColBERT.from_parts(backbone, hf, settings, weight, where=str(folder))
    tokens.check_inserted(hf, model.tokenizer, str(folder), NAME)
    return model


def settings_of(metadata: dict[str, Any], dim: int, where: str) -> ColBERTSettings:
    """Our settings from those of colbert-ai; what is not there has colbert-ai's default."""
    values = {key: value for key, value in metadata.items() if value is not None}
    if values.get("interaction", "colbert") != "colbert":
        raise UserError("an interaction other than MaxSim", where=where, found=str(values["interaction"]))
    if values.get("similarity", "cosine") not in ("cosine", "l2"):
        raise UserError("an unknown similarity", where=where, expected="cosine or l2", found=str(values["similarity"]))
    return ColBERTSettings(
        dim=dim,
        query_maxlen=int(values.get("query_maxlen", 32)),
        doc_maxlen=int(values.get("doc_maxlen", 220)),
        mask_punctuation=bool(values.get("mask_punctuation", True)),
        similarity=values.get("similarity", "cosine"),
        query_marker=str(values.get("query_token_id", "[unused0]")),
        doc_marker=str(values.get("doc_token_id", "[unused1]")),
        attend_to_mask=bool(values.get("attend_to_mask_tokens", False)),
    )


def write(model: ColBERT, folder: Path) -> list[str]:
    """Write `model` for colbert-ai into the empty `folder`; returns what differs there, as sentences.

    Raises:
        UserError: the model has a setting that colbert-ai cannot hold.
    """
    s = model.settings
    _check(model)
    prefix = model.backbone.base_model_prefix
    config = copy.deepcopy(model.backbone.config)
    config.architectures = ["HF_ColBERT"]
    config.save_pretrained(folder)
    weights = {f"{prefix}.{name}": t.detach().cpu().clone() for name, t in model.backbone.state_dict().items()}
    weights["linear.weight"] = model.projection.weight.detach().float().cpu().clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokens.write_inserting_tokenizer(model.tokenizer, folder, "--format colbert", NAME)
    write_json(
        folder / METADATA,
        {
            "query_token_id": s.query_marker,
            "doc_token_id": s.doc_marker,
            "query_token": "[Q]",
            "doc_token": "[D]",
            # Its l2 keeps padding as zero rows; its search uses inner products with either value.
            "similarity": "cosine",
            "interaction": "colbert",
            "dim": s.dim,
            "query_maxlen": s.query_maxlen,
            "doc_maxlen": s.doc_maxlen,
            "mask_punctuation": True,
            "attend_to_mask_tokens": s.attend_to_mask,
        },
    )
    if s.query_expansion:
        return []
    return ["colbert-ai fills queries with [MASK] in search too, here only training does; rankings differ"]


def _check(model: ColBERT) -> None:
    s = model.settings
    punctuation = not s.mask_punctuation or s.skip_tokens is not None
    found = {
        "passages that keep their punctuation (colbert-ai 0.2 cannot encode them)": punctuation,
        "queries without augmentation": not (s.query_expansion or s.training_expansion),
        "no markers": not s.query_marker or not s.doc_marker,
        "one token for both padding and [MASK]": model.tokenizer.pad_id == model.tokenizer.mask_id,
    }
    problems = [problem for problem, is_so in found.items() if is_so]
    if problems:
        raise UserError(
            "colbert-ai cannot hold this model",
            where="--format colbert",
            expected="markers, queries filled with [MASK], passages without punctuation",
            found=", ".join(problems),
            fix="--format pylate or sentence-transformers hold it",
        )
