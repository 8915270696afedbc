#!/usr/bin/env bash
# From a folder of pictures and videos to a checked dataset of tokens.
#
#   examples/tokenize_folder.sh FOLDER OUT [options of bsq tokenize ...]
#
# Writes OUT/shards and OUT/tokens.  After an interruption `bsq resume OUT/tokens` goes on.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 FOLDER OUT [options of bsq tokenize ...]" >&2
  exit 2
fi
folder=$1 out=$2
shift 2

python "$(dirname "${BASH_SOURCE[0]}")/make_shards.py" "$folder" "$out/shards"
bsq tokenize "$out/shards/*.tar" --out "$out/tokens" "$@"
bsq verify "$out/tokens"
bsq inspect "$out/tokens"
