#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# A real Docker engine for the tests, and a base image that needs no registry. To be sourced:
#
#   . tests/engine.sh
#   engine_up [N]    uses the engine that answers, else installs and starts N (default 1; root on Debian or Ubuntu);
#                    exports DOCKER_HOST, where it started them also RLAR_TEST_ENGINES with all their addresses, and,
#                    where it made the base image, RLAR_TEST_BASE. Returns 1 if there is none
#   engine_down      ends the engines that engine_up started; to be called at exit
#
# Or run, for work by hand:  eval "$(bash tests/engine.sh up)"   and   bash tests/engine.sh down
#
# Tests count an engine's containers, so those that run at the same time each need an engine of their own.
#
# An engine that is started here has namespaces of its own for mounts, network and processes: the host's network and
# mounts stay as they are, nothing in it can reach a network, and it ends with one signal. Its folder has a short path
# because a socket's path is limited to 108 bytes.
#
# Not covered: other distributions (start an engine yourself, set DOCKER_HOST); a base image on another release than
# Debian 12 (the tests then take `rlar.sandbox.base`, which the engine must have or be able to pull).

engine_base=rlar-test/python:3.11

engine_say() { echo "engine: $*" >&2; }

# Whether an engine answers at $DOCKER_HOST.
engine_answers() { timeout -k 1 20 docker version >/dev/null 2>&1; }

engine_up() {
  engine_folders=()
  if command -v docker >/dev/null && engine_answers; then
    engine_say "using the one that answers${DOCKER_HOST:+ at $DOCKER_HOST}"
    engine_image
    return
  fi
  engine_install && engine_start && engine_image || return 1
  local first=$DOCKER_HOST
  export RLAR_TEST_ENGINES=$first
  while ((${#engine_folders[@]} < ${1:-1})); do
    engine_start || return 1
    [[ -z ${RLAR_TEST_BASE:-} ]] || docker -H "$first" save "$RLAR_TEST_BASE" | docker load >/dev/null || return 1
    RLAR_TEST_ENGINES+=" $DOCKER_HOST"
  done
  export DOCKER_HOST=$first
}

engine_install() {
  command -v dockerd >/dev/null && command -v docker >/dev/null && command -v docker-init >/dev/null && return
  if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    engine_say "none answers, and only root on Debian or Ubuntu can have one installed here"
    return 1
  fi
  engine_say "installing docker.io"
  local try
  for try in 1 2 3; do
    if { apt-get update -qq && engine_apt_install docker.io && engine_client; } >/dev/null 2>&1; then
      return
    fi
    engine_say "installing docker.io failed (try $try of 3)"
    sleep $((5 * try))
  done
  { apt-get update -qq && engine_apt_install docker.io && engine_client; } >&2
}

# The command `docker`: newer releases have it in a package of its own.
engine_client() {
  hash -r
  command -v docker >/dev/null || engine_apt_install docker-cli
}

# Installs without starting a service: `engine_start` starts the daemon in namespaces of its own.
engine_apt_install() {
  local policy=/usr/sbin/policy-rc.d made= code=0
  if [[ ! -e $policy ]]; then
    made=1
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
  fi
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" || code=$?
  [[ -z $made ]] || rm -f "$policy"
  return $code
}

engine_start() {
  if [[ $(id -u) != 0 ]]; then
    engine_say "none answers, and only root can start one"
    return 1
  fi
  local engine_folder
  engine_folder=$(mktemp -d /tmp/rlar.XXXX)
  engine_folders+=("$engine_folder")
  setsid unshare --mount --net --pid --fork --kill-child=KILL --mount-proc \
    docker-init -- dockerd -H "unix://$engine_folder/docker.sock" --pidfile "$engine_folder/docker.pid" \
    --exec-root "$engine_folder/exec" --data-root "$engine_folder/data" \
    --exec-opt native.cgroupdriver=cgroupfs --cgroup-parent "/${engine_folder##*/}" \
    --bridge=none --iptables=false --ip6tables=false >"$engine_folder/dockerd.log" 2>&1 </dev/null &
  echo $! >"$engine_folder/unshare.pid"
  export DOCKER_HOST=unix://$engine_folder/docker.sock
  local try
  for try in {1..240}; do
    if [[ -S $engine_folder/docker.sock ]] && engine_answers; then
      engine_say "started at $DOCKER_HOST"
      return
    fi
    kill -0 "$(<"$engine_folder/unshare.pid")" 2>/dev/null || break
    sleep 0.5
  done
  engine_say "the daemon did not come up; the end of its log:"
  tail -n 40 "$engine_folder/dockerd.log" >&2
  engine_down
  return 1
}

engine_down() {
  local folder
  for folder in "${engine_folders[@]:-}"; do
    engine_end "$folder"
  done
  engine_folders=()
}

engine_end() {
  local engine_folder=$1 outer inner try
  [[ -n $engine_folder && -d $engine_folder ]] || return 0
  outer=$(<"$engine_folder/unshare.pid")
  inner=$(cat "/proc/$outer/task/$outer/children" 2>/dev/null) || inner=
  # shellcheck disable=SC2086
  [[ -z $inner ]] || kill -TERM $inner 2>/dev/null || true # `unshare` itself ignores TERM
  for try in {1..40}; do
    [[ -d /proc/$outer ]] && [[ $(sed 's/.*) //' "/proc/$outer/stat" 2>/dev/null) != Z* ]] || break
    sleep 0.25
  done
  kill -KILL "$outer" 2>/dev/null || true
  wait "$outer" 2>/dev/null || true
  find /sys/fs/cgroup -depth -type d -path "*/${engine_folder##*/}*" -exec rmdir {} + 2>/dev/null || true
  rm -rf -- "$engine_folder" || true
}

# Makes the base image out of Debian's packages: an interpreter with its library, and no shell.
engine_image() {
  if docker image inspect "$engine_base" >/dev/null 2>&1; then
    export RLAR_TEST_BASE=$engine_base
    return
  fi
  if ! grep -q '^VERSION_CODENAME=bookworm$' /etc/os-release 2>/dev/null || ! command -v apt-get >/dev/null; then
    engine_say "no base image is made on this distribution; the tests take the default of rlar.sandbox.base"
    return
  fi
  engine_say "making $engine_base"
  local work try
  work=$(mktemp -d)
  for try in 1 2 3; do
    if engine_packages "$work"; then
      if engine_root "$work"; then
        export RLAR_TEST_BASE=$engine_base
        rm -rf -- "$work"
        return
      fi
    fi
    engine_say "making the base image failed (try $try of 3)"
    apt-get update -qq >&2 || true
  done
  rm -rf -- "$work"
  return 1
}

engine_packages() {
  (
    cd -- "$1" && rm -f -- *.deb && apt-get -o APT::Sandbox::User=root download -qq \
      python3.11 python3.11-minimal libpython3.11-minimal libpython3.11-stdlib \
      libc6 libcrypt1 libgcc-s1 libstdc++6 zlib1g libexpat1 libssl3 libbz2-1.0 liblzma5 libffi8 libsqlite3-0 \
      libncursesw6 libtinfo6 libreadline8 libuuid1 libdb5.3 media-types netbase tzdata
  ) >&2
}

engine_root() {
  local root=$1/root deb
  rm -rf -- "$root"
  mkdir -p "$root"/{usr/{bin,lib,lib64,sbin},etc,tmp,proc,sys,dev}
  ln -s usr/bin usr/lib usr/lib64 usr/sbin "$root/"
  for deb in "$1"/*.deb; do
    dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$root" --keep-directory-symlink || return 1
  done
  rm -rf -- "$root"/usr/share/{doc,man,lintian}
  ln -sf python3.11 "$root/usr/bin/python3"
  printf 'root:x:0:0:root:/root:/usr/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n' \
    >"$root/etc/passwd"
  printf 'root:x:0:\nnogroup:x:65534:\n' >"$root/etc/group"
  chmod 1777 "$root/tmp"
  tar -c -C "$root" --owner=0 --group=0 --numeric-owner . | docker import - "$engine_base" >/dev/null
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  set -euo pipefail
  case ${1:-} in
    up)
      engine_up
      [[ -z ${DOCKER_HOST:-} ]] || echo "export DOCKER_HOST=$DOCKER_HOST"
      [[ -z ${RLAR_TEST_BASE:-} ]] || echo "export RLAR_TEST_BASE=$RLAR_TEST_BASE"
      ;;
    down)
      engine_folder=${DOCKER_HOST:-}
      engine_folder=${engine_folder#unix://}
      engine_folder=${engine_folder%/docker.sock}
      [[ $engine_folder != /tmp/rlar.???? ]] || engine_end "$engine_folder" # else not ours
      ;;
    *)
      echo "usage: bash tests/engine.sh up|down" >&2
      exit 2
      ;;
  esac
fi
