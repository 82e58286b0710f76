"""What a folder or file is, by the files that are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from ckd_ray.errors import UserError
from ckd_ray.model.colbert import is_checkpoint
from ckd_ray.runs.exports import EXPORT_FILE

Kind = Literal["ckd-ray", "sentence-transformers", "pylate", "colbert-ai", "published", "encoder"]

MODULES = "modules.json"
LIBRARY = "config_sentence_transformers.json"
METADATA = "artifact.metadata"
# Keys that PyLate writes into `LIBRARY`; `model_type` is not always among them.
_PYLATE_KEYS = {"query_prefix", "document_prefix", "do_query_expansion", "attend_to_expansion_tokens"}
ACCEPTED = (
    "a checkpoint of ckd-ray (colbert.json), a folder of sentence-transformers' MultiVectorEncoder or of PyLate "
    "(modules.json), of colbert-ai (artifact.metadata), a published .dnn file, or a transformers encoder (config.json)"
)


def kind_of(path: Path) -> Kind:
    """The kind of the model at `path`; UserError, with what was found, when it is none that is accepted."""
    if path.is_file():
        if path.suffix == ".dnn":
            return "published"
        raise UserError("this file is no model", where=str(path), expected=ACCEPTED, found=path.name)
    if is_checkpoint(path):
        return "ckd-ray"
    if (path / MODULES).is_file():
        return _of_modules(path)
    if not (path / "config.json").is_file():
        names = ", ".join(sorted(entry.name for entry in path.iterdir())[:12])
        raise UserError("no model in this folder", where=str(path), expected=ACCEPTED, found=names or "nothing")
    architectures = read_object(path / "config.json").get("architectures") or []
    return "colbert-ai" if (path / METADATA).is_file() or "HF_ColBERT" in architectures else "encoder"


def _of_modules(path: Path) -> Kind:
    library = read_object(path / LIBRARY, optional=True)
    types = [str(module.get("type", "")) for module in read_list(path / MODULES)]
    if library.get("model_type") == "MultiVectorEncoder":
        return "sentence-transformers"
    of_pylate = library.get("model_type") == "ColBERT" or _PYLATE_KEYS & library.keys()
    if of_pylate or any(name.startswith("pylate.") for name in types):
        return "pylate"
    return "encoder"  # a SentenceTransformer, which gives one vector a text: its transformer is an encoder like others


def exported_similarity(path: Path) -> Literal["l2", "cosine"] | None:
    """The similarity of the model that ckd-ray exported to `path`; None in folders that others made."""
    found = read_object(path / EXPORT_FILE, optional=True).get("settings", {}).get("similarity")
    return found if found in ("l2", "cosine") else None


def encoder_folder(path: Path) -> Path:
    """The folder of the transformer: `path`, or the subfolder that modules.json names."""
    if not (path / MODULES).is_file():
        return path
    for module in read_list(path / MODULES):
        if str(module.get("type", "")).endswith("Transformer"):
            return inside(path, str(module.get("path", "")))
    return path


def inside(folder: Path, part: str) -> Path:
    """`folder`/`part`; UserError when that leads out of the folder."""
    target = (folder / part).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise UserError("a module lies outside of the model's folder", where=str(folder / MODULES), found=part)
    return target


def read_object(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in a file; empty when the file is missing and `optional`."""
    if optional and not path.is_file():
        return {}
    value = _read(path)
    if not isinstance(value, dict):
        raise UserError("not a JSON object", where=str(path), found=type(value).__name__)
    return value


def read_list(path: Path) -> list[dict[str, Any]]:
    """The JSON list of objects in a file."""
    value = _read(path)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError("not a JSON list of objects", where=str(path), found=type(value).__name__)
    return value


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError("a file of the model is missing", where=str(path), expected=path.name) from error
    except (ValueError, RecursionError) as error:
        raise UserError("not valid JSON", where=str(path), found=str(error)) from error


def write_json(path: Path, value: Any) -> None:
    """Indented JSON; makes the folder."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
