# SPDX-License-Identifier: Apache-2.0
"""``python -m verl_rlar`` is ``rlar``."""

from verl_rlar.cli import main

if __name__ == "__main__":
    main()
