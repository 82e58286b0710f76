"""Collections: readers, validation, and the Parquet form that every stage reads."""

from ckd_ray.data.build import CollectionManifest, build_collection, source_signature
from ckd_ray.data.collection import Collection, Qrels, Queries
from ckd_ray.data.problems import InputError

__all__ = [
    "Collection", "CollectionManifest", "InputError", "Qrels", "Queries", "build_collection", "source_signature",
]  # fmt: skip
