"""PyLate's folders (tested with 1.6): a Transformer, dense layers, and the settings beside them.

PyLate inserts the prefix as second token, pads queries with [MASK] to `query_length`, leaves out the tokens of
`skiplist_words` from passages, normalises rows, and scores by the sum of the greatest inner products.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckd_ray.errors import UserError
from ckd_ray.model.colbert import ColBERT, load_transformers
from ckd_ray.model.exchange import tokens
from ckd_ray.model.exchange.detect import LIBRARY, exported_similarity, read_object, write_json
from ckd_ray.model.exchange.modules import (
    check_case,
    read_modules,
    read_projection,
    read_transformer,
    write_dense,
    write_modules,
)
from ckd_ray.model.settings import ColBERTSettings

NAME = "PyLate"


def read(folder: Path, defaults: ColBERTSettings) -> ColBERT:
    """The model in a folder that PyLate saved; `defaults` give the settings that the folder does not hold."""
    library = read_object(folder / LIBRARY, optional=True)
    modules = read_modules(folder, {"Transformer", "Dense"})
    weight = read_projection(folder, modules)
    encoder = modules[0].folder
    backbone, hf = load_transformers(str(encoder), str(folder))
    hf = tokens.with_padding_token(hf, backbone)
    check_case(read_transformer(encoder), hf, encoder)
    words = library.get("skiplist_words")
    if words is None:
        skip: dict[str, Any] = {"mask_punctuation": True, "skip_tokens": None}
    else:  # in PyLate a word that is no token means the unknown token
        skip = tokens.skip_settings(hf, hf.convert_tokens_to_ids([str(w) for w in words]))
    settings = ColBERTSettings(
        dim=weight.shape[0],
        query_maxlen=int(library.get("query_length") or 32),
        doc_maxlen=int(library.get("document_length") or 180),
        similarity=exported_similarity(folder) or defaults.similarity,
        query_marker=_marker(hf, library.get("query_prefix"), "[Q] ", folder),
        doc_marker=_marker(hf, library.get("document_prefix"), "[D] ", folder),
        attend_to_mask=bool(library.get("attend_to_expansion_tokens")),
        query_expansion=library.get("do_query_expansion") is not False,
        **skip,
    )
    model = ColBERT.from_parts(backbone, hf, settings, weight, where=str(folder))
    tokens.check_inserted(hf, model.tokenizer, str(folder), NAME)
    return model


def _marker(hf: Any, prefix: str | None, usual: str, folder: Path) -> str:
    prefix = usual if prefix is None else prefix
    if prefix and prefix not in hf.get_vocab():
        raise UserError("the prefix is no token of the vocabulary", where=str(folder / LIBRARY), found=repr(prefix))
    return prefix


def write(model: ColBERT, folder: Path) -> list[str]:
    """Write `model` for PyLate into the empty `folder`; returns what differs there, as sentences."""
    s, tokenizer = model.settings, model.tokenizer
    model.backbone.save_pretrained(folder, safe_serialization=True)
    tokens.write_inserting_tokenizer(tokenizer, folder, "--format pylate", NAME)
    write_modules(folder, [("sentence_transformers.models.Transformer", ""), ("pylate.models.Dense.Dense", "1_Dense")])
    write_dense(folder / "1_Dense", model.projection.weight, {"use_residual": False})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": s.doc_maxlen - 1, "do_lower_case": False})
    write_json(
        folder / LIBRARY,
        {
            "model_type": "ColBERT",
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "MaxSim",
            "query_prefix": s.query_marker,
            "document_prefix": s.doc_marker,
            "query_length": s.query_maxlen,
            "document_length": s.doc_maxlen,
            "attend_to_expansion_tokens": s.attend_to_mask,
            "skiplist_words": tokens.skip_words(tokenizer),
            "do_query_expansion": s.query_expansion,
        },
    )
    return []
