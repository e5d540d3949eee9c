"""Completion scripts, made from the parser itself: commands, options, and files where neither fits."""

from __future__ import annotations

import argparse

from jaxplan.cli.output import emit

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
_jaxplan() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" found=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        found="{top}"
    elif [ "${{word#-}}" != "$word" ]; then
        case "${{COMP_WORDS[1]}}" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$found" -- "$word"))
    if [ "${{#COMPREPLY[@]}}" -eq 0 ]; then COMPREPLY=($(compgen -f -- "$word")); fi
}}
complete -F _jaxplan jaxplan
"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def options(parser: argparse.ArgumentParser) -> None:
    """Options of `jaxplan completion`."""
    parser.add_argument("shell", choices=SHELLS)


def show(parser: argparse.ArgumentParser, shell: str) -> int:
    """Print the script for a shell."""
    commands = words(parser)
    top = commands.pop("")
    if shell == "fish":
        lines = [f"complete -c jaxplan -n __fish_use_subcommand -f -a {word}" for word in top if not word.startswith("-")]
        for name, found in commands.items():
            for word in found:
                kind = "-l" if word.startswith("--") else "-s" if word.startswith("-") else "-f -a"
                lines.append(f"complete -c jaxplan -n '__fish_seen_subcommand_from {name}' {kind} {word.lstrip('-')}")
        emit("\n".join(lines))
    else:
        cases = "\n".join(f'        {name}) found="{" ".join(found)}" ;;' for name, found in commands.items())
        emit((_ZSH if shell == "zsh" else "") + _BASH.format(top=" ".join(top), cases=cases).rstrip("\n"))
    return 0


def words(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """{command: its options}; of "" the commands and the options before one."""
    found = {"": [option for action in parser._actions for option in action.option_strings]}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found[""] += list(action.choices)
            for name, inner in action.choices.items():
                found[name] = [word for part in inner._actions for word in [*part.option_strings, *_choices(part)]]
    return found


def _choices(action: argparse.Action) -> list[str]:
    return [str(choice) for choice in action.choices] if action.choices and not action.option_strings else []
