"""How runs start and end when something is wrong: one line, the right exit code, and nothing that was trained is lost.

Faults are real: closed pipes, signals, a device that is not there, more memory than there is, files that may not grow.
"""

import io
import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

import deep_spi
from tests.commands import CARTPOLE, PPO, ROOT, command, run
from tests.event_files import scalars
from tests.wandb_files import exit_codes
from utils.runs.flags import parse_flags
from utils.runs.quiet_start import Unbreakable

# what starts the tests may ignore Ctrl-C, and what it starts would too
HEEDING = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
LIMIT_FILES = (  # of the size that is the first argument: it stands in for a disk that is full
    "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); limit = int(sys.argv[1]); "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)); sys.argv = sys.argv[2:]; "
    "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
)


def assert_one_line(done, *words):
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and all(word in lines[0] for word in words), done.stderr


def limited(size, *flags):
    arguments = [sys.executable, "-c", LIMIT_FILES, str(size), *command(PPO, *flags)[1:]]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    "variables, words",
    [
        pytest.param(
            {"JAX_PLATFORMS": "cuda"},
            ["JAX_PLATFORMS=cuda", "unset it"],
            marks=pytest.mark.skipif(jax.default_backend() != "cpu", reason="it can start here"),
        ),
        ({"JAX_PLATFORMS": "nonsense,cpu"}, ["JAX_PLATFORMS=nonsense,cpu", "unset it"]),
        ({"JAX_ENABLE_X64": "1"}, ["JAX_ENABLE_X64", "unset it"]),
        ({"JAX_ENABLE_X64": "maybe"}, ["JAX_ENABLE_X64", "maybe"]),
    ],
)
def test_what_jax_cannot_start_is_said_before_anything_exists(variables, words, tmp_path):
    done = run(PPO, *CARTPOLE, "--track", f"--logdir={tmp_path}", WANDB_MODE="offline", WANDB_DIR=str(tmp_path), **variables)
    assert done.returncode == 2 and done.stdout == ""
    assert_one_line(done, *words)
    assert not any(tmp_path.iterdir())


def test_an_evaluation_says_too_what_jax_cannot_start(tmp_path):
    done = run("evaluate.py", str(tmp_path), JAX_PLATFORMS="nonsense,cpu")
    assert done.returncode == 2 and done.stdout == ""
    assert_one_line(done, "JAX_PLATFORMS=nonsense,cpu", "unset it")


def test_a_python_without_the_packages_says_how_to_get_them(tmp_path):
    bare = [sys.executable, "-E", "-S", str(ROOT / PPO)]  # without site-packages
    done = subprocess.run(bare, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, cwd=tmp_path)
    assert done.returncode == 2
    assert_one_line(done, "uv run", "requirements.lock")


def start(*arguments):
    """A process that heeds Ctrl-C, and is ended after some minutes whatever happens."""
    heeding = [sys.executable, "-c", HEEDING, *arguments]
    process = subprocess.Popen(heeding, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(240, process.kill)
    watchdog.daemon = True
    watchdog.start()
    return process


@pytest.mark.parametrize("package", ["numpy", "jax._src.config", "flax", "envpool"])
def test_ctrl_c_while_it_imports(package, tmp_path):
    """Python says of each import when it is done; the next one is under way then."""
    python, *arguments = command(PPO, *CARTPOLE, f"--logdir={tmp_path}")
    process = start(python, "-X", "importtime", *arguments)
    assert any(line.split("|")[-1].strip() == package for line in process.stderr)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == 130
    assert all(line.startswith("import time:") for line in rest.splitlines()), rest
    assert not any(tmp_path.iterdir())


def test_ctrl_c_ends_the_run_after_its_update(tmp_path):
    flags = ["--env-id=CartPole-v1", "--num-envs=8", "--num-steps=16", "--fc-layers=32", f"--logdir={tmp_path}"]
    process = start(*command(PPO, *flags))
    assert any(line.startswith("first update") for line in process.stdout), process.stderr.read()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, err) == (130, "") and "stopping after this update" in out
    steps = int(out.split("stopped after ")[1].split()[0].replace(",", ""))
    (folder,) = tmp_path.iterdir()
    assert scalars(folder)["losses/policy_loss"][-1][0] == steps > 0
    assert out.count("tensorboard --logdir") == 1


def test_a_stream_writes_what_its_encoding_has_and_drops_the_rest():
    written = io.BytesIO()
    stream = Unbreakable(io.TextIOWrapper(written, encoding="ascii"))
    assert stream.write("läuft\n") == 6
    stream.flush()
    assert written.getvalue() == b"l?uft\n"
    written.close()
    assert stream.write("more") == 4  # to nobody
    stream.flush()


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_goes_on_to_its_end(tmp_path):
    """A pipe whose reader leaves after a line, then streams that are closed from the start; in a folder with letters and spaces
    that the terminal's encoding lacks."""
    folder = tmp_path / "läufe mit leerzeichen"
    typed = shlex.join(command(PPO, *CARTPOLE, f"--logdir={folder}"))
    for k, redirected in enumerate(
        (f"{{ {typed} --seed=1; echo $? >&3; }} | head -1 >&2", f"{typed} --seed=2 >&- 2>&-; echo $? >&3")
    ):
        done = subprocess.run(
            ["bash", "-c", f"exec 3>&1; {redirected}"], capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}
        )
        assert done.stdout == b"0\n"
        assert len(done.stderr.splitlines()) == 1 - k, done.stderr  # what the reader read before it left
    runs = sorted(folder.iterdir(), key=lambda run: run.name.split("__")[2])
    assert [len(scalars(run)["losses/policy_loss"]) for run in runs] == [3, 3]


OUT_OF_MEMORY = """
import jax
from utils.runs.launch import run_main
def main():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
run_main(main)
"""


def test_out_of_memory_is_one_line_and_a_failure():
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert_one_line(done, "out of memory", "--num-envs")


@pytest.mark.slow
def test_out_of_memory_in_the_last_update_is_one_line_and_a_failure(tmp_path):
    """A rollout of half a petabyte, for which no address space has room."""
    flags = ["--env-id=Breakout-v5", "--num-envs=8", "--num-steps=500000000", "--total-timesteps=4000000000"]
    done = run(
        PPO, *flags, "--track", f"--logdir={tmp_path}", WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true"
    )
    assert done.returncode == 1
    assert_one_line(done, "out of memory", "--num-envs")
    assert done.stdout.count("stopped after 0 steps") == 1 and "ended" not in done.stdout
    assert done.stdout.count("tensorboard --logdir") == 1
    assert exit_codes(tmp_path) == [1]


@pytest.mark.parametrize(
    "size, steps",
    # while it runs; and when all it wrote is flushed at the end
    [(20_000, 64_000), pytest.param(3_000, 96, marks=pytest.mark.slow)],
)
def test_a_full_disk_is_one_line_and_a_failure(size, steps, tmp_path):
    flags = ["--env-id=CartPole-v1", "--num-envs=4", "--num-steps=8", f"--total-timesteps={steps}", "--fc-layers=8"]
    done = limited(size, *flags, f"--logdir={tmp_path}")
    assert done.returncode == 1
    assert_one_line(done, "disk full", str(tmp_path))
    assert done.stdout.count("stopped after") == 1 and "ended after" not in done.stdout


def test_a_folder_that_cannot_be_written_gets_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(PPO, *CARTPOLE, f"--logdir={tmp_path / 'file' / 'runs'}")
    assert done.returncode == 1
    assert_one_line(done, "file")


@pytest.mark.slow
def test_numbers_that_are_none_stop_no_healthy_run(tmp_path, capsys):
    """One environment, one step: returns have no variance. With jax_debug_nans, a NaN anywhere would be an error."""
    flags = ["--env-id=CartPole-v1", "--num-envs=1", "--num-steps=1", "--num-minibatches=1", "--total-timesteps=4"]
    flags += ["--no-norm-adv"]
    flags += ["--fc-layers=8", "--monitor-guarantee", "--monitor-every=2"]
    flags += ["--latent=categorical", "--num-categories=2", "--num-classes=2"]
    with jax.debug_nans(True):
        deep_spi.main(parse_flags(deep_spi.Args, [*flags, f"--logdir={tmp_path}"]))
    out, err = capsys.readouterr()
    assert "not finite" not in out and err == ""
    (folder,) = tmp_path.iterdir()
    written = scalars(folder)
    assert "losses/explained_variance" not in written and len(written["losses/value_loss"]) == 4
    assert [step for step, _ in written["spi/bound/reward_error"]] == [1, 3]
