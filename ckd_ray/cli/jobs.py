"""Commands that can run elsewhere: what `--cluster` and its companions mean, once for all of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="Where: `local`, a Ray address, a dashboard (http://HOST:8265), or a cluster launcher's YAML."
        " Default: a running Ray, else local.",
    ),
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Start (or end) the cluster without asking.")]
DownOption = Annotated[bool, typer.Option("--down", help="Take the cluster of a YAML down afterwards, come what may.")]
_COMPANIONS: dict[str, Any] = {
    "yes": YesOption,
    "down": DownOption,
    "keep": Annotated[bool, typer.Option("--keep", help="Leave the cluster up afterwards (the default).")],
    "detach": Annotated[bool, typer.Option("--detach", help="Send the job and return; `attach` follows it.")],
}
# What is settled here, or travels as the resolved configuration.
_NOT_OF_THE_JOB = {"config", "set_", "cluster", *_COMPANIONS}


def job_command(
    name: str, check: Callable[..., None] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The command `name` with `--yes --down --keep --detach`; for a remote `--cluster` its body runs there, as a job.

    Args:
        check: given the command's options, raises UserError for what is wrong with them, before anything starts.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)

        @functools.wraps(command)
        def call(**values: Any) -> None:
            from ckd_ray.ray_util.target import parse_target

            if check is not None:
                check(**values)
            chosen = {option: values.pop(option) for option in _COMPANIONS}
            target = parse_target(values["cluster"])
            if any(chosen.values()):
                from ckd_ray.jobs.remote import ClusterOptions

                ClusterOptions(**chosen).check(target)
            if target is None or not target.remote:
                command(**values)
                return
            status = _send(target, name, job_words(signature, values), values, chosen)
            if status:
                raise typer.Exit(status)

        companions = [
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
            for option, kind in _COMPANIONS.items()
        ]
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()]
        call.__signature__ = signature.replace(parameters=[*own, *companions])  # type: ignore[attr-defined]
        call.__annotations__ = {**command.__annotations__, **_COMPANIONS}
        return call

    return decorate


def _send(target: Any, name: str, words: list[str], values: dict[str, Any], chosen: dict[str, bool]) -> int:
    from ckd_ray.checks import load_config
    from ckd_ray.jobs.launcher import object_stream
    from ckd_ray.jobs.remote import ClusterOptions, Command, run_remote
    from ckd_ray.progress import set_quiet
    from ckd_ray.ray_util.token import use_token

    set_quiet(values["quiet"])
    config = load_config(values["config"], values["set_"] or [])
    use_token()
    arguments = {option: value for option, value in values.items() if option not in _NOT_OF_THE_JOB}
    command = Command(name, words, arguments, config)
    with object_stream(values["quiet"]) as objects:
        return run_remote(target, command, ClusterOptions(**chosen), objects)


def job_words(signature: inspect.Signature, values: dict[str, Any]) -> list[str]:
    """The command line that gives these values again, without what is settled before a job is sent."""
    words: list[str] = []
    for parameter in signature.parameters.values():
        value = values[parameter.name]
        if parameter.name in _NOT_OF_THE_JOB:
            continue
        if value is None or value is False or value == parameter.default:  # 0 is neither None nor False
            continue
        option = parameter.annotation.__metadata__[0]  # in an Annotated, the first name stands where a default would
        name = next(word for word in (option.default, *(option.param_decls or ())) if word.startswith("--"))
        words += [name] if value is True else [name, str(value)]
    return words
