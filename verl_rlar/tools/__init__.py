# SPDX-License-Identifier: Apache-2.0
"""How each kind of tool scores a sample. Today: rules (`verl_rlar.tools.rules`), run by `verl_rlar.tools.runner`."""
