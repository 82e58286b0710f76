"""The token-embedding store: shards, codecs, manifests, random access by passage. Imports without Ray."""

from ckd_ray.store.embeddings import EmbeddingStore, Ragged, intact_shards, write_manifest
from ckd_ray.store.shard import BrokenShardError, Shard, ShardHeader, shard_name, write_shard

__all__ = [
    "BrokenShardError",
    "EmbeddingStore",
    "Ragged",
    "Shard",
    "ShardHeader",
    "intact_shards",
    "shard_name",
    "write_manifest",
    "write_shard",
]
