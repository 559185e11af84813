#!/bin/sh
# Make a virtual environment with pip in it. Debian and Ubuntu keep the part that does this in a package of its own.
# usage: make_venv.sh PYTHON FOLDER
set -u
python=$1 folder=$2
"$python" -m venv "$folder" >/dev/null 2>&1 && exit 0
rm -rf "$folder"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "python3-venv is missing: installing it" >&2
    { apt-get -qq update && apt-get -qq install -y --no-install-recommends python3-venv; } >/dev/null 2>&1
    "$python" -m venv "$folder" && exit 0
    rm -rf "$folder"
fi
echo "error: this Python cannot make virtual environments | apt-get install python3-venv, then run make again" >&2
exit 6
