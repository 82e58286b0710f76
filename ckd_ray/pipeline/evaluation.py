"""The evaluate stage: embed with the student, search exactly with both, measure, compare."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pyarrow as pa

from ckd_ray.data import Collection
from ckd_ray.errors import JobError
from ckd_ray.evaluate.compare import compare
from ckd_ray.evaluate.measures import Measures, measure_run
from ckd_ray.evaluate.runs import falling_scores, write_trec_run
from ckd_ray.pipeline.artefact import make
from ckd_ray.pipeline.context import RunContext
from ckd_ray.pipeline.fingerprint import fingerprint
from ckd_ray.progress import say
from ckd_ray.retrieve.rankings import read_ranking_part
from ckd_ray.retrieve.servers import SearchSettings, serving
from ckd_ray.retrieve.stream import RetrieveJob, retrieve
from ckd_ray.store import EmbeddingStore
from ckd_ray.store.files import join, list_files, write_json_atomic

SYSTEMS = ("teacher", "student")


def evaluate_run(context: RunContext, made_of: str) -> dict[str, Any]:
    """Measure teacher and student on every evaluation split that the collection has.

    Writes `evaluation/SYSTEM.SPLIT.run` (TREC), `measures.json`, `SYSTEM.SPLIT.per_query.json` and `comparison.json`.
    """
    from ckd_ray.pipeline.work import embed_all

    collection = Collection.open(context.run)
    splits: list[str] = [s for s in context.config.evaluate.splits if s in collection.splits]
    if not splits:
        say("evaluate: the collection has none of the splits of evaluate.splits")
    embeddings = {"teacher": context.path("embeddings"), "student": context.path("student_embeddings")}
    # The student's store has a fingerprint of its own: other measures or depths do not embed the corpus again.
    student_of = fingerprint(student=_made_of(context, "student"), embed=_made_of(context, "embeddings"))

    def embed_student() -> dict[str, Any]:
        store = embed_all(
            context,
            context.path("student"),
            embeddings["student"],
            student_of,
            stage="evaluate",
            splits=splits,
        )
        return {"passages": store.num_passages}

    make(embeddings["student"], student_of, embed_student)
    found: dict[str, dict[str, Measures]] = {split: {} for split in splits}
    for system in SYSTEMS:
        for split, measures in _measure_system(context, system, embeddings[system], splits, collection).items():
            found[split][system] = measures
    _write(context, found)
    count = sum(len(collection.queries(split).ids) for split in splits)
    return {"count": count, "unit": "queries", "splits": splits}


def _made_of(context: RunContext, folder: str) -> str:
    from ckd_ray.pipeline.artefact import manifest_of

    manifest = manifest_of(context.path(folder))
    if manifest is None:
        raise JobError(f"{context.path(folder)} is not finished")
    return str(manifest["made_of"])


def _measure_system(
    context: RunContext, system: str, embeddings: str, splits: list[str], collection: Collection
) -> dict[str, Measures]:
    settings = context.config.evaluate
    store = EmbeddingStore.open(join(embeddings, "passages"))
    out = context.path("evaluation", "rankings", system)
    measured = {}
    with serving(store, SearchSettings("exact"), context.config.retrieve.actors) as servers:
        for split in splits:
            job = RetrieveJob(context.run, split, join(embeddings, f"queries.{split}"), out, settings.depth)
            retrieve(job, servers, len(collection.queries(split).ids), stage=f"evaluate {system} {split}")
    for split in splits:
        run = read_run(out, split)
        write_trec_run(context.path("evaluation", f"{system}.{split}.run"), run, f"ckd-ray-{system}")
        measured[split] = measure_run(run, _qrels(collection, split), settings.measures, settings.relevance_threshold)
    return measured


def read_run(folder: str, split: str) -> pd.DataFrame:
    """All parts of a split's rankings as one run (query_id, doc_id, rank, score)."""
    columns = ["query_id", "passage_id", "rank", "score"]
    parts = [n for n in list_files(folder, ".parquet") if n.rpartition("-")[0] == split]
    table = pa.concat_tables([read_ranking_part(join(folder, n), columns) for n in parts])
    return falling_scores(table.to_pandas().rename(columns={"passage_id": "doc_id"}))


def _qrels(collection: Collection, split: str) -> pd.DataFrame:
    labels = collection.qrels(split)
    return pd.DataFrame({"query_id": labels.query_ids, "doc_id": labels.passage_ids, "relevance": labels.relevance})


def _write(context: RunContext, found: dict[str, dict[str, Measures]]) -> None:
    """`measures.json` holds the student's means of the last split at the top, and all of them by split and system."""
    by_split = {split: {name: m.mean for name, m in systems.items()} for split, systems in found.items()}
    top: dict[str, Any] = {}
    if found:
        last = list(found)[-1]
        top = {**found[last]["student"].mean, "split": last, "system": "student"}
    write_json_atomic(context.path("evaluation", "measures.json"), {**top, "splits": by_split})
    for split, systems in found.items():
        for name, measures in systems.items():
            path = context.path("evaluation", f"{name}.{split}.per_query.json")
            write_json_atomic(path, measures.per_query)
    comparison = {split: compare(systems["teacher"], systems["student"]) for split, systems in found.items()}
    write_json_atomic(context.path("evaluation", "comparison.json"), comparison)
