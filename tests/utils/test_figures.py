"""All figures are the same bytes, whatever the user has configured for their own."""

import matplotlib
import numpy as np
import optuna
import pytest
from numpy.testing import assert_array_equal
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import create_trial
from tensorboardX.utils import figure_to_image

from experiments import confounding_gridworld, guarantees, heatmap
from experiments.study import figures, search_report
from experiments.study.comparison import Comparison
from experiments.study.records import COLUMNS
from utils.dreams import traces
from utils.figures import own_style

# what people set for their papers: LaTeX, which may be missing, fonts, cropped files, other colors and sizes
CONFIGURED = """
text.usetex: True
font.family: serif
font.size: 20
savefig.bbox: tight
savefig.dpi: 50
savefig.facecolor: black
figure.dpi: 200
axes.prop_cycle: cycler('color', ['k', 'r'])
axes.grid: True
lines.linewidth: 5
svg.fonttype: path
image.cmap: plasma
"""


def of_a_report(tmp_path):
    comparison = Comparison(["ppo"], ["Pong-v5"], [1], {}, [])
    draws = [figures.intervals(comparison, {"ppo": (0.5, 0.25, 1.0)}, "mean of $x$", 0.3)]
    return figures.png(comparison, draws, (3.0, 2.0), 1) + figures.svg(draws[0], (3.0, 2.0), "mean", "a note").encode()


def of_a_gridworld(tmp_path):
    args = confounding_gridworld.Args(output=str(tmp_path / "figure"))
    rising = np.stack([np.arange(4.0), np.arange(4.0) ** 2])
    curve = {"steps": np.arange(4), confounding_gridworld.VALUE: rising, confounding_gridworld.DISTANCE: rising}
    confounding_gridworld.draw({"PPO": curve}, args, 1.0, 0.5)
    return (tmp_path / "figure.png").read_bytes()


def of_guarantees(tmp_path):
    args, values = guarantees.Args(output=str(tmp_path / "figure")), {guarantees.VALUE: np.ones((2, 3))}
    bounds = [{name: np.arange(3.0) for name in ("improvement", "latent improvement", "promised")}]
    guarantees.draw(dict.fromkeys(guarantees.MODES, values), dict.fromkeys(guarantees.MODES, bounds), args)
    return (tmp_path / "figure.png").read_bytes()


def of_a_heat_map(tmp_path):
    row = lambda flags, score: f"deep_spi,Pong-v5,{flags},1,100,100,{score},1"  # noqa: E731
    (tmp_path / "t.csv").write_text("\n".join([",".join(COLUMNS), row("", 1.0), row("--clip-coef 0.2", 2.0)]))
    args = heatmap.Args((str(tmp_path / "t.csv"),), "clip-coef", "transition-loss-coef", output=tmp_path / "figure.png")
    heatmap.main(args)
    return args.output.read_bytes()


def of_a_search(tmp_path):
    space = {"level": FloatDistribution(0.1, 10.0, log=True), "size": CategoricalDistribution(("1", "2"))}
    study = optuna.create_study(direction="maximize")
    study.add_trials([create_trial(value=v, params={"level": v, "size": "1"}, distributions=space) for v in (1.0, 2.0)])
    search_report.draw_slices(study.trials, space, tmp_path / "figure.png")
    return (tmp_path / "figure.png").read_bytes()


def dreams():
    of = dict.fromkeys(("alive", "reward", "dreamed_reward", "end", "dreamed_end", "error", "no_change"), np.ones((2, 3)))
    of |= {"example": np.array(0), "taken": np.zeros(2, int)} | dict.fromkeys(("frames", "like"), np.eye(3, 4))
    return {traces.PREFIX + name: x for name, x in of.items()}


def of_dreams(tmp_path):
    return traces.picture(dreams()).tobytes()


def test_the_picture_of_dreams_is_that_of_their_figure():
    with own_style():
        assert_array_equal(traces.picture(dreams()), figure_to_image(traces.draw(dreams())))


@pytest.mark.parametrize("drawn", [of_a_report, of_a_gridworld, of_guarantees, of_a_heat_map, of_a_search, of_dreams])
def test_a_matplotlibrc_changes_nothing(drawn, tmp_path):
    (tmp_path / "matplotlibrc").write_text(CONFIGURED)
    plain = drawn(tmp_path)
    with matplotlib.rc_context(fname=tmp_path / "matplotlibrc"):
        assert drawn(tmp_path) == plain
