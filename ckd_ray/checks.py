"""Every check of a configuration, and the one function that reads a configuration with all of them.

The schema checks its own keys. The modules of the objectives, the comparison and the search check theirs and import
the schema. This module combines all of these checks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ckd_ray.compare.plan import compare_problems
from ckd_ray.config import Config, read_config
from ckd_ray.config.checks import schema_problems
from ckd_ray.distill.objectives import objective_of
from ckd_ray.errors import UserError, first_line
from ckd_ray.files.paths import KEYS
from ckd_ray.tune.space import tune_problems


def load_config(path: str | None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: a YAML file; None reads the quick start that comes with the package.
        overrides: `key.path=value`, the value in YAML; later ones win. A mapping is merged into the section it names.

    Raises:
        ConfigError: with every problem of the file, the overrides and their combination.
    """
    return read_config(path, overrides, all_problems)


def check_inputs(config: Config) -> None:
    """Look at what the configuration names, before Ray starts: the files of the collection, and the encoder.

    Raises:
        UserError: a file is missing, its storage does not answer, or the folder of the encoder holds no model or one
            that is no encoder.
    """
    from ckd_ray.data import source_signature
    from ckd_ray.model.sources import check_encoder, is_hub_id, resolve_backbone

    try:
        source_signature(config.collection)
    except OSError as error:  # of an object store
        raise UserError("this storage cannot be read", where="collection", found=first_line(error), fix=KEYS) from error
    given = config.teacher.checkpoint
    source, key = given or config.model.backbone, "teacher.checkpoint" if given else "model.backbone"
    if not is_hub_id(source):  # a run that is resumed may not need the hub any more
        check_encoder(resolve_backbone(source, key), max(config.model.doc_maxlen, config.model.query_maxlen), key)


def all_problems(config: Config) -> Iterator[tuple[str, str]]:
    """(path of the key, what is wrong and how to mend it) for every combination of keys that cannot work."""
    yield from schema_problems(config)
    yield from objective_of(config).mistakes(config)
    yield from compare_problems(config)
    yield from tune_problems(config)
