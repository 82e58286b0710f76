"""Tokenisation of queries and passages for ColBERT: markers, [MASK] augmentation and tokens without an embedding.

Shapes: B queries, Q = query_maxlen rows a query, N passages.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ckd_ray.arrays import BoolArray, Int32Array
from ckd_ray.errors import UserError
from ckd_ray.model.settings import ColBERTSettings


class ColBERTTokenizer:
    """Wraps a fast `transformers` tokenizer.

    Attributes:
        skip_ids: ids that give no passage embedding: those of punctuation when `mask_punctuation` is on.
        special_token_ids: ids of special tokens and [unused*], which do not vote for a centroid's token (step 4 of
            method.md).
    """

    def __init__(self, tokenizer: Any, settings: ColBERTSettings) -> None:
        self.hf = tokenizer
        self.settings = settings
        self.cls_id = _first(tokenizer.cls_token_id, tokenizer.bos_token_id, what="[CLS] or beginning-of-text")
        self.sep_id = _first(tokenizer.sep_token_id, tokenizer.eos_token_id, what="[SEP] or end-of-text")
        self.mask_id = _first(tokenizer.mask_token_id, what="[MASK]")
        self.pad_id = _first(tokenizer.pad_token_id, what="[PAD]")
        self.query_marker_id = self._marker(settings.query_marker)
        self.doc_marker_id = self._marker(settings.doc_marker)
        self.skip_ids = self._skip_ids()
        unused = [i for token, i in tokenizer.get_vocab().items() if token.startswith("[unused")]
        markers = [i for i in (self.query_marker_id, self.doc_marker_id) if i is not None]
        marks = [self.mask_id, self.cls_id, self.sep_id, self.pad_id]
        self.special_token_ids = np.array(sorted({*tokenizer.all_special_ids, *unused, *markers, *marks}), np.int32)

    def _marker(self, token: str) -> int | None:
        if not token:
            return None
        found = self.hf.convert_tokens_to_ids(token)
        if found is None or found == self.hf.unk_token_id:
            raise UserError(f"the tokenizer has no marker token {token!r}", fix="add it to the vocabulary first")
        return int(found)

    def _skip_ids(self) -> Int32Array:
        tokens = self.settings.skip_tokens
        if tokens is not None:
            return np.array(sorted(self.hf.convert_tokens_to_ids(list(tokens))), np.int32)
        return punctuation_ids(self.hf) if self.settings.mask_punctuation else np.empty(0, np.int32)

    def framed(self, texts: Sequence[str], marker_id: int | None, maxlen: int) -> list[list[int]]:
        """Ids of [CLS] marker tokens [SEP], at most `maxlen` of them."""
        if not texts:
            return []
        head, tail = [self.cls_id] + ([] if marker_id is None else [marker_id]), [self.sep_id]
        encoded = self.hf(
            list(texts),
            add_special_tokens=False,
            truncation=True,
            max_length=maxlen - len(head) - 1,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return [head + ids + tail for ids in encoded["input_ids"]]

    def passages(self, texts: Sequence[str], maxlen: int | None = None) -> list[Int32Array]:
        """Ids of [CLS] [D] tokens [SEP] for every text, at most `doc_maxlen` of them, without padding.

        Args:
            maxlen: a smaller limit than `doc_maxlen`, for training.
        """
        limit = min(maxlen or self.settings.doc_maxlen, self.settings.doc_maxlen)
        return [np.array(ids, np.int32) for ids in self.framed(texts, self.doc_marker_id, limit)]

    def queries(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of [CLS] [Q] tokens [SEP] [MASK] ... and the attention mask, both int64 of shape (B, Q).

        The mask is 0 on the augmentation unless `attend_to_mask`; augmentation tokens give embeddings either way.
        """
        maxlen = self.settings.query_maxlen
        ids = np.full((len(texts), maxlen), self.mask_id, np.int64)
        attend = self.settings.attend_to_mask and self.settings.query_expansion
        mask = np.full((len(texts), maxlen), int(attend), np.int64)
        for row, full in enumerate(self.framed(texts, self.query_marker_id, maxlen)):
            ids[row, : len(full)] = full
            mask[row, : len(full)] = 1
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def pad(self, passages: Sequence[Int32Array], multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Stack ragged passages to (N, L): int64 ids padded with [PAD], and the attention mask.

        L is the longest passage, rounded up to `multiple` (a GPU prefers multiples of 8).
        """
        longest = max((len(p) for p in passages), default=1)
        width = -(-longest // multiple) * multiple
        ids = np.full((len(passages), width), self.pad_id, np.int64)
        mask = np.zeros((len(passages), width), np.int64)
        for row, passage in enumerate(passages):
            ids[row, : len(passage)] = passage
            mask[row, : len(passage)] = 1
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def keeps(self, token_ids: Int32Array) -> BoolArray:
        """True where a passage token gives an embedding: it is not in `skip_ids`."""
        return ~np.isin(token_ids, self.skip_ids)


def punctuation_ids(tokenizer: Any) -> Int32Array:
    """Sorted ids of the first tokens of all signs of `string.punctuation`."""
    ids = {i for c in string.punctuation for i in tokenizer.encode(c, add_special_tokens=False)[:1]}
    return np.array(sorted(ids), np.int32)


def _first(*candidates: int | None, what: str) -> int:
    found = next((candidate for candidate in candidates if candidate is not None), None)
    if found is None:
        raise UserError(f"the tokenizer has no {what} token", fix="choose an encoder trained with masked tokens (BERT)")
    return int(found)
