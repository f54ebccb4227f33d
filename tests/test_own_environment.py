"""The page docs/add_an_environment.md, as a new user follows it: its code in a file, training, evaluation, a study."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

import evaluate
import ppo_atari_envpool_xla_jax_scan as ppo
from envs.jax_env import Gymnax, Octax
from experiments import report
from experiments.study import plan as planning
from experiments.study.records import planned_runs
from tests.commands import ROOT
from utils.runs.flags import UsageError, parse_flags
from utils.runs.load_run import load_run, read_run

CODE = re.findall(r"```python\n(.*?)```", (ROOT / "docs/add_an_environment.md").read_text(), re.DOTALL)
TINY = ["--num-envs=4", "--num-steps=16", "--num-minibatches=2", "--fc-layers=8", "--total-timesteps=192"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the page's file and a finished run of three updates."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "my_envs.py").write_text(CODE[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flags = ["--env-id", "my_envs.py:GoToGoal", "--env-option", "size=6", "--run-name", "goal", *TINY]
        ppo.main(parse_flags(ppo.Args, [*flags, "--capture-video"]))
    return folder


def test_the_code_is_short():
    assert len([line for line in CODE[0].splitlines() if line.strip()]) <= 40


def test_the_page_s_run_is_trained_filmed_and_loaded(folder, monkeypatch):
    monkeypatch.chdir(folder)
    params, agent, env = load_run("runs/goal")
    assert (env.size, env.num_envs, env.obs_spec.shape) == (6, 4, (6, 6, 2))
    _, obs = env.reset()
    assert agent.encoder.apply(params.encoder, obs).shape == (4, 1, 1, 128)
    assert np.asarray(obs).sum((1, 2)).tolist() == [[1, 1]] * 4  # the agent and the goal
    assert [path.suffix for path in (folder / "runs/goal/videos").iterdir()] in ([".gif"], [".mp4"])


@pytest.mark.slow
def test_it_resumes_and_is_evaluated(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    flags = ["--env-id", "my_envs.py:GoToGoal", "--env-option", "size=6", "--run-name", "goal", *TINY[:-1]]
    ppo.main(parse_flags(ppo.Args, [*flags, "--capture-video", "--resume=auto", "--total-timesteps=256"]))
    assert read_run("runs/goal").progress["step"] == 256
    with pytest.raises(UsageError, match="--env-option size=7 .was"):
        other = [flag.replace("size=6", "size=7") for flag in flags]
        ppo.main(parse_flags(ppo.Args, [*other, "--capture-video", "--resume=auto", "--total-timesteps=320"]))
    evaluate.main(evaluate.Args(run=Path("runs/goal"), episodes=3))
    evaluate.main(evaluate.Args(run=Path("runs/goal"), episodes=2, env_option=("size=6",), greedy=True))
    assert "3 games under the train protocol, sampled" in capsys.readouterr().out
    tables = sorted(path.name for path in (folder / "runs/goal").glob("*.csv"))
    assert tables == ["evaluation.csv", "evaluation_greedy_size-6.csv"]
    for options, said in (
        (("size=7",), "changes what runs/goal observes"),
        (("sise=6",), "did you mean size"),
    ):
        with pytest.raises(UsageError, match=said):
            evaluate.main(evaluate.Args(run=Path("runs/goal"), env_option=options))
    with pytest.raises(UsageError, match="--env-option size=6: needs --protocol train"):
        evaluate.main(evaluate.Args(run=Path("runs/goal"), env_option=("size=6",), protocol="machado"))

    monkeypatch.setattr("sys.argv", ["report.py"])
    report.main(report.Args(runs=("runs/goal",), output=Path("r")))
    page = (folder / "r.md").read_text()
    assert re.search(r"\| my_envs.py:GoToGoal \| as in training \| .*1 run, 3 games", page)
    assert re.search(r"\| my_envs.py:GoToGoal \| as in training, greedy, size=6 \| .*1 run, 2 games", page)
    (folder / "runs/goal/evaluation_2.csv").write_text("a,b\n1,2\n")
    report.main(report.Args(runs=("runs/goal",), output=Path("r")))
    assert "evaluation_2.csv: is not a whole table of games" in capsys.readouterr().out


def test_a_study_has_own_environments(folder, monkeypatch):
    monkeypatch.chdir(folder)
    runs = planning.plan(("ppo", "deep_spi"), ("my_envs.py:GoToGoal", "CartPole-v1"), [1], [], folder / "study")
    names = {"my_envs-GoToGoal__ppo__1", "my_envs-GoToGoal__deep_spi__1", "CartPole-v1__ppo__1", "CartPole-v1__deep_spi__1"}
    assert {run.name for run in runs} == names
    own = next(run for run in runs if run.name == "my_envs-GoToGoal__ppo__1")  # runs start in another folder
    assert own.env_id == "my_envs.py:GoToGoal" and f"--env-id={folder}/my_envs.py:GoToGoal" in own.command
    planning.write_plan(folder / "study", runs)
    assert planned_runs(folder / "study")[own.name].env_id == own.env_id
    with pytest.raises(UsageError, match="my_envs.py has no class or function GoTo"):
        planning.plan(("ppo",), ("my_envs.py:GoTo",), [1], [], folder / "study")


def test_environments_of_one_name_in_two_files_are_two_studies(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    (tmp_path / "my_envs.py").write_text(CODE[0])
    ids = ("my_envs.py:GoToGoal", f"{tmp_path}/my_envs.py:GoToGoal")
    with pytest.raises(
        UsageError, match=f"--env-ids: {ids[0]} and {ids[1]} give runs of one name, my_envs-GoToGoal__ppo__1; use"
    ):
        planning.plan(("ppo",), ids, [1], [], tmp_path / "study")
    (run,) = planning.plan(("ppo",), (ids[0], f"./{ids[0]}"), [1], [], tmp_path / "study")  # the same file
    assert run.name == "my_envs-GoToGoal__ppo__1"


def test_a_missing_file_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"goal: --env-id my_envs.py:GoToGoal: {tmp_path}/my_envs.py does not exist"):
        load_run(os.path.relpath(folder / "runs/goal"))


def test_the_page_s_other_code_is_python():
    for code in CODE[1:]:
        exec(compile(code, "page", "exec"), names := {})
    assert names["Gymnax"] is Gymnax and names["Octax"] is Octax
