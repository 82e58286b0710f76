"""Tokens as the other libraries make them, and the check that their ids are ours.

The others let the tokenizer put [CLS] and [SEP], and then insert the marker as the second token (PyLate, colbert-ai) or
write it before the text (sentence-transformers). ckd-ray frames the ids itself. For the tokenizers of BERT and its like
the results are the same; every import and export checks that they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ckd_ray.errors import UserError
from ckd_ray.model.colbert import read_tokenizer
from ckd_ray.model.exchange.detect import write_json
from ckd_ray.model.tokenizer import ColBERTTokenizer, punctuation_ids

# Case, punctuation, digits, other scripts, an unknown sign, the empty text, and more than any model holds.
_PROBES = (
    "what is late interaction?",
    'ColBERT (2020): one vector a token - not one a text; see e.g. "Khattab & Zaharia"!',
    "3.14 µg/l of naïve Größe 東京 🙂",
    "",
    "word " * 9000,
)


def _frames(tokenizer: ColBERTTokenizer) -> tuple[tuple[int | None, int], tuple[int | None, int]]:
    """(marker id, most tokens) of queries and of passages."""
    settings = tokenizer.settings
    return (tokenizer.query_marker_id, settings.query_maxlen), (tokenizer.doc_marker_id, settings.doc_maxlen)


def _inserted_as_ours(hf: Any, tokenizer: ColBERTTokenizer) -> bool:
    for marker, maxlen in _frames(tokenizer):
        inserted = [] if marker is None else [marker]
        rows = hf(list(_PROBES), truncation=True, max_length=maxlen - len(inserted))["input_ids"]
        if [[*ids[:1], *inserted, *ids[1:]] for ids in rows] != tokenizer.framed(_PROBES, marker, maxlen):
            return False
    return True


def check_inserted(hf: Any, tokenizer: ColBERTTokenizer, where: str, library: str) -> None:
    """Raises UserError unless `library`, which inserts the marker as second token, makes our ids with `hf`."""
    if not _inserted_as_ours(hf, tokenizer):
        raise unlike(where, library)


def prompted_as_ours(hf: Any, tokenizer: ColBERTTokenizer, query_prompt: str, doc_prompt: str) -> bool:
    """Whether a library that writes a prompt before the text makes our ids with the tokenizer `hf`."""
    for prompt, (marker, maxlen) in zip((query_prompt, doc_prompt), _frames(tokenizer), strict=True):
        rows = hf([prompt + text for text in _PROBES], truncation=True, max_length=maxlen)["input_ids"]
        if [list(ids) for ids in rows] != tokenizer.framed(_PROBES, marker, maxlen):
            return False
    return True


def unlike(where: str, library: str) -> UserError:
    """The error for a tokenizer whose ids would differ."""
    return UserError(
        f"its tokens would not be the same in {library} and here",
        where=where,
        expected="a tokenizer that puts one token before a text, one after it, and reads the markers as one token each",
    )


def write_inserting_tokenizer(tokenizer: ColBERTTokenizer, folder: Path, where: str, library: str) -> None:
    """Write the tokenizer for a `library` that inserts the marker as second token; UserError when its ids differ."""
    for frame in (False, True):
        write_tokenizer(tokenizer, folder, frame=frame)
        if _inserted_as_ours(read_tokenizer(folder), tokenizer):
            return
    raise unlike(where, library)


def write_plain_tokenizer(tokenizer: ColBERTTokenizer, folder: Path, where: str, library: str) -> None:
    """Write the tokenizer for a `library` that puts all special tokens itself; UserError when its ids differ."""
    from tokenizers import Tokenizer

    write_tokenizer(tokenizer, folder, frame=False)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for marker, maxlen in _frames(tokenizer):
        head = [tokenizer.cls_id] + ([] if marker is None else [marker])
        rows = [plain.encode(text, add_special_tokens=False).ids[: maxlen - len(head) - 1] for text in _PROBES]
        if [head + ids + [tokenizer.sep_id] for ids in rows] != tokenizer.framed(_PROBES, marker, maxlen):
            raise unlike(where, library)


def write_tokenizer(tokenizer: ColBERTTokenizer, folder: Path, *, special: Iterable[str] = (), frame: bool) -> None:
    """Write the tokenizer as tokenizer.json, with a configuration that transformers 4 and 5 both read.

    Args:
        special: tokens that are to be read as one token wherever they stand in a text.
        frame: let the tokenizer put its first and last special token itself, whatever it did before.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.processors import TemplateProcessing

    hf, settings = tokenizer.hf, tokenizer.settings
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
    config = {
        **roles,
        "additional_special_tokens": list(dict.fromkeys(others)),
        "clean_up_tokenization_spaces": False,
        "model_input_names": list(hf.model_input_names),
        "model_max_length": max(settings.doc_maxlen, settings.query_maxlen),
        "padding_side": "right",
        "truncation_side": hf.truncation_side,
        # tokenizer.json alone says how texts are read; a class of its own would put its defaults over that.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", roles)


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
    punctuation = bool(wanted) and wanted == punctuation_ids(hf).tolist()
    others = None if punctuation or not wanted else tuple(str(t) for t in hf.convert_ids_to_tokens(wanted))
    return {"mask_punctuation": punctuation, "skip_tokens": others}
