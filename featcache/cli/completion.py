"""The verb ``featcache completion``: a shell script that completes verbs, flags, choices and stores."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

from featcache.errors import FeatcacheError

SCRIPTS = {
    "bash": """_featcache() {
  local IFS=$'\\n'
  COMPREPLY=($(featcache completion words "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//@/}
complete -o default -F _featcache featcache
""",
    "zsh": """#compdef featcache
_featcache() {
  local -a found
  found=(${(f)"$(featcache completion words "${(@)words[2,$CURRENT]}" 2>/dev/null)"})
  (( $#found )) && compadd -a found || _files
}
compdef _featcache featcache
""",
    "fish": """function __featcache
  featcache completion words (commandline -opc)[2..] (commandline -ct) 2>/dev/null
end
complete -c featcache -a '(__featcache)'
""",
}
HOW = {
    "bash": 'eval "$(featcache completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(featcache completion zsh)" in ~/.zshrc, after compinit',
    "fish": "featcache completion fish > ~/.config/fish/completions/featcache.fish",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``featcache completion``."""
    parser.epilog = "; ".join(HOW.values())
    parser.add_argument("shell", choices=(*SCRIPTS, "words"), help="shell; `words` is for use by its script")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="WORD", help="with `words`: the command so far")


def run(args: argparse.Namespace) -> int:
    """``featcache completion SHELL``."""
    print(SCRIPTS[args.shell] if args.shell in SCRIPTS else "\n".join(candidates(args.words)))
    return 0


def candidates(words: Sequence[str]) -> list[str]:
    """Completions of the last word: verbs, flags, choices of the flag before it, heads, or stores.

    >>> candidates(["enc"]), candidates(["encode", "--pre"])
    (['encode'], ['--precision', '--preprocess', '--pretrained'])
    """
    from featcache.cli.main import VERBS

    *before, current = words or [""]
    if not before:
        return sorted(verb for verb in VERBS if verb.startswith(current))
    if before[0] not in VERBS:
        return []
    parser = argparse.ArgumentParser()
    import_module(VERBS[before[0]][0]).add_arguments(parser)
    actions = parser._option_string_actions
    if current.startswith("-"):
        return sorted(flag for flag in (*actions, "--json") if flag.startswith(current) and flag.startswith("--"))
    flag = actions.get(before[-1])
    if flag is not None and flag.choices is not None:
        return sorted(str(choice) for choice in flag.choices if str(choice).startswith(current))
    root = before[before.index("--root") + 1] if "--root" in before[:-1] else None
    names = _stores(root)
    for action in parser._actions if flag is None else ():
        names |= set(getattr(action, "completer", ()))  # set by verbs, such as names of heads
    return sorted(name for name in names if name.startswith(current))


def _stores(root: str | None) -> set[str]:
    from featcache.store import list_stores

    try:
        entries = list_stores(root)
    except FeatcacheError:
        return set()
    return {name for entry in entries if entry.finished for name in (entry.short, entry.reference)}
