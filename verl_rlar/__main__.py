# SPDX-License-Identifier: Apache-2.0
"""``python -m verl_rlar`` is ``rlar``. Ctrl-C counts while the command is still being imported, too."""

import sys


def main() -> None:
    """Runs the command."""
    try:
        from verl_rlar.cli import main as command
    except KeyboardInterrupt:
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
