"""Flags: mistakes get one line that says what to do, and booleans may be typed as sweeps type them."""

import dataclasses
import sys
from typing import Annotated

import jax
import pytest
import yaml

import deep_mdp_ppo as deep_mdp
import deep_spi
import dream_spi
import ppo_atari_envpool_xla_jax_scan as ppo
from envs import minatar
from envs.pool import env_seeds
from tests.commands import ROOT, run
from utils.runs.flag_types import Count, Default, Needs, NotNegative, Share, Sizes
from utils.runs.flags import RunArgs, UsageError, check_flags, make_args, own_defaults, parse_flags, refuse_unread, require
from utils.runs.launch import run_script
from utils.runs.stored_flags import from_store

MISTAKES = [
    (["--env-id=Brakout-v5"], "--env-id", "Breakout-v5"),
    (["--minibatch-by=transition", "--num-envs=3", "--num-steps=3"], "--num-minibatches", "change one"),
    (["--num-envs=6"], "--num-minibatches", "change one"),
    (["--total-timesteps=100"], "--total-timesteps", "at least 1024"),
    (["--ent-coef=-0.1"], "--ent-coef", "0 or more"),
    (["--clip-coef=1.5"], "--clip-coef", "between 0 and 1"),
    (["--env-id=CartPole-v1", "--stochastic-env"], "--stochastic-env", "an Atari game"),
    (["--env-id=CartPole-v1", "--no-reward-clip"], "--no-reward-clip", "an Atari game"),
    (["--gridworld-n-path=3"], "--gridworld-n-path", "ConfoundingGridworld-v0"),
    (["--env-id=ConfoundingGridworld-v0", "--gridworld-n-path=1"], "--gridworld-n-path", "between 2 and 81"),
    (["--env-id=ConfoundingGridworld-v0", "--gridworld-epsilon=0"], "--gridworld-epsilon", "(0, 1]"),
    (["--env-id=ConfoundingGridworld-v0", "--gamma=1"], "--gamma", "in (0, 1)"),
    (["--num-envs=2", "--num-steps=2", "--num-minibatches=4", "--minibatch-by=transition"], "--norm-adv", "--no-norm-adv"),
    (["--num-envs=4", "--num-steps=1", "--minibatch-by=env"], "--norm-adv", "--no-norm-adv"),
    (["--seed=-1"], "--seed", "0 or more"),
    (["--num-envs=0"], "--num-envs", "at least 1"),
    (["--wandb-group=a"], "--wandb-group", "--track"),
    (["--num-classes=8"], "--num-classes", "--latent categorical"),
    (["--latent=categorical", "--num-classes=1"], "--num-classes", "at least 2"),
    (["--decoupled-layers", "--decoupled-repr"], "--decoupled-layers", "leave it out"),
    (["--env-id=ConfoundingGridworld-v0", "--env-step=callback"], "--env-step", "leave it out"),
    (["--num-devices=2", "--env-step=callback"], "--num-devices", "leave out --env-step"),
    (["--num-devices=3"], "--num-devices", "change one"),
    (["--num-envs=4", "--num-devices=2"], "--num-devices", "fewer --num-minibatches"),
    (["--num-devices=1024", "--num-envs=4096"], "--num-devices", "or fewer"),
    (["--num-envs=9", "--num-minibatches=3", "--overlap-rollout"], "--num-envs", "two halves each"),
    (["--env-id=Breakout-MinAtar", "--overlap-rollout"], "--overlap-rollout", "leave it out"),
    (["--logdir=~nobodyatall/runs"], "--logdir", "no such user"),
    (["--resume=~nobodyatall/runs/a"], "--resume", "no such user"),
    (["--resume=auto"], "--run-name", "the path of the run folder"),
    (["--resume=auto", "--run-name="], "--run-name", "must be a name"),
    (["--run-name=.."], "--run-name", "must be a name"),
    (["--run-name=a/b"], "--logdir", "must be a name"),
    (["--resume=auto", "--run-name=a", "--keep-checkpoints=0"], "--keep-checkpoints", "drop one"),
    (["--resume=nowhere/at/all"], "--resume", "neither a run folder"),
    (["--resume=nowhere", "--run-name=a"], "--run-name", "leave out"),
    (["--save-every=-1"], "--save-every", "0 or more"),
    (["--track-every=5"], "--track-every", "--track-params or --track-grads"),
]
WORLD_MODEL_MISTAKES = [
    (["--world-model=transformer"], "--world-model", "--latent categorical"),
    (["--categorical-cost=hamming"], "--categorical-cost", "--latent categorical"),
    (["--latent=categorical", "--transition-density=normal"], "--transition-density", "continuous latents"),
    (["--latent=categorical", "--no-lipschitz-nets"], "--no-lipschitz-nets", "continuous latents"),
    (["--latent=categorical", "--lambda-gp=1"], "--lambda-gp", "continuous latents"),
    (["--latent=categorical", "--categorical-cost=cross_entropy", "--use-gumbel-softmax"], "--use-gumbel-softmax", "l2"),
    (["--latent=categorical", "--gumbel-temperature=0.5"], "--gumbel-temperature", "--use-gumbel-softmax"),
    (["--transition-density=normal", "--mixture-components=3"], "--mixture-components", "mixture_normal"),
    (["--lambda-gp=1"], "--lambda-gp", "--no-lipschitz-nets"),
    (["--use-wgan-gp"], "--use-wgan-gp", "--no-lipschitz-nets"),
    (["--no-lipschitz-nets", "--lipschitz-constant=2"], "--lipschitz-constant", "leave it out"),
    (["--no-lipschitz-nets", "--use-wgan-gp", "--lambda-gp=0"], "--lambda-gp", "positive"),
    (["--clip-reward-net-output", "--no-reward-clip"], "--no-reward-clip", "drop it or"),
    (["--clip-reward-net-output", "--env-id=ConfoundingGridworld-v0"], "--clip-reward-net-output", "drop it"),
    (["--w-balancing=2"], "--w-balancing", "[0, 1]"),
    (["--transition-loss-coef=-1"], "--transition-loss-coef", "0 or more"),
    (["--monitor-every=5"], "--monitor-every", "--monitor-guarantee"),
    (["--monitor-guarantee", "--monitor-every=0"], "--monitor-every", "at least 1"),
    (["--monitor-guarantee", "--gamma=1"], "--gamma", "below 1"),
]
DREAM_MISTAKES = [
    (["--env-id=Brakout-v5"], "--env-id", "Breakout-v5"),
    (["--imagination-horizon=0"], "--imagination-horizon", "at least 1"),
    (["--dyna-style", "--progressive=linear"], "--dyna-style", "drop one"),
    (["--heads-learning-rate=0"], "--heads-learning-rate", "positive"),
    (["--dream-minibatches=5"], "--dream-minibatches", "another number"),
    (["--dream-minibatches=3072"], "--dream-minibatches", "use fewer, or --no-norm-adv"),
    (["--no-use-replay-buffer", "--dreams-from=replay"], "--dreams-from", "--use-replay-buffer"),
    (["--slow-critic=1"], "--slow-critic", "[0, 1)"),
    (["--slow-critic=0.9", "--clip-vloss"], "--slow-critic", "clip-vloss"),
    (["--end-loss=huber", "--reward-loss-coef=0"], "--end-loss", "--reward-loss-coef"),
    (["--critic-learning-rate=1e-3"], "--critic-learning-rate", "--decoupled-layers"),
    (["--weight-decay=-1"], "--weight-decay", "0 or more"),
    (["--monitor-guarantee"], "--monitor-guarantee", "leave it out"),
    (["--enforce-neighborhood=backtrack"], "--enforce-neighborhood", "leave it out"),
    (["--target-kl=0.1"], "--target-kl", "leave it out"),
    (["--env-id=CartPole-v1", "--replay-capacity=30000"], "--replay-capacity", "--use-replay-buffer"),
    (["--actor-after=-1"], "--actor-after", "at least 0"),
    (["--no-use-replay-buffer", "--save-replay"], "--save-replay", "--use-replay-buffer"),
    (["--env-id=Asterix-MinAtar", "--off-policy=clipped_ratio"], "--off-policy", "--use-replay-buffer"),
    (["--update-epochs=2"], "--update-epochs", "leave it out"),
    (["--replay-length=0"], "--replay-length", "at least 1"),
    (["--env-id=Breakout-v5", "--num-minibatches=16"], "--num-minibatches", "--no-use-replay-buffer"),
    (["--use-replay-buffer", "--replay-prefill=100"], "--replay-prefill", "at least 4608"),
    (["--use-replay-buffer", "--replay-capacity=20000"], "--replay-capacity", "at least 20096"),
    (["--use-replay-buffer", "--total-timesteps=20480"], "--total-timesteps", "use more"),
    (["--use-replay-buffer", "--replay-ratio=0"], "--replay-ratio", "the nearest is 0.25"),
    (["--use-replay-buffer", "--replay-ratio=5.6"], "--replay-ratio", "the nearest is 5.5"),
    (
        ["--num-envs=8", "--use-replay-buffer", "--replay-capacity=99999999", "--replay-ratio=64"],
        "--replay-capacity",
        "GiB of memory",
    ),
    (["--wasserstein-discriminator", "--w-balancing=0.5"], "--w-balancing", "leave it out"),
    (["--wasserstein-discriminator", "--discriminator-steps=0"], "--discriminator-steps", "at least 1"),
    (["--discriminator-learning-rate=1e-3"], "--discriminator-learning-rate", "--wasserstein-discriminator"),
    (["--log-dreams-every=5"], "--log-dreams-every", "--log-dreams"),
    (["--decoupled-repr"], "--decoupled-repr", "--decoupled-layers"),
    (["--use-replay-buffer", "--replay-ratio=1e300"], "--replay-ratio", "use less"),
    (["--use-replay-buffer", "--replay-ratio=-1"], "--replay-ratio", "0 or more"),
    (
        ["--latent=categorical", "--wasserstein-discriminator", "--categorical-cost=hamming"],
        "--categorical-cost",
        "leave it out",
    ),
    (["--log-dreams", "--log-dreams-every=0"], "--log-dreams-every", "at least 1"),
]


def assert_refused(code, out, err, name, remedy):
    assert code == 2
    assert out == ""  # nothing was started
    assert len(err.strip().splitlines()) == 1 and name in err and remedy in err, err


@pytest.mark.parametrize(
    "script, flags, name, remedy",
    [(script, *mistake) for script in (ppo, deep_mdp, deep_spi) for mistake in MISTAKES]
    + [(script, *mistake) for script in (deep_mdp, deep_spi) for mistake in WORLD_MODEL_MISTAKES]
    + [(dream_spi, *mistake) for mistake in DREAM_MISTAKES],
)
def test_mistakes_get_one_line_and_exit_code_2(script, flags, name, remedy, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", *flags])
    with pytest.raises(SystemExit) as end:
        run_script(script.main, script.Args)
    assert_refused(end.value.code, *capsys.readouterr(), name, remedy)


def test_mistakes_in_a_process_of_their_own():
    done = run("deep_spi.py", "--drift-coef=0.5")
    assert_refused(done.returncode, done.stdout, done.stderr, "--drift-coef", "--drift-formulation")


@pytest.mark.parametrize(
    "flag, value, remedy",
    [
        ("learning-rate", "nan", "positive"),
        ("learning-rate", "inf", "finite"),
        ("ent-coef", "-inf", "0 or more"),
        ("vf-coef", "inf", "finite"),
        ("gridworld-epsilon", "inf", "ConfoundingGridworld-v0"),
        ("seed", str(2**32), "at most 4294967295"),
        ("num-steps", str(2**31), "at most 2147483647"),
        ("total-timesteps", str(2**60), "at most 9007199254740992"),
        ("total-timesteps", "-5", "at least 1"),
        ("fc-layers", "0", "sizes must be positive"),
        ("fc-layers", str(10**30), "at most 2147483647"),
    ],
)
def test_odd_numbers_are_refused_by_name(flag, value, remedy):
    with pytest.raises(UsageError) as error:
        check_flags(parse_flags(ppo.Args, [f"--{flag}", value]))
    assert str(error.value).startswith(f"--{flag} ") and remedy in str(error.value)


def test_the_largest_seed_is_a_seed_of_its_own():
    check_flags(parse_flags(ppo.Args, [f"--seed={2**32 - 1}"]))
    keys = {tuple(jax.random.key_data(jax.random.key(seed)).tolist()) for seed in (0, 1, 2**31, 2**32 - 1)}
    assert len(keys) == 4
    assert len({tuple(env_seeds(seed, 2)) for seed in (0, 1, 2**31, 2**32 - 1)}) == 4


def test_a_replay_buffers_minibatches_are_no_parts_of_a_rollout():
    check_flags(make_args(dream_spi.Args, num_envs=4, use_replay_buffer=True, replay_ratio=8.0))


@pytest.mark.parametrize("script", [ppo, deep_mdp, deep_spi, dream_spi])
def test_every_default_passes(script):
    check_flags(script.Args())
    check_flags(make_args(script.Args))
    assert script.Args().clip_vloss is False  # as in the official code and CleanRL's JAX script


def test_every_range_and_need_is_checked_on_its_own():
    """A class of flags of each kind; whatever a script declares goes through the same pass."""

    @dataclasses.dataclass
    class Args(RunArgs):
        count: Count = 1
        share: Share | None = None
        sizes: Sizes = (1, 2)
        mode: str = "a"
        needy: Annotated[NotNegative, Needs(mode=("b", "c"))] = 0.5

        def check(self):
            require(self.mode != "d", "--mode d: own check")

    accepted = [{}, {"share": 0.0}, {"share": 1.0}, {"mode": "b", "needy": 0.0}, {"mode": "c", "needy": 2}]
    for flags in accepted:
        check_flags(Args(**flags))
    refused = {
        "--count 0: must be at least 1": {"count": 0},
        "--share 1.5: must lie in [0, 1]": {"share": 1.5},
        "--sizes 1 0: sizes must be positive": {"sizes": (1, 0)},
        "--needy 0.7: is used only with --mode b or c; leave it out": {"needy": 0.7},
        "--needy -1: must be 0 or more": {"mode": "b", "needy": -1},
        "--mode d: own check": {"mode": "d"},
    }
    for message, flags in refused.items():
        with pytest.raises(UsageError) as error:
            check_flags(Args(**flags))
        assert str(error.value) == message


@pytest.mark.parametrize(
    "typed, expected",
    [
        (["--norm-adv"], True),
        (["--no-norm-adv"], False),
        (["--norm-adv=False"], False),
        (["--norm-adv=true"], True),
        (["--norm_adv", "False"], False),
        (["--norm_adv", "True"], True),
        (["--norm_adv=0"], False),
        (["--no-norm-adv=False"], True),
        (["--no_norm_adv"], False),
        (["--norm_adv", "False", "--norm_adv=True"], True),
    ],
)
def test_booleans_as_sweeps_pass_them(typed, expected):
    args = parse_flags(ppo.Args, ["--seed", "3", *typed, "--learning_rate=0.5"])
    assert (args.norm_adv, args.seed, args.learning_rate) == (expected, 3, 0.5)


@pytest.mark.minatar
def test_an_environments_family_has_defaults_of_its_own():
    """Whatever is typed overrides them; in other environments those behind the flags hold."""
    atari, game = parse_flags(ppo.Args, []), parse_flags(ppo.Args, ["--env-id=Breakout-MinAtar"])
    assert (atari.num_envs, atari.num_steps, atari.fc_layers) == (128, 8, (512,))
    assert (game.num_envs, game.num_steps, game.fc_layers, game.learning_rate) == (64, 128, (), 1e-3)
    assert game == make_args(ppo.Args, env_id="Breakout-MinAtar") and atari == ppo.Args()
    overridden = ["--env-id=Pong-v5", "--env-id=Asterix-MinAtar", "--num_envs", "128"]
    for typed in (["--num-envs=128", "--env_id", "Asterix-MinAtar"], overridden):
        mixed = parse_flags(ppo.Args, typed)
        assert (mixed.env_id, mixed.num_envs, mixed.num_steps) == ("Asterix-MinAtar", 128, 128)
        assert own_defaults(mixed) == [
            "--total-timesteps 5000000", "--fc-layers (none)", "--num-steps 128", "--learning-rate 0.001", "--num-minibatches 8"
        ]  # fmt: skip
    assert own_defaults(atari) == []
    # dreams have a rate of their own
    assert dream_spi.Args.learning_rate == ppo.Args.learning_rate
    assert parse_flags(dream_spi.Args, ["--env-id=Breakout-MinAtar"]).learning_rate == 2 * game.learning_rate
    for script in (ppo, deep_mdp, deep_spi, dream_spi):
        check_flags(make_args(script.Args, env_id="Seaquest-MinAtar"))
    with pytest.raises(UsageError, match="--decoupled-layers: is used only with dense layers .--fc-layers."):
        check_flags(make_args(ppo.Args, env_id="Seaquest-MinAtar", decoupled_layers=True))
    with pytest.raises(UsageError, match="--clip-reward-net-output: cannot predict the rewards of Seaquest-MinAtar"):
        check_flags(make_args(deep_spi.Args, env_id="Seaquest-MinAtar", clip_reward_net_output=True))
    check_flags(make_args(deep_spi.Args, env_id="Breakout-MinAtar", clip_reward_net_output=True))


@pytest.mark.minatar
def test_a_default_of_the_family_is_no_value_of_ones_own():
    """Neither where nothing reads the flag, nor in a run that was stored before there was one."""

    @dataclasses.dataclass
    class Args(RunArgs):
        width: Annotated[int, Default(minatar=3), Needs(track=True)] = 2

    check_flags(make_args(Args, env_id="Breakout-MinAtar"))
    for env_id, width in (("Breakout-MinAtar", 2), ("Pong-v5", 3)):
        with pytest.raises(UsageError, match=f"--width {width}: is used only with --track"):
            check_flags(Args(env_id=env_id, width=width))
    assert from_store(deep_spi.Args, {"enforce_neighbourhood": "backtrack"}).enforce_neighborhood == "backtrack"
    assert from_store(Args, {"env_id": "Breakout-MinAtar"}).width == 3 and from_store(Args, {"env_id": "Pong-v5"}).width == 2


def test_flags_of_a_benchmark_without_an_environment_are_checked_too():
    @dataclasses.dataclass
    class Args:
        size: int = 3

    refuse_unread(Args(), ("size",), "--more")
    with pytest.raises(UsageError, match="--size 4: is used only with --more; leave it out"):
        refuse_unread(Args(size=4), ("size",), "--more")


def test_without_the_extra_its_environments_are_refused(monkeypatch):
    monkeypatch.setattr(minatar, "PACKAGES", ("pgx", "no_such_package"))
    with pytest.raises(
        UsageError, match="--env-id Breakout-MinAtar: needs the packages pgx and pgx-minatar; use uv run --extra minatar"
    ):
        check_flags(make_args(ppo.Args, env_id="Breakout-MinAtar"))


def test_a_word_that_is_no_boolean_is_refused():
    with pytest.raises(UsageError, match="--norm-adv maybe: must be True or False"):
        parse_flags(ppo.Args, ["--norm-adv", "maybe"])


def test_the_sweep_file_of_the_docs():
    """What W&B's agent makes of it, with every value of every parameter, is taken by the script."""
    create_sweep_command_args = pytest.importorskip("wandb.sdk.launch.sweeps.utils").create_sweep_command_args
    sweep = yaml.safe_load((ROOT / "docs" / "sweep.yaml").read_text())
    args_type = {"deep_spi.py": deep_spi.Args}[sweep["program"]]
    for name, parameter in sweep["parameters"].items():
        for value in parameter.get("values", [parameter.get("value", parameter.get("min"))]):
            made = create_sweep_command_args({"args": {name: {"value": value}}})
            for macro in ("args", "args_no_equals", "args_no_boolean_flags"):
                args = parse_flags(args_type, made[macro])
                check_flags(args)
                if value is not False or macro != "args_no_boolean_flags":
                    assert getattr(args, name) == value
    assert [word for word in sweep["command"] if word.startswith("${args")] == ["${args}"]


def test_an_environment_that_xla_cannot_step_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    check_flags(ppo.Args())
    with pytest.raises(UsageError, match="--env-step xla: envpool does not support it on darwin"):
        check_flags(ppo.Args(env_step="xla"))
