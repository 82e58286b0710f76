"""Any `transformers` sequence classifier as a cross-encoder: one score for a (query, passage) pair. Pure torch.

Shapes: P pairs, T tokens of all pairs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ckd_ray.arrays import Float32Array, Int32Array, Int64Array
from ckd_ray.errors import UserError, first_line
from ckd_ray.model.encoder import Precision, computing
from ckd_ray.model.length_buckets import each_batch
from ckd_ray.model.sources import most_tokens, refuse_remote_code, resolve_backbone, silent_transformers

_KEY = "cross_encoder.model"


@dataclass(frozen=True)
class Pairs:
    """Tokenised pairs, flat: token_ids and token_types (T,) int32, lengths (P,) int32."""

    token_ids: Int32Array
    token_types: Int32Array
    lengths: Int32Array


class PairTokenizer:
    """Tokenises pairs in the form of the model's training, at most `maxlen` tokens; the longer text is cut first.

    Raises:
        UserError: the source has no fast tokenizer, it has no padding token, or `maxlen` is too long for the model.
    """

    def __init__(self, source: str, maxlen: int) -> None:
        from transformers import AutoTokenizer

        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        folder = _folder(source)
        self.hf: Any = _loaded(source, AutoTokenizer, folder, use_fast=True)
        self.maxlen = maxlen
        if self.hf.pad_token_id is None:
            raise UserError("the tokenizer has no padding token", where=_KEY, found=source)
        room = _most_tokens(source, folder)
        if room is not None and room < maxlen:
            raise UserError(
                f"{source} holds {room} tokens at most",
                where="cross_encoder.maxlen",
                expected=f"at most {room}",
                found=str(maxlen),
            )

    def __call__(self, queries: Sequence[str], passages: Sequence[str]) -> Pairs:
        """Pair i is (queries[i], passages[i])."""
        if not queries:
            return Pairs(*(np.empty(0, np.int32) for _ in range(3)))
        encoded = self.hf(
            list(queries),
            list(passages),
            truncation="longest_first",
            max_length=self.maxlen,
            return_attention_mask=False,
            return_token_type_ids=True,
        )
        ids = encoded["input_ids"]
        lengths = np.array([len(row) for row in ids], np.int32)
        types = encoded.get("token_type_ids") or [[0] * len(row) for row in ids]
        token_ids, token_types = (np.concatenate([np.array(row, np.int32) for row in rows]) for rows in (ids, types))
        return Pairs(token_ids, token_types, lengths)


class PairClassifier:
    """A loaded model that scores pairs.

    With one label the score is the logit. With two labels it is the log-odds of the second, by convention *relevant*:
    logit[1] - logit[0] = ln p / (1 - p). Both have the scale of a logit, so one `distill.temperature` fits both.

    Args:
        token_budget: padded tokens of a batch; bounds the activations' memory.
        precision: `fp32`, or `bf16` or `fp16` (autocast of the encoder; the head is computed in float32).

    Raises:
        UserError: the source cannot be loaded as a sequence classifier, or has another number of labels.
    """

    def __init__(
        self,
        source: str,
        *,
        device: torch.device | str = "cpu",
        token_budget: int = 16384,
        precision: Precision = "fp32",
    ) -> None:
        from transformers import AutoTokenizer

        folder = _folder(source)
        self.device, self.token_budget = torch.device(device), token_budget
        self.precision: Precision = precision
        self.model = _classifier(source, folder).to(self.device).eval()
        _keep_head_exact(self.model, self.device)
        tokenizer = _loaded(source, AutoTokenizer, folder, use_fast=True)
        self._pad_id = int(tokenizer.pad_token_id or 0)
        self._left = tokenizer.padding_side == "left"
        if self.model.config.pad_token_id is None:  # decoders find the last token of a row by it
            self.model.config.pad_token_id = self._pad_id
        self._takes_types = "token_type_ids" in tokenizer.model_input_names

    @torch.inference_mode()
    def score(self, pairs: Pairs) -> Float32Array:
        """(P,) scores, in the order of the pairs; batches hold pairs of similar length."""
        out = np.empty(len(pairs.lengths), np.float32)
        ends = np.cumsum(pairs.lengths, dtype=np.int64)
        multiple = 8 if self.device.type == "cuda" else 1

        def score(batch: Int32Array) -> None:
            inputs = self._inputs(pairs, ends, batch, multiple)
            with computing(self.device, self.precision):
                logits = self.model(**inputs).logits
            logits = logits.float()
            scores = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
            out[batch] = scores.cpu().numpy()

        self.token_budget = each_batch(pairs.lengths, self.token_budget, multiple, score)
        return out

    def _inputs(self, pairs: Pairs, ends: Int64Array, batch: Int32Array, multiple: int) -> dict[str, torch.Tensor]:
        width = -(-int(pairs.lengths[batch].max(initial=1)) // multiple) * multiple
        ids = np.full((len(batch), width), self._pad_id, np.int64)
        types, mask = np.zeros_like(ids), np.zeros_like(ids)
        for row, pair in enumerate(batch.tolist()):
            length = int(pairs.lengths[pair])
            place = slice(width - length, width) if self._left else slice(0, length)
            tokens = slice(int(ends[pair]) - length, int(ends[pair]))
            ids[row, place], types[row, place], mask[row, place] = pairs.token_ids[tokens], pairs.token_types[tokens], 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._takes_types:
            inputs["token_type_ids"] = types
        return {name: torch.from_numpy(values).to(self.device) for name, values in inputs.items()}


def _keep_head_exact(model: Any, device: torch.device) -> None:
    """Compute the layers above the encoder in float32, even under autocast. bfloat16 logits of 8 and more have steps of
    1/16, so passages would tie."""
    encoder = model.base_model
    head = [module for module in model.children() if module is not encoder]
    for module in [*head, getattr(encoder, "pooler", None)]:
        if module is not None and encoder is not model:
            module.forward = _exactly(module.forward, device.type)


def _exactly(forward: Callable[..., Any], device: str) -> Callable[..., Any]:
    def full(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    @functools.wraps(forward)
    def exact(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return forward(*map(full, args), **{name: full(value) for name, value in kwargs.items()})

    return exact


def absolute_folder(source: str) -> str:
    """The absolute path of a local folder, for processes with another working directory; any other source unchanged."""
    path = os.path.expanduser(source)
    return os.path.abspath(path) if os.path.isdir(path) else source


def _folder(source: str) -> str:
    try:
        return resolve_backbone(source)
    except UserError as error:
        raise UserError(error.problem, where=_KEY, expected=error.expected, found=error.found, fix=error.fix) from error


def _loaded(source: str, kind: Any, folder: str, **options: Any) -> Any:
    """`kind.from_pretrained` with our error messages. Code that comes with a model is never run."""
    try:
        with silent_transformers():
            return kind.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:  # broken files make transformers, tokenizers and torch raise errors of any kind
        refuse_remote_code(error, f"{_KEY} {source}")
        raise UserError(
            "the cross-encoder cannot be loaded",
            where=_KEY,
            expected=f"a folder or hub id that transformers' {kind.__name__} reads",
            found=f"{source}: {first_line(error)}",
        ) from error


def _most_tokens(source: str, folder: str) -> int | None:
    """How many tokens the model takes, by its shapes alone; None if it has no limit, or cannot be built."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config: Any = _loaded(source, AutoConfig, folder)
    try:
        with torch.device("meta"):
            return most_tokens(AutoModelForSequenceClassification.from_config(config).base_model)
    except Exception:  # no classifier: `_classifier` says what is wrong
        return None


def _classifier(source: str, folder: str) -> Any:
    from transformers import AutoModelForSequenceClassification

    model, report = _loaded(
        source, AutoModelForSequenceClassification, folder, output_loading_info=True, dtype=torch.float32
    )
    missing = sorted(report["missing_keys"])
    if missing:  # a bare encoder: transformers would give it a head of random numbers
        raise UserError(
            "this model is not a trained classifier",
            where=_KEY,
            expected="a sequence classifier with all its weights, such as cross-encoder/ms-marco-MiniLM-L6-v2",
            found=f"{source}, without {', '.join(missing[:3])}",
        )
    if model.config.num_labels not in (1, 2):
        raise UserError(
            "this classifier gives no score of relevance",
            where=_KEY,
            expected="1 label (its logit is the score) or 2 (the log-odds of the second)",
            found=f"{model.config.num_labels} labels",
        )
    return model
