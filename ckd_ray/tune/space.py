"""The space of a search: which keys vary and how (`tune.space`). Without Ray and Optuna, whose imports are slow."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, get_args

import numpy as np
from pydantic import ValidationError

from ckd_ray.config.checks import schema_problems
from ckd_ray.config.schema import Config
from ckd_ray.distill.objectives import CONDITIONAL_KEYS, objective_of

# The teacher's scores depend on these keys, so `first_pass` can compare their values without training.
TEACHER_KEYS = (
    *(f"label.{key}" for key in ("feedback_passages", "clusters", "voters", "token_vote", "neighbours")),
    *(f"distill.{key}" for key in ("beta", "expansion_share", "expansion_size", "zero_row_floor")),
)
_LOSS_KEYS = (
    "loss", "temperature", "teacher_weight", "encoder_share", "bm25_share", "margin", "denoise", "score_scale",
    "smoothing",
)  # fmt: skip
_TRAINING_KEYS = ("learning_rate", "negatives", "negatives_depth", "sampling", "warmup", "weight_decay", "ema")
KEYS = (*TEACHER_KEYS, *(f"distill.{key}" for key in (*_LOSS_KEYS, *_TRAINING_KEYS)))
STANDARD: dict[str, dict[str, Any]] = {
    "distill.loss": {"choice": ["decoupled", "mixture", "kl"]},
    "distill.temperature": {"choice": ["auto", 1.0, 2.0, 4.0, 8.0]},
    "distill.teacher_weight": {"choice": ["auto", 0.5, 1.0]},
    "distill.encoder_share": {"choice": ["auto", 0.0, 0.2, 0.4]},
    "distill.bm25_share": {"choice": ["auto", 0.0, 0.1, 0.2]},
    "distill.smoothing": {"choice": [0.0, 0.02, 0.1]},
    "distill.expansion_share": {"choice": [0.1, 0.2, 0.3, 0.5]},
    "distill.expansion_size": {"choice": [5, 10, 20]},
}
_KINDS = ("choice", "uniform", "loguniform", "int")

Values = dict[str, Any]


@dataclass(frozen=True)
class Parameter:
    """How a key varies: a `choice` among `values`, or `uniform`, `loguniform` or `int` between two inclusive ends."""

    kind: str
    values: tuple[Any, ...]

    def draw(self, random: np.random.Generator) -> Any:
        """One value."""
        if self.kind == "choice":
            return self.values[int(random.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "int":
            return int(random.integers(low, high + 1))
        if self.kind == "uniform":
            return float(random.uniform(low, high))
        return min(high, max(low, math.exp(random.uniform(math.log(low), math.log(high)))))

    def holds(self, value: Any) -> bool:
        """Whether `value` is one of the values."""
        return value in self.values if self.kind == "choice" else bool(self.values[0] <= value <= self.values[1])

    @property
    def size(self) -> float:
        """The number of values; infinite for a range of real numbers."""
        if self.kind == "choice":
            return len(self.values)
        return self.values[1] - self.values[0] + 1 if self.kind == "int" else math.inf

    def all(self) -> list[Any]:
        """Every value of a finite parameter."""
        return list(self.values) if self.kind == "choice" else list(range(self.values[0], self.values[1] + 1))


def parse(spec: Mapping[str, Any]) -> Parameter:
    """The parameter of an entry of `tune.space`, such as `{choice: [...]}`.

    Raises:
        ValueError: with the problem.
    """
    if len(spec) != 1 or next(iter(spec)) not in _KINDS:
        raise ValueError(f"expected one of {', '.join(_KINDS)} with a list, such as {{uniform: [0.0, 0.2]}}")
    kind, values = next(iter(spec.items()))
    if not isinstance(values, list) or not values:
        raise ValueError(f"{kind} takes a list of values, found {values!r}")
    if kind == "choice":
        if any(isinstance(v, dict | list) for v in values):
            raise ValueError("choice takes plain values")
        if any(v in values[:i] for i, v in enumerate(values)):
            raise ValueError("choice lists a value twice")
        return Parameter(kind, tuple(values))
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
    if len(numbers) != 2 or len(values) != 2 or numbers[0] >= numbers[1]:
        raise ValueError(f"{kind} takes [low, high], two numbers in ascending order, found {values!r}")
    if kind == "int" and any(v != int(v) for v in numbers):
        raise ValueError(f"int takes whole numbers, found {values!r}")
    if kind == "loguniform" and numbers[0] <= 0:
        raise ValueError(f"loguniform needs a low above 0, found {values[0]!r}")
    return Parameter(kind, tuple(map(int if kind == "int" else float, numbers)))


def space_of(config: Config) -> dict[str, Parameter]:
    """The parameters of a checked configuration, in a fixed order."""
    given = config.tune.space
    if given is None:
        most = config.label.clusters
        given = {**STANDARD, "distill.expansion_size": {"choice": [n for n in (5, 10, 20) if n <= most] or [most]}}
        given = {key: _possible(config, key, spec) for key, spec in given.items() if _matters(config, key)}
    return {key: parse(given[key]) for key in sorted(given, key=KEYS.index)}


def _possible(config: Config, key: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """The choices of a standard parameter that the objective allows; label_smoothing, for example, needs smoothing."""
    allowed = [value for value in spec["choice"] if not _mistake(config, key, value)]
    return {"choice": allowed or spec["choice"]}


def _mistake(config: Config, key: str, value: Any) -> str | None:
    """The problem for the objective that this value causes and the configured value does not; None when it is fine."""
    before = set(objective_of(config).mistakes(config))
    changed = with_values(config, {key: value})
    return next((text for path, text in objective_of(changed).mistakes(changed) if (path, text) not in before), None)


def _matters(config: Config, key: str) -> bool:
    """Whether the objective reads a key, under some value of the other keys that the search may vary."""
    objective = objective_of(config)
    section, _, name = key.partition(".")
    if section == "label":
        return objective.reads_expansions
    return name not in CONDITIONAL_KEYS or name in objective.all_keys()


def grid(space: Mapping[str, Parameter]) -> Iterator[Values]:
    """Every combination of a finite space, in a fixed order."""
    for values in itertools.product(*(p.all() for p in space.values())):
        yield dict(zip(space, values, strict=True))


def split(space: Mapping[str, Parameter], config: Config) -> tuple[dict[str, Parameter], dict[str, Parameter]]:
    """(the keys of the first pass, which only objectives with expansions have; the others)."""
    reads = objective_of(config).reads_expansions
    first = {key: p for key, p in space.items() if key in TEACHER_KEYS and reads}
    return first, {key: p for key, p in space.items() if key not in first}


def values_of(config: Config, keys: Iterable[str]) -> Values:
    """The configured value of each key."""
    return {key: attrgetter(key)(config) for key in keys}


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with these values.

    Raises:
        pydantic.ValidationError: a value is out of its key's range.
    """
    tree = config.model_dump()
    for key, value in values.items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    return Config.model_validate(tree)


def candidates(config: Config, space: Mapping[str, Parameter], count: int, seed: int) -> list[Values]:
    """Up to `count` different combinations, the configuration's own first: the whole grid where it is small enough,
    else random ones. Combinations that cannot work are left out."""

    def works(values: Values) -> bool:
        tried = with_values(config, values)
        return not any((*schema_problems(tried), *objective_of(tried).mistakes(tried)))

    found = [values_of(config, space)]
    if math.prod(p.size for p in space.values()) <= count:
        drawn = grid(space)
    else:
        random = np.random.default_rng([seed, 1])
        drawn = ({key: p.draw(random) for key, p in space.items()} for _ in range(50 * count))
    for values in drawn:
        if len(found) >= count:
            break
        if values not in found and works(values):
            found.append(values)
    return found


def steps_a_measurement(config: Config) -> int:
    """Steps between two measurements of a trial."""
    return max(1, config.distill.steps // config.tune.measurements)


def tune_problems(config: Config) -> Iterator[tuple[str, str]]:
    """The problems of section `tune`: (path, sentence)."""
    yield from _space_problems(config)
    if config.tune.grace > config.tune.measurements:
        yield "tune.grace", f"must be at most tune.measurements ({config.tune.measurements})"
    elif config.tune.grace * steps_a_measurement(config) > config.distill.steps:
        yield "tune.grace", f"a trial of distill.steps ({config.distill.steps}) ends before that many measurements"
    if config.tune.gpus_per_trial > 1 and config.tune.gpus_per_trial % 1:
        yield "tune.gpus_per_trial", "expected a share of one GPU, or a whole number of them"


def _space_problems(config: Config) -> Iterator[tuple[str, str]]:
    for key, spec in (config.tune.space or {}).items():
        path = f"tune.space.{key}"
        if key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, 1, 0.5)
            yield path, f"cannot vary; {f'did you mean {close[0]}?' if close else 'what can: ' + ', '.join(KEYS)}"
            continue
        try:
            parameter = parse(spec)
        except ValueError as error:
            yield path, str(error)
            continue
        if key == "label.feedback_passages" and len(config.label.depths) > 1:
            yield path, f"cannot vary while label.feedback_passages is a list, {list(config.label.depths)}"
            continue
        if problem := _range_problem(config, key, parameter):
            yield path, problem
        if not _matters(config, key):
            yield path, f"changes nothing for objective {config.distill.objective}"


def _kinds(key: str) -> set[Any]:
    """The types of a key's values, with those inside unions and annotations."""
    section, _, name = key.partition(".")
    inner: Any = Config.model_fields[section].annotation
    waiting, found = [inner.model_fields[name].annotation], set()
    while waiting:
        kind = waiting.pop()
        found.add(kind)
        waiting += get_args(kind)
    return found


def _range_problem(config: Config, key: str, parameter: Parameter) -> str | None:
    kinds = _kinds(key)
    if parameter.kind in ("uniform", "loguniform") and float not in kinds:
        # The ends of such a range may be valid, but not the numbers between them.
        return f"{parameter.kind} draws fractions; use {'int or choice' if int in kinds else 'choice'}"
    for value in parameter.values:  # a range is valid when both of its ends are
        if problem := _value_problem(config, key, value):
            return f"{problem}, found {value!r}"
    return None


def _value_problem(config: Config, key: str, value: Any) -> str | None:
    try:
        changed = with_values(config, {key: value})
    except ValidationError as error:
        message = error.errors()[-1]["msg"]  # the last error of a key that takes auto or a number is about the number
        return f"{message[:1].lower()}{message[1:]}"
    if mistake := _mistake(config, key, value):
        return mistake
    negatives, feedback = changed.distill.negatives_depth, changed.label.depths[-1]
    if {"distill.negatives_depth": negatives, "label.feedback_passages": feedback}.get(key, 0) > config.retrieve.depth:
        return f"must be at most retrieve.depth ({config.retrieve.depth})"
    scored = config.distill.negatives_depth if config.cross_encoder.depth == "auto" else config.cross_encoder.depth
    by_model = objective_of(config).reads_pairs and config.cross_encoder.model
    if key == "distill.negatives_depth" and by_model and negatives > scored:
        return f"only {scored} negatives a query are scored; raise cross_encoder.depth"
    return None
