# From here on, all jobs have the same text.
job=$SLURM_JOB_ID
log() { echo "$(date '+%F %T') job $job: $*"; }
refuse() {
  log "error: $1; give this file to sbatch, see its first lines"
  exit 2
}
is_count() { [[ $1 =~ ^(0|[1-9][0-9]{0,14})$ ]]; } # bash runs a command that is in the text of a number it computes with
state() { [ ! -f "$run/state.json" ] || sed -n "s/^  \"$1\": \"*\([^\",]*\)\"*,*\$/\1/p" "$run/state.json" 2>/dev/null; } # a value of state.json

for name in SLURM_JOB_ID SLURM_RESTART_COUNT SLURM_NNODES ranks_per_node; do
  is_count "${!name-0}" || refuse "$name '${!name}': must be a whole number"
done
nodes=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-none}") && [ -n "$job" ] && [ -n "$nodes" ] ||
  refuse "SLURM_JOB_ID '$job', SLURM_JOB_NODELIST '$SLURM_JOB_NODELIST': name no job of Slurm"
MASTER_ADDR=${nodes%%$'\n'*} MASTER_PORT=$((20000 + job % 10000)) # by job, because two jobs may run on one node
export MASTER_ADDR MASTER_PORT PYTHONUNBUFFERED=1
mkdir -p "$run"

run_ranks() { # waits until all ranks have ended, and sets exit_code
  start_ranks "$@" &
  ranks=$!
  [ "$stopping" = no ] || kill -USR1 "$ranks" # the signal came a moment ago, before there were ranks
  while :; do
    interrupted=no
    wait "$ranks"
    exit_code=$?
    [ "$interrupted" = yes ] && [ "$exit_code" -gt 128 ] || break # otherwise only the signal ended the wait
  done
  ranks=
}

requeue() {
  log "$1: requeued, to continue from step $(state step)"
  if scontrol requeue "$job"; then
    sleep 60 # Slurm ends this shell during the sleep
    exit 1
  fi
  log "cannot be requeued; give this file to sbatch again: the run continues from there"
  exit 1
}

# A job that makes no progress is not started for ever, no matter why it starts again and who requeued it.
restarts=${SLURM_RESTART_COUNT:-0} step=$(state step) last_step=-1 idle_starts=0
is_count "$step" || step=0
if [ "$restarts" -gt 0 ] && [ -f "$run/.starts" ]; then read -r last_step idle_starts <"$run/.starts"; fi
is_count "$last_step" || last_step=-1
is_count "$idle_starts" || idle_starts=0
idle_starts=$((step > last_step ? 0 : idle_starts + 1))
[ ! -L "$run/.starts" ] && { [ ! -e "$run/.starts" ] || [ -f "$run/.starts" ]; } || refuse "$run/.starts is no file"
echo "$step $idle_starts" >"$run/.starts"
log "start $((restarts + 1)) on ${nodes//$'\n'/ }, run $run at step $step"
if [ "$idle_starts" -gt "$max_requeues" ]; then
  log "error: $idle_starts requeues in a row found no newer checkpoint than step $step; see the log above"
  exit 1
fi

if [ "$preflight" = true ]; then
  run_ranks -m lora_dist.cli doctor --distributed --run_folder "$run"
  if [ "$exit_code" != 0 ]; then
    log "the preflight failed ($exit_code): nothing was trained"
    exit "$exit_code"
  fi
fi
if [ "$stopping" = yes ]; then requeue "asked to stop before it trained"; fi

run_ranks "${recipe[@]}"
status=$(state status) lost=$(state rank_lost)
log "the ranks exited with $exit_code; the run is ${status:-not started}, step $(state step)"
if [ "$stopping" = yes ] && { [ "$exit_code" = 138 ] || { [ "$exit_code" = 0 ] && [ "$status" = preempted ]; }; }; then
  requeue "asked to stop" # 138: USR1 ended srun itself, a moment after it was started
elif [ "$exit_code" != 0 ] && [ "$exit_code" != 2 ] && { [ "$lost" = true ] || { [ "$status" = running ] && [ "$exit_code" -gt 128 ]; }; }; then
  requeue "a rank was lost"
fi # otherwise the run is completed, was told to stop by somebody else, or failed in a way that would fail again
exit "$exit_code"
