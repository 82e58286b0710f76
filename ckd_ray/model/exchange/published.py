"""`.dnn` checkpoints: what the first ColBERT, and the code published with the paper, saved.

A torch file with `model_state_dict` (`bert.*` and `linear.weight`, sometimes below `module.` or `model.`) and
`arguments`, the command line of its training. It holds neither the encoder's configuration nor its tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ckd_ray.errors import UserError, first_line
from ckd_ray.model.colbert import ColBERT, read_tokenizer, without_pooler
from ckd_ray.model.exchange import tokens
from ckd_ray.model.exchange.weights import as_matrix, load_torch
from ckd_ray.model.settings import ColBERTSettings
from ckd_ray.model.sources import resolve_backbone

_ENCODER_FIX = "model.backbone must name the encoder that the checkpoint was trained from"


def read(file: Path, defaults: ColBERTSettings, encoder: str | None) -> ColBERT:
    """The model in a `.dnn` file.

    Configuration and tokenizer come from files in its folder (config.json), else from `encoder`, else from the model
    that its arguments name, else from bert-base-uncased, from which that code always started. Settings come from
    `arguments`, else from `defaults`.
    """
    state, arguments = _contents(file)
    weight = as_matrix(state.pop("linear.weight").float(), str(file))
    if (file.parent / "config.json").is_file():
        encoder = str(file.parent)
    encoder = encoder or str(arguments.get("model") or "bert-base-uncased")
    backbone, hf = _empty_encoder(encoder, file)
    _fill(backbone, state, weight, file, encoder)
    settings = _settings(arguments, weight.shape[0], defaults, str(file))
    model = ColBERT.from_parts(backbone, hf, settings, weight, where=str(file))
    tokens.check_inserted(hf, model.tokenizer, encoder, "the published code")
    return model


def _contents(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    saved = load_torch(file)
    state = saved.get("model_state_dict") if isinstance(saved, dict) else None
    if not isinstance(state, dict):
        found = ", ".join(map(str, list(saved)[:8])) if isinstance(saved, dict) else type(saved).__name__
        raise UserError("not a ColBERT checkpoint", where=str(file), expected="model_state_dict", found=found)
    state = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    for prefix in ("module.", "model."):  # of a data-parallel wrapper; of colbert-ai's outer module
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    if "linear.weight" not in state:
        found = ", ".join(list(state)[:6]) or "nothing"
        raise UserError("no projection in this checkpoint", where=str(file), expected="linear.weight", found=found)
    arguments = saved.get("arguments")
    return state, arguments if isinstance(arguments, dict) else {}


def _empty_encoder(encoder: str, file: Path) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModel

    try:
        folder = resolve_backbone(encoder)
        backbone = AutoModel.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        hf = read_tokenizer(folder)
    except Exception as error:  # broken files make transformers and tokenizers raise errors of any kind
        raise UserError(
            "a .dnn file holds neither tokenizer nor configuration, and these were not found",
            where=str(file),
            expected=f"{encoder} as a folder or hub id that transformers reads",
            found=first_line(error),
            fix="name the encoder as model.backbone and the file as teacher.checkpoint, or put config.json and the "
            "tokenizer's files beside it",
        ) from error
    return without_pooler(backbone).float(), hf


def _fill(backbone: Any, state: dict[str, Tensor], weight: Tensor, file: Path, encoder: str) -> None:
    """Put the checkpoint's weights into the encoder; every one of the encoder's must be there, in its shape."""
    wanted = backbone.state_dict()
    prefixes = [f"{backbone.base_model_prefix}.", "bert.", ""]
    prefix = next((p for p in prefixes if any(p + name in state for name in wanted)), prefixes[0])
    missing = [name for name in wanted if prefix + name not in state and not name.endswith("position_ids")]
    if missing:
        raise UserError(
            "weights of the encoder are missing",
            where=str(file),
            expected=f"those of {encoder}, such as {prefix}{missing[0]}",
            found=", ".join(list(state)[:4]) or "nothing",
            fix=_ENCODER_FIX,
        )
    odd = [n for n, t in wanted.items() if prefix + n in state and state[prefix + n].shape != t.shape]
    if odd or weight.shape[1] != backbone.config.hidden_size:
        name = prefix + odd[0] if odd else "linear.weight"
        expected = str(tuple(wanted[odd[0]].shape) if odd else ("dim", backbone.config.hidden_size))
        found = str(tuple((state[name] if odd else weight).shape))
        problem = f"{name} does not fit {encoder}"
        raise UserError(problem, where=str(file), expected=expected, found=found, fix=_ENCODER_FIX)
    backbone.load_state_dict({n: state[prefix + n] for n in wanted if prefix + n in state}, strict=False)


def _settings(arguments: dict[str, Any], dim: int, defaults: ColBERTSettings, where: str) -> ColBERTSettings:
    values = {name: value for name, value in arguments.items() if value is not None}
    similarity = values.get("similarity", defaults.similarity)
    if similarity not in ("l2", "cosine"):
        raise UserError("an unknown similarity", where=where, expected="l2 or cosine", found=str(similarity))
    return ColBERTSettings(
        dim=dim,
        query_maxlen=int(values.get("query_maxlen", defaults.query_maxlen)),
        doc_maxlen=int(values.get("doc_maxlen", defaults.doc_maxlen)),
        mask_punctuation=bool(values.get("mask_punctuation", defaults.mask_punctuation)),
        similarity=similarity,
        query_marker=str(values.get("query_token_id", "[unused0]")),
        doc_marker=str(values.get("doc_token_id", "[unused1]")),
        attend_to_mask=bool(values.get("attend_to_mask_tokens", False)),
    )
