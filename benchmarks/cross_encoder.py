"""What a cross-encoder costs as a teacher: it is trained on a run's own labels, and scores what a student's steps draw.

    python benchmarks/cross_encoder.py --run RUN --out DIR [--seeds 1 2] [--steps 400] [--maxlen 160] [--rerank 200]

The classifier starts from the run's bare encoder. A step has some training queries, each with its labelled passage and
negatives of the top of the teacher's ranking; the loss is the cross-entropy of the labelled passage within its list.
DIR/classifier is the model. DIR/scores.tsv has the scores of every pair that the students of `--seeds` meet, in the
form that `cross_encoder.scores` takes:

    ckd-ray train ... --set distill.objective=cross_encoder --set cross_encoder.scores=DIR/scores.tsv

Printed: seconds of the training, pairs scored a second, seconds that all training queries would take at
`distill.negatives_depth` candidates each, and seconds of the run's own label stage, which labels all of them.
`--rerank N`: MRR@10 of N dev queries whose first 20 passages of the teacher are ranked again, beside the teacher's.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import arguments, emit, figure, machine, note

from ckd_ray.arrays import Float32Array
from ckd_ray.cross_encoder.classifier import PairClassifier, PairTokenizer
from ckd_ray.data import Collection
from ckd_ray.distill.batches import BatchPlan
from ckd_ray.evaluate.measures import measure_run
from ckd_ray.evaluate.runs import read_trec_run
from ckd_ray.model.sources import resolve_backbone
from ckd_ray.retrieve.rankings import read_ranking_matrix

RERANKED = 20  # passages of a dev query that are ranked again


def main() -> None:
    number: dict[str, Any] = {"type": int}
    args = arguments(
        __doc__ or "",
        run={"metavar": "RUN", "required": True, "help": "a run with rankings and labels"},
        out={"metavar": "DIR", "required": True},
        seeds={**number, "nargs": "+", "default": [1], "help": "distill.seed of the students"},
        seed={**number, "default": 1, "help": "of the classifier"},
        steps={**number, "default": 400},
        queries_per_step={**number, "default": 4},
        negatives={**number, "default": 7},
        learning_rate={"type": float, "default": 5e-5},
        maxlen={**number, "default": 160, "help": "tokens of a pair"},
        rerank={**number, "default": 0, "metavar": "N"},
    )
    before, bench = machine(), Bench(Path(args.run), args.maxlen)
    if args.quick:
        args.steps, args.rerank = 4, 0
    out = Path(args.out)
    trained = bench.train(out / "classifier", args)
    scored = bench.score_pairs(out / "classifier", out / "scores.tsv", args.seeds, 4 if args.quick else None)
    settings: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in ("run", "out", "data", "only")}
    settings |= {"run": Path(args.run).name, "precision": "bf16", "training": trained, "scoring": scored}
    if args.rerank:
        settings["reranked"] = bench.rerank(out / "classifier", args.rerank)
    whole = scored["seconds_of_all_queries"]
    figures = {
        "labelling_seconds_against_the_label_stage": figure(whole / scored["label_stage_seconds"], None, "higher")
    }
    emit(settings, figures, before)


class Bench:
    """A run, and a classifier that is trained and asked on its collection. Pairs have `maxlen` tokens at most."""

    def __init__(self, run: Path, maxlen: int) -> None:
        self.run, self.maxlen = run, maxlen
        self.config: dict[str, Any] = json.loads((run / "run.json").read_text())["config"]
        self.collection = Collection.open(str(run))
        self.queries = self.collection.queries("train")
        grade = self.config["collection"]["positive_grade"]
        self.positives = self.collection.positives("train", grade)
        self.rankings = read_ranking_matrix(str(run / "rankings"), "train")

    def plan(self, batch_size: int, negatives: int, seed: int, sampling: Any = "uniform") -> BatchPlan:
        """The batches of a training."""
        depth = self.config["distill"]["negatives_depth"]
        return BatchPlan(
            self.positives, num_passages=self.collection.num_passages, batch_size=batch_size, negatives=negatives,
            seed=seed, rankings=self.rankings, negatives_depth=depth, sampling=sampling,
        )  # fmt: skip

    def train(self, out: Path, args: Any) -> dict[str, Any]:
        """Train the classifier, and save it with its tokenizer."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        torch.manual_seed(args.seed)
        folder = resolve_backbone(self.config["model"]["backbone"])
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
        warm = max(1, args.steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, (args.steps - step) / max(1, args.steps - warm))
        )
        plan = self.plan(args.queries_per_step, args.negatives, args.seed)
        losses, started = [], time.perf_counter()
        for step in range(args.steps):
            batch = plan.batch(step)
            asked = np.repeat(batch.queries_B, batch.passages_BM.shape[1])
            inputs = tokenizer(
                [self.queries.texts[i] for i in asked.tolist()],
                self.collection.texts(batch.passages_BM.reshape(-1)),
                truncation="longest_first", max_length=self.maxlen, padding=True, return_tensors="pt",
            )  # fmt: skip
            with torch.autocast("cpu", torch.bfloat16):
                scores_BM = model(**inputs).logits.float().view(batch.passages_BM.shape)
            loss = torch.nn.functional.cross_entropy(scores_BM, torch.zeros(len(scores_BM), dtype=torch.long))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if step % 20 == 0:
                note(f"training: step {step} of {args.steps}, loss {np.mean(losses[-20:]):.3f}")
        seconds = time.perf_counter() - started
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        pairs = args.steps * args.queries_per_step * (1 + args.negatives)
        tail = [float(np.mean(part)) for part in (losses[:20], losses[-20:])]
        return {"seconds": round(seconds, 1), "pairs": pairs, "loss_first_and_last_20": [round(x, 3) for x in tail]}

    def scores(self, classifier: Path, queries: list[str], passages: list[str]) -> Float32Array:
        """(P,) scores of the pairs."""
        pairs = PairTokenizer(str(classifier), self.maxlen)(queries, passages)
        return PairClassifier(str(classifier), precision="bf16").score(pairs)

    def score_pairs(self, classifier: Path, out: Path, seeds: list[int], steps: int | None) -> dict[str, Any]:
        """Write the scores of all pairs that the students' own lists have."""
        distill = self.config["distill"]
        wanted: set[tuple[int, int]] = set()
        for seed in seeds:
            plan = self.plan(distill["batch_size"], distill["negatives"], seed, distill["sampling"])
            for step in range(steps or distill["steps"]):
                batch = plan.batch(step)
                for query, row in zip(batch.queries_B.tolist(), batch.passages_BM.tolist(), strict=True):
                    wanted |= {(query, passage) for passage in row}
        pairs = sorted(wanted)
        queries = [self.queries.texts[q] for q, _ in pairs]
        texts = self.collection.texts(np.array([p for _, p in pairs]))
        started = time.perf_counter()
        scores = self.scores(classifier, queries, texts)
        seconds = time.perf_counter() - started
        ids = self.collection.passage_ids(np.array([p for _, p in pairs]))
        with out.open("w", encoding="utf-8") as file:
            for (query, _), passage, score in zip(pairs, ids, scores.tolist(), strict=True):
                file.write(f"{self.queries.ids[query]}\t{passage}\t{score:.6f}\n")
        labelled = len(self.positives.labelled_queries)
        stage = json.loads((self.run / "labels" / "_manifest.json").read_text())["seconds"]
        retrieved = json.loads((self.run / "rankings" / "_manifest.json").read_text())["seconds"]
        whole = labelled * (1 + distill["negatives_depth"]) * seconds / len(pairs)
        return {
            "pairs": len(pairs),
            "seconds": round(seconds, 1),
            "queries": labelled,
            "seconds_of_all_queries": round(whole, 1),
            "label_stage_seconds": stage,
            "retrieve_stage_seconds": retrieved,
        }

    def rerank(self, classifier: Path, count: int) -> dict[str, float]:
        """MRR@10 of the first `count` labelled dev queries, before and after their first passages are ranked again."""
        dev, qrels = self.collection.queries("dev"), self.collection.qrels("dev")
        runs = [self.run / folder / "teacher.dev.run" for folder in ("compare/teacher", "evaluation")]
        path = next((p for p in runs if p.exists()), None)
        if path is None:
            raise SystemExit(f"{self.run}: no teacher.dev.run here; run ckd-ray compare or evaluate first")
        grade = self.config["collection"]["positive_grade"]
        chosen = self.collection.positives("dev", grade).labelled_queries[:count]
        texts = {dev.ids[query]: dev.texts[query] for query in chosen.tolist()}
        labels = pd.DataFrame(
            {"query_id": qrels.query_ids, "doc_id": qrels.passage_ids, "relevance": qrels.relevance}
        ).query("query_id in @texts.keys()")
        found = read_trec_run(str(path)).query("query_id in @texts.keys() and rank <= @RERANKED")
        index = self.collection.passage_index(found["doc_id"])
        passages = self.collection.texts(np.array([index[name] for name in found["doc_id"]]))
        again = found.assign(score=self.scores(classifier, [texts[q] for q in found["query_id"]], passages))
        measures = {
            name: measure_run(run, labels, ["MRR@10"], grade)
            for name, run in {"teacher": found, "cross_encoder": again}.items()
        }
        return {name: round(measured.mean["MRR@10"], 4) for name, measured in measures.items()}


if __name__ == "__main__":
    main()
