"""Models to and from other libraries: sentence-transformers, PyLate, colbert-ai, the published `.dnn`, bare encoders;
and to ONNX.

How scores relate, what each library cannot hold and which versions were tested: exchange.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ckd_ray import __version__
from ckd_ray.errors import UserError
from ckd_ray.model.colbert import ColBERT
from ckd_ray.model.exchange import colbert_ai, onnx_graph, published, pylate, sentence_transformers
from ckd_ray.model.exchange.detect import EXPORT_FILE, MODULES, Kind, encoder_folder, kind_of, read_list, write_json
from ckd_ray.model.settings import ColBERTSettings
from ckd_ray.model.sources import is_hub_id, resolve_backbone
from ckd_ray.progress import say

__all__ = ["EXPORT_FILE", "FORMATS", "Loaded", "load_any", "write_export"]

FORMATS: dict[str, Callable[[ColBERT, Path], list[str]]] = {
    "sentence-transformers": sentence_transformers.write,
    "pylate": pylate.write,
    "colbert": colbert_ai.write,
    "onnx": onnx_graph.write,
}
_READERS: dict[str, Callable[[Path, ColBERTSettings], ColBERT]] = {
    "sentence-transformers": sentence_transformers.read,
    "pylate": pylate.read,
    "colbert-ai": colbert_ai.read,
}


@dataclass(frozen=True)
class Loaded:
    """A model and what it was read from; the projection of a bare `encoder` is drawn at random."""

    model: ColBERT
    kind: Kind


def load_any(
    source: str,
    defaults: ColBERTSettings,
    *,
    encoder: str | None = None,
    seed: int = 0,
    dropout: float = 0.0,
    key: str = "model.backbone",
) -> Loaded:
    """Load whatever is accepted as `model.backbone` or `teacher.checkpoint`.

    Args:
        source: a folder or file, `package:NAME/FOLDER`, or a hub id, whose files are downloaded before they are looked
            at.
        defaults: settings for what the source does not say; a bare encoder says nothing.
        encoder: where the tokenizer and configuration of a `.dnn` file come from.
        seed, dropout: for the new projection and the layers of a bare encoder.
        key: the key of the configuration that names `source`, for messages.

    Raises:
        UserError: the source is not accepted, is broken, or has a setting without a counterpart in ckd-ray.
    """
    path = Path(resolve_backbone(source, key))
    if not path.exists():  # a URI, which transformers refuses
        return Loaded(ColBERT.from_backbone(source, defaults, seed=seed, dropout=dropout), "encoder")
    kind = kind_of(path)
    if kind == "ckd-ray":
        return Loaded(ColBERT.from_pretrained(path), kind)
    if kind == "published":
        return Loaded(published.read(path, defaults, encoder), kind)
    if kind == "encoder":
        folder = encoder_folder(path)
        _tell_of_encoder(source, path, key)
        bare = source if folder == path else str(folder)
        return Loaded(ColBERT.from_backbone(bare, defaults, seed=seed, dropout=dropout), kind)
    return Loaded(_READERS[kind](path, defaults), kind)


def _tell_of_encoder(source: str, path: Path, key: str) -> None:
    """Says what a bare encoder may lack of its model."""
    if (path / MODULES).is_file() and any(str(m.get("type", "")).endswith("Dense") for m in read_list(path / MODULES)):
        say(f"{key}: {source} has a Dense layer for its one vector a text, which is not used")
    from huggingface_hub import constants

    if is_hub_id(source) and constants.HF_HUB_OFFLINE:
        say(f"{key}: {source} is a bare encoder by the files in the hub's cache; HF_HUB_OFFLINE keeps others away")


def write_export(model: ColBERT, folder: str | Path, fmt: str) -> list[str]:
    """Write `model` into the empty `folder` so that the library of `fmt` loads it without code of ckd-ray.

    `FORMATS` has the formats; `onnx` is for onnxruntime and others that run such graphs.

    Returns:
        what differs there, as sentences.

    Raises:
        UserError: the format is unknown, or the library cannot hold a setting of this model.
    """
    if fmt not in FORMATS:
        raise UserError("unknown format", where="--format", expected=", ".join(FORMATS), found=fmt)
    folder = Path(folder)
    notes = FORMATS[fmt](model, folder)
    record = {"ckd_ray": __version__, "format": fmt, "settings": model.settings.to_dict(), "differences": notes}
    write_json(folder / EXPORT_FILE, record)
    return notes
