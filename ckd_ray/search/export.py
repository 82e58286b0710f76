"""`ckd-ray export RUN --what vectors|index`: the token embeddings of all passages for other search engines.

Parts are written one by one, each of a shard of the store, so memory holds one shard and the same command goes on where
it stopped. Needs no Ray.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ckd_ray.data import Collection
from ckd_ray.errors import UserError
from ckd_ray.files import join, read_json, write_atomic
from ckd_ray.runs.artifact import content_fingerprint, identity_of, make, making_of, manifest_of
from ckd_ray.runs.directory import check_role
from ckd_ray.runs.exports import EXPORT_KEY, check_place
from ckd_ray.runs.fingerprint import fingerprint
from ckd_ray.runs.finished import open_finished, reading
from ckd_ray.search import fast_plaid, vectors
from ckd_ray.search.cards import index_card, vectors_card
from ckd_ray.search.stored import stored_passages
from ckd_ray.store import EmbeddingStore


@dataclass(frozen=True)
class _Format:
    """Writes `target` from a store and its collection.

    Attributes:
        card: makes the text of README.md from the run's name and the entries of the manifest.
        settings: the options that change the result.
    """

    write: Callable[..., dict[str, Any]]
    card: Callable[[str, dict[str, Any]], str]
    settings: tuple[str, ...] = ()


def _write_vectors(target: str, store: EmbeddingStore, collection: Collection) -> dict[str, Any]:
    """Write into a folder of their own: a reader of a folder of Parquet files would take the card for one of them."""
    return vectors.write_vectors(join(target, "data"), store, collection)


_FORMATS = {
    "vectors": {"parquet": _Format(_write_vectors, vectors_card)},
    "index": {"fast-plaid": _Format(fast_plaid.write_index, index_card, ("bits",))},
}
# Part of an export's fingerprint: 2 has a card, and vectors in a folder of their own.
_LAYOUT = 2


def export_stored(
    run: str, what: str, fmt: str, *, out: str | None = None, system: str = "student", bits: int = 4
) -> dict[str, Any]:
    """Write the passages of a run for another search engine.

    Args:
        run: a run, or a variant of one, as `open_finished` takes it.
        what, fmt: `vectors` as `parquet`, or `index` as `fast-plaid`.
        out: the folder to write, local or a URI; `exports/WHAT-FORMAT` inside the run when None.
        system: whose embeddings, `student` or `teacher`.
        bits: of an index, where the store is fp16 and its codec is learned here.

    Returns:
        `out`, `what`, `format`, `passages`, `tokens`, `dim`, `model`, and what the format adds.

    Raises:
        UserError: there is no such format or model, the run has no such embeddings, or the folder is in use.
    """
    if fmt not in _FORMATS[what]:
        raise UserError(f"unknown format of {what}", where="--format", expected=", ".join(_FORMATS[what]), found=fmt)
    check_role(system, "--model", "model")
    opened, chosen = open_finished(run), _FORMATS[what][fmt]
    store, paths = stored_passages(opened, system), opened.paths
    with reading(paths.folder):
        collection = Collection.open(paths.root)
        similarity = read_json(join(paths.checkpoint(system), "colbert.json"))["similarity"]
    settings = {"bits": bits} if "bits" in chosen.settings else {}
    made_of = fingerprint(
        what=what,
        format=fmt,
        model=identity_of(paths.checkpoint(system)),
        store=store.manifest["fingerprint"],
        corpus=content_fingerprint(paths.corpus),
        settings=settings,
        layout=_LAYOUT,
    )
    name = f"{what}-{fmt}" if system == "student" else f"{system}-{what}-{fmt}"
    target = out or join(paths.exports, name)
    if out is not None and making_of(target) != made_of:  # the half of this export goes on
        check_place(target)
    about = {
        "passages": store.num_passages,
        "tokens": store.num_tokens,
        "dim": store.dim,
        "model": system,
        "similarity": similarity,
    }

    def work() -> dict[str, Any]:
        added = chosen.write(target, store, collection, **settings)
        card = chosen.card(opened.name, {**about, **added}).encode()
        write_atomic(join(target, "README.md"), lambda stream: stream.write(card))
        return {EXPORT_KEY: what, "format": fmt, **about, **added}

    make(target, made_of, work, digests=False)  # an export may be as large as the store
    kept = ("schema_version", "fingerprint", "made_of", "files", EXPORT_KEY)
    return {"out": target, "what": what, **{k: v for k, v in (manifest_of(target) or {}).items() if k not in kept}}
