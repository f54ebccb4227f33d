#!/usr/bin/env bash
# The MinAtar study (docs/minatar.md).
#
#     bash experiments/minatar_study.sh [STEP ...]
#
# ppo, deep_mdp_ppo, deep_spi, dream_spi, dyna: the search of an algorithm (dyna: DreamSPI with --dyna-style). Each has the same
#   number of trials, and the same intervals for the flags that they share. The runs train for half of the study's steps, on a
#   seed that the study does not use.
# sensitivity: Deep SPI over eps and c_P, and over c_R and c_P, on two games and the gridworld.
#
# Without a step, all of them. Repeat the command after an interruption. LOGDIR (default runs/minatar) is the folder, WORKERS
# (default 2) the number of runs at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
logdir=${LOGDIR:-runs/minatar} workers=${WORKERS:-2}
steps=(ppo deep_mdp_ppo deep_spi dream_spi dyna sensitivity)

shared=(--search learning-rate=log:2e-4:8e-3 --search num-minibatches=4,8,16,32 --search update-epochs=2:6
  --search clip-coef=0.05:0.4 --search ent-coef=log:1e-4:5e-2 --search adam-eps=1e-8,1e-5)
model=(--search transition-loss-coef=log:1e-5:1e-1 --search reward-loss-coef=log:1e-4:1 --search transition-layers=,128,"512 512"
  --search transition-density=deterministic,normal,mixture_normal --search lipschitz-nets=True,False)
dreams=(--search heads-learning-rate=log:2e-4:8e-3 --search imagination-horizon=1:6 --search real-value-coef=log:1e-1:1e1)
runs=(--total-timesteps 500000)

search() { # folder, flags of tune.py
  uv run --extra tune --extra minatar experiments/tune.py --logdir "$logdir/search/$1" --trials 24 --pruner median \
    --seeds 901 --workers "$workers" "${shared[@]}" "${@:2}"
}

coefficients=(0 5e-4 5e-3 5e-2) # of c_P, and of c_R

sensitivity() { # name, flag, its values, flags of all runs
  local scripts=() name=$1 flag=$2 x y
  for x in $3; do
    for y in "${coefficients[@]}"; do scripts+=("deep_spi --$flag $x --transition-loss-coef $y"); done
  done
  uv run experiments/gridworld_sensitivity.py --x "$flag" $3 --y transition-loss-coef "${coefficients[@]}" "${@:4}" \
    --seeds 101 102 103 --output "$logdir/gridworld_$name"
  uv run --extra minatar experiments/run.py --scripts "${scripts[@]}" --env-ids Asterix-MinAtar Breakout-MinAtar --num-seeds 3 \
    --logdir "$logdir/$name" --workers "$workers" -- --total-timesteps 250000 "${@:4}"
  uv run experiments/heatmap.py "$logdir/$name" --x "$flag" --y transition-loss-coef --output "$logdir/minatar_$name.png"
}

[ $# -gt 0 ] || set -- "${steps[@]}"
for step; do
  case $step in
    ppo) search ppo --script ppo -- "${runs[@]}" ;;
    deep_mdp_ppo | deep_spi) search "$step" --script "$step" "${model[@]}" -- "${runs[@]}" ;;
    dream_spi) search dream_spi --script dream_spi "${model[@]}" "${dreams[@]}" -- "${runs[@]}" ;;
    dyna) search dyna --script dream_spi "${model[@]}" "${dreams[@]}" -- "${runs[@]}" --dyna-style ;;
    sensitivity)
      sensitivity eps clip-coef "0.0101 0.05 0.1 0.2 0.3"
      sensitivity coefficients reward-loss-coef "${coefficients[*]}" --clip-coef 0.1
      ;;
    *) echo "error: $step: choose from ${steps[*]}" >&2 && exit 2 ;;
  esac
done
