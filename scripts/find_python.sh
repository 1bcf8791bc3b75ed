#!/bin/sh
# Prints the newest Python >= 3.11 that really runs and can make environments (a shim that exists and fails
# is no Python). With an argument, such as 3.12, only that version or a newer one will do.
least=${1:-3.11}
best= best_version=0
for candidate in python3.14 python3.13 python3.12 python3.11 python3 python \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python3; do
    version=$("$candidate" -c '
import sys
import ensurepip, venv, ssl, sqlite3, ctypes
least = tuple(map(int, sys.argv[1].split(".")))
if sys.version_info >= least and sys.version_info < (3, 15) and sys.implementation.name == "cpython":
    print(sys.version_info[0] * 1000 + sys.version_info[1])
' "$least" 2>/dev/null) || continue
    case $candidate in
        # Interpreters outside PATH serve only who asks for a version by name.
        */versions/*) [ $# -gt 0 ] || continue ;;
    esac
    if [ -n "$version" ] && [ "$version" -gt "$best_version" ]; then
        best=$candidate best_version=$version
    fi
done
if [ -z "$best" ]; then
    echo "no working Python >= $least with venv found; install one or give PYTHON=/path/to/python" >&2
    exit 1
fi
echo "$best"
