"""`python -m megallm.config > docs/flags.md` writes the page of all flags."""

import sys

from megallm.config.documentation import flags_page

if __name__ == "__main__":
    sys.stdout.write(flags_page())
