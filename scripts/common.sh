# Shared by the scripts beside it: sourced, never run.
# shellcheck shell=bash

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
readonly repository

say() { printf '%s\n' "$*" >&2; }

die() {
    say "$(basename "$0"): $*"
    exit 1
}

# Makes sure that a program is there, installing its Debian package where that is allowed, and says so.
need() { # PROGRAM PACKAGE
    command -v "$1" >/dev/null 2>&1 && return 0
    if ! command -v apt-get >/dev/null 2>&1 || [ "$(id -u)" != 0 ]; then
        die "'$1' is missing; install it (Debian: apt-get install $2), or run this as root on Debian or Ubuntu, which does"
    fi
    install_packages "$2"
    command -v "$1" >/dev/null 2>&1 || die "'$1' is still missing after the package $2 was installed"
}

install_packages() {
    local log
    log=$(mktemp)
    say "installing Debian packages: $*"
    if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"; } \
        >"$log" 2>&1 </dev/null; then
        tail -n 5 "$log" >&2
        rm -f "$log"
        die "the packages could not be installed: $*"
    fi
    rm -f "$log"
}

need_rust() {
    command -v cargo >/dev/null 2>&1 || die "cargo is missing; install Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$repository/Cargo.toml") or newer (https://rustup.rs)"
    command -v cc >/dev/null 2>&1 || need cc gcc
    need make make
}
