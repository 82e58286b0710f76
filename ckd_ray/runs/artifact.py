"""An artifact: a folder of a run with a `_manifest.json`, made by one step, kept while its fingerprint holds.

While it is being made, the folder holds `_making.json` with the fingerprint instead. By this file, a stopped step finds
its half-made folder and resumes in it; a folder of other settings or inputs is removed first.

The manifest names every file with its bytes and its SHA-256. Every command compares the sizes; before a stage reads the
files, their contents are verified too (`remove_altered`). The files of a store have checksums of their own
(store/shard.py), which are verified whenever a passage is read.

Other programs that read a folder of Parquet files pass over names that begin with `_`. Schemas 1 and 2 of the run
directory (`record.py`) had the names without it, and these are still read.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ckd_ray.errors import JobError, UserError
from ckd_ray.files import (
    check_inside,
    delete,
    delete_inside,
    exists,
    file_sizes,
    first_present,
    join,
    make_folder,
    read_object,
    remove_stale,
    write_json_atomic,
)
from ckd_ray.progress import say
from ckd_ray.runs.digests import digests_of
from ckd_ray.runs.fingerprint import fingerprint as combined_fingerprint

MANIFEST, MAKING = "_manifest.json", "_making.json"
# The names in a run of an earlier version. A token store still uses the former name for its own manifest.
_FORMER = {MANIFEST: "manifest.json", MAKING: "making.json"}
SCHEMA_VERSION = 1
# The key of the fingerprint in both files. (`fingerprint` in a manifest is that of the contents, where the step that
# wrote them has one.)
_FINGERPRINT = "made_of"
# Files beside the weights of a training: no stage reads them, so damage to them is no reason to train again.
_NOT_READ = ("metrics.jsonl", "training.json", "tensorboard/", "last/")


def is_finished(uri: str) -> bool:
    """True when the artifact has a manifest."""
    return exists(manifest_file(uri))


def manifest_file(uri: str) -> str:
    """Where the manifest of an artifact is, or would be."""
    return _present(uri, MANIFEST)


def manifest_of(uri: str) -> dict[str, Any] | None:
    """The manifest of a finished artifact, else None."""
    for name in (MANIFEST, _FORMER[MANIFEST]):
        with suppress(FileNotFoundError):
            return read_object(join(uri, name))
    return None


def remove_manifest(uri: str) -> None:
    """Make an artifact unfinished; its files stay."""
    _remove(uri, MANIFEST)


def _present(uri: str, name: str) -> str:
    """The path of `MANIFEST` or `MAKING` in a folder, under its name or its former one."""
    return first_present(join(uri, name), join(uri, _FORMER[name]))


def _remove(uri: str, name: str) -> None:
    for one in (name, _FORMER[name]):
        delete(join(uri, one))


def fingerprint_of(uri: str) -> str | None:
    """What a finished artifact was made of; None when it is not finished."""
    return (manifest_of(uri) or {}).get(_FINGERPRINT)


def making_of(uri: str) -> str | None:
    """What a half-made artifact is made of; None when nothing is being made there."""
    path = _present(uri, MAKING)
    return read_object(path).get(_FINGERPRINT) if exists(path) else None


def content_fingerprint(uri: str) -> str | None:
    """The fingerprint of the contents of a finished artifact, where its manifest has one (the corpus, a store)."""
    return (manifest_of(uri) or {}).get("fingerprint")


def seconds_of(uri: str) -> float:
    """How long a finished artifact took to make; 0 where its manifest does not say."""
    return float((manifest_of(uri) or {}).get("seconds", 0.0))


def is_made(uri: str, fingerprint: str) -> bool:
    """True when the artifact is finished, of this fingerprint, and no file it names is missing or of another size."""
    manifest = manifest_of(uri)
    return manifest is not None and manifest.get(_FINGERPRINT) == fingerprint and not _damaged(uri, manifest)


def remove_altered(uri: str) -> list[str]:
    """Verify the files of a finished artifact; name, and remove, those that are not what its manifest says.

    Returns:
        their names, with those that are missing or of another size. Where a manifest has no checksums (that of a store,
        or of an earlier version), the sizes alone are compared.
    """
    manifest = manifest_of(uri)
    if manifest is None:
        return []
    damaged = _damaged(uri, manifest)
    known = {e["name"]: str(e["sha256"]) for e in manifest.get("files", []) if "sha256" in e}
    present = {name: size for name, size in _named(uri, manifest) if name in known and name not in damaged}
    altered = {name: present[name] for name, digest in digests_of(uri, present).items() if digest != known[name]}
    # A file is read twice before it is removed: the first read itself may have gone wrong.
    altered = {name: size for name, size in altered.items() if digests_of(uri, {name: size})[name] != known[name]}
    for name in altered:
        say(f"{join(uri, name)}: its bytes do not match its checksum; it is made again")
        delete_inside(uri, name)
    return [*damaged, *altered]


def _damaged(uri: str, manifest: dict[str, Any]) -> list[str]:
    """Names of the files in the manifest that are missing or of another size; one listing, however many there are."""
    sizes = {entry["name"]: entry["bytes"] for entry in _files(uri)}
    return [name for name, size in _named(uri, manifest) if sizes.get(name) != size]


def _named(uri: str, manifest: dict[str, Any]) -> list[tuple[str, int]]:
    """Names and bytes of the files in a manifest. A damaged file is deleted, so no name may lead out of the folder."""
    entries, where = manifest.get("files", []), manifest_file(uri)
    try:
        named = [(str(entry["name"]), int(entry["bytes"])) for entry in entries]
    except (TypeError, KeyError, ValueError) as error:
        fix = "delete it, and the same command makes what is missing again"
        raise UserError("its list of files is damaged", where=where, found=str(error), fix=fix) from error
    check_inside((name for name, _ in named), where)
    return named


def make(
    uri: str,
    fingerprint: str,
    work: Callable[[], dict[str, Any] | None],
    *,
    replace_atomically: bool = False,
    digests: bool = True,
) -> bool:
    """Run `work` unless the artifact is there. Returns whether it ran. What killed writers have left is removed first.

    Args:
        work: writes into the folder and returns what goes into the manifest besides the fingerprint and the list of
            files. When it writes a manifest of its own (as the token store does), that one is extended.
        replace_atomically: `work` puts a new folder in the place of the former one, all at once. The former one stays
            until then, so a collection that cannot be read any more, or a training that is stopped, loses nothing.
        digests: the manifest has checksums, for which all files are read again; else sizes alone.
    """
    if is_made(uri, fingerprint):
        return False
    remove_stale(uri)
    resumed = _can_resume(uri, fingerprint)
    if not replace_atomically:
        if not resumed:
            delete(uri)
        make_folder(uri)
        write_json_atomic(join(uri, MAKING), {_FINGERPRINT: fingerprint})
        _remove(uri, MANIFEST)
    extra = work() or {}
    own = manifest_of(uri) or {}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint,
        **own,
        **extra,
        _FINGERPRINT: fingerprint,
        "files": own.get("files") or (_with_digests(uri, _files(uri)) if digests else _files(uri)),
    }
    write_json_atomic(join(uri, MANIFEST), manifest)
    _remove(uri, MAKING)
    delete(join(uri, _FORMER[MANIFEST]))
    return True


def reopen(uri: str) -> None:
    """Make a finished artifact half made, so that `make` adds further files to it and keeps those that are there."""
    manifest = manifest_of(uri)
    if manifest is not None:
        write_json_atomic(join(uri, MAKING), {_FINGERPRINT: manifest.get(_FINGERPRINT)})
        _remove(uri, MANIFEST)


def identity_of(uri: str) -> str:
    """What later stages depend on: what a finished artifact was made of, and the weights that came of it, since a
    training need not give the same weights again (on a GPU, or with other versions of the libraries).

    Raises:
        JobError: it is not finished.
    """
    manifest = manifest_of(uri)
    if manifest is None:
        raise JobError(f"{uri} is not finished")
    files = manifest.get("files", [])
    weights = {e["name"]: e["sha256"] for e in files if e["name"].endswith(".safetensors") and "sha256" in e}
    made_of = str(manifest[_FINGERPRINT])
    return combined_fingerprint(made_of=made_of, weights=weights) if weights else made_of


def is_of(uri: str, role: str, model: str) -> bool:
    """Whether a finished artifact was made with the model that is at `model` now, as far as its manifest says.

    Args:
        role: `teacher` or `student`.
    """
    known = ((manifest_of(uri) or {}).get("figures") or {}).get(role)
    return known is None or (manifest_of(model) is not None and known == identity_of(model))


def _can_resume(uri: str, fingerprint: str) -> bool:
    """True when the folder's contents are of this fingerprint: half made, or finished and damaged since."""
    making, manifest = _present(uri, MAKING), manifest_of(uri)
    known = read_object(making) if exists(making) else manifest
    if known is None or known.get(_FINGERPRINT) != fingerprint:
        return False
    for name in _damaged(uri, manifest) if manifest else ():
        say(f"{join(uri, name)}: missing or of another size; it is made again")
        delete_inside(uri, name)
    return True


def _files(uri: str) -> list[dict[str, Any]]:
    """Every file below the folder, by its path in it, with its bytes."""
    skipped = {*_FORMER, *_FORMER.values()}
    return [{"name": n, "bytes": size} for n, size in file_sizes(uri).items() if n not in skipped]


def _with_digests(uri: str, files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of a manifest with SHA-256, but for files of stores inside the folder, and for those not read."""
    own = "/manifest.json"  # of a store (store/writing.py)
    stores = tuple(e["name"].removesuffix(own[1:]) for e in files if e["name"].endswith(own))
    digests = digests_of(uri, {e["name"]: e["bytes"] for e in files if not e["name"].startswith(stores + _NOT_READ)})
    return [e | {"sha256": digests[e["name"]]} if e["name"] in digests else e for e in files]
