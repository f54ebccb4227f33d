#!/usr/bin/env bash
# The searches of the MinAtar study (docs/minatar.md): five algorithms, the same number of trials, and the same intervals for the
# flags that they share.
#
#     bash experiments/minatar_study.sh [ALGORITHM ...]
#
# Repeat the command after an interruption. LOGDIR (default runs/minatar) is the folder, WORKERS (default 2) the number of runs
# at a time. The runs train for half of the study's steps, on a seed that the study does not use.
set -euo pipefail
cd "$(dirname "$0")/.."
logdir=${LOGDIR:-runs/minatar}

shared=(--search learning-rate=log:2e-4:8e-3 --search num-minibatches=4,8,16,32 --search update-epochs=2:6
  --search clip-coef=0.05:0.4 --search ent-coef=log:1e-4:5e-2 --search adam-eps=1e-8,1e-5)
model=(--search transition-loss-coef=log:1e-5:1e-1 --search reward-loss-coef=log:1e-4:1 --search transition-layers=,128,"512 512"
  --search transition-density=deterministic,normal,mixture_normal --search lipschitz-nets=True,False)
dreams=(--search heads-learning-rate=log:2e-4:8e-3 --search imagination-horizon=1:6 --search real-value-coef=log:1e-1:1e1)
runs=(--total-timesteps 500000)

search() { # folder, flags of tune.py
  uv run --extra tune --extra minatar experiments/tune.py --logdir "$logdir/search/$1" --trials 24 --pruner median \
    --seeds 901 --workers "${WORKERS:-2}" "${shared[@]}" "${@:2}"
}

[ $# -gt 0 ] || set -- ppo deep_mdp_ppo deep_spi dream_spi dyna
for algorithm; do
  case $algorithm in
    ppo) search ppo --script ppo -- "${runs[@]}" ;;
    deep_mdp_ppo | deep_spi) search "$algorithm" --script "$algorithm" "${model[@]}" -- "${runs[@]}" ;;
    dream_spi) search dream_spi --script dream_spi "${model[@]}" "${dreams[@]}" -- "${runs[@]}" ;;
    dyna) search dyna --script dream_spi "${model[@]}" "${dreams[@]}" -- "${runs[@]}" --dyna-style ;;
    *) echo "error: $algorithm: choose ppo, deep_mdp_ppo, deep_spi, dream_spi, or dyna" >&2 && exit 2 ;;
  esac
done
