"""The tuner: its search space, what it proposes, how trials are judged, and what a kill leaves."""

import csv
import json
import os
import random
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

import deep_spi
import ppo_atari_envpool_xla_jax_scan as ppo
from experiments import tune
from experiments.study import search_report
from experiments.study.plan import PlannedRun, Progress, python_path, state_of, write_plan
from experiments.study.records import RunRecord
from experiments.study.search import Outcome, Search, Settings, make_scale, score
from experiments.study.space import as_words, check_space, default_params, parse_space, rounded, size
from experiments.study.status import Live
from experiments.study.trials import Trials
from tests.commands import ROOT, command
from tests.experiments.test_launching import saved, sittings, wait_for
from utils.runs.flags import GRIDWORLD, UsageError, parse_flags
from utils.runs.stored_flags import to_store

SHORT = str(ROOT / "tests" / "short_script.py")
LEVELS = {"level": FloatDistribution(0.1, 10.0, log=True)}
ONE = {"CartPole-v1": [0.0, 20.0]}


def begin(logdir, concurrent=2, first=None, pruner="none", space=LEVELS, **more):
    settings = Settings(SHORT, ["CartPole-v1"], [901], ["level=log:0.1:10"], [], ONE, 1, concurrent, pruner, "games")
    return Search(logdir, settings._replace(**more), space, first)


def complete(params, **more):
    return Outcome("complete", (10 + params["level"]) / 20, params, {"CartPole-v1": 10 + params["level"]}, {}, 1.0, **more)


def values(search):
    return [(trial.state, trial.params, trial.value) for trial in search.trials()]


def test_the_search_space_is_read():
    texts = (
        "learning-rate=log:2e-4:8e-3",
        "ent_coef=0:.05",
        "--num-minibatches=4,8,32",
        "update-epochs=1:8",
        "fc-layers=,64 64",
    )
    space = parse_space((*texts, "norm-adv=True,False"), deep_spi.Args)
    assert space == {
        "learning-rate": FloatDistribution(2e-4, 8e-3, log=True),
        "ent-coef": FloatDistribution(0.0, 0.05),
        "num-minibatches": CategoricalDistribution(("4", "8", "32")),
        "update-epochs": IntDistribution(1, 8),
        "fc-layers": CategoricalDistribution(("", "64 64")),
        "norm-adv": CategoricalDistribution(("True", "False")),
    }
    check_space(space, deep_spi.Args, ("Breakout-v5", "CartPole-v1"), ["--total-timesteps", "100000"])
    chosen = {"learning-rate": 0.0012345678, "ent-coef": 0.04999999, "num-minibatches": "8", "update-epochs": 3}
    chosen = rounded(chosen | {"fc-layers": "64 64", "norm-adv": "False"}, space)
    assert chosen["learning-rate"] == 0.00123 and chosen["ent-coef"] == 0.05
    args = parse_flags(deep_spi.Args, as_words(chosen, deep_spi.Args))
    assert (args.learning_rate, args.num_minibatches, args.update_epochs, args.fc_layers, args.norm_adv) == (
        *(0.00123, 8, 3),
        *((64, 64), False),
    )
    assert parse_flags(deep_spi.Args, as_words({"fc-layers": ""}, deep_spi.Args)).fc_layers == ()


def test_the_first_trial_has_the_defaults_if_they_are_in_the_space():
    space = parse_space(
        ("learning-rate=log:1e-4:1e-2", "num-minibatches=4,8", "fc-layers=512,", "norm-adv=true,false"), ppo.Args
    )
    defaults = {"learning-rate": 2.5e-4, "num-minibatches": "4", "fc-layers": "512", "norm-adv": "true"}
    assert default_params(space, ppo.Args, ("Breakout-v5", "Pong-v5"), []) == defaults
    assert default_params(space, ppo.Args, ("Breakout-v5",), ["--learning-rate=1e-3"])["learning-rate"] == 1e-3
    assert default_params(space, ppo.Args, ("Breakout-v5", "CartPole-v1"), []) is None  # they have other defaults
    outside = parse_space(("learning-rate=log:1e-3:1e-2",), ppo.Args)
    assert default_params(outside, ppo.Args, ("Breakout-v5",), []) is None


@pytest.mark.parametrize(
    "script, searched, flags, said",
    [
        ("ppo", [], [], "--search: name at least one flag"),
        ("ppo", ["gama=0:1"], [], "--search gama=0:1: the script has no flag --gama"),
        ("ppo", ["transition-loss-coef=0:1"], [], "the script has no flag --transition-loss-coef"),
        ("ppo", ["seed=1,2"], [], "--search seed=1,2: the tuner sets --seed"),
        ("ppo", ["gamma"], [], "--search gamma: has no values"),
        ("ppo", ["gamma=0.9"], [], "has one value"),
        ("ppo", ["gamma=0.9,0.9"], [], "has duplicates"),
        ("ppo", ["gamma=0.9,0.99", "gamma=0.8,0.9"], [], "--gamma is searched twice"),
        ("ppo", ["gamma=0.99:0.9"], [], "the interval is empty"),
        ("ppo", ["ent-coef=log:0:0.1"], [], "a logarithmic interval begins above 0"),
        ("ppo", ["ent-coef=lin:0:0.1"], [], "is no interval"),
        ("ppo", ["update-epochs=1.5:4"], [], "takes whole numbers"),
        ("ppo", ["norm-adv=0:1"], [], "this flag takes no single number"),
        ("ppo", ["num-minibatches=4,four"], [], "--search num-minibatches: four is not a value of --num-minibatches"),
        ("ppo", ["gamma=0.9:1.1"], [], "--search: CartPole-v1 refuses --gamma 1.1: .*must lie"),
        ("ppo", ["num-minibatches=4,3"], [], "CartPole-v1 refuses --num-minibatches 3: .*not divisible"),
        ("ppo", ["gamma=0.9,0.99"], ["--gamma=0.9"], "--gamma: is searched, so every trial sets it"),
        ("deep_spi", ["num-classes=4,8", "gamma=0.9,0.99"], [], "--num-classes 4.*: .*is used only with --latent categorical"),
        ("deep_spi", ["gamma=0.9,0.99", "world-model=fc,softmoe"], [], "is used only with --latent categorical"),
    ],
)
def test_a_wrong_space_is_refused_in_one_line(script, searched, flags, said, tmp_path):
    args = tune.Args(search=tuple(searched), script=script, env_ids=("CartPole-v1",), scale=("CartPole-v1=20:400",))
    args.logdir = tmp_path / "search"
    with pytest.raises(UsageError, match=said):
        tune.main(args, flags)
    assert not args.logdir.exists()


def test_each_kind_of_observation_is_checked(tmp_path):
    """Environments of one family may observe images or vectors; --encoder has no effect on vectors."""
    ids = ("Craftax-Classic-Symbolic-v1", "Craftax-Classic-Pixels-v1")
    args = tune.Args(search=("encoder=nature,impala",), env_ids=ids, scale=tuple(f"{one}=0:1" for one in ids))
    args.logdir = tmp_path / "search"
    with pytest.raises(UsageError, match="--search: Craftax-Classic-Symbolic-v1 refuses --encoder impala"):
        tune.main(args, [])


def test_scales():
    known = make_scale(("Breakout-v5", "Asterix-MinAtar"), ())
    assert known["Breakout-v5"] == [1.7, 30.5] and known["Asterix-MinAtar"] == [0.51, 6.02]
    assert make_scale((GRIDWORLD, "Breakout-v5"), (f"{GRIDWORLD}=2:7.9", "Breakout-v5=0:400")) == {
        GRIDWORLD: [2.0, 7.9],
        "Breakout-v5": [0.0, 400.0],
    }
    for given, said in (
        ((), "has no entry for CartPole-v1; add --scale CartPole-v1=LOW:HIGH"),
        (("CartPole-v1=9",), "write ENV-ID=LOW:HIGH"),
        (("CartPole-v1=9:8",), "LOW must be less than HIGH"),
        (("Cartpole-v1=1:8",), "Cartpole-v1 is not in --env-ids"),
    ):
        with pytest.raises(UsageError, match=said):
            make_scale(("CartPole-v1",), given)


def test_a_score_is_that_of_the_last_tenth():
    """100 steps; episodes that ended there count, weighted by their number, and so for the first half."""
    step, value = np.arange(10, 110, 10), np.arange(1.0, 11.0)
    run = RunRecord("", "ppo", "CartPole-v1", "", 1, 100, step, value, np.ones(10))
    other = run._replace(value=value + 2)
    assert score([run]) == 10 and score([run, other]) == 11
    assert score([run], share=0.5) == 5
    late = run._replace(weight=np.array([0.0] * 8 + [1.0, 0.0]))
    assert score([late]) == 9 and score([late, run], share=0.5) is None
    fine = run._replace(step=np.arange(1, 101), value=np.arange(100.0), weight=np.where(np.arange(100) < 98, 1.0, 3.0))
    assert score([fine]) == pytest.approx((sum(range(90, 98)) + 3 * 98 + 3 * 99) / 14)


@pytest.mark.parametrize("concurrent", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_proposals_do_not_depend_on_interruptions_nor_on_the_order_of_ends(concurrent, tmp_path):
    """Twelve trials one after another, and the same in random order, by two processes, with a new start before each step."""
    steady = begin(tmp_path / "a", concurrent, first={"level": 1.0})
    for number in range(12):
        steady.decide(number, complete(steady.params(number)))
        steady.publish()
    expected = values(steady)
    assert len({value for *_, value in expected}) == 12 and expected[0][1] == {"level": 1.0}
    draw, running = random.Random(0), {}
    while len((search := begin(tmp_path / "b", concurrent, first={"level": 1.0})).trials()) < 12:
        over = len(search.trials())
        window = range(over, min(over + concurrent, 12))
        free = [n for n in window if n not in running and not search.outcome_path(n).exists()]
        if free and draw.random() < 0.6:
            number = draw.choice(free)
            running[number] = search.params(number)
        elif running:
            number, params = running.popitem() if draw.random() < 0.5 else (n := min(running), running.pop(n))
            search.decide(number, complete(params))
    assert values(search) == expected
    assert search.publish() == []  # nothing is counted twice


def test_a_model_of_the_trials_finds_better_values(tmp_path):
    search = begin(tmp_path, 1)
    for number in range(30):
        search.decide(number, complete(search.params(number)))
        search.publish()
    levels = [trial.params["level"] for trial in search.trials()]
    assert np.mean(levels[20:]) > 2 * np.mean(levels[:10])
    best = search_report.best_trial(search.trials())
    assert best.params["level"] == max(levels)
    assert search_report.importances(search) == {"level": 1.0}


def test_what_fails_is_a_bad_trial(tmp_path):
    """High levels fail: the sampler turns to low ones. What failed for another reason may be replaced."""

    def search_on(folder, fails):
        search = begin(tmp_path / folder, 1)
        for number in range(25):
            params = search.params(number)
            failed = Outcome("failed", None, params, {}, {}, 1.0, "not finite in update 3", diverged=True)
            search.decide(number, failed if fails and params["level"] > 1 else complete(params))
            search.publish()
        return search

    failing, fine = search_on("a", True), search_on("b", False)
    tried = [[trial.params["level"] > 1 for trial in search.trials()[10:]] for search in (failing, fine)]
    assert sum(tried[0]) < 8 < 12 < sum(tried[1])  # of 15
    assert {trial.state for trial in failing.trials()} == {TrialState.COMPLETE, TrialState.FAIL}
    failing.replace_failed()
    assert failing.replaced() == []
    failing.decide(25, Outcome("failed", None, failing.params(25), {}, {}, 1.0, "exit code 1: the disk is full"))
    failing.publish(), failing.replace_failed()
    assert failing.replaced() == [25]
    lines = search_report.write_report(failing, parse_args_type())
    failed = sum(trial.state == TrialState.FAIL for trial in failing.trials())
    assert lines[0] == f"26 trials: {26 - failed} complete, 0 pruned, {failed - 1} diverged, 1 failed"
    with (tmp_path / "a" / "trials.csv").open() as file:
        table = list(csv.DictReader(file))
    assert (
        table[25]["state"] == "failed" and table[25]["reason"] == "exit code 1: the disk is full" and table[25]["value"] == ""
    )
    assert float(table[0]["level"]) == failing.trials()[0].params["level"]
    assert (tmp_path / "a" / "slices.png").stat().st_size > 10_000


def parse_args_type():
    from experiments.study.plan import args_of, script_path

    return args_of(script_path(SHORT))


@pytest.mark.parametrize("pruner, low", [("median", 4.4), ("halving", 4.0)])
def test_a_pruner_compares_with_earlier_trials(pruner, low, tmp_path):
    """Eight trials have the values 1 to 8 at both rungs, so that the median is 4.5."""
    search = begin(tmp_path, 1, pruner=pruner)
    for number in range(8):
        steps = {rung: float(number + 1) for rung in (1, 2)}
        _, attrs = search.is_pruned(number, steps)
        search.decide(number, Outcome("complete", number + 1.0, {"level": 1.0}, {}, steps, 1.0, attrs=attrs))
        search.publish()
    assert search.is_pruned(8, {1: low})[0] and not search.is_pruned(8, {1: 8.5})[0]
    assert search.is_pruned(8, {1: 8.5, 2: low})[0] == (pruner == "halving")  # the median's compares a trial's best value
    search.settings = search.settings._replace(concurrent_trials=9)  # then none of them is known to the ninth
    assert not search.is_pruned(8, {1: low})[0]


def test_another_search_in_the_folder_is_refused(tmp_path):
    begin(tmp_path)
    with pytest.raises(UsageError, match=r"other values of --concurrent-trials \(2, now 3\)"):
        begin(tmp_path, concurrent=3)
    with pytest.raises(UsageError, match="other values of the flags after --"):
        begin(tmp_path, flags=["--gamma=0.9"])
    (tmp_path / "search.json").write_text("{")
    with pytest.raises(UsageError, match="search.json: is damaged; delete it"):
        begin(tmp_path)
    with pytest.raises(UsageError, match="contains no search"):
        tune.main(tune.Args(logdir=tmp_path / "none", status=True), [])


def test_damaged_files_get_a_line_and_a_lost_storage_is_written_anew(tmp_path):
    """Also in a folder whose name has characters with a meaning in a URL."""
    logdir = tmp_path / "a?b=c#d"
    search = begin(logdir)
    for number in range(3):
        search.decide(number, complete(search.params(number)))
    search.publish()
    expected = values(search)
    (logdir / "search.db").unlink()
    assert values(begin(logdir)) == expected and [p.name for p in tmp_path.iterdir()] == ["a?b=c#d"]
    for path, said in (
        ("search.db", "search.db: .*if it is damaged, delete it, and repeat the command"),
        ("trials/002/outcome.json", "outcome.json: is damaged; delete it, and the trial is judged again"),
        ("trials/003/params.json", "params.json: is damaged; delete it, and the same values are proposed again"),
        ("replaced.json", "replaced.json: is damaged; delete it, and repeat the command with --replace-failed"),
    ):
        whole = (logdir / path).read_bytes() if (logdir / path).exists() else None
        if path.endswith("outcome.json"):  # it is read again when a storage is new
            (logdir / "search.db").unlink()
        (logdir / path).parent.mkdir(exist_ok=True)
        (logdir / path).write_text("{" * 5000)
        with pytest.raises(UsageError, match=said):
            begin(logdir).params(3)
        (logdir / path).write_bytes(whole) if whole else (logdir / path).unlink()
    assert values(begin(logdir)) == expected


def test_values_that_the_script_refuses_are_a_failed_trial(tmp_path):
    """Defaults whose trial failed for another reason are tried again with --replace-failed. Status writes no storage."""
    asked = {"script": "ppo", "space": {"gamma": FloatDistribution(0.5, 2.0)}, "search": ["gamma=0.5:2"]}
    search = begin(tmp_path, 1, first={"gamma": 1.5}, **asked)
    source = Trials(search, ppo.Args, 3, 1, Live())
    assert source.more() == [] and not list(tmp_path.glob("*__ppo__*"))
    source.total = 1
    assert source.is_over() and len(search.trials()) == 1  # the last trial may be a refused one
    refused = json.loads(search.outcome_path(0).read_text())
    assert refused["reason"].startswith("refused: CartPole-v1: --gamma 1.5: must lie") and refused["state"] == "failed"
    search.publish(), search.replace_failed()
    assert search.replaced() == []
    search = begin(tmp_path / "b", 1, first={"gamma": 0.9}, **asked)
    search.decide(0, Outcome("failed", None, search.params(0), {}, {}, 1.0, "exit code 1: the disk is full"))
    search.publish(), search.replace_failed()
    assert search.replaced() == [0] and search.params(1) == search.params(0) == {"gamma": 0.9}
    assert Trials(search, ppo.Args, 3, 1, Live()).total == 4
    (tmp_path / "b" / "search.db").unlink()
    tune.main(tune.Args(logdir=tmp_path / "b", status=True), [])
    assert not (tmp_path / "b" / "search.db").exists()


def test_the_size_of_a_space():
    of = lambda *texts: size(parse_space(texts, ppo.Args))  # noqa: E731
    assert of("num-minibatches=4,8", "update-epochs=2:4") == 6 and of("gamma=0.9,0.99", "ent-coef=0:0.1") == float("inf")
    args = tune.Args(search=("num-minibatches=4,8",), script="ppo", env_ids=("Breakout-MinAtar",), logdir=Path("none"))
    with pytest.raises(UsageError, match="--trials 40: the search space has only 2 settings; use fewer"):
        tune.main(args, [])


def test_the_folder_of_a_study_is_refused_and_a_script_may_have_a_space_in_its_path(tmp_path):
    script = tmp_path / "my scripts" / "my_short.py"
    script.parent.mkdir(), script.write_text(Path(SHORT).read_text())
    args = tune.Args(search=("level=0.1:10",), script=str(script), env_ids=("CartPole-v1",), scale=("CartPole-v1=0:20",))
    assert tune.read_command(replace(args, logdir=tmp_path), []).settings.script == str(script)
    runs = [PlannedRun(name, "ppo", "CartPole-v1", 1, 8, ["python", "ppo.py"]) for name in ("000__a__ppo__1", "a__ppo__1")]
    write_plan(tmp_path, runs[:1])  # of a search whose search.json was deleted
    tune.read_command(replace(args, logdir=tmp_path), [])
    write_plan(tmp_path, runs[1:])
    with pytest.raises(UsageError, match="contains a study of run.py; choose another folder"):
        tune.main(replace(args, logdir=tmp_path), [])


def test_without_optuna_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(tune, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs Optuna: use uv run --extra tune"):
        tune.main(tune.Args(), [])


def typed(logdir, *flags, trials=3):
    words = [
        "--script",
        SHORT,
        "--env-ids",
        "Breakout-MinAtar",  # envpool's take a second longer to start
        "--scale=Breakout-MinAtar=0:20",
        "--search=level=0.5:9",
        f"--trials={trials}",
    ]
    return command("experiments/tune.py", *words, f"--logdir={logdir}", *flags, "--", "--total-timesteps=100", "--save-every=0")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kills processes by their number")
def test_killed_runs_and_tuners_are_repaired_by_the_same_command(tmp_path):
    """kill -9 of a run, of the tuner, and of both; one trial diverges. The trials are those of a search that never stopped."""
    gate, logdir = tmp_path / "gate", tmp_path / "s"
    words = [*typed(logdir, "--workers=2", "--gpus"), "--diverging=8", "--pause=0.01", f"--gate={gate}"]
    first, second = (logdir / f"00{n}__Breakout-MinAtar__short_script__901" for n in (0, 1))
    owner = lambda folder: int((folder / ".process").read_text().split()[1])  # noqa: E731
    tuner = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    wait_for(lambda: saved(first) == saved(second) == 50)
    os.kill(owner(first), signal.SIGKILL)  # it is retried
    wait_for(lambda: sittings(first) == 2)
    tuner.kill(), tuner.wait()
    os.kill(owner(second), signal.SIGKILL)
    tuner = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)  # the first is an orphan, the second is to be resumed
    wait_for(lambda: sittings(second) == 2)
    gate.touch()
    said, _ = tuner.communicate(timeout=120)
    assert tuner.returncode == 0 and "3 trials: " in said, said
    assert sittings(first) == sittings(second) == 2
    study = optuna.load_study(study_name=SHORT, storage=f"sqlite:///{logdir / 'search.db'}")
    settings = json.loads((logdir / "search.json").read_text())
    steady = Search(tmp_path / "t", Settings(**settings), {"level": FloatDistribution(0.5, 9.0)}, None)
    for number in range(3):
        params = steady.params(number)
        diverged = Outcome("failed", None, params, {}, {}, 1.0, "", diverged=True)
        steady.decide(number, diverged if params["level"] >= 8 else complete(params))
        steady.publish()
    found = [(trial.state, trial.params, trial.value and pytest.approx(trial.value)) for trial in study.trials]
    assert shlex.split(said.splitlines()[-1])[:2] == ["env", f"PYTHONPATH={python_path()}"]  # of a script in another folder
    assert found == values(steady)


def record(logdir, run, level, share=1.0):
    """What a run's folder says after a share of its 10 updates, all with the return `level`."""
    args = parse_flags(parse_args_type(), run.command[2:])
    steps = [10 * (k + 1) for k in range(round(10 * share))]
    written = {"name": run.name, "algorithm": "short", "script": "short_script", "seed": 901, "flags": to_store(args)}
    written |= {"sittings": [], "finished_at": steps[-1]}
    (logdir / run.name).mkdir(exist_ok=True)
    (logdir / run.name / "run.json").write_text(json.dumps(written))
    rows = [{"step": step, "elapsed": 1.0, "charts/episodic_return": level, "charts/episodes": 1.0} for step in steps]
    (logdir / run.name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("prune_on", ["games", "steps"])
def test_a_bad_trial_is_pruned_and_its_other_runs_are_stopped(prune_on, tmp_path, capsys):
    """Five trials have 10 in both environments; the sixth has 1 in the first environment, or in the first quarter, where the
    trials before it had 10 too. That its second run fails later on makes no difference, though it is known earlier."""
    asked = {"env_ids": ["CartPole-v1", "Acrobot-v1"], "scale": {"CartPole-v1": [0.0, 10.0], "Acrobot-v1": [0.0, 20.0]}}
    search = begin(tmp_path, 1, pruner="median", prune_on=prune_on, flags=["--total-timesteps=100"], **asked)
    source = Trials(search, parse_args_type(), 6, 1, Live())
    for number in range(6):
        source.looked = -10.0
        runs = source.more()
        assert [run.name for run in runs] == [f"00{number}__{env}__short_script__901" for env in asked["env_ids"]]
        if number < 5:
            for run in runs:
                record(tmp_path, run, 10.0)
                source.over(run, state_of(tmp_path, run))
    first, second = runs
    assert [source.rank(run) for run in runs] == ([0, 1] if prune_on == "games" else [0, 0])
    record(tmp_path, second, 1.0, 0.3)
    source.over(second, Progress("failed", error="exit code 1: error: not finite in update 4"))
    assert source.more() == [] and not source.is_over()
    record(tmp_path, first, 1.0, 1.0 if prune_on == "games" else 0.3)
    if prune_on == "games":
        source.over(first, state_of(tmp_path, first))
    source.looked = -10.0
    assert source.more() is None and source.is_over()
    assert source.dropped.keys() == {run.name for run in (runs if prune_on == "steps" else runs[1:])}
    assert Trials(search, parse_args_type(), 6, 1, Live()).dropped.keys() == {
        f"00{n}__{env}__short_script__901" for n in range(6) for env in asked["env_ids"]
    }
    *complete, pruned = search.trials()
    assert {(trial.state, trial.value) for trial in complete} == {(TrialState.COMPLETE, 0.75)}
    # the means of scaled returns: of one environment, or of both after a quarter
    assert (pruned.state, pruned.value) == (TrialState.PRUNED, pytest.approx(0.1 if prune_on == "games" else 0.075))
    said = {"games": "1 of 2 environments", "steps": "1 of 4 quarters of the steps"}[prune_on]
    assert "trial 5: pruned" in capsys.readouterr().out and pruned.user_attrs["reason"] == f"after {said}"
    lines = search_report.write_report(search, parse_args_type())
    assert lines[0] == "6 trials: 5 complete, 1 pruned, 0 diverged, 0 failed" and "best: trial 0, 0.750" in lines[-2]


def test_a_trial_without_an_episode_or_with_a_failed_run_is_bad(tmp_path, capsys):
    """And what the next trial learns of it."""
    search = begin(tmp_path, 1, flags=["--total-timesteps=100"])
    source = Trials(search, parse_args_type(), 4, 1, Live())
    (silent,) = source.more()
    record(tmp_path, silent, None)
    source.over(silent, state_of(tmp_path, silent))
    (failing,) = source.more()
    failed = Progress("failed", error="exit code 1: error: not finite in update 3 (step 30): losses/policy_loss")
    source.over(failing, failed)
    (damaged,) = source.more()
    record(tmp_path, damaged, 5.0)
    metrics = tmp_path / damaged.name / "metrics.jsonl"
    metrics.write_text("\n".join(metrics.read_text().splitlines()[:6]))
    source.over(damaged, state_of(tmp_path, damaged))
    (last,) = source.more()
    record(tmp_path, last, 5.0)
    source.over(last, state_of(tmp_path, last))
    assert source.more() is None
    states = [(trial.state, trial.user_attrs["reason"], trial.user_attrs["diverged"]) for trial in search.trials()]
    silence = f"{tmp_path / silent.name}: no episode ended in its 100 steps"
    reason = "CartPole-v1, seed 901: exit code 1: error: not finite in update 3 (step 30): losses/policy_loss"
    assert states[:2] == [(TrialState.FAIL, silence, False), (TrialState.FAIL, reason, True)]
    lost = f"{tmp_path / damaged.name}: metrics.jsonl ends at step 60 although the run is finished; it counts as unfinished"
    assert states[2] == (TrialState.FAIL, lost, False)
    assert states[3] == (TrialState.COMPLETE, "", False)
    said = capsys.readouterr().out
    assert f"trial 0: failed: {silence}" in said and "trial 1: diverged" in said
