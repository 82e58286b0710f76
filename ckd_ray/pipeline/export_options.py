"""Which options of an export go with what is exported: one that would be ignored is refused."""

from __future__ import annotations

from typing import Any

from ckd_ray.errors import UserError

# What is exported -> the options that change it.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "model": ("model",),
    "labels": ("width", "scores"),
    "vectors": ("model",),
    "index": ("model", "bits"),
}


def export_options(what: str, **given: Any) -> dict[str, Any]:
    """The arguments of `pipeline.export.export` for the options that the user gave; its defaults hold for the others.

    Args:
        what: as `export` takes it, which refuses an unknown one.
        given: `model`, `width`, `scores` and `bits`; None where the user did not give one.

    Raises:
        UserError: options do not apply to `what`; names all of them.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    ignored = [name for name in chosen if name not in _OPTIONS.get(what, chosen)]
    if ignored:
        kinds = {name: [kind for kind, names in _OPTIONS.items() if name in names] for name in ignored}
        raise UserError(
            f"this would be ignored: it does not apply to --what {what}",
            where=", ".join(f"--{name}" for name in ignored),
            expected="; ".join(f"--{name} with --what {' or '.join(of)}" for name, of in kinds.items()),
            fix="leave it out",
        )
    return chosen
