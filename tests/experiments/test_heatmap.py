"""Heat maps of final scores over two flags."""

from dataclasses import replace

import numpy as np
import pytest

from experiments import heatmap
from experiments.study.records import COLUMNS, read_table
from utils.runs.flags import UsageError

ARGS = heatmap.Args(runs=(), x="clip-coef", y="transition-loss-coef")


def table(path, runs):
    """`runs` are (script, environment, flags, seed, return, finished); of two returns the last one counts."""
    rows = [",".join(COLUMNS)]
    for script, env_id, flags, seed, final, finished in runs:
        first = f"{script},{env_id},{flags},{seed},100"
        rows += [f"{first},50,99,1", f"{first},{100 if finished else 60},{final},1"]
    path.write_text("\n".join(rows))
    return replace(ARGS, runs=(str(path),), output=path.with_name("out.png"))


def test_cells_are_means_of_finished_runs(tmp_path, capsys):
    args = table(
        tmp_path / "t.csv",
        [
            ("deep_spi", "Breakout-v5", "", 1, 3.0, True),  # both flags have their defaults
            ("deep_spi", "Breakout-v5", "", 2, 5.0, True),
            ("deep_spi", "Breakout-v5", "--clip-coef 0.2", 1, 7.0, True),
            ("deep_spi", "Breakout-v5", "--clip-coef 0.2 --transition-loss-coef 0.05", 1, 8.0, False),
            ("deep_spi", "Pong-v5", "--transition-loss-coef 0.05", 1, -2.0, True),
        ],
    )
    heatmap.main(args)
    assert "seed 1: not finished, at 60 of 100 steps; skipped ***" in capsys.readouterr().out
    assert args.output.stat().st_size > 10_000
    drawn = heatmap.draw(heatmap.cells(read_table(tmp_path / "t.csv"), args.x, args.y), args.x, args.y, "return")
    breakout, pong = ([text.get_text() for text in axes.texts] for axes in drawn.axes)
    assert breakout == ["4", "7\n(1 of 2)"] and pong == ["-2\n(1 of 2)"]  # the picture says which means are of fewer runs
    assert (tmp_path / "out.csv").read_text().splitlines() == [
        "env_id,transition-loss-coef,clip-coef,mean,std,runs",
        f"Breakout-v5,0.0005,0.1,4,{np.sqrt(2):.6g},2",
        "Breakout-v5,0.0005,0.2,7,,1",
        "Breakout-v5,0.05,0.2,,,0",
        "Pong-v5,0.05,0.1,-2,,1",
    ]


def test_runs_that_differ_in_other_flags_are_refused(tmp_path):
    runs = [("deep_spi", "Pong-v5", flags, 1, 1.0, True) for flags in ("--clip-coef 0.2", "--clip-coef 0.2 --gamma 0.9")]
    args = table(tmp_path / "t.csv", runs)
    with pytest.raises(
        UsageError, match="Pong-v5 also differ in other flags: '--gamma 0.9' and 'defaults'|'defaults' and '--gamma"
    ):
        heatmap.main(args)
    heatmap.main(replace(args, where=("gamma=0.90",), output=tmp_path / "a.png"))
    assert "Pong-v5,0.0005,0.2,1,,1" in (tmp_path / "a.csv").read_text()
    several = table(tmp_path / "u.csv", [("ppo", "Pong-v5", "", 1, 1.0, True), *runs])
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    gone = table(tmp_path / "gone.csv", [("gone", "Pong-v5", "", 1, 1.0, True)])
    for wrong, said in (
        (replace(args, x="transition_loss_coef"), "name two flags"),
        (replace(args, y="gama"), "--gama: deep_spi has no such flag"),
        (replace(args, where=("gamma",)), "write flag=value"),
        (replace(args, where=("gamma=0.5",)), "no run is left to draw"),
        (replace(args, output=tmp_path / "a.svg"), "name a .png file"),
        (replace(args, output=tmp_path / "t.png"), "would overwrite .*t.csv, which is an input"),
        (
            replace(args, where=("gamma=0.9",), output=tmp_path / "other.png"),
            "other.csv, which has other columns; choose another name",
        ),
        (replace(args, runs=args.runs * 2), "are duplicates: deep_spi on Pong-v5, seed 1"),
        (gone, "script gone cannot be imported; add its folder"),
        (replace(several, y="gamma"), "the runs are of several scripts, deep_spi, ppo"),
    ):
        with pytest.raises(UsageError, match=said):
            heatmap.main(wrong)


def test_switches_and_empty_values_are_shown(tmp_path):
    runs = [("deep_spi", "CartPole-v1", flags, 1, 1.0, True) for flags in ("", "--no-norm-adv", "--fc-layers (none)")]
    args = replace(table(tmp_path / "t.csv", runs), x="norm-adv", y="fc-layers")
    heatmap.main(args)
    _, *cells = (tmp_path / "out.csv").read_text().splitlines()
    assert [row.split(",")[1:3] for row in cells] == [["(none)", "True"], ["512", "False"], ["512", "True"]]
    heatmap.main(replace(args, where=("norm-adv=False",)))
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 2
    for flag in ("seed", "logdir", "env-id", "save-every"):
        with pytest.raises(UsageError, match=f"--{flag}: does not affect results, or is averaged over"):
            heatmap.main(replace(args, x=flag))
