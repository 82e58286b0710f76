"""The ColBERT encoder, its tokenisation, MaxSim and checkpoints. Imports without Ray."""

from ckd_ray.model.colbert import ColBERT, is_checkpoint
from ckd_ray.model.maxsim import maxsim
from ckd_ray.model.settings import ColBERTSettings
from ckd_ray.model.tokenizer import ColBERTTokenizer

__all__ = ["ColBERT", "ColBERTSettings", "ColBERTTokenizer", "is_checkpoint", "maxsim"]
