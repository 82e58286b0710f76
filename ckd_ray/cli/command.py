"""What every command of the command line shares: its options, its streams, its errors, and where it runs."""

from __future__ import annotations

import functools
import inspect
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated, Any

import typer

from ckd_ray.errors import JobError, LostRayError, UserError, described, without_advice
from ckd_ray.progress import say, set_quiet, without_keys
from ckd_ray.ray_util.again import remember, same_command
from ckd_ray.ray_util.processes import end_when_broken
from ckd_ray.ray_util.watch import lost, terminate
from ckd_ray.streams import log_path, objects, only_ours

# `ckd-ray --help` shows these panels in the order in which people meet them.
RUN, LOOK, SHARE, CLUSTERS = "Run", "Look at", "Share", "Clusters"

ConfigOption = Annotated[
    str | None, typer.Option("--config", "-c", help="YAML configuration. Default: the quick start that is built in.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Set one key: --set distill.temperature=0.3 (repeatable).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress and no messages.")]
ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="Where to run: `local`, a Ray address, a dashboard (http://HOST:8265), or a cluster launcher's YAML."
        " Default: a running Ray, else local.",
    ),
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Start (or end) the cluster without asking.")]
DownOption = Annotated[
    bool, typer.Option("--down", help="Take the cluster of a YAML down afterwards, even after a failure.")
]
_WHERE_OPTIONS: dict[str, Any] = {
    "yes": YesOption,
    "down": DownOption,
    "keep": Annotated[bool, typer.Option("--keep", help="Leave the cluster up afterwards (the default).")],
    "detach": Annotated[bool, typer.Option("--detach", help="Send the job and return; `attach` follows it.")],
    "dry_run": Annotated[
        bool,
        typer.Option("--dry-run", help="Print what a YAML's cluster would change in your account; do nothing."),
    ],
}
_JOB_OPTIONS: dict[str, Any] = {"config": ConfigOption, "set_": SetOption, "cluster": ClusterOption}
_OUTPUT_OPTIONS: dict[str, Any] = {"json_": JsonOption, "quiet": QuietOption}
_VERBOSE_OPTION: dict[str, Any] = {
    "verbose": Annotated[bool, typer.Option("--verbose", help="Show what Ray and other libraries print, too.")]
}
# These do not travel with a job: they are settled before it is sent, or travel as the resolved configuration.
_NOT_OF_THE_JOB = {*_JOB_OPTIONS, *_WHERE_OPTIONS}

app = typer.Typer(
    name="ckd-ray",
    help="Distil collective relevance labels into a late-interaction (ColBERT) retriever, on Ray.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
Command = Callable[..., Any]


def command(
    panel: str, *, name: str | None = None, text: str | None = None, prompts: bool = False
) -> Callable[[Command], Command]:
    """Put a command on `app`, with `--json` and `--quiet`.

    The command takes `json_` where it prints an object, and returns its exit status where that is not 0.

    Args:
        panel: where `ckd-ray --help` shows it.
        name, text: its name and its help; those of the function when left out.
        prompts: the command reads lines from the terminal, so its streams are not redirected.
    """

    def decorate(body: Command) -> Command:
        own = inspect.signature(body, eval_str=True).parameters

        def call(**values: Any) -> None:
            set_quiet(values["quiet"])
            verbose = values.get("verbose", False)
            with nullcontext() if prompts else only_ours(verbose=verbose):
                status = body(**{key: value for key, value in values.items() if key in own})
            if status:
                raise typer.Exit(status)

        functools.update_wrapper(call, body)
        options = [option for option in own.values() if option.name not in _OUTPUT_OPTIONS]
        found = guarded(_shown(call, [*options, *_parameters(_OUTPUT_OPTIONS)]))
        app.command(name=name, help=text, rich_help_panel=panel)(found)
        return found

    return decorate


def job_command(
    name: str, check: Callable[..., None] | None = None, text: str | None = None
) -> Callable[[Command], Command]:
    """Put the command `name` on `app`. It runs here, inside `connected`, or as a job on a remote `--cluster`.

    The function is given the configuration and whether `--json` prints its object, then its own options.

    Args:
        check: is given all options, and raises UserError for what is wrong with them before anything starts.
        text: the help of the command; that of the function when left out.
    """

    def decorate(body: Command) -> Command:
        own = list(inspect.signature(body, eval_str=True).parameters.values())[2:]
        options = [*_parameters(_JOB_OPTIONS), *own, *_parameters({**_WHERE_OPTIONS, **_VERBOSE_OPTION})]
        options += _parameters(_OUTPUT_OPTIONS)

        def call(**values: Any) -> int | None:
            from ckd_ray.jobs.remote import ClusterOptions
            from ckd_ray.jobs.session import session
            from ckd_ray.ray_util.target import parse_target

            if check is not None:
                check(**values)
            target = parse_target(values["cluster"])
            where = ClusterOptions(**{option: values[option] for option in _WHERE_OPTIONS})
            where.check(target)
            if target is not None and target.remote:
                return _send(target, name, job_words(inspect.signature(call), values), values, where)
            with session(values["config"], values["set_"] or [], values["cluster"]) as config:
                body(config, values["json_"], **{option.name: values[option.name] for option in own})
            return None

        functools.update_wrapper(call, body)
        return command(RUN, name=name, text=text)(_shown(call, options))

    return decorate


def _parameters(options: dict[str, Any]) -> list[inspect.Parameter]:
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if name in _JOB_OPTIONS else False,
            annotation=kind,
        )
        for name, kind in options.items()
    ]


def _shown(call: Command, parameters: list[inspect.Parameter]) -> Command:
    """Let Typer see these parameters."""
    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    call.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in keyword_only}
    return call


def job_words(signature: inspect.Signature, values: dict[str, Any]) -> list[str]:
    """The options that give a job these values, without those that are settled before it is sent."""
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


def _send(target: Any, name: str, words: list[str], values: dict[str, Any], where: Any) -> int:
    from ckd_ray.checks import load_config
    from ckd_ray.jobs.remote import Command as RemoteCommand, run_remote
    from ckd_ray.ray_util.token import use_token

    config = load_config(values["config"], values["set_"] or [])
    use_token()
    arguments = {option: value for option, value in values.items() if option not in _NOT_OF_THE_JOB}
    return run_remote(target, RemoteCommand(name, words, arguments, config), where, objects())


def guarded(call: Command) -> Command:
    """A command whose errors end the process with a message and the right status, never with a traceback."""

    @functools.wraps(call)
    def wrapped(**kwargs: Any) -> None:
        remember(fresh=kwargs.get("fresh", False), start=kwargs.get("start"))
        try:
            call(**kwargs)
        except typer.Exit:  # the command has chosen its status itself
            raise
        except KeyboardInterrupt:
            code = fail(f"interrupted; {same_command()} goes on where this one stopped", 130)
        except UserError as error:
            code = fail(_message(error), 2)
        except LostRayError:  # ray_util/watch.py has said why
            code = 1
            if hint := _log_hint():
                say(hint.strip("\n"), always=True)
        except JobError as error:
            code = fail(_message(error) + _log_hint(), 1)
        except Exception as error:  # whatever Ray or the system throws: the cause in a line, the traceback on request
            if os.environ.get("CKD_RAY_TRACEBACK"):
                raise
            again = f"; give {same_command()} again: what was finished is kept" if _may_pass(error) else ""
            hint = "CKD_RAY_TRACEBACK=1 shows the traceback"
            code = fail(f"{described(error)}{again}\n  ({hint}){_log_hint()}", 1)
        else:
            return
        raise typer.Exit(code)

    return wrapped


def fail(message: str, code: int) -> int:
    """Print why the command ends. Returns its exit status."""
    say(f"ckd-ray: {message}", always=True)
    return code


def _message(error: BaseException) -> str:
    """The message of our own error. Raised in a task or an actor, it comes with Ray's traceback around it."""
    return without_advice(str(getattr(error, "cause", error)))


def _may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed: the error is of storage, the network or memory, or a process was lost."""
    import ray

    while isinstance(cause := getattr(error, "cause", None), BaseException) and cause is not error:
        error = cause
    if isinstance(error, ray.exceptions.RayError):
        return not isinstance(error, ray.exceptions.RayTaskError)
    return type(error) is OSError or isinstance(error, (ConnectionError, TimeoutError))


def _log_hint() -> str:
    """A hint at the log file with the lines that `only_ours` did not show."""
    path = log_path()
    if path is None:
        return ""
    where = f" on {socket.gethostname()}" if "CKD_RAY_OBJECT_MARK" in os.environ else ""  # of a job: on the head
    return f"\n  (what Ray and other libraries printed: {path}{where})"


def put(value: Any) -> None:
    """Print the one object of `--json`. Keys in URIs are hidden: what a program reads is logged as well.

    The output of a job comes back as one text, in which a mark at the start of a line tells the object from the rest.
    """
    mark = os.environ.get("CKD_RAY_OBJECT_MARK", "")
    start = f"\n{mark}" if mark else ""
    print(start + json.dumps(without_keys(value)), file=objects(), flush=True)


def main() -> None:
    """Entry point: exit status 0 done, 1 the job failed, 2 the user's input is wrong, 130 interrupted."""
    end_when_broken()
    signal.signal(signal.SIGTERM, terminate)
    lost_before = lost()  # by this process, which may be another program's
    try:
        app()
    except KeyboardInterrupt:  # before a command has begun
        sys.exit(fail("interrupted", 130))
    except SystemExit as end:
        if lost() == lost_before:
            raise
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)  # Ray's threads may crash while Python closes without it
