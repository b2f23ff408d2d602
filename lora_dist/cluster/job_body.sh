# Below: the same in every job.
job=$SLURM_JOB_ID
say() { echo "$(date '+%F %T') job $job: $*"; }
state() { sed -n "s/^  \"$1\": \"*\([^\",]*\)\"*,*\$/\1/p" "$run/state.json" 2>/dev/null; } # of the run: status, step

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${nodes%%$'\n'*} MASTER_PORT=$((20000 + job % 10000)) # two jobs may have one machine
export MASTER_ADDR MASTER_PORT PYTHONUNBUFFERED=1
mkdir -p "$run"

run_ranks() { # sets exit_code
  start_ranks "$@" &
  ranks=$!
  [ "$stopping" = no ] || kill -USR1 "$ranks" # asked a moment ago, when there was nobody to tell
  while :; do
    interrupted=no
    wait "$ranks"
    exit_code=$?
    [ "$interrupted" = yes ] && [ "$exit_code" -gt 128 ] || break # else it was the signal that ended the wait
  done
  ranks=
}

requeue() {
  say "$1: requeued, to go on from step $(state step)"
  if scontrol requeue "$job"; then
    sleep 60 # Slurm ends this shell meanwhile
    exit 1
  fi
  say "cannot be requeued; give this file to sbatch again: it goes on from there"
  exit 1
}

# However a job came to start again, and whoever requeued it: not for ever.
restarts=${SLURM_RESTART_COUNT:-0} step=$(state step) last_step=-1 idle=0
if [ "$restarts" -gt 0 ] && [ -f "$run/.starts" ]; then read -r last_step idle <"$run/.starts"; fi
idle=$((${step:-0} > last_step ? 0 : idle + 1))
echo "${step:-0} $idle" >"$run/.starts"
say "start $((restarts + 1)) on ${nodes//$'\n'/ }, run $run at step ${step:-0}"
if [ "$idle" -gt "$max_requeues" ]; then
  say "error: $idle requeues in a row found no newer checkpoint than step ${step:-0}; see the log above"
  exit 1
fi

if [ "$preflight" = true ]; then
  run_ranks -m lora_dist.cli doctor --distributed --run_folder "$run"
  if [ "$exit_code" != 0 ]; then
    say "the preflight failed ($exit_code): nothing was trained"
    exit "$exit_code"
  fi
fi
if [ "$stopping" = yes ]; then requeue "asked to stop before it trained"; fi

run_ranks "${recipe[@]}"
status=$(state status) lost=$(state rank_lost)
say "the ranks left with $exit_code; the run is ${status:-not begun}, step $(state step)"
if [ "$stopping" = yes ] && { [ "$exit_code" = 138 ] || { [ "$exit_code" = 0 ] && [ "$status" = preempted ]; }; }; then
  requeue "asked to stop" # 138: srun itself died of USR1, a moment after it was started
elif [ "$exit_code" != 0 ] && [ "$exit_code" != 2 ] && { [ "$lost" = true ] || { [ "$status" = running ] && [ "$exit_code" -gt 128 ]; }; }; then
  requeue "a rank was lost"
fi # else it is completed, or was told to stop, or failed in a way that it would fail again
exit "$exit_code"
