#!/bin/sh
# tests/install.sh NAME PACKAGE...: installs Debian's packages that some tests need. Where that cannot be done it says why,
# and those tests are skipped.
name=$1
shift
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "$name is missing here; on Debian root installs it: apt-get install $*"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
install() {
    apt-get install --yes --quiet=2 --no-install-recommends "$@" >/dev/null
}
install "$@" || { apt-get update --quiet=2 && install "$@"; } || echo "$name could not be installed: $*"
