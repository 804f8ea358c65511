#!/usr/bin/env bash
# Installs a requirements file into a virtual environment, which is made first where there is none.
#
#   scripts/make_venv.sh VENV REQUIREMENTS [MINOR...]
#
# Takes the newest Python 3.MINOR (default: 14 13 12 11) that starts, can make an environment and finds a wheel of
# every requirement. VENV/installed-NAME marks a finished install of NAME.txt, so what a failure leaves behind is never
# taken for an environment. Exits with 3 if no such Python is installed, with 1 if the requirements can't be.
set -euo pipefail

venv=$1 requirements=$2
shift 2
[ $# -gt 0 ] || set -- 14 13 12 11
stamp=$venv/installed-$(basename "$requirements" .txt)

say() { echo "make_venv: $*" >&2; }

# Whether program $1 is a Python 3.$2 with venv and pip; a pyenv shim of an unselected version is none.
works() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, int(sys.argv[1])))' "$2" >/dev/null 2>&1
}

# Where a Python 3.$1 may be: on PATH, then behind pyenv's shims, which serve only the versions selected.
places() {
  type -ap "python3.$1" python3 || true
  type -ap "python3.$1" | sed -n 's|/shims/[^/]*$||p' | while read -r root; do
    ls -d "$root/versions/3.$1".*/bin/"python3.$1" 2>/dev/null | sort -rV
  done
}

find_python() {
  local path
  while read -r path; do
    if works "$path" "$1"; then
      echo "$path"
      return
    fi
  done < <(places "$1")
}

# `&&`, since `set -e` does not reach into a function that is a condition.
install() { "$venv/bin/python" -m pip install --only-binary :all: -r "$requirements" && touch "$stamp"; }

if ls "$venv"/installed-* >/dev/null 2>&1; then
  for minor in "$@"; do
    if works "$venv/bin/python" "$minor"; then
      say "adding $requirements to $venv"
      install
      exit
    fi
  done
fi

tried=""
for minor in "$@"; do
  python=$(find_python "$minor")
  [ -n "$python" ] || continue
  tried="$tried 3.$minor"
  say "making $venv with $("$python" --version) ($python); $requirements takes a minute or more and over 1 GB"
  rm -rf "$venv"
  if "$python" -m venv "$venv" && install; then exit; fi
  say "Python 3.$minor: $requirements cannot be installed, for the reason above"
done

if [ -z "$tried" ]; then
  say "error: no working Python 3.($*) with venv and pip on PATH; install one (on Debian and Ubuntu:" \
    "apt install python3 python3-venv) and run this again"
  exit 3
fi
say "error: $requirements cannot be installed with Python$tried"
exit 1
