#!/bin/sh
# Make the environment in folder $1 with Python $2; where $2 is empty, with the first of the usual names that will do.
# 3.11 comes first because the images run it.
set -eu
venv=$1
python=${2:-}
if [ -n "$python" ]; then set -- "$python"; else set -- python3.11 python3.12 python3.13 python3; fi

# Prints the version, and "venv" where environments can be made: Debian and Ubuntu keep ensurepip in a package of its own.
probe='
import sys
sys.stdout.write("%d.%d" % sys.version_info[:2])
import ensurepip, venv
sys.stdout.write(" venv")
'
problem=
for candidate; do
  found=$("$candidate" -c "$probe" 2>/dev/null) || true
  case $found in
    "3.11 venv" | "3.12 venv" | "3.13 venv") exec "$candidate" -m venv --clear "$venv" ;;
    3.11 | 3.12 | 3.13)
      without="$candidate is Python $found without its venv module"
      problem=${problem:-"$without: install that (Debian, Ubuntu: apt-get install python$found-venv)"} ;;
  esac
done

if [ -z "$problem" ] && [ -n "$found" ]; then
  problem="$candidate is Python ${found%% *}, and 3.11, 3.12 or 3.13 is needed: install one, or name one with PYTHON="
elif [ -z "$problem" ] && [ -n "$python" ]; then
  problem="$python does not run: name a Python 3.11, 3.12 or 3.13 with PYTHON="
fi
needed="there is no Python 3.11, 3.12 or 3.13: install one (Debian 12 and 13, Ubuntu 24.04: apt-get install python3-venv)"
echo "make: ${problem:-$needed}" >&2
exit 2
