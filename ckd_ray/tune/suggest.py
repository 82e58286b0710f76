"""The values of the next trial, from Optuna's TPE or at random.

A suggestion depends on the seed, the trial's number, and the trials that had ended when it began, and on no state in
memory. So a resumed search suggests what the uninterrupted one would have. A space of few combinations is tried
completely, in an order that the seed determines.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ckd_ray.errors import UserError
from ckd_ray.tune.records import Trial
from ckd_ray.tune.space import Parameter, Values, grid

_KEPT = "combination"
# Up to this many combinations are all tried: a model of so few is poor, and would suggest some of them repeatedly.
_FEW = 32


def check_installed(search: str) -> None:
    """Raise UserError, with the command to install it, when `tune.search` is optuna and Optuna is missing."""
    if search != "optuna":
        return
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError(
            "optuna is not installed",
            where="tune.search",
            fix="pip install 'ckd-ray[tune]', or search at random: --set tune.search=random",
        ) from None


class Suggester:
    """Draws the values of a trial.

    Args:
        kept: combinations of the keys that the teacher's scores depend on, the configuration's own first; [{}] when the
            space has no such key.
        space: the other keys.
        default: the configured values of all keys, which trial 0 takes.
        trials: the number of trials to run.

    Attributes:
        trials: the same, or the number of different combinations where that is smaller.
    """

    def __init__(
        self,
        kept: Sequence[Values],
        space: Mapping[str, Parameter],
        default: Values,
        *,
        search: str,
        seed: int,
        trials: int,
    ) -> None:
        self.kept, self.space, self.default = list(kept), dict(space), default
        self.search, self.seed = search, seed
        # The first trials are random, because TPE needs some to model: a third of a short search.
        self.at_random = max(2, min(10, trials // 3))
        self.trials = trials
        self._order: list[Values] | None = None
        # This does not depend on `trials`, which a resumed search may raise.
        if len(self.kept) * math.prod(p.size for p in self.space.values()) <= _FEW:
            found = [{**kept, **values} for kept in self.kept for values in grid(self.space)]
            order = np.random.default_rng([self.seed, 4]).permutation(len(found))
            self._order = [dict(self.default), *(found[i] for i in order if found[i] != self.default)]
            self.trials = min(trials, len(self._order))

    def values(self, number: int, ended: Sequence[Trial]) -> Values:
        """Values of all keys of the space for trial `number`, which is below `trials`."""
        if number == 0:
            return dict(self.default)
        if self._order is not None:
            return dict(self._order[number])
        if self.search == "random" or len([t for t in ended if t.measurements]) < self.at_random:
            random = np.random.default_rng([self.seed, 2, number])
            kept = self.kept[int(random.integers(len(self.kept)))]
            return {**kept, **{key: p.draw(random) for key, p in self.space.items()}}
        return self._tpe(number, ended)

    def _tpe(self, number: int, ended: Sequence[Trial]) -> Values:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        seed = int(np.random.default_rng([self.seed, 3, number]).integers(2**31))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # Optuna 6 will drop `gamma`
            # Searches are short, so a quarter of the trials counts as good; Optuna's default is a tenth.
            sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=self.at_random, gamma=lambda n: min(-(-n // 4), 25)
            )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        distributions = self._distributions()
        for trial in ended:
            params = self._params(trial.values)
            if params is not None and trial.measurements:
                study.add_trial(_known(trial, params, distributions))
        drawn = study.ask(distributions).params
        kept = self.kept[drawn.pop(_KEPT)] if _KEPT in drawn else self.kept[0]
        return {**kept, **drawn}

    def _distributions(self) -> dict[str, Any]:
        space = dict(self.space)
        if len(self.kept) > 1:
            space[_KEPT] = Parameter("choice", tuple(range(len(self.kept))))
        return {key: _distribution(parameter) for key, parameter in space.items()}

    def _params(self, values: Values) -> dict[str, Any] | None:
        """An ended trial's values in Optuna's form; None where they lie outside of the space (trial 0 may)."""
        params = {key: values[key] for key in self.space}
        if not all(p.holds(params[key]) for key, p in self.space.items()):
            return None
        if len(self.kept) > 1:
            own = {key: value for key, value in values.items() if key not in self.space}
            if own not in self.kept:
                return None
            params[_KEPT] = self.kept.index(own)
        return params


def importance(trials: Sequence[Trial]) -> dict[str, float] | None:
    """The importance of each key for being among the best quarter of the trials (PED-ANOVA), in shares that sum to 1;
    None where Optuna is missing, or fewer than six trials were measured."""
    measured = [t for t in trials if t.measurements]
    try:
        import optuna
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    except ImportError:
        return None
    if len(measured) < 6:
        return None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {key: _spanned([t.values[key] for t in measured]) for key in measured[0].values}
    study = optuna.create_study(direction="maximize")
    for t in measured:
        study.add_trial(optuna.trial.create_trial(params=t.values, distributions=distributions, value=t.best))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna marks the evaluator as experimental
        evaluator = PedAnovaImportanceEvaluator(target_quantile=0.25)
        found = get_param_importances(study, evaluator=evaluator)
    return {key: round(float(value), 4) for key, value in found.items()}


def _spanned(values: list[Any]) -> Any:
    """A distribution from which the values may come."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    distinct = sorted(set(values), key=str)
    if len(distinct) <= 5 or not all(isinstance(v, int | float) for v in distinct):
        return CategoricalDistribution(distinct)
    return FloatDistribution(min(values), max(values), log=min(values) > 0)


def _distribution(parameter: Parameter) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.kind == "choice":
        return CategoricalDistribution(parameter.values)
    low, high = parameter.values
    if parameter.kind == "int":
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=parameter.kind == "loguniform")


def _known(trial: Trial, params: dict[str, Any], distributions: dict[str, Any]) -> Any:
    from optuna.trial import TrialState, create_trial

    stopped = trial.state == "stopped"
    return create_trial(
        params=params,
        distributions=distributions,
        value=trial.measurements[-1][1] if stopped else trial.best,
        intermediate_values={int(m[0]): m[1] for m in trial.measurements},
        state=TrialState.PRUNED if stopped else TrialState.COMPLETE,
    )
