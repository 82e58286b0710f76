"""A finished run made by hand, without Ray and without training: a collection, a teacher, a student, both stores, their
rankings and an evaluation. Texts and ids hold what a page or a terminal must not take for its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from ckd_ray.checks import load_config
from ckd_ray.config import Config
from ckd_ray.data import Collection, build_collection
from ckd_ray.evaluate.measures import Measures
from ckd_ray.evaluate.table import build_table
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.model.encoder import TextEncoder
from ckd_ray.pipeline.evaluation import write_measures
from ckd_ray.retrieve.rankings import write_ranking_part
from ckd_ray.search.scan import scan
from ckd_ray.store import EmbeddingStore, shard_name, write_manifest, write_shard
from ckd_ray.store.codec import Float16
from tests.support import WORDS, overrides, write_collection

EVIL = "<script>alert('passage')</script>"
EVIL_ID = "p<script>alert(1)</script>"


def evil_collection(folder: Path) -> Path:
    """`write_collection`, with script tags, quotes and escape codes in some passages, ids and queries."""
    write_collection(folder)
    lines = (folder / "collection.tsv").read_text().splitlines()
    lines[24] = f"{EVIL_ID}\t{EVIL} {lines[24].partition(chr(9))[2]} \x1b[31mred </script> \"quoted\" & 'more'"
    (folder / "collection.tsv").write_text("\n".join(lines) + "\n")
    qrels = (folder / "qrels.dev.tsv").read_text().replace("\tp24\t", f"\t{EVIL_ID}\t")
    (folder / "qrels.dev.tsv").write_text(qrels)
    queries = (folder / "queries.dev.tsv").read_text().splitlines()
    queries[0] = f"{queries[0]} <img src=x onerror=alert(2)> {WORDS[0]}"
    (folder / "queries.dev.tsv").write_text("\n".join(queries) + "\n")
    return folder


def store_of(model: ColBERT, texts: list[str], out: Path, *, queries: bool = False, shard: int = 16) -> EmbeddingStore:
    """Embed `texts` into a store of shards of `shard` texts."""
    encoder, headers = TextEncoder(model), []
    out.mkdir(parents=True, exist_ok=True)
    for index, first in enumerate(range(0, len(texts), shard)):
        part = texts[first : first + shard]
        encoded = encoder.queries(part) if queries else encoder.passages(model.tokenizer.passages(part))
        header, _ = write_shard(
            str(out / shard_name(index)),
            fingerprint="hand",
            index=index,
            first=first,
            lengths=encoded.lengths,
            token_ids=encoded.token_ids,
            embeddings_TD=encoded.embeddings_TD,
            codec=Float16(model.settings.dim),
        )
        headers.append(header)
    write_manifest(str(out), "hand", len(headers))
    return EmbeddingStore.open(str(out))


def hand_made_run(folder: Path, backbone: str, collection: Path) -> Path:
    """The run directory `folder`/tiny."""
    config = load_config(None, overrides(folder, backbone, str(collection), "evaluate.depth=50"))
    run = folder / "tiny"
    run.mkdir(parents=True)
    record = {"ckd_ray": "0", "python": "3", "versions": {"torch": "2"}, "config": config.model_dump(mode="json")}
    (run / "run.json").write_text(json.dumps(record))
    build_collection(config.collection, str(run), progress=lambda done, total: None)
    opened = Collection.open(str(run))
    texts = opened.iter_passages(0, opened.num_passages)
    settings = ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48)
    teacher = ColBERT.from_backbone(backbone, settings, seed=1)
    student = ColBERT.from_backbone(backbone, settings, seed=1)
    with torch.no_grad():
        noise = torch.randn(student.projection.weight.shape, generator=torch.Generator().manual_seed(5))
        student.projection.weight += 0.15 * noise
    found: dict[str, dict[str, Measures]] = {"dev": {}, "test": {}}
    for name, model, stores in (("teacher", teacher, "embeddings"), ("student", student, "student_embeddings")):
        model.save(run / name)
        losses = [json.dumps({"step": i, "loss": 1 / (i + 1), "mrr@10": i / 9}) for i in range(10)]
        (run / name / "metrics.jsonl").write_text("\n".join(losses))
        passages = store_of(model, texts, run / stores / "passages")
        for split in found:
            queries = opened.queries(split)
            asked = store_of(model, queries.texts, run / stores / f"queries.{split}", queries=True)
            found[split][name] = _rank(run, name, split, passages, asked, opened, config)
    write_measures(str(run / "evaluation"), found, config, opened)
    for systems in found.values():  # as if the student's values were the encoder's, and BM25 found nothing
        nothing = {m: dict.fromkeys(values, 0.0) for m, values in systems["student"].per_query.items()}
        systems |= {"encoder": systems["student"], "bm25": Measures.of(nothing)}
    table = {**build_table(found), "left_out": {"a third": EVIL}}
    (run / "evaluation" / "table.json").write_text(json.dumps(table))
    for stage in ("teacher", "student", "evaluation"):
        manifest = {"made_of": "hand", "seconds": 12.5, "figures": {"count": 100, "unit": "steps"}}
        (run / stage / "_manifest.json").write_text(json.dumps(manifest))
    return run


def _rank(
    run: Path,
    system: str,
    split: str,
    passages: EmbeddingStore,
    asked: EmbeddingStore,
    opened: Collection,
    config: Config,
) -> Measures:
    from ckd_ray.evaluate.measures import measure_parts
    from ckd_ray.evaluate.runs import write_trec_run
    from ckd_ray.pipeline.evaluation import RankedParts, labelled_parts

    queries, rankings = opened.queries(split), run / "evaluation" / "rankings" / system
    rankings.mkdir(parents=True, exist_ok=True)
    answers = [scan(passages, rows, 50) for rows in asked.gather(np.arange(len(queries.ids))).split()]
    indices = np.stack([p for _, p in answers])
    write_ranking_part(
        str(rankings / f"{split}-000000.parquet"),
        first_query=0,
        query_ids=queries.ids,
        scores_BK=np.stack([s for s, _ in answers]),
        passages_BK=indices,
        passage_ids=opened.passage_ids(indices.ravel()),
    )
    parts = RankedParts(str(rankings), split, len(queries.ids))
    write_trec_run(str(run / "evaluation" / f"{system}.{split}.run"), parts, "hand")
    return measure_parts(labelled_parts(parts, opened), config.evaluate.measures)
