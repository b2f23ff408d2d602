#!/usr/bin/env bash
# Run a recipe on this machine: on all its GPUs, or on 2 CPU ranks where there is none.
#   launch/local.sh recipes/opt_quotes.py --max_steps 20
#   STRATEGY=ddp RANKS=4 launch/local.sh recipes/opt_quotes.py
set -euo pipefail
gpus=$(nvidia-smi -L 2>/dev/null | grep -c UUID || true)
ranks=${RANKS:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 2)}
strategy=${STRATEGY:-$([ "$ranks" -eq 1 ] && echo single || echo fsdp)} # one rank has nothing to shard over
set -x
exec accelerate launch --config_file "accelerate_configs/$strategy.yaml" --num_processes "$ranks" "$@"
