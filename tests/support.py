"""What tests share: a tiny collection, settings of a run that takes seconds, and scripts with a Ray of their own."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# For runs whose topic is neither the pool, the servers nor the workers: every process takes seconds of a core to start.
ALONE = ("embed.actors=1", "retrieve.actors=1", "cross_encoder.actors=1", "teacher.workers=1", "distill.workers=1")

WORDS = [f"{a}{b}" for a in "bcdfghjklmnp" for b in ("an", "el", "im", "or", "uk", "ost")]


def write_collection(folder: Path, passages: int = 60, queries: int = 24) -> Path:
    """An MS MARCO folder: passages about a few of the words, queries of three words of their passage."""
    rng = random.Random(5)
    texts = []
    for _ in range(passages):
        topic = rng.sample(WORDS, 6)
        texts.append(" ".join(rng.choice(topic) for _ in range(rng.randint(4, 40))) + ".")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"p{i}\t{text}\n" for i, text in enumerate(texts)]
    (folder / "collection.tsv").write_text("".join(lines))
    for split, first, count in (("train", 0, queries), ("dev", queries, 6), ("test", queries + 6, 6)):
        asked = range(first, first + count)
        words = {q: " ".join(sorted(set(texts[q % passages].rstrip(".").split()))[:3]) for q in asked}
        (folder / f"queries.{split}.tsv").write_text("".join(f"q{q}\t{words[q]}\n" for q in asked))
        (folder / f"qrels.{split}.tsv").write_text("".join(f"q{q}\t0\tp{q % passages}\t1\n" for q in asked))
    return folder


def tiny_bert(folder: Path, words: Iterable[str] = WORDS) -> str:
    """A random two-layer BERT of 32 dimensions and a vocabulary of these words, written into `folder`."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "[unused1]"]
    vocabulary = {token: i for i, token in enumerate([*special, *".,;:!?-()", *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def overrides(storage: Path | str, backbone: str, collection: str, *more: str) -> list[str]:
    """`--set` values of a run that takes seconds."""
    return [
        f"run.storage={storage}",
        "run.name=tiny",
        "collection.format=msmarco",
        f"collection.path={collection}",
        "collection.limit=null",
        f"model.backbone={backbone}",
        "model.dim=16",
        "model.doc_maxlen=48",
        "model.query_maxlen=12",
        "teacher.steps=4",
        "teacher.batch_size=6",
        "teacher.precision=fp32",
        "teacher.log_every=1",
        "embed.precision=fp32",
        "embed.passages_per_shard=16",
        "retrieve.depth=20",
        "retrieve.engine=exact",
        "label.clusters=8",
        "distill.expansion_size=4",
        "distill.negatives=3",
        "distill.negatives_depth=15",
        "distill.steps=4",
        "distill.batch_size=6",
        "distill.precision=fp32",
        "distill.log_every=1",
        "evaluate.depth=50",
        "evaluate.measures=[MRR@10,nDCG@10,R@50]",
        "evaluate.baselines=[]",
        *more,
    ]


def classifier(folder: Path, backbone: str, labels: int, **tokenizer_values: object) -> str:
    """A random sequence classifier with the vocabulary of `backbone`, far from ties."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification

    config = AutoConfig.from_pretrained(backbone, num_labels=labels)
    config.architectures = None
    torch.manual_seed(labels)
    model = BertForSequenceClassification(config)
    torch.nn.init.normal_(model.classifier.weight, std=2.0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone, **tokenizer_values).save_pretrained(folder)
    return str(folder)


def flip_bit(path: Path, byte: int, bit: int = 0) -> None:
    """Change one bit of a file, in place."""
    with open(path, "r+b") as file:
        file.seek(byte)
        (value,) = file.read(1)
        file.seek(byte)
        file.write(bytes([value ^ (1 << bit)]))


def tensorboard_events(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """Tag -> [(step, value)] of the event files of a folder: records of TensorFlow, with a length before each."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            for value in event.summary.value:
                plugin = value.metadata.plugin_data
                content = plugin.content if plugin.plugin_name == "hparams" else value.tensor.string_val
                scalar = value.simple_value if value.WhichOneof("value") == "simple_value" else content
                found[value.tag].append((event.step, scalar))
    return dict(found)


def told_by(module: str, *arguments: str) -> Any:
    """The JSON object that a script of the tests prints, which has a Ray of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    script = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(script, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr
    # Ray's own lines may come after it.
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
