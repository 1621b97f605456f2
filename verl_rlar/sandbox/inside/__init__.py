# SPDX-License-Identifier: Apache-2.0
"""What runs inside a box. These files are copied into the image; nothing of them runs on the host."""
