#!/usr/bin/env bash
# Each job of the array is one run of a study; `experiments/run.py --slurm` submits the array. Set the partition, account, GPU
# and time of your cluster here, or in a copy that you pass with --slurm-script.
#SBATCH --gres=gpu:1 --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# --signal: SLURM sends SIGTERM two minutes before the time limit. The run saves and exits with 143, and the script requeues the
# job. (scancel, preemption, and a requeue send SIGTERM too, but then the job is no longer RUNNING, and SLURM decides.)
trap : TERM # at the time limit, this shell gets SIGTERM too; it must survive to requeue the job
runs=$1 logs=$2
IFS=$'\t' read -r name command < <(sed -n "${SLURM_ARRAY_TASK_ID}p" "$runs")
[ -n "$command" ] || { echo "error: $runs: no run on line $SLURM_ARRAY_TASK_ID" && exit 2; }
log="$logs/$name.log"
for attempt in 1 2; do # retry a failed run once, from its last checkpoint
  echo "=== begins $(date +%FT%T%z) job $SLURM_JOB_ID on $(hostname): $command" >>"$log"
  srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} bash -c "exec $command" >>"$log" 2>&1
  code=$?
  echo "=== ended with exit code $code" >>"$log"
  job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  [ "$code" -eq 143 ] && scontrol show job "$job" | grep -q JobState=RUNNING && scontrol requeue "$job"
  case $code in 0 | 2 | 143) break ;; esac # 2: wrong flags, not worth a retry
done
exit "$code"
