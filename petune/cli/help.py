"""The help of a command: every argument by its name, `METHOD...`, without the Python type that typer adds."""

from __future__ import annotations

import traceback
from typing import Any

from typer.core import TyperCommand

from petune.base.errors import PluginError

FLAGS_FOR = {
    "--learning-rate": "--lr",
    "--data": "--dataset",
    "--model": "--backbone",
    "--batch": "--batch-size",
    "--num-epochs": "--epochs",
}
"""Flags that users try, and those of petune that are spelled too differently to be suggested."""


class Command(TyperCommand):
    """A command whose help is the same with every version of typer."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words, or fail with what to write instead of an argument too many: `run adaptformer`."""
        ctx.allow_extra_args = True
        try:
            rest = super().parse_args(ctx, args)
        except Exception as error:  # click's, which newer versions of typer bring along under another name
            given = getattr(error, "option_name", "")
            instead = FLAGS_FOR.get(given)
            if instead and any(instead in param.opts for param in self.get_params(ctx)):
                ctx.fail(f"No such option: {given}. Did you mean {instead}?")
            raise
        if ctx.args:
            takes_method = any("--method" in param.opts for param in self.get_params(ctx))
            advice = (
                f"To choose a method, write --method {ctx.args[0]}" if takes_method else f"See {ctx.command_path} -h"
            )
            ctx.fail(f"unexpected argument: {ctx.args[0]}. {advice}")
        return rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an exit in the middle of it is an error, since petune and typer never exit there."""
        try:
            return super().invoke(ctx)
        except SystemExit as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise PluginError(
                f"{frame.filename}, line {frame.lineno}, ended the program (SystemExit: {error}). Repair, update or "
                "remove the plugin or package that it belongs to"
            ) from error

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the words of the usage line; what may be left out is in brackets."""
        arguments = [p for p in self.get_params(ctx) if p.param_type_name == "argument"]
        names = [_name(p) if p.required else f"[{_name(p)}]" for p in arguments]
        return ["[OPTIONS]", *names]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            if param.param_type_name == "argument":
                sections["Arguments"].append((_name(param), record[1]))
            else:
                sections["Options"].append(record)
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def _name(argument: Any) -> str:
    """Return `DIR`, or `DIR...` for an argument that may be repeated."""
    return f"{argument.metavar}{'' if argument.nargs == 1 else '...'}"
