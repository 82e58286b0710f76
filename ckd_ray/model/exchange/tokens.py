"""Tokens as the other libraries make them, and the check that they come out as ours.

The others let the tokenizer put [CLS] and [SEP], and then insert the marker as the second token (PyLate, colbert-ai) or
write it before the text (sentence-transformers). We frame the ids ourselves. Both are the same for the tokenizers of
BERT and its like; here that is seen, not believed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ckd_ray.errors import UserError
from ckd_ray.model.tokenizer import ColBERTTokenizer, punctuation_ids

# Case, punctuation, digits, other scripts, an unknown sign, the empty text, and more than any model holds.
PROBES = (
    "what is late interaction?",
    'ColBERT (2020): one vector a token - not one a text; see e.g. "Khattab & Zaharia"!',
    "3.14 µg/l of naïve Größe 東京 🙂",
    "",
    "word " * 9000,
)


def inserted(hf: Any, texts: Sequence[str], marker_id: int | None, maxlen: int) -> list[list[int]]:
    """As PyLate and colbert-ai: the tokenizer's own frame, then the marker as second token."""
    room = maxlen - (marker_id is not None)
    rows = hf(list(texts), truncation=True, max_length=room)["input_ids"]
    return [list(ids) if marker_id is None else [*ids[:1], marker_id, *ids[1:]] for ids in rows]


def prompted(hf: Any, texts: Sequence[str], prompt: str, maxlen: int) -> list[list[int]]:
    """As sentence-transformers: the prompt before the text."""
    return [list(ids) for ids in hf([prompt + t for t in texts], truncation=True, max_length=maxlen)["input_ids"]]


def ours(tokenizer: ColBERTTokenizer, *, query: bool) -> list[list[int]]:
    """Our ids of the probes, without augmentation."""
    settings = tokenizer.settings
    if query:
        return tokenizer.framed(PROBES, tokenizer.query_marker_id, settings.query_maxlen)
    return tokenizer.framed(PROBES, tokenizer.doc_marker_id, settings.doc_maxlen)


def inserted_as_ours(hf: Any, tokenizer: ColBERTTokenizer) -> bool:
    """Whether a library that inserts markers makes our ids with the tokenizer `hf`."""
    s = tokenizer.settings
    queries = inserted(hf, PROBES, tokenizer.query_marker_id, s.query_maxlen)
    passages = inserted(hf, PROBES, tokenizer.doc_marker_id, s.doc_maxlen)
    return queries == ours(tokenizer, query=True) and passages == ours(tokenizer, query=False)


def prompted_as_ours(hf: Any, tokenizer: ColBERTTokenizer, query_prompt: str, doc_prompt: str) -> bool:
    """Whether a library that writes prompts makes our ids with the tokenizer `hf`."""
    s = tokenizer.settings
    queries = prompted(hf, PROBES, query_prompt, s.query_maxlen)
    passages = prompted(hf, PROBES, doc_prompt, s.doc_maxlen)
    return queries == ours(tokenizer, query=True) and passages == ours(tokenizer, query=False)


def unlike(where: str, library: str) -> UserError:
    """The error for a tokenizer whose ids would differ."""
    return UserError(
        f"its tokens would not be the same in {library} and here",
        where=where,
        expected="a tokenizer that puts one token before a text, one after it, and reads the markers as one token each",
    )


def write_tokenizer(tokenizer: ColBERTTokenizer, folder: Path, *, special: Iterable[str] = (), frame: bool) -> None:
    """The tokenizer as tokenizer.json with a configuration that transformers 4 and 5 both read.

    Args:
        special: tokens that are to be read as one token wherever they stand in a text.
        frame: let the tokenizer put its first and last special token itself, whatever it did before.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.processors import TemplateProcessing

    hf = tokenizer.hf
    backend = Tokenizer.from_str(hf.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    cls, sep = hf.convert_ids_to_tokens([tokenizer.cls_id, tokenizer.sep_id])
    if frame:
        backend.post_processor = TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0",
            pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
            special_tokens=[(cls, tokenizer.cls_id), (sep, tokenizer.sep_id)],
        )
    added = [AddedToken(token, normalized=False, special=True) for token in special]
    if added:
        backend.add_special_tokens(added)
    backend.save(str(folder / "tokenizer.json"))
    roles = {"pad_token": hf.convert_ids_to_tokens(tokenizer.pad_id), "unk_token": hf.unk_token}
    roles |= {"mask_token": hf.mask_token, "cls_token": cls, "sep_token": sep}
    roles = {role: token for role, token in roles.items() if token is not None}
    others = [t for t in [*(str(t) for t in hf.all_special_tokens), *special] if t not in roles.values()]
    settings = tokenizer.settings
    config = {
        **roles,
        "additional_special_tokens": list(dict.fromkeys(others)),
        "clean_up_tokenization_spaces": False,
        "model_input_names": list(hf.model_input_names),
        "model_max_length": max(settings.doc_maxlen, settings.query_maxlen),
        "padding_side": "right",
        "truncation_side": hf.truncation_side,
        # The file alone says how texts are read; a class of its own would put its defaults over that.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(roles, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, use_fast=True)


def with_padding_token(hf: Any, backbone: Any) -> Any:
    """PyLate saves [MASK] as the padding token; the encoder's own is put back, so that both can be told apart."""
    pad = getattr(backbone.config, "pad_token_id", None)
    if hf.pad_token_id is not None and hf.pad_token_id == hf.mask_token_id and isinstance(pad, int):
        token = hf.convert_ids_to_tokens(pad)
        if token is not None and pad != hf.mask_token_id:
            hf.pad_token = token
    return hf


def skip_words(tokenizer: ColBERTTokenizer) -> list[str]:
    """The tokens that give no passage embedding."""
    return [str(t) for t in tokenizer.hf.convert_ids_to_tokens([int(i) for i in tokenizer.skip_ids])]


def skip_settings(hf: Any, ids: Iterable[int]) -> dict[str, Any]:
    """The values of `mask_punctuation` and `skip_tokens` that skip exactly these ids."""
    wanted = sorted(set(ids))
    if not wanted:
        return {"mask_punctuation": False, "skip_tokens": None}
    if wanted == punctuation_ids(hf).tolist():
        return {"mask_punctuation": True, "skip_tokens": None}
    return {"mask_punctuation": False, "skip_tokens": tuple(str(t) for t in hf.convert_ids_to_tokens(wanted))}


def marker_in(hf: Any, prompt: str | None) -> str | None:
    """The vocabulary token that a prefix or prompt stands for, "" for none, None when it is no single token."""
    if not prompt or not prompt.strip():
        return ""
    vocabulary = hf.get_vocab()
    return next((t for t in (prompt, prompt.strip()) if t in vocabulary), None)
