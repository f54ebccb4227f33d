"""The scripts as a user types them."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import deep_mdp_ppo as deep_mdp
import dream_spi
from tests.commands import CARTPOLE, PPO, SMALL, run
from tests.event_files import scalars
from utils.runs.flags import parse_flags

CODES = ["--latent=categorical", "--num-categories=4", "--num-classes=4"]  # which compile faster
WATCHED = ["--monitor-guarantee", "--monitor-every=2", "--enforce-neighborhood=backtrack"]
WATCHED += ["--track-params", "--track-grads", "--track-every=2"]
REPLAYED = ["--use-replay-buffer", "--replay-capacity=400", "--replay-prefill=40", "--replay-length=4", "--replay-batch-size=4"]
REPLAYED += ["--replay-ratio=1.5", "--log-dreams", "--log-dreams-every=2"]
MORE = ["--wasserstein-discriminator", "--track-grads", "--track-every=2"]


def assert_tracked(folder, written, *names):
    """Norms and histograms of layers, of the first and the third update."""
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0})
    events.Reload()
    histograms = {tag: [(h.step, h.histogram_value.num) for h in events.Histograms(tag)] for tag in events.Tags()["histograms"]}
    for name in names:
        (tag, *_) = [tag for tag in histograms if tag.startswith(name)]
        assert [step for step, _ in histograms[tag]] == [step for step, _ in written[f"{tag}/norm"]] == [32, 96], tag
        assert all(num > 0 for _, num in histograms[tag]) and all(norm > 0 for _, norm in written[f"{tag}/norm"])


def assert_trained(folder, out, *more):
    """Three updates are in the output and in the TensorBoard file, whose scalars it returns."""
    assert "device:" in out and "96/96 steps" in out and "tensorboard --logdir" in out
    written = scalars(folder)
    expected = {"losses/policy_loss", "losses/explained_variance", "charts/SPS", "spi/ratio_max", "spi/outside_fraction"}
    assert expected | set(more) <= set(written)
    assert [step for step, _ in written["losses/policy_loss"]] == [32, 64, 96]
    return written


MODEL = ("losses/transition_loss", "losses/reward_loss")


@pytest.mark.parametrize(
    "script, flags",
    [
        pytest.param(PPO, ["--env-id=Breakout-v5"], marks=pytest.mark.slow),
        ("deep_spi.py", ["--env-id=Breakout-v5"]),
        pytest.param("dream_spi.py", ["--env-id=CartPole-v1"], marks=pytest.mark.slow),  # with replay and codes: below
        pytest.param("deep_mdp_ppo.py", ["--env-id=Breakout-v5"], marks=pytest.mark.slow),
        pytest.param("dream_spi.py", ["--env-id=Breakout-v5", "--no-use-replay-buffer"], marks=pytest.mark.slow),
    ],
)
def test_trains_and_says_where_the_logs_are(script, flags, tmp_path):
    unoptimized = "Breakout-v5" not in flags[0]  # that one as it is for users
    done = run(script, *SMALL, *flags, f"--logdir={tmp_path}", JAX_DISABLE_MOST_OPTIMIZATIONS=str(int(unoptimized)))
    assert (done.returncode, done.stderr) == (0, "")
    (folder,) = tmp_path.iterdir()
    assert_trained(folder, done.stdout, *(() if script == PPO else MODEL))


def test_halves_bounds_and_tracked_layers(tmp_path, capsys):
    deep_mdp.main(parse_flags(deep_mdp.Args, [*CARTPOLE, "--overlap-rollout", *CODES, *WATCHED, f"--logdir={tmp_path}"]))
    (folder,) = tmp_path.iterdir()
    written = assert_trained(folder, capsys.readouterr().out, *MODEL)
    assert [step for step, _ in written["spi/bound/reward_error"]] == [32, 96]
    assert [value for _, value in written["spi/outside_fraction"]] == [0, 0, 0]
    assert_tracked(folder, written, "params/encoder/Dense_0/kernel", "grads/transition/logits/kernel", "params/actor_critic")


@pytest.mark.parametrize("more", [[], pytest.param(MORE, marks=pytest.mark.slow)])
def test_dreams_with_replay_a_critic_and_pictures(more, tmp_path):
    dream_spi.main(parse_flags(dream_spi.Args, [*CARTPOLE, *CODES, *REPLAYED, *more, f"--logdir={tmp_path}"]))
    (folder,) = tmp_path.iterdir()
    written = scalars(folder)
    assert [step for step, _ in written["losses/explained_variance"]] == [32, 64, 96]
    assert [step for step, _ in written["losses/transition_loss"]] == [96]  # the first two rollouts fill the buffer
    if more:
        of_heads = written["grads/dreams/actor_critic/actor/kernel/norm"]
        assert [step for step, _ in of_heads] == [96] and all(norm > 0 for _, norm in of_heads)
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    assert {tag: [p.step for p in events.Images(tag)] for tag in events.Tags()["images"]} == {"dreams/dream": [96]}


OPTIONS = [
    ["--transition-density=deterministic", "--minibatch-by=transition", "--no-anneal-lr", "--use-huber"],
    ["--transition-density=normal", "--no-lipschitz-nets", "--drift-formulation", "--target-kl=0.02", "--clip-vloss"],
    [
        "--no-piecewise-auxiliary-ratio",
        "--decoupled-repr",
        "--use-layer-norm",
        "--activation=silu",
        "--stochastic-env",
        "--no-reward-clip",
    ],
    ["--fc-layers", "400", "400", "400", "400", "--no-norm-adv", "--env-id=CartPole-v1"],
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_options_run(options, tmp_path):
    done = run("deep_spi.py", *SMALL, *options, f"--logdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "not finite" not in done.stdout
