"""Reports: what is read of runs, what is missing, scales, and the page."""

import csv
import dataclasses
import importlib
import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.testing import assert_allclose
from scipy import stats

import evaluate
from experiments import report
from experiments import run as launching
from experiments.study.comparison import (
    aggregate,
    compare,
    differing_settings,
    normalized,
    raw_scores,
    run_protocol,
    unequal,
)
from experiments.study.evaluations import games_of
from experiments.study.figures import curves, filled, mean_curve
from experiments.study.plan import plan, write_plan
from experiments.study.records import (
    RunRecord,
    Unread,
    final_score,
    labels,
    read_folder,
    read_runs,
    read_table,
    stretches,
    typed_flags,
    write_table,
)
from utils.files import write_csv
from utils.runs.flags import UsageError, make_args, parse_command
from utils.runs.stored_flags import to_store

RETURN = "charts/episodic_return"
BATCH = 8 * 16


def write_run(folder, script, env_id, seed, returns, updates=None, **flags):
    """The folder of a run of so many updates (if not given, finished), and the mean return and number of episodes of each."""
    args = make_args(
        importlib.import_module(script).Args,
        **{"env_id": env_id, "seed": seed, "num_envs": 8, "num_steps": 16, "num_minibatches": 4},
        total_timesteps=(updates or len(returns)) * BATCH,
        **flags,
    )
    folder.mkdir(parents=True)
    record = {"name": folder.name, "algorithm": script, "script": script, "seed": seed, "flags": to_store(args)}
    (folder / "run.json").write_text(json.dumps(record | {"sittings": []}))
    rows = []
    for k, (value, episodes) in enumerate(returns, 1):
        row = {"step": k * BATCH, "charts/episodes": episodes}
        rows.append(json.dumps(row | ({RETURN: value} if episodes else {})))
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def write_grid(folder, scripts=("ppo_atari_envpool_xla_jax_scan", "deep_spi"), games=("Breakout", "Asterix"), seeds=(1, 2, 3)):
    """Runs of 20 updates whose returns rise: by script, game and seed differently fast."""
    rng = np.random.default_rng(0)
    for i, script in enumerate(scripts):
        for game in games:
            for seed in seeds:
                slope = 1 + i + rng.uniform()
                returns = [(slope * k, 1 + k % 3) for k in range(20)]
                write_run(folder / f"{game}__{script}__{seed}", script, f"{game}-MinAtar", seed, returns)
    return folder


def record(values, weights=None, planned=None, script="ppo", flags="", seed=1, env_id="Breakout-MinAtar"):
    step = np.arange(1, len(values) + 1) * 10
    weights = np.ones(len(values)) if weights is None else np.array(weights, float)
    return RunRecord(
        f"{script}-{seed}", script, env_id, flags, seed, planned or int(step[-1]), step, np.array(values, float), weights
    )


def test_what_is_damaged_is_named_and_the_rest_is_read(tmp_path):
    whole = write_run(tmp_path / "whole", "deep_spi", "Breakout-MinAtar", 3, [(1.0, 2), (None, 0), (5.0, 1)], gae_lambda=0.9)
    run, problems = read_folder(whole, RETURN)
    assert problems == [] and (run.script, run.env_id, run.seed, run.planned) == ("deep_spi", "Breakout-MinAtar", 3, 3 * BATCH)
    assert "--gae-lambda 0.9" in run.flags and "--seed" not in run.flags and "--logdir" not in run.flags
    assert_allclose(run.step, [BATCH, 2 * BATCH, 3 * BATCH])
    assert_allclose(run.value, [1, np.nan, 5]), assert_allclose(run.weight, [2, 0, 1])

    cut = write_run(tmp_path / "cut", "deep_spi", "Asterix-MinAtar", 1, [(1.0, 2), (3.0, 1)])
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 384, "charts/ep')
    early = write_run(tmp_path / "early", "deep_spi", "Asterix-MinAtar", 6, [(1.0, 1), (2.0, 1)])
    identity = json.loads((early / "run.json").read_text())
    (early / "run.json").write_text(json.dumps(identity | {"finished_at": 3 * BATCH}))
    holes = write_run(tmp_path / "holes", "deep_spi", "Breakout-MinAtar", 7, [(1.0, 1)] * 4)
    first, _, *rest = (holes / "metrics.jsonl").read_text().splitlines(keepends=True)
    (holes / "metrics.jsonl").write_text("".join([first, *rest]))
    empty = write_run(tmp_path / "empty", "deep_spi", "Asterix-MinAtar", 2, [(1.0, 1)])
    (empty / "metrics.jsonl").write_text("")
    lost = write_run(tmp_path / "lost", "deep_spi", "Asterix-MinAtar", 3, [(1.0, 1)])
    (lost / "run.json").write_text("{")
    none = write_run(tmp_path / "none", "deep_spi", "Asterix-MinAtar", 4, [(None, 0)])
    gone = write_run(tmp_path / "gone", "deep_spi", "Asterix-MinAtar", 5, [(1.0, 1)])
    (gone / "metrics.jsonl").unlink()
    found = read_runs([str(tmp_path)], RETURN)
    assert [run.source for run in found.runs] == [str(cut), str(early), str(whole), str(holes)] and found.runs[
        0
    ].reached == 2 * BATCH
    assert sorted(found.problems) == [
        f"{cut}: 1 of 3 rows of metrics.jsonl are damaged and ignored",
        f"{early}: metrics.jsonl ends at step 256 although the run is finished; it counts as unfinished",
        f"{empty}: metrics.jsonl has no {RETURN} yet; skipped",
        f"{gone}: metrics.jsonl cannot be read (No such file or directory); skipped",
        f"{holes}: 1 of 4 rows of metrics.jsonl are missing",
        f"{lost}: run.json is missing or damaged; skipped",
        f"{none}: no episode ended in its 128 steps; skipped",
    ]
    for wrong, said in ((tmp_path / "nothing", "no such folder"), (empty / "run.json", "is not a table")):
        with pytest.raises(UsageError, match=said):
            read_runs([str(wrong)], RETURN)


def test_stretches_and_scores_are_means_over_episodes():
    run = record([1, 2, np.nan, 4, 10, 20], [3, 1, 0, 2, 1, 1])
    halves = stretches(run, 2)
    assert_allclose(halves.value, [(3 + 2) / 4, (8 + 10 + 20) / 4]), assert_allclose(halves.step, [30, 60])
    whole = stretches(run, 6)
    assert_allclose(whole.value, run.value), assert_allclose(whole.weight, run.weight)
    stopped = stretches(run, 4, 120)  # of 120 steps, of which there are 60
    assert_allclose(stopped.step, [30, 60]), assert_allclose(stopped.value, halves.value)
    assert final_score(run, 6, 2) == final_score(run, 3, 1) == 15.0 and final_score(run, 6, 3) == (2 * 4 + 10 + 20) / 4
    assert final_score(record([1, 7, np.nan], [1, 1, 0]), 3, 1) == 7.0
    rng = np.random.default_rng(0)
    odd = record(rng.uniform(size=333), rng.integers(0, 4, 333))  # does not divide into 40: the table has the same score
    assert_allclose(final_score(stretches(odd, 40), 40, 2), final_score(odd, 40, 2))
    assert_allclose(filled(np.array([np.nan, 1, np.nan, np.nan, 2, np.nan])), [np.nan, 1, 1, 1, 2, 2])


def test_a_table_is_read_as_it_was_written(tmp_path):
    runs = [record([1.25, np.nan], [3, 0], 40), record([2, 3], flags="--gamma 0.9", seed=2), record([5], script="deep_spi")]
    write_table(tmp_path / "a.csv", runs)
    again = read_table(tmp_path / "a.csv")
    assert [run[1:6] for run in again] == [run[1:6] for run in runs]
    for a, b in zip(again, runs, strict=True):
        assert_allclose(a.step, b.step), assert_allclose(a.value, b.value), assert_allclose(a.weight, b.weight)
    lines = (tmp_path / "a.csv").read_text().splitlines()
    (tmp_path / "b.csv").write_text("\n".join([*lines[:2], lines[2][:20]]))
    with pytest.raises(UsageError, match="b.csv: line 3 is damaged"):
        read_table(tmp_path / "b.csv")
    (tmp_path / "b.csv").write_text("\n".join([*lines[:2], lines[2].rsplit(",", 2)[0]]))  # its last step, without the return
    with pytest.raises(UsageError, match="b.csv: line 3 is damaged"):
        read_table(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="c.csv: is not a table of runs .no column script"):
        read_table(tmp_path / "c.csv")


def test_algorithms_are_named_by_what_differs():
    flags = ["--gamma 0.9 --fc-layers 64 32", "--gamma 0.9", "", "--clip-coef 0.3"]
    runs = [record([1], script=s, flags=f) for s, f in zip(["ppo", "ppo", "deep_spi", "other"], flags, strict=True)]
    assert labels(runs) == ["ppo --fc-layers 64 32", "ppo", "deep_spi", "other"]
    with pytest.raises(UsageError, match="ppo-1 and ppo-1 are duplicates: ppo on Breakout-MinAtar, seed 1"):
        labels([runs[1], runs[1]])
    assert compare(runs).algorithms == ["ppo", "ppo --fc-layers 64 32", "deep_spi", "other"]
    steps = "--total-timesteps 5000000"  # the default of one family, and not of another
    families = [
        record([1]),
        record([1], flags=steps, env_id="Pong-v5"),
        record([1], flags=f"{steps} --gamma 0.5", env_id="Pong-v5"),
    ]
    assert labels(families) == ["ppo", "ppo", "ppo --gamma 0.5"]


def test_flags_are_those_that_are_not_the_defaults_of_the_game():
    args = make_args(importlib.import_module("deep_spi").Args, env_id="Breakout-MinAtar", learning_rate=2e-3, logdir="x")
    assert typed_flags("deep_spi", to_store(args)) == "--learning-rate 0.002"
    measured = dataclasses.replace(args, monitor_guarantee=True, monitor_every=5, track_grads=True)
    assert typed_flags("deep_spi", to_store(measured)) == "--learning-rate 0.002"  # no other algorithm
    old = to_store(args) | {"enforce_neighbourhood": "backtrack"}
    del old["enforce_neighborhood"]
    assert typed_flags("deep_spi", old) == "--learning-rate 0.002 --enforce-neighborhood backtrack"
    dreams = to_store(make_args(importlib.import_module("dream_spi").Args, env_id="Breakout-MinAtar"))
    assert typed_flags("dream_spi", dreams) == ""
    del dreams["transition_layers"]  # of a run older than the flag, whose network had no such layers
    assert typed_flags("dream_spi", dreams) == "--transition-layers (none)"
    all_that_matter = typed_flags("no_such_script", to_store(args))
    assert "--learning-rate 0.002" in all_that_matter and "--gamma 0.99" in all_that_matter
    assert "--logdir" not in all_that_matter and "--seed" not in all_that_matter


def test_the_grid_names_what_is_missing():
    runs = [record([1, 2], seed=1), record([1], [1], 20, seed=2), record([3, 4], script="deep_spi", seed=1)]
    runs.append(record([1, 1], script="deep_spi", seed=1, env_id="Asterix-MinAtar"))
    assert compare(runs).missing == [
        "ppo, Asterix-MinAtar, seed 1: not found",
        "ppo, Asterix-MinAtar, seed 2: not found",
        "deep_spi, Asterix-MinAtar, seed 2: not found",
        "ppo, Breakout-MinAtar, seed 2: unfinished, at 10 of 20 steps",
        "deep_spi, Breakout-MinAtar, seed 2: not found",
    ]
    planned = [Unread("", "ppo", "Breakout-MinAtar", "", seed) for seed in (1, 3)]
    assert compare(runs[:1], planned).missing == ["ppo, Breakout-MinAtar, seed 3: planned, but not found"]
    with_flag = [run._replace(flags="--gamma 0.9") for run in planned]  # another algorithm, although none of its runs is there
    assert compare(runs[:1], with_flag).algorithms == ["ppo"]
    lines = [f"ppo --gamma 0.9, Breakout-MinAtar, seed {seed}: planned, but not found" for seed in (1, 3)]
    assert compare(runs[:1], with_flag).missing == lines
    assert compare(runs[:1], with_flag, with_flag[:1]).missing == lines[1:]  # a skipped run has been named
    with pytest.raises(UsageError, match="no readable runs"):
        compare([])


def test_scales():
    games = ("Breakout-v5", "Pong-v5")
    runs = [record([1.7], env_id=games[0]), record([14.6], env_id=games[1])]
    runs += [record([30.5], None, 10, "deep_spi", env_id=games[0]), record([-20.7], None, 10, "deep_spi", env_id=games[1])]
    comparison = compare(runs)
    raw = raw_scores(comparison, 40, 2)
    human = normalized(comparison, raw, "human", "ppo")  # Breakout: random 1.7, human 30.5; Pong: -20.7, 14.6
    assert_allclose(human["ppo"], [[0], [1]], atol=1e-9), assert_allclose(human["deep_spi"], [[1], [0]], atol=1e-9)
    spread = normalized(comparison, raw, "min-max", "ppo")
    assert_allclose(spread["ppo"], [[0], [1]]), assert_allclose(spread["deep_spi"], [[1], [0]])
    beside = normalized(comparison, raw, "against", "ppo")
    assert_allclose(beside["ppo"], [[1], [1]]), assert_allclose(beside["deep_spi"], [[30.5 / 1.7], [-20.7 / 14.6]])
    with pytest.raises(UsageError, match="--scale against: deep_spi has a mean score of -20.7 on Pong-v5; use --scale min-max"):
        normalized(comparison, raw, "against", "deep_spi")
    relative = normalized(comparison, raw, "baseline", "ppo")
    found = aggregate(relative, "baseline", "ppo", 0)
    assert found.statistics["optimality gap"]["ppo"][0] == -np.mean(np.minimum(np.concatenate(relative["ppo"]), 0))
    assert found.improvement["deep_spi"][0] == 0.5
    small = compare([record([1])])
    for scale in ("human", "baseline"):
        with pytest.raises(UsageError, match=f"--scale {scale}.*use --scale min-max"):
            normalized(small, raw_scores(small, 40, 2), scale, "ppo")
    assert_allclose(normalized(small, raw_scores(small, 40, 2), "min-max", "ppo")["ppo"], [[0]])  # all the same


def run_report(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["experiments/report.py", *map(str, words)])
    report.main(parse_command(report.Args))


def test_the_page_holds_all_and_is_the_same_twice(tmp_path, monkeypatch, capsys):
    runs, out = write_grid(tmp_path / "runs"), tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    run_report(monkeypatch, runs, "--title", "Ours & theirs", "--output", "r")
    assert capsys.readouterr().out.startswith("12 runs; written: ")
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    endings = (".csv", ".html", ".md", "_aggregates.png", "_curves.png", "_scores.csv")
    assert sorted(first) == sorted(f"r{ending}" for ending in endings)
    run_report(monkeypatch, runs, "--title", "Ours & theirs", "--output", "r")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    page = first["r.html"].decode()
    assert "Ours &amp; theirs" in page and page.count("<svg ") == 2 + 6 and "currentColor" in page
    assert not re.search(r"(src|href)=.(?!data:|#)|url\((?!#)|@import", page)  # it needs nothing else
    assert "missing" not in page.lower()
    text = first["r.md"].decode()
    assert "![learning curves](r_curves.png)" in text and "![aggregates](r_aggregates.png)" in text
    rows = list(csv.DictReader(first["r_scores.csv"].decode().splitlines()))
    assert len(rows) == 12 and {row["algorithm"] for row in rows} == {"ppo", "deep_spi"}
    # the last twentieth of 20 updates is the last: slope * 19, whose ends make the scale
    slopes = [1 + i + x for i, x in zip([0] * 6 + [1] * 6, np.random.default_rng(0).uniform(size=12), strict=True)]
    assert_allclose(sorted(float(row["score"]) for row in rows), np.sort(slopes) * 19, rtol=1e-5)
    assert "| deep_spi |" in text and "1.000 [1.000, 1.000]" in text  # all of its runs are better
    with pytest.raises(UsageError, match="would overwrite r.csv, which is an input"):
        run_report(monkeypatch, "r.csv", "--output", "r")
    run_report(monkeypatch, "r.csv", "--output", "again")  # the table alone says the same
    tables = lambda text: [line for line in text.splitlines() if line.startswith("|")]  # noqa: E731
    assert tables((out / "again.md").read_text()) == tables(text)
    assert (out / "again.csv").read_bytes() == first["r.csv"]


def test_an_incomplete_grid_is_not_aggregated_unless_asked(tmp_path, monkeypatch, capsys):
    runs = write_grid(tmp_path / "runs", seeds=(1, 2))
    write_run(runs / "more", "deep_spi", "Asterix-MinAtar", 3, [(1.0, 1)] * 5, updates=20)
    (runs / "broken").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r_aggregates.png").write_text("of before")
    with pytest.raises(SystemExit) as end:
        run_report(monkeypatch, "runs", "--output", "r")
    said = capsys.readouterr()
    assert end.value.code == 1 and "error: 5 runs are missing, unfinished or skipped, so nothing was aggregated" in said.err
    assert "*** runs/broken: run.json is missing or damaged; skipped ***" in said.out
    at = "deep_spi, Asterix-MinAtar, seed 3: unfinished, at 640 of 2,560 steps"
    assert f"missing: {at}" in said.out and "missing: ppo, Breakout-MinAtar, seed 3: not found" in said.out
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg ") == 2 and "No aggregates" in page and "at 640 of 2,560 steps" in page and "runs/broken" in page
    assert not (tmp_path / "r_aggregates.png").exists()
    with pytest.raises(UsageError, match="--against deep_sip: choose from ppo, deep_spi"):
        run_report(monkeypatch, "runs", "--output", "r", "--against", "deep_sip")
    run_report(monkeypatch, "runs", "--output", "r", "--allow-incomplete")
    assert "Asterix-MinAtar,3" not in (tmp_path / "r_scores.csv").read_text()  # what it has reached is no final score
    page = (tmp_path / "r.html").read_text()
    assert page.count("5 runs are missing, unfinished or skipped") == 1 + 6  # on each figure of aggregates too
    assert (tmp_path / "r_aggregates.png").exists()


def write_study(logdir, scripts, finished, returns=((1.0, 1), (2.0, 1)), seeds=(1, 2), flags=()):
    """The plan of a study, and finished runs of those of its scripts that are numbered in `finished`."""
    common = ["--num-envs=8", "--num-steps=16", "--num-minibatches=4", f"--total-timesteps={len(returns) * BATCH}", *flags]
    runs = plan(tuple(scripts), ("CartPole-v1",), list(seeds), common, logdir)
    write_plan(logdir, runs)
    for number, run in enumerate(runs):
        which = number % len(scripts)
        if which in finished:
            stem = run.command[1].rpartition("/")[2].removesuffix(".py")
            write_run(logdir / run.name, stem, "CartPole-v1", run.seed, returns, **finished[which])
    return runs


def test_runs_that_diverged_or_were_extended_are_named(tmp_path, monkeypatch):
    runs = write_grid(tmp_path / "runs", games=("Breakout",))
    for folder, change in (
        ("Breakout__deep_spi__1", {"diverged_at": 2560}),
        ("Breakout__deep_spi__2", {"extended_from": [1280]}),
    ):
        path = runs / folder / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    monkeypatch.chdir(tmp_path)
    run_report(monkeypatch, "runs", "--output", "r", "--allow-incomplete")
    text = (tmp_path / "r.md").read_text()
    assert "deep_spi, Breakout-MinAtar, seed 1 | diverged, at 2,560 of 2,560 steps" in text
    assert re.search(r"\| Breakout-MinAtar \| \S+ ± \S+ \(3\) \| \S+ ± \S+ \(2, 1 diverged\) \|", text)
    assert "| extended | no | no, from 1,280 steps |" in text
    for run in read_table(tmp_path / "r.csv"):  # a table knows no divergence, but it does not call the run finished
        assert run.is_finished == ((run.script, run.seed) != ("deep_spi", 1))


def test_a_metric_that_is_no_return_is_not_called_better(tmp_path, monkeypatch):
    write_grid(tmp_path / "runs", games=("Breakout",))
    monkeypatch.chdir(tmp_path)
    run_report(monkeypatch, "runs", "--output", "r", "--metric", "charts/episodes")
    text = (tmp_path / "r.md").read_text()
    assert "P(larger than ppo)" in text and "larger may be worse" in text and "better" not in text


def test_a_table_of_other_runs_is_not_replaced(tmp_path, monkeypatch):
    runs = write_grid(tmp_path / "runs", games=("Breakout",))
    monkeypatch.chdir(tmp_path)
    run_report(monkeypatch, "runs", "--output", "r")
    before = (tmp_path / "r.csv").read_bytes()
    with pytest.raises(UsageError, match="--output r: would replace r.csv, which has other runs .ppo Breakout-MinAtar .* 1.;"):
        run_report(monkeypatch, *runs.glob("*deep_spi*"), "--output", "r")
    assert (tmp_path / "r.csv").read_bytes() == before
    (tmp_path / "r_scores.csv").write_text("a\n1\n")
    with pytest.raises(UsageError, match="--output r: would replace r_scores.csv, which has other columns"):
        run_report(monkeypatch, "runs", "--output", "r")


def test_a_study_among_the_runs_is_named(tmp_path):
    write_study(tmp_path / "runs" / "study", ["ppo"], {0: {}})
    write_run(tmp_path / "runs" / "alone", "deep_spi", "Breakout-MinAtar", 3, [(1.0, 2)])
    found = read_runs([str(tmp_path / "runs")], RETURN)
    assert [run.script for run in found.runs] == ["deep_spi"] and found.skipped == []
    assert found.problems == [f"{tmp_path / 'runs' / 'study'}: is the folder of a study; name it too to compare its runs"]


def test_games_of_several_evaluations_count_once(tmp_path):
    """The second evaluation has other games than the first, and the third one more than the first."""
    folder = write_run(tmp_path / "a", "deep_spi", "Breakout-MinAtar", 3, [(1.0, 2)])
    for name, envs, games, value in (("", 2, 2, 1.0), ("_2", 4, 4, 2.0), ("_3", 2, 3, 1.0)):
        rows = [("a", "deep_spi", "b", 3, BATCH, "train", 0, 1, i, i * envs // games, value, 5, 0) for i in range(games)]
        write_csv(folder / f"evaluation{name}.csv", evaluate.COLUMNS, rows)
    run, _ = read_folder(folder, RETURN)
    assert games_of(run) == ({"as in training": [1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 1.0]}, [])


def test_an_algorithm_without_any_run_is_missing(tmp_path, monkeypatch, capsys):
    """run.py --scripts ppo "ppo --learning-rate 2e-3", of which the second left no folder."""
    write_study(tmp_path / "s", ["ppo", "ppo --learning-rate 2e-3"], {0: {}})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run_report(monkeypatch, "s", "--output", "r")
    said = capsys.readouterr()
    assert end.value.code == 1 and "2 runs are missing" in said.err
    page = (tmp_path / "r.md").read_text()
    for seed in (1, 2):
        assert f"| ppo --learning-rate 0.002, CartPole-v1, seed {seed} | planned, but not found |" in page
    assert "| ppo |" in page and "No aggregates" in page
    # a run that left a folder without run.json is named by its folder, and is not counted again
    (tmp_path / "s" / "CartPole-v1__ppo__learning-rate-2e-3__1").mkdir()
    found = read_runs(["s"], RETURN)
    (unread,) = found.skipped
    assert unread.seed == 1 and "--learning-rate 0.002" in unread.flags and len(found.planned) == 1
    with pytest.raises(SystemExit):
        run_report(monkeypatch, "s", "--output", "r")
    assert "2 runs are missing, unfinished or skipped" in capsys.readouterr().err


OWN = """
from dataclasses import dataclass
import ppo_atari_envpool_xla_jax_scan as ppo

@dataclass
class Args(ppo.Args):
    bonus: float = 0.5

if __name__ == "__main__":
    run_script(ppo.main, Args)
"""


def test_the_name_of_a_script_may_hold_two_underscores(tmp_path, monkeypatch, capsys):
    (tmp_path / "my__ppo.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    write_study(tmp_path / "s", [str(tmp_path / "my__ppo.py"), "ppo"], {0: {}, 1: {}})
    monkeypatch.chdir(tmp_path)
    run_report(monkeypatch, "s", "--output", "r")
    assert "missing" not in capsys.readouterr().out and "| my__ppo |" in (tmp_path / "r.md").read_text()
    # without the script, what it would have been called is not known, but the planned run is
    (tmp_path / "my__ppo.py").unlink()
    shutil.rmtree(tmp_path / "s" / "CartPole-v1__my__ppo__2")
    monkeypatch.delitem(sys.modules, "my__ppo"), importlib.invalidate_caches()
    found = read_runs(["s"], RETURN)
    assert len(found.runs) == 3 and [(run.script.split()[0], run.seed) for run in found.planned] == [("my__ppo", 2)]
    assert any(line.startswith("my__ppo") for line in compare(*found[:1], found.planned).missing)


def test_a_run_without_an_ended_episode_is_named_once(tmp_path, monkeypatch, capsys):
    """Games longer than the run: Freeway, 20,000 steps of 64 environments. In its folder and in a table."""
    runs = write_study(tmp_path / "s", ["ppo", "deep_spi"], {0: {}, 1: {}})
    shutil.rmtree(tmp_path / "s" / runs[1].name)
    write_run(tmp_path / "s" / runs[1].name, "deep_spi", "CartPole-v1", 1, [(None, 0), (None, 0)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run_report(monkeypatch, "s", "--output", "r")
    said = capsys.readouterr()
    assert "error: 1 run is missing, unfinished or skipped" in said.err
    line = f"s/{runs[1].name}: no episode ended in its 256 steps; skipped"
    assert said.out.count(runs[1].name) == 2 and f"*** {line} ***" in said.out and f"missing: {line}" in said.out
    assert "seed 1: " not in said.out
    table = [record([1, 2], seed=seed, script=script) for seed in (1, 2) for script in ("ppo", "deep_spi")]
    write_table(tmp_path / "t.csv", [*table[:3], record([np.nan, np.nan], [0, 0], script="deep_spi", seed=2)])
    with pytest.raises(SystemExit):
        run_report(monkeypatch, "t.csv", "--output", "u")
    said = capsys.readouterr()
    assert "error: 1 run is missing" in said.err
    assert "*** t.csv, deep_spi, Breakout-MinAtar, seed 2: no episode ended in its 20 steps; skipped ***" in said.out


def test_one_unreadable_file_does_not_end_a_report_nor_the_status(tmp_path, monkeypatch, capsys):
    runs = write_study(tmp_path / "s", ["ppo", "deep_spi"], {0: {}, 1: {}}, seeds=(1, 2, 3))
    folders = [tmp_path / "s" / run.name for run in runs]
    (folders[0] / "run.json").unlink(), (folders[0] / "run.json").mkdir()
    (folders[1] / "run.json").unlink(), (folders[1] / "run.json").symlink_to("run.json")
    (folders[2] / "metrics.jsonl").unlink(), (folders[2] / "metrics.jsonl").mkdir()
    (tmp_path / "s" / "logs" / f"{runs[3].name}.log").mkdir(parents=True)
    (tmp_path / "s" / ".ipynb_checkpoints").mkdir()
    with (folders[3] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1e999, "elapsed": 1}\n{"step": 384, "elapsed": "x", "charts/episodic_return": []}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run_report(monkeypatch, "s", "--output", "r")
    said = capsys.readouterr()
    for folder, what in zip(
        folders,
        (
            "run.json cannot be read (Is a directory)",
            "run.json cannot be read (Too many",
            "metrics.jsonl cannot be read (Is a directory)",
        ),
        strict=False,
    ):
        assert f"*** s/{folder.name}: {what}" in said.out
    assert "error: 3 runs are missing, unfinished or skipped" in said.err and "ipynb" not in said.out + said.err
    launching.main(launching.Args(logdir=tmp_path / "s", status=True), [])
    said = capsys.readouterr().out
    assert f"failed: {runs[0].name}: run.json cannot be read (Is a directory)" in said and "2 failed" in said
    wrong = {"name": "a", "script": "b", "env_id": 3, "seed": 1, "steps": 0, "command": []}
    for content in ("{", '{"runs": [{"name": 1}]}', json.dumps({"runs": [wrong]})):
        (tmp_path / "s" / "study.json").write_text(content)
        found = read_runs(["s"], RETURN)
        assert len(found.runs) == 3 and any("study.json: is damaged" in line for line in found.problems)
        with pytest.raises(UsageError, match="study.json: is damaged"):
            launching.main(launching.Args(logdir=tmp_path / "s", status=True), [])
    (tmp_path / "s" / "study.json").unlink(), (tmp_path / "s" / "study.json").mkdir()
    assert any("study.json: cannot be read" in line for line in read_runs(["s"], RETURN).problems)
    with pytest.raises(UsageError, match="study.json: cannot be read"):
        launching.main(launching.Args(logdir=tmp_path / "s", status=True), [])


def test_a_damaged_run_is_known_by_its_checkpoints(tmp_path):
    """It has no run.json and no place in a plan."""
    runs = write_grid(tmp_path / "runs", seeds=(1, 2), games=("Breakout",))
    lost = runs / "Breakout__deep_spi__2"
    (lost / "checkpoints" / "000000002560").mkdir(parents=True)
    (lost / "run.json").rename(lost / "checkpoints" / "000000002560" / "progress.json")
    found = read_runs([str(runs)], RETURN)
    assert [run.seed for run in found.skipped] == [2] and compare(found.runs, [], found.skipped).missing == []


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_that_a_spreadsheet_saved_is_read(tmp_path, separator, ending):
    run = record([1.25, np.nan, 3.5], [3, 0, 2], 30, flags="--fc-layers 64 32")
    write_table(tmp_path / "a.csv", [run])
    rows = [line.split(",") for line in (tmp_path / "a.csv").read_text().splitlines()]
    if separator == ";":  # with a decimal comma
        rows = [[cell.replace(".", ",") for cell in row] for row in rows]
    text = ending.join(map(separator.join, rows)) + ending
    (tmp_path / "b.csv").write_bytes(text.encode("utf-16" if separator == "\t" else "utf-8-sig"))
    (again,) = read_table(tmp_path / "b.csv")
    assert again[1:6] == run[1:6]
    assert_allclose(again.step, run.step), assert_allclose(again.value, run.value), assert_allclose(again.weight, run.weight)


@pytest.mark.parametrize("wrong", ["inf,1", "nan,1", "1,-1", "1,inf", "1,nan"])
def test_impossible_numbers_of_a_table_are_damage(tmp_path, wrong):
    write_table(tmp_path / "a.csv", [record([1.25], [3])])
    (tmp_path / "a.csv").write_text((tmp_path / "a.csv").read_text().replace("1.25,3", wrong))
    with pytest.raises(UsageError, match="a.csv: line 2 is damaged"):
        read_table(tmp_path / "a.csv")


def test_where_no_game_is_complete_all_but_the_aggregates_is_written(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "s" / "a", "ppo_atari_envpool_xla_jax_scan", "Breakout-MinAtar", 1, [(1.0, 1)] * 5)
    write_run(tmp_path / "s" / "b", "deep_spi", "Asterix-MinAtar", 1, [(1.0, 1)] * 5)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r_aggregates.png").write_text("of before")
    run_report(monkeypatch, "s", "--output", "r", "--allow-incomplete")
    assert "*** no aggregates: no game has a finished run of every algorithm ***" in capsys.readouterr().out
    page = (tmp_path / "r.html").read_text()
    assert "No aggregates: no game has a finished run of every algorithm." in page and page.count("<svg ") == 2
    assert not (tmp_path / "r_aggregates.png").exists() and (tmp_path / "r_scores.csv").exists()
    write_run(tmp_path / "s" / "c", "deep_spi", "Breakout-MinAtar", 1, [(1.0, 1)] * 5)
    run_report(monkeypatch, "s", "--output", "r", "--allow-incomplete")
    assert "Left out, because an algorithm has no finished run: Asterix-MinAtar." in (tmp_path / "r.md").read_text()


def test_an_interval_needs_several_runs(tmp_path, monkeypatch):
    """Each algorithm has one finished run, of another seed."""
    write_table(tmp_path / "t.csv", [record([1], seed=1), record([2], seed=2, script="deep_spi")])
    monkeypatch.chdir(tmp_path)
    run_report(monkeypatch, "t.csv", "--output", "r", "--allow-incomplete", "--title", "a \udcff")
    text = (tmp_path / "r.md").read_text()
    assert "| ppo | 0.000 | 0.000 | 0.000 | 1.000 | - |" in text and "| 1.000 | 1.000 | 1.000 | 0.000 | 1.000 |" in text


def test_settings_that_differ_are_on_the_page(tmp_path, monkeypatch, capsys):
    """Steps and protocol differ between algorithms; a flag, the commit and a version differ within them."""
    runs = [record([1, 2], planned=1000, env_id="Pong-v5", seed=seed) for seed in (1, 2)]
    other = "--stochastic-env --total-timesteps 9000 --no-norm-adv"
    runs += [record([3, 4], planned=9000, env_id="Pong-v5", seed=seed, script="deep_spi", flags=other) for seed in (1, 2)]
    write_table(tmp_path / "t.csv", [run._replace(step=run.step * run.planned // 20) for run in runs])
    monkeypatch.chdir(tmp_path)
    run_report(monkeypatch, "t.csv", "--output", "r")
    warned = [
        "The compared runs differ in Atari protocol: ppo sticky actions 0, up to 30 no-ops; "
        "deep_spi sticky actions 0.3, up to 60 no-ops",
        "The compared runs differ in steps: ppo 1,000; deep_spi 9,000",
    ]
    said, page, text = capsys.readouterr().out, (tmp_path / "r.html").read_text(), (tmp_path / "r.md").read_text()
    for line in warned:
        assert f"*** {line} ***" in said and f"<p class=warn>{line}; see the settings below.</p>" in page
    rows = text.partition("## Settings that differ")[2].partition("## ")[0]
    for row in ("| steps | 1,000 | 9,000 |", "| --stochastic-env | - | on |", "| --norm-adv | - | off |"):
        assert row in rows
    assert page.index(warned[0]) < page.index("<h2>")

    known = {"commit": "a" * 40, "dirty": False, "versions": {"jax": "0.11.0", "numpy": "2.3"}}
    runs = [record([1, 2], seed=1)._replace(**known), record([1, 2], seed=2)._replace(**known)]
    assert differing_settings(compare(runs)) == []
    runs[1] = runs[1]._replace(commit="b" * 40, dirty=True, versions={"jax": "0.11.1"}, flags="--gamma 0.9", env_id="x-MinAtar")
    runs.append(record([1, 2], seed=3))
    comparison = compare(runs)
    assert comparison.algorithms == ["ppo"]
    assert differing_settings(comparison) == [
        ["", "ppo"],
        ["--gamma", "-, 0.9"],
        ["commit", f"{'a' * 12}, unknown, {'b' * 12}"],
        ["uncommitted changes", "no, unknown, yes"],
        ["version of jax", "0.11.0, unknown, 0.11.1"],
        ["version of numpy", "2.3, unknown, not installed"],
    ]
    assert unequal(comparison, differing_settings(comparison)) == []
    rounded = compare([record([1], planned=1000), record([1], planned=995, seed=2)])  # the same flag, another rollout
    assert unequal(rounded, differing_settings(rounded)) == [] and differing_settings(rounded)[1] == ["steps", "1,000, 995"]


def test_commit_and_versions_are_those_of_the_last_session(tmp_path):
    folder = write_run(tmp_path / "a", "deep_spi", "Breakout-MinAtar", 1, [(1.0, 1)])
    stored = json.loads((folder / "run.json").read_text())
    sittings = [{"git_commit": c, "git_dirty": c == "b", "versions": {"jax": c}} for c in "ab"]
    (folder / "run.json").write_text(json.dumps(stored | {"sittings": sittings}))
    run, _ = read_folder(folder, RETURN)
    assert (run.commit, run.dirty, run.versions) == ("b", True, {"jax": "b"})
    (folder / "run.json").write_text(json.dumps(stored | {"sittings": ["x"]}))
    run, _ = read_folder(folder, RETURN)
    assert (run.commit, run.dirty, run.versions) == (None, None, None)


def test_mistakes(tmp_path, monkeypatch):
    runs = write_grid(tmp_path / "runs", seeds=(1,), games=("Breakout",))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    for words, said in (
        ([], "no runs"),
        ([runs, "--points", 0], "--points 0"),
        ([runs, "--last", 0], "--last 0"),
        ([runs, "--against", "a2c"], "--against a2c: choose from ppo, deep_spi"),
        ([runs, "--output", "no/where"], "--output no/where: folder no does not exist"),
        ([runs, "--scale", "human"], "--scale human: no human score is known for Breakout-MinAtar"),
        ([tmp_path / "runs" / "none"], "no such folder"),
        ([runs, "--metric", "charts/nothing"], "no readable runs"),
        ([runs, "--metric", "step", "--scale", "human"], "--scale human: applies to returns only"),
        ([runs, "--output", "."], "--output .: is not a file name"),
        ([runs, "--seed", -1], "--seed -1: must be 0 or more"),
        ([runs, "--against", ""], "--against : choose from"),
        ([""], "'': no such folder or table"),
        (["loop"], "loop: no such folder or table"),
        ([runs, "--points", 10**9], "--points 1000000000"),
        ([runs, "--published", "Breakout-MinAtar=nan"], "'nan' is not a number"),
        (["~nobody-at-all/s"], "~nobody-at-all is no home folder"),
        ([runs, "--output", "~nobody-at-all/s"], "--output ~nobody-at-all/s: ~nobody-at-all is no home folder"),
        ([runs, "--output", "/proc/r"], "--output /proc/r.html: cannot be written"),
    ):
        with pytest.raises(UsageError) as error:
            run_report(monkeypatch, *words)
        assert said in str(error.value)


def test_weights_and_biases(monkeypatch):
    """Its API is replaced: what is asked of it, and what becomes of the answer."""
    import wandb

    config = to_store(make_args(importlib.import_module("deep_spi").Args, env_id="Breakout-MinAtar", gamma=0.9, seed=4))
    config |= {"git_commit": "abc", "git_dirty": False, "versions": {"jax": "1"}}
    rows = [{"global_step": 8192 * k, RETURN: float(k), "charts/episodes": 2 * k} for k in (1, 2)]
    rows.append({"global_step": 8192 * 3, RETURN: "NaN", "charts/episodes": 1})
    rows.append({"global_step": 610 * 8192, "charts/episodes": 0})  # no episode ended in the last update
    with_keys = lambda rows: lambda keys: (row for row in rows if set(keys) <= set(row))  # noqa: E731
    runs = [
        SimpleNamespace(id="a", config=config | {"script": "deep_spi"}, scan_history=with_keys(rows)),
        SimpleNamespace(id="b", config={}, scan_history=with_keys([])),
        SimpleNamespace(id="c", config={"script": "deep_spi"}, scan_history=with_keys(rows)),
    ]
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=lambda project: runs if project == "we/spi" else 1 / 0))
    found = read_runs(["wandb:we/spi"], RETURN)
    (run,) = found.runs
    assert (run.script, run.flags, run.seed, run.planned) == ("deep_spi", "--gamma 0.9", 4, 610 * 8192)
    assert_allclose(run.value, [1, 2, np.nan, np.nan]), assert_allclose(run.weight, [2, 4, 0, 0])
    assert (run.commit, run.dirty, run.versions) == ("abc", False, {"jax": "1"})
    assert run.reached == run.planned
    assert found.problems == [
        f"wandb:we/spi/b: has no {RETURN}; skipped",
        "wandb:we/spi/c: its config is not from a run of these scripts; skipped",
    ]

    for row in rows:
        row["params/encoder"] = {"bins": [0, 1], "values": [2]}
    with pytest.raises(UsageError, match="--metric params/encoder: is not a number in wandb:we/spi/a; choose another"):
        read_runs(["wandb:we/spi"], "params/encoder")

    def refuse():
        raise wandb.errors.CommError("no such project")

    monkeypatch.setattr(wandb, "Api", refuse)
    with pytest.raises(UsageError, match="wandb:we/spi: cannot be read .no such project"):
        read_runs(["wandb:we/spi"], RETURN)


def test_a_curve_has_the_interval_of_student():
    values = np.array([[1.0, 2.0], [3.0, 2.0], [8.0, 5.0]])
    mean, half = mean_curve(values)
    low, high = stats.t.interval(0.95, 2, values.mean(axis=0), stats.sem(values, axis=0))
    assert_allclose([mean - half, mean + half], [low, high], atol=1e-9)
    assert np.all(np.isnan(mean_curve(values[:1])[1]))


def test_published_scores_and_unfinished_runs_are_marked(tmp_path, monkeypatch):
    runs = write_grid(tmp_path / "runs", seeds=(1,))
    write_run(runs / "more", "deep_spi", "Asterix-MinAtar", 2, [(1.0, 1)] * 5, updates=20)
    comparison = compare(read_runs([str(runs)], RETURN).runs)
    axes = Figure().subplots()
    curves(comparison, "Asterix-MinAtar", 20, "return", published=123.0)(axes)
    assert any(line.get_linestyle() == ":" and set(line.get_ydata()) == {123.0} for line in axes.lines)
    assert axes.get_ylim()[1] > 123
    assert [text.get_text() for text in axes.texts] == ["unfinished"]
    assert axes.texts[0].xy == (5 * BATCH, 1.0)
    monkeypatch.chdir(tmp_path)
    run_report(monkeypatch, "runs", "--output", "r", "--allow-incomplete", "--published", "Breakout-MinAtar=50")
    text = (tmp_path / "r.md").read_text()
    assert "Circle: end of an unfinished run." in text and "published score (Breakout-MinAtar=50)" in text
    for wrong, said in (("Pong-v5=20", "must be ENV_ID=SCORE"), ("Breakout-MinAtar=x", "'x' is not a number")):
        with pytest.raises(UsageError, match=f"--published {wrong}: {said}"):
            run_report(monkeypatch, "runs", "--output", "r", "--published", wrong)


def test_a_baseline_is_of_one_protocol():
    """Flags of the protocol are read off a run's flags, and runs of two protocols have no baseline in common."""
    plain, sticky = record([1.0], env_id="Pong-v5"), "--stochastic-env --total-timesteps 9000"
    assert run_protocol(plain) == (0.0, 30)
    assert run_protocol(plain._replace(flags=sticky)) == (0.3, 60)
    assert run_protocol(plain._replace(flags="--gamma 0.9 --repeat-action-probability 0.25 --noop-max 7")) == (0.25, 7)
    unset = "--no-stochastic-env --repeat-action-probability None --noop-max None"  # of a script that cannot be imported
    assert run_protocol(plain._replace(flags=unset)) == (0.0, 30)
    with pytest.raises(UsageError, match="ppo-1: its flags are damaged"):
        run_protocol(plain._replace(flags="--noop-max many"))
    other = plain._replace(script="deep_spi", flags=sticky)
    comparison = compare([plain._replace(source="a"), other._replace(source="b")])
    raw = raw_scores(comparison, 1, 1)
    with pytest.raises(UsageError, match="--scale baseline: .* differ in their protocol .*30 no-ops: a; .*60 no-ops: b"):
        normalized(comparison, raw, "baseline", "ppo")
    odd = compare([plain._replace(flags="--noop-max 7")])
    with pytest.raises(UsageError, match="Pong-v5 has no baseline for sticky actions 0, up to 7 no-ops: ppo-1"):
        normalized(odd, raw_scores(odd, 1, 1), "baseline", "ppo")
    assert len(normalized(comparison, raw, "min-max", "ppo")["ppo"]) == 1
