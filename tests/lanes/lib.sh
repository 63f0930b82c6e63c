# shellcheck shell=bash
# What setup, the two lanes and guest-images/fetch-debian share. Sourced, never run.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
# Worktrees may share one cache; without the variable it is this tree's target/.
cache=$(realpath -m "${TRAPLINE_CACHE_DIR:-$repo/target}")
# shellcheck disable=SC2034  # the sourcing scripts use it
lanes=$cache/lanes
me=${0##*/}

note() { printf '%s: %s\n' "$me" "$*" >&2; }

# die STATUS MESSAGE...
die() {
    local status=$1
    shift
    note "$*"
    exit "$status"
}

have() { command -v "$1" >/dev/null 2>&1; }

# One word that a POSIX shell reads back as exactly $1.
quote() { printf "'%s'" "${1//\'/\'\\\'\'}"; }

is_count() { [[ $1 =~ ^[1-9][0-9]{0,5}$ ]]; }

# Waits until this run alone holds the lock file; the lock goes with the process. What the process
# starts must not inherit it where it may live longer, but nothing here leaves a process behind.
lock() {
    mkdir -p "${1%/*}"
    exec {lock_fd}>"$1"
    if ! flock -n "$lock_fd"; then
        note "waiting for another run that holds $1"
        flock "$lock_fd"
    fi
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif have sudo; then
        sudo "$@"
    else
        die 69 "this step needs root: run it as root or install sudo ($*)"
    fi
}

# Runs a command quietly and shows what it said only if it fails.
quietly() {
    local log
    log=$(mktemp)
    if "$@" >"$log" 2>&1; then
        rm -f "$log"
    else
        local status=$?
        tail -n 25 "$log" >&2
        rm -f "$log"
        return "$status"
    fi
}

# Package lists: fetched once per run, and only by a step that needs them. apt does not wait for
# another apt's lock on the lists, so this does.
apt_updated=
apt_update() {
    [ -z "$apt_updated" ] || return 0
    local try
    for try in 1 2 3 4 5; do
        if quietly as_root apt-get -q -o Acquire::Retries=3 update; then
            apt_updated=yes
            return 0
        fi
        [ "$try" = 5 ] || sleep $((try * 3))
    done
    die 69 "apt-get update failed: check the network and the machine's apt sources"
}

is_installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# The version apt would take of a package; nothing if there is none.
candidate() {
    local version
    version=$(apt-cache policy "$1" 2>/dev/null | sed -n 's/^  Candidate: //p')
    [ "$version" = '(none)' ] || printf '%s' "$version"
}

apt_get_install() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends \
        -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 install "$@"
}

# apt_install PACKAGE...: installs those that are missing. A package may need exactly the version
# of a library that a newer one from the backports has replaced; then it comes from there, too.
apt_install() {
    local missing=() package
    for package in "$@"; do
        is_installed "$package" || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    apt_update
    note "installing ${missing[*]}"
    apt_get_install "${missing[@]}" >/dev/null 2>&1 ||
        apt_get_install -t "$(codename)-backports" "${missing[@]}" >/dev/null 2>&1 ||
        quietly apt_get_install "${missing[@]}" ||
        die 69 "apt-get could not install: ${missing[*]}"
}

codename() {
    # shellcheck source=/dev/null
    (. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
}

# apt_fetch PACKAGE DIR: the package's file into DIR, not installed. A list that is older than
# the archive names files that are gone, so a failure leads to an update and a second try.
apt_fetch() {
    local get=(apt-get -q -o Acquire::Retries=3 -o "APT::Sandbox::User=$(id -un)" download "$1")
    (cd "$2" && "${get[@]}" >/dev/null 2>&1) && return 0
    apt_update
    (cd "$2" && quietly "${get[@]}") || die 69 "could not download the package $1: check the network"
}
