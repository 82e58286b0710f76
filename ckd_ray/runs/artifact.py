"""An artefact: a folder of a run with a `manifest.json`, made by one step, kept while its fingerprint holds.

While it is being made, the folder holds `making.json` with the fingerprint instead. A stopped step finds its own
half-made folder by that and goes on in it; a folder made of other settings or inputs is removed first.

The manifest names every file with its bytes and its SHA-256. Sizes are looked at by every command, contents before a
stage reads them (`remove_altered`). The files of a store have checksums of their own (store/shard.py), looked at
whenever a passage is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow.fs as pafs

from ckd_ray.errors import JobError, UserError
from ckd_ray.files import (
    check_inside,
    delete,
    delete_inside,
    exists,
    filesystem_of,
    join,
    make_folder,
    read_object,
    remove_stale,
    write_json_atomic,
)
from ckd_ray.progress import say
from ckd_ray.runs.digests import digests_of
from ckd_ray.runs.fingerprint import fingerprint

MANIFEST, MAKING = "manifest.json", "making.json"
SCHEMA_VERSION = 1
# Beside the weights of a training: no stage reads them, so a bit of theirs is no reason to train again.
_FOR_PEOPLE = ("metrics.jsonl", "training.json", "tensorboard/", "last/")


def manifest_of(uri: str) -> dict[str, Any] | None:
    """The manifest of a finished artefact, else None."""
    path = join(uri, MANIFEST)
    return read_object(path) if exists(path) else None


def is_made(uri: str, fingerprint: str) -> bool:
    """True when the artefact is finished, of this fingerprint, and no file it names is missing or of another size."""
    manifest = manifest_of(uri)
    return manifest is not None and manifest.get("made_of") == fingerprint and not _damaged(uri, manifest)


def remove_altered(uri: str) -> list[str]:
    """Read the files of a finished artefact through; name, and remove, those that are not what its manifest says.

    Returns:
        their names, with those that are missing or of another size. A manifest without checksums (of a store, or
        written by an earlier version) vouches for sizes alone.
    """
    manifest = manifest_of(uri)
    if manifest is None:
        return []
    damaged = _damaged(uri, manifest)
    known = {e["name"]: str(e["sha256"]) for e in manifest.get("files", []) if "sha256" in e}
    whole = {name: size for name, size in _named(uri, manifest) if name in known and name not in damaged}
    altered = {name: whole[name] for name, digest in digests_of(uri, whole).items() if digest != known[name]}
    # Once more before anything is lost: a read that went wrong is no file that is wrong.
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
    """Names and bytes of the files in a manifest. A damaged one is removed for good, so none may lie elsewhere."""
    entries, where = manifest.get("files", []), join(uri, MANIFEST)
    try:
        named = [(str(entry["name"]), int(entry["bytes"])) for entry in entries]
    except (TypeError, KeyError, ValueError) as error:
        fix = "delete it, and the same command makes what is missing again"
        raise UserError("its list of files is damaged", where=where, found=str(error), fix=fix) from error
    check_inside((name for name, _ in named), where)
    return named


def make(uri: str, fingerprint: str, work: Callable[[], dict[str, Any] | None], *, whole: bool = False) -> bool:
    """Run `work` unless the artefact is there. Returns whether it ran. What killed writers have left is removed first.

    Args:
        work: writes into the folder and returns what is to stand in the manifest besides the fingerprint and the list
            of files. When it writes a manifest of its own (the token store does), that one is extended.
        whole: it puts a new folder in the place of the former one, all at once. Then that one stays until it does: a
            collection that cannot be read any more, or a training that is stopped, takes nothing away.
    """
    if is_made(uri, fingerprint):
        return False
    remove_stale(uri)
    kept = _go_on(uri, fingerprint)
    if not whole:
        if not kept:
            delete(uri)
        make_folder(uri)
        write_json_atomic(join(uri, MAKING), {"made_of": fingerprint})
        delete(join(uri, MANIFEST))
    extra = work() or {}
    own = manifest_of(uri) or {}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint,
        **own,
        **extra,
        "made_of": fingerprint,
        "files": own.get("files") or _with_digests(uri, _files(uri)),
    }
    write_json_atomic(join(uri, MANIFEST), manifest)
    delete(join(uri, MAKING))
    return True


def reopen(uri: str) -> None:
    """A finished artefact is to get further files: `make` then goes on in it, and keeps what is there."""
    manifest = manifest_of(uri)
    if manifest is not None:
        write_json_atomic(join(uri, MAKING), {"made_of": manifest.get("made_of")})
        delete(join(uri, MANIFEST))


def identity_of(uri: str) -> str:
    """What follows from a finished artefact depends on this: how it was made, and the weights that came of it. A
    training need not give the same ones again (on a GPU, or with other versions of the libraries).

    Raises:
        JobError: it is not finished.
    """
    manifest = manifest_of(uri)
    if manifest is None:
        raise JobError(f"{uri} is not finished")
    files = manifest.get("files", [])
    weights = {e["name"]: e["sha256"] for e in files if e["name"].endswith(".safetensors") and "sha256" in e}
    made_of = str(manifest["made_of"])
    return fingerprint(made_of=made_of, weights=weights) if weights else made_of


def is_of(uri: str, role: str, model: str) -> bool:
    """Whether a finished artefact was made with the model that is at `model` now, as far as its manifest tells.

    Args:
        role: `teacher` or `student`.
    """
    known = ((manifest_of(uri) or {}).get("figures") or {}).get(role)
    return known is None or (manifest_of(model) is not None and known == identity_of(model))


def _go_on(uri: str, fingerprint: str) -> bool:
    """True when the folder's contents are of this fingerprint: half made, or finished and damaged since."""
    making, manifest = join(uri, MAKING), manifest_of(uri)
    known = read_object(making) if exists(making) else manifest
    if known is None or known.get("made_of") != fingerprint:
        return False
    for name in _damaged(uri, manifest) if manifest else ():
        say(f"{join(uri, name)}: missing or of another size; it is made again")
        delete_inside(uri, name)
    return True


def _files(uri: str) -> list[dict[str, Any]]:
    """Every file below the folder, by its path in it, with its bytes."""
    fs, path = filesystem_of(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
    found = [(i.path[len(path.rstrip("/")) + 1 :], int(i.size)) for i in infos if i.type == pafs.FileType.File]
    skipped = (MANIFEST, MAKING)
    return [{"name": n, "bytes": size} for n, size in sorted(found) if n not in skipped]


def _with_digests(uri: str, files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    stores = tuple(e["name"].removesuffix(MANIFEST) for e in files if e["name"].endswith("/" + MANIFEST))
    digests = digests_of(uri, {e["name"]: e["bytes"] for e in files if not e["name"].startswith(stores + _FOR_PEOPLE)})
    return [e | {"sha256": digests[e["name"]]} if e["name"] in digests else e for e in files]
