"""Folders of sentence-transformers' MultiVectorEncoder (tested with 6.2).

The steps are Transformer, Dense, MultiVectorMask (which rows count) and Normalize. Markers are prompts before the text;
queries are widened by `query_expansion` of the Transformer; scores are sums of the greatest inner products.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckd_ray.errors import UserError
from ckd_ray.model.colbert import ColBERT, load_transformers, read_tokenizer
from ckd_ray.model.exchange import tokens
from ckd_ray.model.exchange.detect import LIBRARY, exported_similarity, read_object, write_json
from ckd_ray.model.exchange.modules import (
    Module,
    check_case,
    read_modules,
    read_projection,
    read_transformer,
    write_dense,
    write_modules,
)
from ckd_ray.model.settings import ColBERTSettings

NAME = "sentence-transformers"
_BASE = "sentence_transformers.base.modules"
_TYPES = [
    (f"{_BASE}.transformer.Transformer", ""),
    (f"{_BASE}.dense.Dense", "1_Dense"),
    ("sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask", "2_MultiVectorMask"),
    (f"{_BASE}.normalize.Normalize", "3_Normalize"),
]


def read(folder: Path, defaults: ColBERTSettings) -> ColBERT:
    """The model in a folder that a MultiVectorEncoder saved; `defaults` give the settings that it does not hold."""
    library = read_object(folder / LIBRARY, optional=True)
    modules = read_modules(folder, {"Transformer", "Dense", "MultiVectorMask", "Normalize"})
    weight = read_projection(folder, modules)
    _check_normalised(folder, modules)
    encoder = modules[0].folder
    backbone, hf = load_transformers(str(encoder), str(folder))
    hf = tokens.with_padding_token(hf, backbone)
    transformer = read_transformer(encoder)
    check_case(transformer, hf, encoder)
    mask = next((m for m in modules if m.kind == "MultiVectorMask"), None)
    prompts = library.get("prompts") or {}
    query_prompt = prompts.get("query") or ""
    # The library takes the first of these that is there.
    doc_prompt = next((prompts[name] for name in ("document", "passage", "corpus") if name in prompts), None) or ""
    settings = ColBERTSettings(
        dim=weight.shape[0],
        doc_maxlen=int(transformer.get("document_length") or defaults.doc_maxlen),
        similarity=exported_similarity(folder) or defaults.similarity,
        query_marker=_marker(hf, query_prompt, folder),
        doc_marker=_marker(hf, doc_prompt, folder),
        **_expansion(transformer, hf, mask, encoder, defaults),
        **tokens.skip_settings(hf, _skip_ids(mask, hf)),
    )
    model = ColBERT.from_parts(backbone, hf, settings, weight, where=str(folder))
    if not tokens.prompted_as_ours(hf, model.tokenizer, query_prompt, doc_prompt):
        raise tokens.unlike(str(folder), NAME)
    return model


def _check_normalised(folder: Path, modules: list[Module]) -> None:
    configs = [read_object(m.folder / "config.json", optional=True) for m in modules if m.kind == "Normalize"]
    if not any(config.get("module_input_name") == "token_embeddings" for config in configs):
        raise UserError(
            "the token embeddings of this model are not normalised",
            where=str(folder),
            expected="a Normalize module for token_embeddings",
            found=f"{modules[-1].type} as the last module",
        )


def _marker(hf: Any, prompt: str, folder: Path) -> str:
    """The vocabulary token that a prompt stands for, "" for none."""
    if not prompt.strip():
        return ""
    marker = next((token for token in (prompt, prompt.strip()) if token in hf.get_vocab()), None)
    if marker is None:
        raise UserError(
            "a prompt of several tokens has no counterpart here",
            where=str(folder / LIBRARY),
            expected="prompts that are one token of the vocabulary, such as '[Q] ', or none",
            found=repr(prompt),
        )
    return marker


def _expansion(
    transformer: dict[str, Any], hf: Any, mask: Module | None, where: Path, defaults: ColBERTSettings
) -> dict[str, Any]:
    expansion = transformer.get("query_expansion")
    if expansion is None:
        length = int(transformer.get("query_length") or defaults.query_maxlen)
        return {"query_maxlen": length, "attend_to_mask": False, "query_expansion": False}
    strategy, token = expansion.get("strategy"), expansion.get("token")
    problems = [] if strategy == "fixed" else [f"strategy {strategy!r}"]
    problems += [] if token in (None, hf.mask_token) else [f"token {token!r}"]
    problems += ["no MultiVectorMask module, so the added tokens are not scored"] if mask is None else []
    if problems:
        raise UserError(
            "this way of widening queries has no counterpart here",
            where=str(where / "sentence_bert_config.json"),
            expected="query_expansion with strategy 'fixed' and the mask token, followed by a MultiVectorMask",
            found=", ".join(problems),
        )
    attend = bool(expansion.get("attend", False))
    return {"query_maxlen": int(expansion["length"]), "attend_to_mask": attend, "query_expansion": True}


def _skip_ids(mask: Module | None, hf: Any) -> list[int]:
    if mask is None:
        return []
    config = read_object(mask.folder / "config.json")
    words = [str(w) for w in config.get("skiplist_words") or []]
    tasks = config.get("skiplist_tasks") or ["document"]
    if config.get("keep_only_token_ids") or (words and tasks != ["document"]):
        raise UserError(
            "this choice of rows has no counterpart here",
            where=str(mask.folder / "config.json"),
            expected="skiplist_words for the task document, no keep_only_token_ids",
            found=f"skiplist_tasks {tasks}, keep_only_token_ids {config.get('keep_only_token_ids')}",
        )
    ids = zip(words, hf.convert_tokens_to_ids(words), strict=True)
    return [i for word, i in ids if i != hf.unk_token_id or word == hf.unk_token]  # others are dropped there as well


def write(model: ColBERT, folder: Path) -> list[str]:
    """Write `model` for MultiVectorEncoder into the empty `folder`; returns what differs there, as sentences."""
    s, tokenizer = model.settings, model.tokenizer
    model.backbone.save_pretrained(folder, safe_serialization=True)
    query_prompt, doc_prompt = _write_prompts(model, folder)
    write_modules(folder, _TYPES)
    expansion = {"strategy": "fixed", "attend": s.attend_to_mask, "token": None, "length": s.query_maxlen}
    lengths: dict[str, Any] = {"document_length": s.doc_maxlen}
    lengths |= {"query_expansion": expansion} if s.query_expansion else {"query_length": s.query_maxlen}
    write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "module_output_name": "token_embeddings",
            **lengths,
        },
    )
    names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    write_dense(folder / "1_Dense", model.projection.weight, names)
    mask = {"skiplist_words": tokens.skip_words(tokenizer), "skiplist_tasks": ["document"], "keep_only_token_ids": None}
    write_json(folder / "2_MultiVectorMask" / "config.json", mask)
    write_json(folder / "3_Normalize" / "config.json", names)
    write_json(
        folder / LIBRARY,
        {
            "model_type": "MultiVectorEncoder",
            "prompts": {"query": query_prompt, "document": doc_prompt},
            "default_prompt_name": None,
            "similarity_fn_name": "maxsim",
        },
    )
    markers = [m for m in (s.query_marker, s.doc_marker) if m]
    return [f"a text that holds {' or '.join(markers)} literally is read with the marker there"] if markers else []


def _write_prompts(model: ColBERT, folder: Path) -> tuple[str, str]:
    """The tokenizer, with the markers as tokens that a text can hold; returns the prompts that give our ids."""
    s, tokenizer = model.settings, model.tokenizer
    markers = [m for m in (s.query_marker, s.doc_marker) if m]
    for frame in (False, True):
        tokens.write_tokenizer(tokenizer, folder, special=markers, frame=frame)
        hf = read_tokenizer(folder)
        for end in (" ", ""):
            prompts = [m + end if m and not m.endswith(" ") else m for m in (s.query_marker, s.doc_marker)]
            if tokens.prompted_as_ours(hf, tokenizer, prompts[0], prompts[1]):
                return prompts[0], prompts[1]
    raise tokens.unlike("--format sentence-transformers", NAME)
