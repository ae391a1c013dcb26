#!/usr/bin/env sh
# Make the archive for Gradescope from the last commit: sh course/gradescope/make_zip.sh autograder.zip
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/kvsink"
git -C "$(dirname "$0")/../.." archive HEAD | tar -x -C "$folder/kvsink"
cp "$folder/kvsink/course/gradescope/setup.sh" "$folder/kvsink/course/gradescope/run_autograder" "$folder"
python3 -m zipfile -c "$1" "$folder"/*
