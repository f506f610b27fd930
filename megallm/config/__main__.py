"""`python -m megallm.config > docs/flags.md` writes the page of all flags.

`source <(python -m megallm.config completion bash)`, or zsh, completes them in a shell.
"""

import sys

from megallm.config.completion import SHELLS, completion_script
from megallm.config.documentation import flags_page

if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            sys.stdout.write(flags_page())
        case ["completion", shell] if shell in SHELLS:
            sys.stdout.write(completion_script(shell))
        case _:
            sys.exit(f"usage: python -m megallm.config [completion {'|'.join(SHELLS)}]")
