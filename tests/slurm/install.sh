#!/bin/sh
# Installs SLURM from Debian's packages. Where that cannot be done it says why, and the tests are skipped.
packages="slurm-wlm munge iproute2"
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "SLURM is missing here; on Debian and Ubuntu root installs it: apt-get install $packages"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
install() {
    # shellcheck disable=SC2086
    apt-get install --yes --quiet=2 --no-install-recommends $packages >/dev/null
}
install || { apt-get update --quiet=2 && install; } || echo "SLURM could not be installed: $packages"
