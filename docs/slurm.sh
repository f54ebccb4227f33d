#!/usr/bin/env bash
# Three seeds of Deep SPI as a job array that no preemption, requeue or time limit can stop: sbatch docs/slurm.sh
#SBATCH --job-name=deep-spi
#SBATCH --array=1-3
#SBATCH --gres=gpu:1 --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%a.log
# --signal: SIGTERM to the script two minutes before the time limit; it saves, and ends with 143. (A requeue or a preemption
# sends SIGTERM too, and the job starts again by itself.)
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" uv run deep_spi.py --env-id=Pong-v5 --seed="$SLURM_ARRAY_TASK_ID" \
  --run-name="pong-deep-spi-$SLURM_ARRAY_TASK_ID" --resume=auto
code=$?
[ "$code" -eq 143 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
