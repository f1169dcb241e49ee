#!/usr/bin/env bash
# Prepare data before training; flags of the task's tool come last (--help lists them).
#   bash scripts/preprocess.sh --input_dir data/raw --output_dir data/processed
#   TASK=clip bash scripts/preprocess.sh --images data/photos --captions data/captions.csv --output_dir data/shards
set -euo pipefail
TASK=${TASK:-text}  # text: clean and split; clip: pack shards; image: folds; sign: check clips; har: frames to features

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
declare -A tools=([clip]=make_shards [har]=extract_features [sign]=validate_npz [image]=split_folds [text]=preprocess_text)
if [[ -z ${tools[$TASK]:-} ]]; then
  echo "error: TASK=$TASK: choose clip, har, sign, image or text" >&2
  exit 2
fi
export PYTHONPATH=$root/lib${PYTHONPATH:+:$PYTHONPATH}
exec python "$root/tools/${tools[$TASK]}.py" "$@"
