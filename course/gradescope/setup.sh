#!/usr/bin/env bash
# Gradescope runs this once, as root, when the image is built: Python 3.11 or newer and the packages.
set -euo pipefail
apt-get update && apt-get install -y python3 python3-venv
python3 -m venv /autograder/venv
/autograder/venv/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
/autograder/venv/bin/pip install -r /autograder/source/kvsink/requirements.txt
chmod -R go-rwx /autograder/source # so that students' code runs as nobody, who cannot read it
