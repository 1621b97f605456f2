# SPDX-License-Identifier: Apache-2.0
"""Agent-backed rewards for verl: every query scored by the tool that fits it.

Importing this package imports no verl, ray or torch; see `README.md` for the map of the modules.
"""

__version__ = "0.1.0"
