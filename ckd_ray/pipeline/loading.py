"""Loading the model that a run starts from, with the settings of section `model`."""

from __future__ import annotations

import os

from ckd_ray.config import Config
from ckd_ray.errors import UserError
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.model.exchange import load_any
from ckd_ray.progress import say

# Settings of a checkpoint that stand whatever the configuration says.
_KEPT = ("query_maxlen", "query_expansion", "doc_maxlen", "mask_punctuation", "similarity")


def load_backbone(config: Config) -> ColBERT:
    """The model that the teacher's training starts from: whatever is accepted as `model.backbone`."""
    return _load(config.model.backbone, config, given=False)


def load_teacher(source: str, config: Config) -> ColBERT:
    """A finished teacher: whatever is accepted as `teacher.checkpoint`."""
    return _load(source, config, given=True)


def _load(source: str, config: Config, *, given: bool) -> ColBERT:
    source = os.path.expanduser(source)
    m = config.model
    wanted = ColBERTSettings(
        dim=m.dim,
        query_maxlen=m.query_maxlen,
        query_expansion=m.query_expansion == "always",
        training_expansion=m.query_expansion == "training",
        doc_maxlen=m.doc_maxlen,
        mask_punctuation=m.mask_punctuation,
        similarity=m.similarity,
    )
    # The seed is no part of a given teacher's fingerprint, so nothing of it may depend on the seed.
    seed = 0 if given else config.run.seed
    encoder, key = (m.backbone, "teacher.checkpoint") if given else (None, "model.backbone")
    loaded = load_any(source, wanted, encoder=encoder, seed=seed, dropout=m.dropout, key=key)
    if given and loaded.kind == "encoder":
        say(f"teacher.checkpoint: {source} is a bare encoder; its projection is drawn at random, not trained")
    model = loaded.model
    if model.settings.dim != m.dim:
        raise UserError(
            "the checkpoint has another dimension",
            where="model.dim",
            expected=str(model.settings.dim),
            found=str(m.dim),
        )
    for key in _KEPT:
        kept, asked = _setting(model.settings, key), getattr(m, key)
        if kept != asked:
            say(f"model.{key}: {kept} is taken from {source} ({asked} in the configuration)")
    return model


def _setting(settings: ColBERTSettings, key: str) -> object:
    """A setting of a checkpoint in the words of the configuration."""
    if key != "query_expansion":
        return getattr(settings, key)
    if settings.query_expansion:
        return "always"
    return "training" if settings.training_expansion else "never"
