"""Gradient checkpointing (Chen et al. 2016): a layer's activations are computed again when its gradients need them.

A backward pass then holds the inputs of all layers and the activations of one, for one more forward pass.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ckd_ray.errors import UserError
from ckd_ray.model.colbert import ColBERT
from ckd_ray.model.packed import attention


def recompute_activations(model: ColBERT, key: str = "gradient_checkpointing") -> None:
    """Let every layer of the encoder keep its inputs alone while the model is in training mode.

    Args:
        key: the key of the configuration that asked for it, for the message.

    Raises:
        UserError: the encoder cannot do so.
    """
    backbone = model.backbone
    config = backbone.config

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Around a layer's first and second computation: `encode_packed` has its own attention while it computes, and
        the second computation is to use the same."""
        return nullcontext(), attention(config, config._attn_implementation)

    # transformers 5.24 gave the method a new name.
    enable: Any = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False, "context_fn": contexts})
    except ValueError as error:
        raise UserError(
            "this encoder does not support gradient checkpointing",
            where=key,
            expected="false for this encoder",
            found=type(backbone).__name__,
            fix=f"set {key}: false, and save memory with {key.partition('.')[0]}.accumulate",
        ) from error
