"""The model as an ONNX graph, for runtimes without torch.

`model.onnx` takes `input_ids` and `attention_mask`, int64 (batch, length), and gives `rows`, float32 (batch, length,
dim): a unit row a token. `encoding.json` says how a text becomes token ids, and which rows count; `tokenizer.json` is
read by the package tokenizers. The model card has the code that puts the three together.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ckd_ray.errors import UserError
from ckd_ray.model.colbert import ColBERT
from ckd_ray.model.exchange import tokens
from ckd_ray.model.exchange.detect import write_json

GRAPH = "model.onnx"
ENCODING = "encoding.json"
TOLERANCE = 1e-4  # of a component of a unit row, between torch and onnxruntime
_ONE_FILE = 1_800_000_000  # bytes of weights; a protobuf message holds less than 2 GiB


class _Rows(nn.Module):
    """`ColBERT.rows` with the names of the graph's inputs."""

    def __init__(self, model: ColBERT) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.rows(input_ids, attention_mask)


def write(model: ColBERT, folder: Path) -> list[str]:
    """Write `model` as a graph into the empty `folder`, and compare the graph's rows with the model's.

    Raises:
        UserError: the packages of the extra `onnx` are missing, torch cannot make a graph of this encoder, the graph's
            rows differ by more than `TOLERANCE`, or the package tokenizers reads texts in another way.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx needs it
    except ImportError as error:
        fix = "pip install 'ckd-ray[onnx]'"
        raise UserError("packages for ONNX are missing", where="--format onnx", found=str(error), fix=fix) from error
    tokens.write_plain_tokenizer(model.tokenizer, folder, "--format onnx", "the package tokenizers")
    write_json(folder / ENCODING, _encoding(model))
    model = model.cpu().eval()
    graph = _Rows(model)
    _write_graph(graph, model, folder / GRAPH)
    session = onnxruntime.InferenceSession(str(folder / GRAPH), providers=["CPUExecutionProvider"])
    for ids, mask, counts in _probes(model):
        with torch.no_grad():
            expected = graph(ids, mask).numpy()
        (found,) = session.run(["rows"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        difference = float(np.abs(found - expected)[counts.numpy()].max())
        if not difference <= TOLERANCE:
            raise UserError(
                "the rows of the ONNX graph differ from those of the model",
                where="--format onnx",
                expected=f"at most {TOLERANCE} a component",
                found=f"{difference:.2g} for {ids.shape[0]} texts of {ids.shape[1]} tokens",
            )
    return []


def _probes(model: ColBERT) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Token ids, attention mask and which rows count, (batch, length) each: a query of one token, then passages."""
    ids, mask = model.tokenizer.queries(["a"])
    yield ids, mask, torch.ones_like(mask, dtype=torch.bool) if model.settings.query_expansion else mask.bool()
    ids, mask = _sample(model, 3, model.settings.doc_maxlen)
    yield ids, mask, mask.bool()


def _encoding(model: ColBERT) -> dict[str, object]:
    """How texts become token ids, for queries and for passages.

    `before` and `after` are the ids around the text's own, which is cut so that all fit `maxlen`. `fill` is the id that
    fills a query up to `maxlen` (null: nothing does), and `attend_to_fill` its attention mask. Tokens in `skip` give no
    row.
    """
    s, t = model.settings, model.tokenizer

    def frame(marker: int | None, maxlen: int) -> dict[str, object]:
        before = [t.cls_id] if marker is None else [t.cls_id, marker]
        return {"before": before, "after": [t.sep_id], "maxlen": maxlen}

    query = {**frame(t.query_marker_id, s.query_maxlen), "fill": t.mask_id if s.query_expansion else None}
    query |= {"attend_to_fill": s.attend_to_mask, "skip": []}
    passage = {**frame(t.doc_marker_id, s.doc_maxlen), "fill": None, "attend_to_fill": False}
    passage["skip"] = t.skip_ids.tolist()
    return {"query": query, "passage": passage}


def _sample(model: ColBERT, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Random token ids and an attention mask, int64 (batch, length), whose last text is half as long."""
    ordinary = sorted(set(model.tokenizer.hf.get_vocab().values()) - set(model.tokenizer.special_token_ids.tolist()))
    ids = torch.from_numpy(np.random.default_rng(0).choice(ordinary, (batch, length)))
    mask = torch.ones_like(ids)
    ids[-1, length // 2 :], mask[-1, length // 2 :] = model.tokenizer.pad_id, 0
    return ids, mask


def _write_graph(graph: nn.Module, model: ColBERT, path: Path) -> None:
    ids, mask = _sample(model, 2, 8)
    size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                graph,
                (ids, mask),
                path,
                input_names=["input_ids", "attention_mask"],
                output_names=["rows"],
                dynamic_shapes={"input_ids": size, "attention_mask": size},
                dynamo=True,
                external_data=weights > _ONE_FILE,
                verbose=False,
            )
    except Exception as error:  # torch.export raises errors of many classes for code that it cannot trace
        name = type(model.backbone).__name__
        raise UserError(
            "torch cannot make an ONNX graph of this encoder", where="--format onnx", found=f"{name}: {error}"[:300]
        ) from error
