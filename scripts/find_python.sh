#!/bin/sh
# Prints the best Python here for this project: 3.12 first, as LeRobot 0.6 needs it, then its neighbours.
# Arguments, if any, are the minor versions to try instead, best first. A candidate must run: the shim of a version manager may exist and still refuse.
usable='import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, int(sys.argv[1])))'
for minor in ${*:-12 13 11 10 14}; do
    for candidate in "python3.$minor" "$HOME"/.pyenv/versions/3.$minor*/bin/python "/usr/bin/python3.$minor" \
        "/usr/local/bin/python3.$minor" "/opt/homebrew/bin/python3.$minor" python3 python; do
        if "$candidate" -c "$usable" "$minor" >/dev/null 2>&1; then
            command -v "$candidate"
            exit 0
        fi
    done
done
cat >&2 <<'TEXT'
No Python from 3.10 to 3.14 that can create virtual environments was found. Install one, 3.12 if you can choose
(Debian, Ubuntu: apt install python3.12 python3.12-venv; elsewhere: python.org or pyenv), or name one:
    make venv PYTHON=/path/to/python
TEXT
exit 1
