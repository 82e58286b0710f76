"""The token-embedding store: shards, codecs, manifests, random access by passage. Imports without Ray."""

from ckd_ray.store.embeddings import EmbeddingStore, Ragged
from ckd_ray.store.shard import BrokenShardError, Shard, ShardHeader, shard_name, write_shard
from ckd_ray.store.writing import close_store, intact_shards, summarise_shards, write_manifest

__all__ = [
    "BrokenShardError", "EmbeddingStore", "Ragged", "Shard", "ShardHeader", "close_store", "intact_shards",
    "shard_name", "summarise_shards", "write_manifest", "write_shard",
]  # fmt: skip
