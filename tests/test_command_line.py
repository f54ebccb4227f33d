"""The scripts as a user types them."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import deep_mdp_ppo as deep_mdp
import deep_spi
import dream_spi
import ppo_atari_envpool_xla_jax_scan as ppo
from tests.event_files import scalars
from utils.runs.launch import run_script

ROOT = Path(deep_spi.__file__).parent
SCRIPTS = ["ppo_atari_envpool_xla_jax_scan.py", "deep_mdp_ppo.py", "deep_spi.py", "dream_spi.py"]
SMALL = ["--num-envs=8", "--num-steps=4", "--total-timesteps=96", "--fc-layers=32"]


def run(script, *flags, **env):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *flags], capture_output=True, text=True, env=os.environ | env, timeout=300
    )


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
    (["--env-id=ConfoundingGridworld-v0", "--gamma=1"], "--gamma", "between 0 and 1"),
    (["--seed=-1"], "--seed", "0 or more"),
    (["--num-envs=0"], "--num-envs", "at least 1"),
    (["--wandb-group=a"], "--wandb-group", "--track"),
    (["--num-classes=8"], "--num-classes", "--latent categorical"),
    (["--latent=categorical", "--num-classes=1"], "--num-classes", "at least 2"),
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
    (["--no-lipschitz-nets", "--use-wgan-gp", "--lambda-gp=0"], "--lambda-gp", "above 0"),
    (["--clip-reward-net-output", "--no-reward-clip"], "--no-reward-clip", "drop one"),
    (["--clip-reward-net-output", "--env-id=ConfoundingGridworld-v0"], "--clip-reward-net-output", "leave it out"),
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
    (["--weight-decay=-1"], "--weight-decay", "0 or more"),
    (["--monitor-guarantee"], "--monitor-guarantee", "leave it out"),
    (["--enforce-neighbourhood=backtrack"], "--enforce-neighbourhood", "leave it out"),
    (["--target-kl=0.1"], "--target-kl", "leave it out"),
    (["--replay-capacity=30000"], "--replay-capacity", "--use-replay-buffer"),
    (["--off-policy=clipped_ratio"], "--off-policy", "--use-replay-buffer"),
    (["--use-replay-buffer", "--update-epochs=2"], "--update-epochs", "leave it out"),
    (["--use-replay-buffer", "--replay-length=0"], "--replay-length", "at least 1"),
    (["--use-replay-buffer", "--replay-prefill=100"], "--replay-prefill", "at least 4224"),
    (["--use-replay-buffer", "--replay-capacity=20000"], "--replay-capacity", "at least 20096"),
    (["--use-replay-buffer", "--total-timesteps=20480"], "--total-timesteps", "ask for more"),
    (["--use-replay-buffer", "--replay-ratio=0"], "--replay-ratio", "the nearest is 2"),
    (["--use-replay-buffer", "--replay-ratio=5.5"], "--replay-ratio", "the nearest is 6"),
    (
        ["--num-envs=8", "--use-replay-buffer", "--replay-capacity=99999999", "--replay-ratio=64"],
        "--replay-capacity",
        "GiB of memory",
    ),
    (["--wasserstein-discriminator", "--w-balancing=0.5"], "--w-balancing", "leave it out"),
    (["--wasserstein-discriminator", "--discriminator-steps=0"], "--discriminator-steps", "at least 1"),
    (["--discriminator-learning-rate=1e-3"], "--discriminator-learning-rate", "--wasserstein-discriminator"),
    (["--latent=categorical", "--use-gumbel-softmax", "--wasserstein-discriminator"], "--use-gumbel-softmax", "leave it out"),
    (["--log-dreams-every=5"], "--log-dreams-every", "--log-dreams"),
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
    for flag, remedy in (("--transition-loss-coef=-1", "0 or more"), ("--drift-coef=0.5", "--drift-formulation")):
        done = run("deep_spi.py", flag)
        assert_refused(done.returncode, done.stdout, done.stderr, flag.split("=")[0], remedy)


def test_full_disk_ends_the_run_with_one_line(tmp_path):
    """A limit on the size of files stands in for the disk."""
    limited = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.argv = sys.argv[1:]; "
        "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    flags = ["--env-id=CartPole-v1", "--num-envs=4", "--num-steps=8", "--total-timesteps=64000", "--fc-layers=8"]
    command = [sys.executable, "-c", limited, str(ROOT / SCRIPTS[0]), *flags, f"--logdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "disk full" in done.stderr.strip().splitlines()[-1], done.stderr
    assert "stopped after" in done.stdout


def test_unwritable_folder_gets_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(SCRIPTS[0], *SMALL, "--env-id=CartPole-v1", f"--logdir={tmp_path / 'file' / 'runs'}")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1 and "file" in done.stderr, done.stderr


WATCHED = ["--monitor-guarantee", "--monitor-every=2", "--enforce-neighbourhood=backtrack"]


REPLAYED = ["--use-replay-buffer", "--replay-capacity=400", "--replay-prefill=40", "--replay-length=4", "--replay-batch-size=4"]
REPLAYED += ["--replay-ratio=1.5", "--wasserstein-discriminator", "--log-dreams", "--log-dreams-every=2"]


@pytest.mark.parametrize("script, flags", [*zip(SCRIPTS, ([], WATCHED, [], []), strict=True)])
def test_trains_on_atari_and_says_where_the_logs_are(script, flags, tmp_path):
    done = run(script, "--env-id=Breakout-v5", *SMALL, *flags, f"--logdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "device:" in done.stdout and "96/96 steps" in done.stdout and "tensorboard --logdir" in done.stdout
    (folder,) = tmp_path.iterdir()
    written = scalars(folder)
    expected = {"losses/policy_loss", "losses/explained_variance", "charts/SPS", "spi/ratio_max", "spi/outside_fraction"}
    if script != SCRIPTS[0]:
        expected |= {"losses/transition_loss", "losses/reward_loss"}
    assert expected <= set(written)
    assert [step for step, _ in written["losses/policy_loss"]] == [32, 64, 96]
    if flags:
        assert [step for step, _ in written["spi/bound/reward_error"]] == [32, 96]
        assert [value for _, value in written["spi/outside_fraction"]] == [0, 0, 0]


def test_dreams_on_atari_with_replay_a_critic_and_pictures(tmp_path):
    done = run("dream_spi.py", "--env-id=Breakout-v5", *SMALL, *REPLAYED, f"--logdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    written = scalars(folder)
    assert [step for step, _ in written["losses/explained_variance"]] == [32, 64, 96]
    assert [step for step, _ in written["losses/transition_loss"]] == [96]  # the first two rollouts fill the buffer
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    assert {tag: [p.step for p in events.Images(tag)] for tag in events.Tags()["images"]} == {
        "dreams/outcomes": [96], "dreams/latent_error": [96]
    }  # fmt: skip


def test_trains_on_the_gridworld_and_logs_what_is_known_exactly(tmp_path):
    done = run(SCRIPTS[0], "--env-id=ConfoundingGridworld-v0", *SMALL, f"--logdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    written = scalars(folder)
    assert {"charts/init_value", "charts/representation_distance", "values/2_0", "values/3_5"} <= set(written)
    assert written["values/2_0"] == written["charts/init_value"] and len(written["values/2_0"]) == 3
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    pictures = events.Images("charts/policy_matrix")
    assert [(p.step, p.height, p.width) for p in pictures] == [(32, 192, 64), (64, 192, 64), (96, 192, 64)]


def test_interrupt_ends_the_run_without_a_traceback(tmp_path):
    flags = ["--env-id=Pong-v5", "--num-envs=8", "--num-steps=16", "--fc-layers=32", f"--logdir={tmp_path}"]
    command = [sys.executable, str(ROOT / SCRIPTS[0]), *flags]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what starts the tests may ignore it, and so would the run
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    watchdog = threading.Timer(200, process.kill)
    watchdog.start()
    assert any(line.startswith("first update") for line in process.stdout), process.stderr.read()
    watchdog.cancel()
    time.sleep(1)  # well within some iteration
    process.send_signal(signal.SIGINT)
    said = iter(process.stdout.readline, "")
    assert any(line.startswith("stopping") for line in said), process.stderr.read()
    process.send_signal(signal.SIGINT)  # an impatient second one
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "" and "stopped after" in out and "tensorboard --logdir" in out


OPTIONS = [
    ["--transition-density=deterministic", "--minibatch-by=transition", "--no-anneal-lr", "--use-huber"],
    ["--transition-density=normal", "--no-lipschitz-nets", "--drift-formulation", "--target-kl=0.02", "--no-clip-vloss"],
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
