"""What would run on a GPU, as far as that shows without one: the programs of every script and world model, lowered for CUDA."""

import re
from dataclasses import replace
from functools import partial

import jax
import pytest

import deep_mdp_ppo
import deep_spi
import dream_spi
import ppo_atari_envpool_xla_jax_scan as ppo
from envs.registry import make_env
from tests.probes import make_iteration
from utils.runs.flags import check_flags, make_args

slow = partial(pytest.param, marks=pytest.mark.slow)
CODES = {"latent": "categorical"}
REPLAY = {
    "use_replay_buffer": True,
    "replay_prefill": 1024,
    "replay_capacity": 1024,
    "replay_length": 8,
    "replay_batch_size": 8,
}
REPLAY |= {"replay_ratio": 1.0}


@pytest.mark.parametrize(
    "script, flags",
    [
        (ppo, {}),
        (deep_spi, CODES),
        slow(deep_mdp_ppo, {"transition_density": "deterministic"}),
        (dream_spi, {"log_dreams": True}),
        slow(ppo, {"overlap_rollout": True}),
        slow(deep_spi, {}),
        slow(deep_spi, CODES | {"world_model": "transformer"}),
        slow(deep_spi, CODES | {"world_model": "softmoe"}),
        slow(deep_spi, {"lipschitz_nets": False, "transition_density": "normal", "monitor_guarantee": True}),
        slow(deep_spi, {"lipschitz_nets": False, "transition_layers": (64,), "enforce_neighborhood": "backtrack"}),
        slow(dream_spi, {"use_replay_buffer": False, "wasserstein_discriminator": True}),
        slow(dream_spi, REPLAY | {"lipschitz_nets": True, "transition_density": "mixture_normal"}),
    ],
)
def test_lowers_for_cuda(script, flags):
    """The platform's own convolution, forwards and backwards; of the host a step needs but the emulators' two calls."""
    # few games, because each takes a tenth of a second to make
    args = make_args(script.Args, env_id="Breakout-v5", num_envs=4, num_steps=64, **flags)
    if not getattr(args, "use_replay_buffer", False):
        args = replace(args, num_minibatches=2)
    check_flags(args)
    env = make_env(args)
    agent, optimizer = script.make_agent(args, env.num_actions, env.obs_parts), script.make_optimizer(args)
    state = jax.eval_shape(lambda: script.init_state(args, env, agent, optimizer))
    iteration = make_iteration(script, env, agent, optimizer, args)
    text = iteration.trace(state).lower(lowering_platforms=("cuda",)).as_text()
    calls = [name for name in re.findall(r"custom_call @(\w+)", text) if name.endswith(("_send", "_recv"))]
    assert len(set(calls)) == 2 * (1 + args.overlap_rollout)  # the latter steps a half before the scan, and one after it, too
    assert len(calls) == 2 or args.overlap_rollout
    assert "callback" not in text
    # the encoder's three: in the rollout, at its end, in an update; and the latter's gradients, of three kernels and two inputs
    assert text.count("stablehlo.convolution(") >= 3 + 3 + 3 + 3 + 2
