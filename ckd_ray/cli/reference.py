"""The page about the command line, made of the commands themselves: `python -m ckd_ray.cli.reference > PAGE`."""

from __future__ import annotations

from typing import Any

import typer.main

from ckd_ray.cli import app

_HEAD = """# Command line

Every command, argument and option. `python -m ckd_ray.cli.reference` writes this page from `ckd_ray/cli/`; a test
compares the two, and `ckd-ray COMMAND --help` shows the same in a terminal. The exit statuses are in
[exit_codes.md](exit_codes.md), the keys of a configuration in [configuration.md](configuration.md).
"""


def page() -> str:
    """The page in Markdown: a section a command, a row an argument or option."""
    commands: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
    index = "".join(f"| [{name}](#ckd-ray-{name}) | {_cell(found.help)} |\n" for name, found in commands.items())
    sections = [_section(name, command) for name, command in commands.items()]
    return "\n".join([_HEAD, f"| command | what it does |\n|---|---|\n{index}", *sections])


def _section(name: str, command: Any) -> str:
    arguments = [_metavar(p) for p in command.params if p.param_type_name == "argument"]
    usage = " ".join(["ckd-ray", name, *arguments, "[OPTIONS]"])
    rows = "".join(f"| {_names(p)} | {_default(p)} | {_cell(p.help)} |\n" for p in command.params)
    table = f"| option | default | meaning |\n|---|---|---|\n{rows}"
    return f"## ckd-ray {name}\n\n{_cell(command.help)}\n\n```\n{usage}\n```\n\n{table}"


def _metavar(argument: Any) -> str:
    name = (argument.metavar or argument.name.upper()).strip("[]")
    return name if argument.required else f"[{name}]"


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_metavar(parameter)}`"
    return ", ".join(f"`{name}`" for name in parameter.opts)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    return "" if parameter.default in (None, False) else f"`{parameter.default}`"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
