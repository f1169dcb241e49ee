#!/usr/bin/env bash
# Train with what `accelerate config` has saved, or with a CONFIG of accelerate_configs/; flags of the script come last.
#   bash scripts/train.sh --config configs/text_trec.yaml
#   TASK=sign CONFIG=multi_gpu PROCESSES=2 bash scripts/train.sh --config configs/sign_wlasl50.yaml --lr 3e-4
set -euo pipefail
TASK=${TASK:-text}           # clip, har, sign, image, text or multitask
CONFIG=${CONFIG:-}           # cpu, single_gpu, multi_gpu, fsdp, ... or a file of your own
PROCESSES=${PROCESSES:-}     # how many, if not as CONFIG says

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
declare -A scripts=([clip]=clip_finetune [har]=clip_har [sign]=sign_train [image]=image_classify [text]=text_classify
  [multitask]=text_multitask)
if [[ -z ${scripts[$TASK]:-} ]]; then
  echo "error: TASK=$TASK: choose clip, har, sign, image, text or multitask" >&2
  exit 2
fi
if [[ -n $CONFIG && ! -f $CONFIG ]]; then
  file=$root/accelerate_configs/$CONFIG.yaml
  [[ -f $file ]] || { echo "error: CONFIG=$CONFIG: no such file, and no $CONFIG.yaml in accelerate_configs/" >&2; exit 2; }
  CONFIG=$file
fi
export PYTHONPATH=$root/lib${PYTHONPATH:+:$PYTHONPATH}
exec accelerate launch ${CONFIG:+--config_file "$CONFIG"} ${PROCESSES:+--num_processes "$PROCESSES"} \
  "$root/scripts/${scripts[$TASK]}.py" "$@"
