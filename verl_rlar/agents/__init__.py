# SPDX-License-Identifier: Apache-2.0
"""What looks for tools and makes them. It proposes; the exam decides, and the service writes the library."""
