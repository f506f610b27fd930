"""Completion of flags and their values in bash and zsh."""

from __future__ import annotations

from megallm.config.arguments import all_flags
from megallm.config.fields import all_fields

SHELLS = ("bash", "zsh")

# The programs are called by way of python or torchrun, so these are what is completed, where one of ours follows.
_BASH = """\
_megallm() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" word ours=
    COMPREPLY=()
    for word in "${{COMP_WORDS[@]:0:COMP_CWORD}}"; do
        case "$word" in pretrain_*.py|*/pretrain_*.py) ours=1 ;; esac
    done
    [ -n "$ours" ] || return 0
    case "$previous" in
{values}
    esac
    case "$current" in
        --*) COMPREPLY=($(compgen -W "{flags}" -- "$current")) ;;
    esac
}}
complete -o bashdefault -o default -F _megallm python python3 torchrun pretrain_gpt.py
"""


def completion_script(shell: str) -> str:
    """A script that a shell reads to complete our flags: `source <(python -m megallm.config completion bash)`."""
    choices = {entry.flag: " ".join(map(str, entry.choices)) for entry in all_fields() if entry.choices}
    values = [
        f'        {flag}) COMPREPLY=($(compgen -W "{words}" -- "$current")); return 0 ;;'
        for flag, words in choices.items()
    ]
    script = _BASH.format(values="\n".join(values), flags=" ".join(sorted(all_flags())))
    return script if shell == "bash" else "autoload -U +X bashcompinit && bashcompinit\n" + script
