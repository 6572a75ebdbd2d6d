"""radio-train: run a recipe or a saved config.yaml with command-line overrides.

Usage and errors about names come without torch, whose import takes seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from radio.errors import ConfigError, did_you_mean

from .recipes import recipes
from .tables import tables

USAGE = """usage: radio-train RECIPE [--section.option value ...] [--restart]
       radio-train RECIPE --plan [--world RANKS] [--peak-tflops NUMBER] ...
       radio-train runs/NAME/config.yaml [--out runs/OTHER] ...

One run of distillation. Repeat the command to go on where it was stopped. --plan runs nothing: it prints
which ranks do what, the memory they need, and what the run costs.
`radio-train RECIPE --help` lists every option with the recipe's value. Recipes:
"""
PLAN = "--plan"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `radio-train`; return its exit code: 0 done, 2 usage, 85 stopped, to be started again.

    Raises:
        RadioError: a recipe or setting is unknown, data or weights are missing, or the run cannot continue.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console()
    if not arguments or arguments[0] in ("-h", "--help"):
        console.print(USAGE + _listing(), markup=False, highlight=False, soft_wrap=True)
        return 0 if arguments else 2
    name, options = arguments[0], arguments[1:]
    _check_name(name)
    from . import commands

    if PLAN in options:
        return commands.plan(name, [option for option in options if option != PLAN], console)
    if name in tables:
        return commands.make_table(name, options, console)
    return commands.run(name, options, console)


def _check_name(name: str) -> None:
    """Check that the first word is a file of settings, a recipe or a table."""
    if is_file(name) or name in tables or name in recipes:
        return
    if name.startswith("-"):
        raise ConfigError(
            f"the first word is a recipe or a config.yaml, got {name!r}; recipes: {', '.join(recipes)}"
        )
    known = [*recipes, *tables]
    hint = did_you_mean(name, known) or f"; known: {', '.join(known)}"
    raise ConfigError(f"unknown recipe {name!r}{hint}")


def is_file(name: str) -> bool:
    """Check whether the first word names a file of settings."""
    return name.endswith((".yaml", ".yml"))


def _listing() -> str:
    described = {name: recipes[name].__doc__ for name in recipes}
    described |= {name: tables[name].__doc__ for name in tables}
    return "\n".join(f"  {name:<16}{(text or '').splitlines()[0]}" for name, text in described.items())
