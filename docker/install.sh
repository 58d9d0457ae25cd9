#!/usr/bin/env bash
# Install Quatuor from this checkout, with every package at its locked version:   docker/install.sh .venv cpu|gpu
# The Makefile and the Docker images use it. It is quick when nothing changed and may be interrupted at any point.
# With a third word, packages, it leaves the checkout itself out: an image keeps that layer while only our code changes.
set -euo pipefail

die() {
    echo "install: $*" >&2
    exit 2
}

say() {
    echo "install: $*"
}

usage="usage: docker/install.sh VENV cpu|gpu [packages]"
[ $# -eq 2 ] || [ "$#-${3-}" = 3-packages ] || die "$usage"
venv=$(realpath -m "$1")
variant=$2
only=${3-}
checkout=$(realpath "$(dirname "$0")/..")
cd "$checkout"
case $variant in cpu | gpu) ;; *) die "'$variant' is neither cpu nor gpu" ;; esac

find_python() {
    local name
    for name in ${PYTHON:-python3.11 python3.12 python3 python}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    die "Python 3.11 or newer is needed, and ${PYTHON:-python3} is not: set PYTHON to one"
}

if [ -x "$venv/bin/python" ]; then python=$venv/bin/python; else python=$(find_python); fi
tag=$("$python" -c 'import sys; print("py%d%d" % sys.version_info[:2])')
lock=docker/requirements-$variant-$tag.txt
[ -f "$lock" ] || die "no lock file for $tag ($lock): set PYTHON to one of $(cd docker && echo requirements-"$variant"-*.txt)"

# Two stamps say what is installed: the packages, and the checkout on top of them.
packages_stamp=$venv/packages-installed
packages_state=$(echo "$venv" | cat - "$lock" docker/install.sh | sha256sum)
if [ -n "$only" ]; then
    stamp=$packages_stamp
    state=$packages_state
else
    stamp=$venv/quatuor-installed
    state=$(echo "$checkout" "$packages_state" | cat - setup.cfg pyproject.toml | sha256sum)
fi
holds() {
    [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]
}
if holds "$stamp" "$state"; then exit 0; fi

# What is missing is said before anything is downloaded.
[ "$(uname -sm)" = "Linux x86_64" ] || die "the lock files are for Linux on x86_64, this is $(uname -sm)"
compiler=${CXX:-c++}
command -v "$compiler" >/dev/null || die "no C++ compiler ($compiler): on Debian and Ubuntu, apt-get install g++"
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -f "$headers/Python.h" ] || die "no Python headers ($headers/Python.h): on Debian and Ubuntu, apt-get install python3-dev"
"$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || die "no libnuma, which vLLM loads: on Debian and Ubuntu, apt-get install libnuma1"

if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
    die "$venv exists and is not a virtual environment"
fi
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    say "a virtual environment in $venv ($("$python" --version))"
    "$python" -m venv --clear "$venv" || die "$python cannot make a virtual environment: on Debian and Ubuntu, apt-get install python3-venv"
fi
rm -f "$stamp"
export PATH=$venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

# Byte code is written for what is imported (the check below imports what a run does): writing it for all 29,000 files
# takes longer than installing them.
unset PYTHONDONTWRITEBYTECODE
pip_install() {
    "$venv/bin/python" -m pip install -qq --no-deps --no-compile --no-build-isolation "$@"
}

locked() {
    grep -E "^($1)==" "$lock"
}

# The configured index first; PyTorch's own where that does not carry the CPU build.
install_torch() {
    local torch error
    torch=$(locked torch)
    if error=$(pip_install "$torch" 2>&1); then return; fi
    if [[ $torch != *+cpu || $error != *"No matching distribution"* ]]; then die "$error"; fi
    say "$torch is not on the configured index, taking it from PyTorch's"
    pip_install --index-url https://download.pytorch.org/whl/cpu "$torch"
}

install_packages() {
    local tools
    rm -f "$packages_stamp"
    say "pip and PyTorch ($lock)"
    mapfile -t tools < <(locked 'pip|setuptools')  # some packages are built here, with our setuptools
    pip_install "${tools[@]}"
    install_torch
    say "$(grep -c == "$lock") packages"
    grep -v '^torch==' "$lock" >"$venv/rest.txt"
    pip_install -r "$venv/rest.txt"
    echo "$packages_state" >"$packages_stamp"
}

holds "$packages_stamp" "$packages_state" || install_packages
[ -n "$only" ] || pip_install --editable .

say "checking that everything imports"
"$venv/bin/python" docker/check_install.py ${only:+"$only"} >/dev/null
echo "$state" >"$stamp"
say "done"
