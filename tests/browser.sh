#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Chromium for the tests of the report, where a machine of Debian or Ubuntu has none. To be sourced:
#
#   . tests/browser.sh
#   browser_up       installs it (root); where that cannot be, the tests that need it say so and are skipped

browser_up() {
  command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null && return
  [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null || return 0
  echo "browser: installing chromium" >&2
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
    >/dev/null 2>&1 || echo "browser: there is none; tests of the report in a browser are skipped" >&2
}
