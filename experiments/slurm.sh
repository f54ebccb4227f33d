#!/usr/bin/env bash
# A run of a study in each job of an array. `experiments/run.py --slurm` submits it; change here, or in a copy that
# --slurm-script names, what your cluster asks for (partition, account, GPU, time).
#SBATCH --gres=gpu:1 --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# --signal: SIGTERM to the run two minutes before the time limit; it saves, ends with 143, and the job is requeued. (A requeue or a
# preemption by SLURM sends SIGTERM too, and the job starts again by itself.)
trap : TERM # at the time limit itself it comes to this shell too, which must live on to requeue the job
runs=$1 logs=$2
IFS=$'\t' read -r name command < <(sed -n "${SLURM_ARRAY_TASK_ID}p" "$runs")
[ -n "$command" ] || { echo "error: $runs has no run $SLURM_ARRAY_TASK_ID" && exit 2; }
log="$logs/$name.log"
for attempt in 1 2; do # what fails is tried once more, from its last checkpoint
  echo "=== begins $(date +%FT%T%z) job $SLURM_JOB_ID on $(hostname): $command" >>"$log"
  srun --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c "exec $command" >>"$log" 2>&1
  code=$?
  echo "=== ended with exit code $code" >>"$log"
  [ "$code" -eq 143 ] && scontrol requeue "$SLURM_JOB_ID"
  case $code in 0 | 2 | 143) break ;; esac # 2: a mistake in the flags
done
exit "$code"
