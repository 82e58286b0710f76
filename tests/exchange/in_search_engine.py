"""Searches an export with the engine itself, in an environment of that engine, as docs/how-to/search-engines.md does.

in_search_engine.py ENVIRONMENT ENGINE EXPORT QUERIES OUT: QUERIES is a .npy file (B, Q, D), with zero rows after a
query's text; OUT gets the best passages and scores of each query as JSON.
"""

import json
import sys
import tempfile

import numpy as np


def fast_plaid(export, queries, top):
    import pyarrow.parquet as pq
    import torch
    from fast_plaid import search

    index = search.FastPlaid(index=export, device="cpu")
    ids = pq.read_table(f"{export}/passage_ids.parquet")["id"]
    probes = min(64, len(np.load(f"{export}/centroids.npy")))
    asked = [torch.from_numpy(rows) for rows in queries]
    found = index.search(asked, top_k=top, n_ivf_probe=probes, n_full_scores=8192)
    return [[(ids[number].as_py(), score) for number, score in hits] for hits in found]


def lancedb(export, queries, top):
    import lancedb
    import pyarrow.dataset as pads

    with tempfile.TemporaryDirectory() as folder:
        table = lancedb.connect(folder).create_table(
            "passages", data=pads.dataset(f"{export}/data").scanner().to_reader()
        )
        found = []
        for rows in queries:
            hits = table.search(rows).distance_type("cosine").limit(top).to_list()
            found.append([(hit["id"], len(rows) - hit["_distance"]) for hit in hits])
        return found


def qdrant(export, queries, top):
    import pyarrow.dataset as pads
    from qdrant_client import QdrantClient, models

    client = QdrantClient(":memory:")
    size = pads.dataset(f"{export}/data").schema.field("vectors").type.value_type.list_size
    maxsim = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    client.create_collection(
        "passages",
        vectors_config=models.VectorParams(size=size, distance=models.Distance.DOT, multivector_config=maxsim),
    )
    number = 0
    for batch in pads.dataset(f"{export}/data").to_batches():
        points = []
        for row in batch.to_pylist():
            if row["vectors"]:  # a passage that could not be embedded has none
                points.append(models.PointStruct(id=number, vector=row["vectors"], payload={"id": row["id"]}))
            number += 1
        client.upsert("passages", points=points)
    answers = [client.query_points("passages", query=rows.tolist(), limit=top).points for rows in queries]
    return [[(point.payload["id"], point.score) for point in points] for points in answers]


if __name__ == "__main__":
    _, engine, export, queries, out = sys.argv[1:]
    search = {"fast-plaid": fast_plaid, "lancedb": lancedb, "qdrant": qdrant}[engine]
    with open(out, "w") as file:
        json.dump(search(export, [rows[rows.any(1)] for rows in np.load(queries)], 10), file)
