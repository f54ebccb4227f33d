"""Studies on this machine: what is started, what a kill leaves, what is done again."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import ppo_atari_envpool_xla_jax_scan as ppo
from envs.atari import atari_ids
from experiments import run as launching
from experiments.study import local, slurm, status
from experiments.study.estimates import disk_bytes
from experiments.study.plan import (
    BEGAN,
    ENDED,
    SETS,
    count_extended,
    log_path,
    plan,
    read_plan,
    script_path,
    state_of,
    to_paste,
    write_plan,
)
from tests.commands import PPO, ROOT, command
from utils.runs import folder as run_folder
from utils.runs.flags import UsageError, make_args
from utils.runs.stored_flags import to_store

pytestmark = pytest.mark.minatar

SHORT = str(ROOT / "tests" / "short_script.py")
GAMES = ("Breakout-MinAtar", "Asterix-MinAtar")


def planned(logdir, *flags, scripts=(SHORT,), env_ids=GAMES[:1], seeds=(1,)):
    return plan(scripts, env_ids, list(seeds), ["--total-timesteps=100", *flags], logdir)


def rows(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def sittings(folder):
    return len(json.loads((folder / "run.json").read_text())["sittings"])


def wait_for(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def saved(folder):
    """The step of the last checkpoint."""
    return max((int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdecimal()), default=0)


def test_names_sets_and_flags(tmp_path):
    scripts = ("ppo", "deep_spi --transition-loss-coef 1e-3", "deep_spi.py")
    runs = plan(scripts, ("minatar", "Pong-v5"), [3, 4], ["--gamma=0.9"], tmp_path)
    assert len(runs) == 3 * 6 * 2
    assert [len(SETS[name]) for name in ("ale57", "ale61", "atari5")] == [57, 61, 5]
    assert set(SETS["ale57"]) | set(SETS["atari5"]) < set(SETS["ale61"]) <= set(atari_ids())
    assert [run.seed for run in runs] == [3] * 18 + [4] * 18  # a study that is not finished compares what it has
    first, second = runs[0], runs[1]
    assert (first.name, first.steps) == ("Asterix-MinAtar__ppo__3", 610 * 64 * 128)
    assert second.name == "Asterix-MinAtar__deep_spi__transition-loss-coef-1e-3__3"
    assert second.command[-3:] == ["--transition-loss-coef", "1e-3", "--gamma=0.9"]
    assert runs[15].env_id == "Pong-v5" and runs[15].steps == 10_000_000 // 1024 * 1024
    write_plan(tmp_path, runs[:2])
    write_plan(tmp_path, runs[1:3])
    assert read_plan(tmp_path) == runs[:3]


def test_a_script_in_another_folder_finds_the_project_and_its_own_modules(tmp_path, monkeypatch):
    """Started by a study, and by its command pasted in another folder."""
    folder, logdir = tmp_path / "my scripts", tmp_path / "s"
    (folder / "lib").mkdir(parents=True)
    (folder / "lib" / "found_by_path.py").touch(), (folder / "found_beside.py").touch()
    text, hack = (ROOT / "tests" / "short_script.py").read_text(), "sys.path.insert(0, str(Path(__file__).parent.parent))"
    assert hack in text
    (folder / "my_short.py").write_text(text.replace(hack, "import found_beside, found_by_path  # noqa: F401"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", "lib")  # relative to here, not to where a run is started
    monkeypatch.syspath_prepend(folder / "lib")
    runs = planned(logdir, scripts=("my_short.py",))
    assert local.launch(logdir, local.Source(runs), local.make_slots((), 1, 1)) == []
    typed = to_paste(runs[0].command)
    monkeypatch.undo()
    done = subprocess.run(["bash", "-c", typed], cwd="/", capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "already finished" in done.stdout, done.stderr
    ours = [sys.executable, str(ROOT / PPO), "--seed=1"]
    assert to_paste(ours) == shlex.join(ours)
    (folder / "utils.py").touch()
    with pytest.raises(UsageError, match="utils.py in its folder hides this project's"):
        planned(logdir, scripts=(shlex.quote(str(folder / "my_short.py")),))


def program(folder, name, text):
    """Put a shell script into the folder, under the name of a command."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


OF_A_JOB = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "1000", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SRUN_CPUS_PER_TASK": "9"}
OF_A_JOB |= {"SLURM_CPUS_PER_TASK": "9", "SBATCH_MEM_BIND": "local", "CUDA_VISIBLE_DEVICES": "3", "SLURMD_NODENAME": "n1"}


def test_slurm_jobs_do_not_get_the_resources_of_the_job_that_submits_them(tmp_path, monkeypatch):
    program(tmp_path / "bin", "sbatch", f"env >{tmp_path}/given; echo 12")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    kept = {"SLURM_CONF": "/etc/here.conf", "SBATCH_ACCOUNT": "mine", "HOME": str(tmp_path)}
    for name, value in (OF_A_JOB | kept | {"SQUEUE_STATES": "RUNNING", "SBATCH_WAIT": "1"}).items():
        monkeypatch.setenv(name, value)

    def given():
        (tmp_path / "s").mkdir(exist_ok=True)
        assert slurm.submit(tmp_path / "s", planned(tmp_path / "s"), ROOT / "experiments" / "slurm.sh")[0] == ["12"]
        next((tmp_path / "s" / slurm.JOBS).iterdir()).unlink()  # as if the queue were empty
        return dict(line.split("=", 1) for line in (tmp_path / "given").read_text().splitlines() if "=" in line)

    inside = given()
    assert not (OF_A_JOB | {"SQUEUE_STATES": "", "SBATCH_WAIT": ""}).keys() & inside.keys() and kept.items() <= inside.items()
    monkeypatch.delenv("SLURM_JOB_ID")  # outside of a job, they are what the user has chosen
    assert given()["SLURM_CPU_BIND"] == OF_A_JOB["SLURM_CPU_BIND"] and "SQUEUE_STATES" not in given()


@pytest.mark.parametrize("cpus, words", [(None, "bash -c"), ("4", "--cpus-per-task=4 bash -c")])
def test_a_batch_script_may_ask_for_no_cores(cpus, words, tmp_path):
    program(tmp_path / "bin", "srun", f'echo "$@" >{tmp_path}/asked; [[ $1 = --* ]] && shift; exec "$@"')
    (tmp_path / "list").write_text("a\techo one\nb\techo two words\n")
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "7"}
    env |= {"SLURM_CPUS_PER_TASK": cpus} if cpus else {}
    script = ROOT / "experiments" / "slurm.sh"
    done = subprocess.run(["bash", script, tmp_path / "list", tmp_path], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "asked").read_text().startswith(words)
    assert (tmp_path / "b.log").read_text().splitlines()[1:] == ["two words", f"{ENDED} 0"]


@pytest.mark.parametrize("state", ["RUNNING", "CANCELLED"])
def test_a_job_is_requeued_at_its_time_limit_but_not_if_it_is_canceled(state, tmp_path):
    """Both end a run with SIGTERM."""
    program(tmp_path / "bin", "srun", "exit 143")
    program(
        tmp_path / "bin",
        "scontrol",
        f'[[ $1 = show ]] && echo "   JobState={state} Reason=None" || echo "$@" >{tmp_path}/asked',
    )
    (tmp_path / "list").write_text("a\techo one\n")
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "9"}
    env |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    script = ROOT / "experiments" / "slurm.sh"
    done = subprocess.run(["bash", script, tmp_path / "list", tmp_path], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (143, "")
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert asked == ("requeue 7_1\n" if state == "RUNNING" else "")
    assert (tmp_path / "a.log").read_text().count(BEGAN) == 1  # not tried again at once


def test_a_python_that_disappears_is_refused_for_later_jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm.shutil, "which", lambda _: "/bin/true")
    monkeypatch.setattr(sys, "executable", "/home/me/.cache/uv/builds-v0/.tmpAb1/bin/python")
    with pytest.raises(UsageError, match="--slurm: the Python of `uv run --with` disappears"):
        slurm.submit(tmp_path, planned(tmp_path), ROOT / "experiments" / "slurm.sh")


def test_many_flags_make_names_that_a_file_system_takes(tmp_path):
    many = "deep_spi " + " ".join(f"--transition-loss-coef {k}e-3" for k in range(1, 30))
    names = {run.name for run in plan((many, f"{many} --gamma 0.9"), GAMES, [1], [], tmp_path)}
    assert len(names) == 4 and max(map(len, names)) < 200
    for name in names:
        (tmp_path / f"{name}.log").touch()


@pytest.mark.parametrize(
    "scripts, env_ids, flags, said",
    [
        (("nothing",), GAMES, [], "no such script; choose from deep_mdp_ppo, deep_spi, dream_spi, ppo"),
        (("tests/commands.py",), GAMES, [], "has no dataclass Args"),
        (("ppo", "ppo"), GAMES, [], "names ppo twice"),
        (("ppo 'a",), GAMES, [], "no closing quotation"),
        (("",), GAMES, [], "is empty; name a script"),
        (("",), GAMES, [], "--scripts ''"),
        ((), GAMES, [], "--scripts: name at least one"),
        (("ppo",), (), [], "--env-ids: name at least one"),
        (("ppo",), ("Breakou-v5",), [], "did you mean Breakout-v5"),
        (("ppo",), GAMES, ["--seed=3"], "--seed: is set for each run; leave it out"),
        (("ppo --run_name a",), GAMES, [], "--run-name: is set for each run; leave it out"),
        (("ppo",), GAMES, ["--clip-coef=-1"], "--clip-coef -1"),
        (("ppo",), GAMES, ["--keep-checkpoints=0"], "--resume auto: needs checkpoints"),
        (("/tmp/nowhere/own.py",), GAMES, [], "no such script"),
        (("ppo --gamma 0.9",), GAMES, ["--gamma=0.99"], "--scripts 'ppo --gamma 0.9': --gamma is also given after --"),
        (("ppo --no-norm-adv",), GAMES, ["--norm_adv", "True"], "--norm-adv is also given after --, for all runs"),
        (("ppo",), GAMES, ["--fc-layers", "64", "--fc_layers=32"], "--fc-layers: is given 2 times; write all its values after"),
    ],
)
def test_mistakes_are_found_before_anything_starts(scripts, env_ids, flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UsageError) as error:
        plan(scripts, env_ids, [1], flags, tmp_path)
    assert said in str(error.value)


def test_a_draft_among_the_scripts_is_no_script(tmp_path, monkeypatch):
    (tmp_path / "draft.py").write_text("def main(:"), (tmp_path / "text.py").write_bytes(b"\xff\x00")
    (tmp_path / "whole.py").write_text("run_script(main, Args)")
    monkeypatch.setattr(run_folder, "ROOT", tmp_path)
    with pytest.raises(UsageError, match="nothing: no such script; choose from whole, or"):
        script_path("nothing")


def test_a_search_and_slurm_with_resources_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match="--slurm: the batch script sets the resources"):
        launching.main(launching.Args(scripts=("ppo",), logdir=tmp_path / "s", slurm=True, workers=1), [])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "search.json").touch()
    with pytest.raises(UsageError, match="contains a search of tune.py; choose another folder"):
        launching.main(launching.Args(scripts=("ppo",), logdir=tmp_path), [])


def test_one_wandb_id_for_all_runs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    assert len(planned(tmp_path)) == 1
    with pytest.raises(UsageError, match="WANDB_RUN_ID: would make all runs of the study one W&B run"):
        planned(tmp_path, "--track")


def test_cores_and_gpus_are_divided(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(local, "cpu_quota", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [slot.cores for slot in local.make_slots(None, 1, 3)] == [(0, 1), (2, 3, 4), (5, 6, 7)]
    assert [slot.cores for slot in local.make_slots(None, 1, None)] == [(core,) for core in range(8)]
    slots = local.make_slots(("0", "1"), 2, None)
    assert [(slot.gpu, slot.cores, slot.share) for slot in slots[1:3]] == [("0", (2, 3), 0.45), ("1", (4, 5), 0.45)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 3,-1,4")
    assert [slot.gpu for slot in local.make_slots(None, 1, None)] == ["2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert local.visible_gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for platforms, found in (("cpu", []), ("cpu,cuda", []), ("cuda,cpu", ["0"])):
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        assert local.visible_gpus() == found
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5}, raising=False)
    assert [slot.cores for slot in local.make_slots((), 1, 2)] == [(5,), (5,)]
    for wrong in ((None, 0, None), (("1", "1"), 1, None), (("1",), 1, 2), ((), 1, 0), (("0,1",), 1, None), ((), 2, None)):
        with pytest.raises(UsageError):
            local.make_slots(*wrong)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
def test_a_reader_sees_that_a_run_is_running():
    """Somebody who may neither write the lock nor make files beside it."""
    fcntl = pytest.importorskip("fcntl")
    with tempfile.TemporaryDirectory() as logdir:  # the folders of pytest are closed to others
        (run,) = planned(Path(logdir))
        lock = Path(logdir, run.name, ".lock")
        lock.parent.mkdir()
        lock.touch()
        for path, mode in ((lock, 0o444), (lock.parent, 0o555), (Path(logdir), 0o755)):
            path.chmod(mode)
        before = os.geteuid()
        with lock.open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            try:
                if before == 0:
                    os.seteuid(65534)
                assert not os.access(lock, os.W_OK, effective_ids=True)
                assert state_of(Path(logdir), run).kind == "running"
                fcntl.flock(held, fcntl.LOCK_SH)  # of somebody else who asks
                assert state_of(Path(logdir), run).kind == "left"
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # whoever asks keeps nothing
            finally:
                os.seteuid(before)
        lock.parent.chmod(0o755)


def test_a_container_with_less_cpu_time_than_cores_gets_fewer_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for quota, workers in ((4.0, 4), (1.5, 1), (0.5, 1), (64.0, 8)):
        monkeypatch.setattr(local, "cpu_quota", lambda quota=quota: quota)
        slots = local.make_slots((), 1, None)
        assert len(slots) == workers and sum(len(slot.cores) for slot in slots) == 8
        assert len(local.make_slots((), 1, 6)) == 6  # as typed
        assert len(local.make_slots(("0", "1", "2"), 2, None)) == 6


@pytest.mark.parametrize(
    "asked, found",
    [
        ("NoDevFiles", []),
        ("none", []),
        ("void", []),
        ("0,1,NoDevFiles,2", ["0", "1"]),
        ("GPU-8932f937-d72c,MIG-41b3359c-e721", ["GPU-8932f937-d72c", "MIG-41b3359c-e721"]),
        ("0,,1", ["0"]),
        ("1x", []),
    ],
)
def test_visible_devices_end_where_cuda_ends_them(asked, found, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", asked)
    assert local.visible_gpus() == found
    assert [slot.gpu for slot in local.make_slots(None, 1, None)][: len(found) or 1] == (found or [None])


MIG = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa)
  MIG 3g.40gb     Device  0: (UUID: MIG-b0)
  MIG 1g.10gb     Device  1: (UUID: MIG-b1)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-cccc)
"""


@pytest.mark.parametrize(
    "does, found, said",
    [
        (f"printf '{MIG}'", ["MIG-b0", "MIG-b1", "1"], ""),
        ("echo No devices found.", [], ""),
        ("echo NVIDIA-SMI has failed; exit 9", [], "nvidia-smi: NVIDIA-SMI has failed"),
        ("exec sleep 60", [], "nvidia-smi: does not end within"),
    ],
)
def test_what_nvidia_smi_lists(does, found, said, tmp_path, monkeypatch, capsys):
    program(tmp_path / "bin", "nvidia-smi", does)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(local, "NVIDIA_SMI_SECONDS", 0.5 if said else 30.0)
    local._present_gpus.cache_clear(), local._listed_gpus.cache_clear()
    try:
        assert local.visible_gpus() == local.visible_gpus() == found
        if found:
            with pytest.raises(UsageError, match=f"--gpus 9: nvidia-smi lists {len(found)} GPUs"):
                local.make_slots(("0", "9"), 1, None)
    finally:
        local._present_gpus.cache_clear(), local._listed_gpus.cache_clear()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == bool(said) and all(said in line and "--gpus" in line for line in lines)


@pytest.mark.parametrize("gpus, platform, devices", [((), "cpu", "0,1"), (None, "", "0,1"), (("MIG-b1",), "", "MIG-b1")])
def test_a_run_gets_the_gpu_of_its_slot(gpus, platform, devices, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    (run,) = planned(tmp_path)
    run = run._replace(command=["bash", "-c", "echo platform $JAX_PLATFORMS, devices $CUDA_VISIBLE_DEVICES"])
    (slot, *_) = local.make_slots(gpus, 1, None)
    slot = slot._replace(gpu=None) if gpus is None else slot  # no GPU was found
    local.start(tmp_path, run, slot).process.wait()
    assert f"platform {platform}, devices {devices}\n" in log_path(tmp_path, run.name).read_text()


def test_what_a_log_says_of_the_last_process_alone(tmp_path):
    (run,) = planned(tmp_path)
    path = log_path(tmp_path, run.name)
    path.parent.mkdir()
    before = f"{BEGAN} now in place 0: x\nerror: of before\n{ENDED} 1\n{BEGAN} now in place 3: x\n"
    for said, code, error in (
        ("5 of 10 steps\n", 137, "exit code 137: signal 9"),
        ("Traceback ...\nValueError: a\n", 1, "exit code 1: ValueError: a"),
        ("", 1, "exit code 1"),
    ):
        path.write_text(f"{before}{said}{ENDED} {code}\n")
        assert state_of(tmp_path, run).error == error
    assert local.place_of(tmp_path, run.name) == 3 and local.place_of(tmp_path, "nothing") is None
    path.write_text(f"{before}{ENDED} 143\n")
    assert state_of(tmp_path, run).kind == "left"


def test_what_fails_is_tried_once_more_and_then_listed(tmp_path, capsys):
    """One run fails once and goes on from its checkpoint, one fails in every process, and the flags of one are wrong, which is
    not tried again."""
    once, always, logdir = tmp_path / "once", tmp_path / "always", tmp_path / "s"
    once.write_text("x"), always.write_text("xxxxx")
    scripts = (f"{SHORT} --failing {once}", f"{SHORT} --failing {always}")
    runs = planned(logdir, "--save-every=0", scripts=scripts)
    (wrong,) = planned(logdir)
    wrong = wrong._replace(command=[*wrong.command, "--gamma=2"])
    assert local.launch(logdir, local.Source([*runs, wrong]), local.make_slots((), 1, 2)) == [runs[1], wrong]
    assert always.read_text() == "xxx" and log_path(logdir, wrong.name).read_text().count(f"{ENDED} 2") == 1
    assert [state_of(logdir, run).kind for run in (*runs, wrong)] == ["finished", "failed", "failed"]
    assert state_of(logdir, wrong).error == "exit code 2: Unrecognized options: --gamma=2"
    good, bad = (logdir / run.name for run in runs)
    assert sittings(good) == sittings(bad) == 2 and rows(good) == list(range(10, 110, 10))
    said = capsys.readouterr().out
    assert said.count("retrying") == 2 and said.count("FAILED") == 2 and "it was to fail" in said
    states = status.Progresses(logdir, runs).states
    assert status.failures(runs, states) == [f"failed: {runs[1].name}: exit code 1: error: it was to fail"]
    assert status.table(runs, states)[1].endswith("0/1 1 FAILED") and " 1 failed" in status.summary(runs, states)
    always.write_text("")  # mended: the same command finishes it
    record = json.loads((good / "run.json").read_text())  # and of a run that died after its last checkpoint, it says so
    del record["finished_at"]
    (good / "run.json").write_text(json.dumps(record))
    assert state_of(logdir, runs[0]).kind == "stopped"
    assert local.launch(logdir, local.Source(runs), local.make_slots((), 1, 2)) == []
    assert sittings(good) == 2 and rows(bad) == list(range(10, 110, 10))


def test_a_run_that_comes_as_another_ends_may_start_before_one_that_waits(tmp_path):
    """Only one run at a time: the lowest rank is first, also if it comes when a slot becomes free."""
    order, first = tmp_path / "order", planned(tmp_path, env_ids=GAMES)
    (late,) = planned(tmp_path, env_ids=GAMES[:1], seeds=(2,))
    runs = [run._replace(command=["sh", "-c", f"echo {run.name} >> {order}; exit 2"]) for run in (*first, late)]

    class Adding(local.Source):
        whole = False

        def more(self):
            coming, self.coming = self.coming, []
            return None if self.whole and not coming else coming

        def over(self, run, state):
            if run == runs[0]:
                self.coming, self.whole = runs[2:], True

        def rank(self, run):
            return GAMES.index(run.env_id)

    assert local.launch(tmp_path, Adding(runs[:2]), local.make_slots((), 1, 1)) == runs
    assert order.read_text().split() == [runs[i].name for i in (0, 2, 1)]


HOLDS = "import fcntl, sys, time; lock = open(sys.argv[1]); fcntl.flock(lock, fcntl.LOCK_EX); time.sleep(600)"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")
def test_the_orphan_of_a_dropped_run_is_stopped(tmp_path):
    """A process holds the lock of a dropped run; another one, which is not dropped, is left alone."""
    dropped, other = planned(tmp_path, env_ids=GAMES)
    orphans = []
    for run in (dropped, other):
        (tmp_path / run.name).mkdir()
        lock = tmp_path / run.name / ".lock"
        lock.touch()
        orphans.append(subprocess.Popen([sys.executable, "-c", HOLDS, str(lock)]))
        wait_for(lambda: local.is_at_work(tmp_path / run.name))  # noqa: B023

    class Dropping(local.Source):
        def more(self):
            return [] if orphans[0].poll() is None else None

    source = Dropping([])
    command = ["another python", "-c", HOLDS, str(tmp_path / dropped.name / ".lock")]
    source.dropped = {dropped.name: dropped._replace(command=command)}
    assert local.launch(tmp_path, source, local.make_slots((), 1, 1)) == []
    assert orphans[0].wait() == -signal.SIGTERM and orphans[1].poll() is None
    orphans[1].kill(), orphans[1].wait()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")
def test_a_killed_run_and_a_killed_launcher_are_repaired_by_the_same_command(tmp_path, capsys):
    """kill -9 of one run, which is tried again; then of the launcher, whose runs go on as orphans; then of one of these."""
    gate, logdir = tmp_path / "gate", tmp_path / "s"
    own = ["--total-timesteps=400", "--save-every=0", "--pause=0.01", f"--gate={gate}"]
    flags = ["--scripts", SHORT, "--env-ids", *GAMES, "--num-seeds=1", f"--logdir={logdir}", "--workers=2", "--gpus"]
    words = command("experiments/run.py", *flags, "--", *own)
    names = [run.name for run in plan((SHORT,), GAMES, [1], own, logdir)]
    first, second = (logdir / name for name in names)
    owner = lambda folder: int((folder / ".process").read_text().split()[1])  # noqa: E731
    said = [tmp_path / "said", tmp_path / "said again"]
    with said[0].open("w") as out:
        launcher = subprocess.Popen(words, stdout=out, stderr=out)
    wait_for(lambda: saved(first) == saved(second) == 200)
    os.kill(owner(first), signal.SIGKILL)
    wait_for(lambda: sittings(first) == 2)
    launcher.kill(), launcher.wait()
    os.kill(owner(first), signal.SIGKILL)
    assert state_of(logdir, read_plan(logdir)[1]).kind == "running"  # the orphan
    with said[1].open("w") as out:
        launcher = subprocess.Popen(words, stdout=out, stderr=out)
    wait_for(lambda: f"{names[1]} is running in another process" in said[1].read_text() and sittings(first) == 3)
    gate.touch()
    assert launcher.wait(120) == 0 and "2 of 2 runs finished" in said[1].read_text()
    assert [rows(logdir / name) for name in names] == [list(range(10, 410, 10))] * 2
    assert sittings(second) == 1
    again = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "2 runs, 2 already finished" in again.stdout
    assert sittings(second) == 1
    launching.main(launching.Args(logdir=logdir, status=True), [])
    assert "2 of 2 runs finished" in capsys.readouterr().out


@pytest.mark.parametrize("sent, code", [(signal.SIGHUP, 129), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_a_signal_stops_all_runs_which_save(sent, code, tmp_path):
    flags = ["--scripts", SHORT, "--env-ids", *GAMES, "--num-seeds=1", f"--logdir={tmp_path}", "--workers=2", "--gpus"]
    words = command("experiments/run.py", *flags, "--", "--total-timesteps=100000")
    launcher = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    runs = [tmp_path / f"{game}__short_script__1" for game in GAMES]
    wait_for(lambda: all((run / "metrics.jsonl").exists() and len(rows(run)) > 3 for run in runs))
    busy = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert busy.returncode == 2 and "another process is running this study" in busy.stderr
    launcher.send_signal(sent)
    said, _ = launcher.communicate(timeout=100)
    assert launcher.returncode == code and "stopping 2 runs, which save first" in said
    for run in read_plan(tmp_path):
        state = state_of(tmp_path, run)
        assert state.kind == "stopped"
        assert saved(tmp_path / run.name) == state.step
        assert log_path(tmp_path, run.name).read_text().endswith(f"{ENDED} 143\n")


def test_the_disk_space_of_a_run_includes_a_saved_replay_buffer(tmp_path):
    """In each of two checkpoints 8,192 steps, with 10 x 10 x 4 bytes of observation each."""
    flags = ["--total-timesteps=65536", "--use-replay-buffer", "--replay-capacity=8192", "--replay-prefill=8192"]
    flags.append("--save-replay")
    (run,) = plan(("dream_spi",), GAMES[:1], [1], flags, tmp_path)
    with_buffer, without = disk_bytes(run), disk_bytes(run._replace(command=run.command[:-1]))
    assert 2 * 8192 * 400 < with_buffer - without < 2 * 8192 * 500


def test_finished_runs_that_get_more_steps_are_counted(tmp_path):
    runs = plan(("ppo",), ("CartPole-v1",), [1, 2], ["--total-timesteps=2048"], tmp_path)
    args = make_args(ppo.Args, env_id="CartPole-v1", total_timesteps=2048, seed=1)
    (tmp_path / runs[0].name).mkdir()
    written = {"name": "a", "algorithm": "ppo", "script": ppo.__name__, "seed": 1, "flags": to_store(args), "sittings": []}
    (tmp_path / runs[0].name / "run.json").write_text(json.dumps(written | {"finished_at": 2048}))
    assert count_extended(tmp_path, runs) == 0
    assert count_extended(tmp_path, plan(("ppo",), ("CartPole-v1",), [1, 2], ["--total-timesteps=4096"], tmp_path)) == 1


def test_dry_run_starts_nothing_and_says_how_long(tmp_path):
    flags = ["--scripts", "ppo", "deep_spi", "--env-ids", *GAMES, "--num-seeds=2", "--dry-run", f"--logdir={tmp_path / 's'}"]
    flags += ["--", "--num-devices=2"]  # its estimates need one environment alone
    done = subprocess.run(command("experiments/run.py", *flags), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not (tmp_path / "s").exists()
    lines = done.stdout.splitlines()
    assert sum("--run-name=" in line for line in lines) == 8 and "8 runs, 0 finished" in done.stdout
    assert "hours" in lines[-2] and lines[-1].startswith("disk: about")
