"""What is measured of latents and world models."""

import csv
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import deep_spi
from experiments import representations
from experiments.representations import MEASURES
from experiments.study.latent_measures import (
    centered,
    dormant_share,
    effective_rank,
    explained,
    of_latents,
    of_predictions,
    probe,
    readable,
)
from utils.runs.flags import UsageError, make_args


def test_ranks_and_silent_units_by_hand():
    axes = np.concatenate([np.eye(4), -np.eye(4)])
    assert effective_rank(axes) == pytest.approx(4)
    assert effective_rank(axes @ np.diag([1, 1, 0, 0]) + 7) == pytest.approx(2)
    shares = np.array([3, 1]) / 4
    assert effective_rank(axes @ np.diag([3, 1, 0, 0])) == pytest.approx(np.exp(-np.sum(shares * np.log(shares))))
    assert effective_rank(np.full((9, 3), 0.3, np.float32)) is None
    activity = np.array([1.0, 1.0, 0.04, 0.0])  # 2.5% of their mean is 0.01275
    assert dormant_share(np.stack([activity, -activity])) == 0.25
    maps = np.zeros((2, 3, 3, 4))
    maps[1, 2, 0] = [1.0, 1.0, 1.0, 0.0]  # a channel that is seen in one place is alive
    assert dormant_share(maps) == 0.25
    assert dormant_share(np.zeros((2, 4))) is None


def test_probes_by_hand():
    """All of what is linear, nothing of what is independent, half of both; in groups that nothing was fitted to."""
    rng = np.random.default_rng(0)
    z, weights, group = rng.normal(size=(900, 5)), rng.normal(size=(5, 3)), np.arange(900) % 6
    noise = rng.normal(size=(900, 3)) * np.linalg.norm(weights, axis=0)
    assert probe(z, z @ weights + 2, group) == pytest.approx(1, abs=1e-3)
    assert -0.02 < probe(z, noise, group) < 0.05
    assert 0.4 < probe(z, np.concatenate([z @ weights, noise], axis=1), group) < 0.6
    more = np.concatenate([z, rng.normal(size=(900, 280))], axis=1)  # nearly as many numbers as samples
    assert -0.05 < probe(more, noise, group) < 0.05 and probe(more, z @ weights, group) > 0.5
    own = np.where(group[:, None] % 3 == 2, -1.0, 1.0) * (z @ weights)  # in the groups that are tried, the opposite
    assert probe(z, own, group) < -2
    assert probe(z, np.ones((900, 2)), group) is None
    frames = np.arange(2 * 84 * 84, dtype=np.uint8).reshape(1, 2, 84, 84)
    np.testing.assert_allclose(readable(frames)[0, 13], frames[0, 1, 7:14, 7:14].mean() / 255, rtol=1e-6)
    assert readable(np.ones((3, 10, 10, 4))).shape == (3, 400)


def test_steps_that_are_none_count_nowhere():
    """Latents 0, 1, 3, 4, ... in six environments; where a step is not valid they jump by a million."""
    t, start = np.arange(41), np.arange(6)
    latent = (t + t // 2)[:, None] + start
    z = np.stack([latent, -latent], axis=-1).astype(np.float32)[:, :, None, None]
    valid = np.ones((40, 6), bool)
    expected = of_latents(valid, z, latent[..., None])
    assert expected["probe"] == pytest.approx(1, abs=1e-3) and expected["effective_rank"] == pytest.approx(1)
    variance = latent[:40].var()  # of each of the two numbers; moves are 1 and 2 in turn
    assert expected["moves"] == pytest.approx(2.5 / variance)
    late = np.concatenate([z, z[-1:] + 1e6, z[-1:]])  # a step to there, and one from there
    invalid = np.zeros((2, 6), bool)
    found = of_latents(np.concatenate([valid, invalid]), late, np.concatenate([latent, latent[-2:]])[..., None])
    assert found == pytest.approx(expected)


def test_predictions_by_hand():
    now, after = np.array([[0.0], [2.0]]), np.array([[2.0], [2.0]])
    mean, sample = np.array([[1.0], [2.0]]), np.array([[1.5], [1.0]])
    reward, predicted = np.array([0.0, 4.0]), np.array([1.0, 4.0])
    assert of_predictions(now, after, mean, sample, reward, predicted) == {
        "transition_skill": 1 - 1 / 4,
        "noise": pytest.approx((0.25 + 1.0) / (0.25 + 1.0)),  # squared distances of samples from means, and from latents
        "reward_r2": 1 - 1 / 8,
    }
    still = of_predictions(now, now, now, now, np.full(2, 0.1), predicted)
    assert still == {"transition_skill": None, "noise": None, "reward_r2": None}
    assert explained(np.zeros((2, 2)), np.ones((2, 2))) == 1
    assert not np.any(centered(np.full((10_000, 2), 0.1, np.float32)))


def unchanged(state, steps, advantages, key, agent, optimizer, args):
    """In the place of Deep SPI's `update`, which takes the longest to compile: the initial networks are measured as well."""
    metrics = dict.fromkeys(("losses/policy_loss", "charts/learning_rate"), jnp.ones(()))
    return state._replace(iteration=state.iteration + 1), metrics


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_runs_are_measured_and_what_cannot_be_is_named(tmp_path, capsys, monkeypatch):
    """A finished run, beside one that is not finished, one without a model, and one of a script that is not there."""
    monkeypatch.setattr(deep_spi, "update", unchanged)
    flags = {"num_envs": 8, "num_steps": 16, "num_minibatches": 2, "total_timesteps": 3 * 128, "save_every": 1e9}
    study = tmp_path / "study"
    args = make_args(deep_spi.Args, env_id="Catch-v0", fc_layers=(16,), logdir=str(study), run_name="good", **flags)
    deep_spi.main(args)
    record = json.loads((study / "good" / "run.json").read_text())
    for seed, name in enumerate(("unfinished", "empty", "foreign"), 2):
        shutil.copytree(study / "good", study / name)
        other = record | {"flags": record["flags"] | {"seed": seed}}
        (study / name / "run.json").write_text(json.dumps(other))
    lines = (study / "unfinished" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (study / "unfinished" / "metrics.jsonl").write_text("".join(lines[:-1]))
    for place in ("model", "checkpoints"):
        shutil.rmtree(study / "empty" / place, ignore_errors=True)
    (study / "foreign" / "run.json").write_text(json.dumps(record | {"flags": {"env_id": "Catch-v0", "seed": 1}}))
    output = tmp_path / "table.csv"
    representations.main(representations.Args((study,), output, num_envs=6, num_steps=20, skip=30))
    said = capsys.readouterr().out
    for words in ("unfinished: not finished; skipped", "holds neither a model nor a checkpoint", "is not from a run"):
        assert words in said
    (row,) = csv.DictReader(output.open())
    assert (row["script"], row["env_id"], row["seed"], row["step"]) == ("deep_spi", "Catch-v0", "1", "384")
    found = {name: float(row[name]) for name in MEASURES}
    assert 1 < found["effective_rank"] < 50 and found["probe"] > 0.5 and 0 <= found["dormant"] < 0.5 and found["moves"] > 0
    assert -0.5 < found["transition_skill"] < 0.5 and 0 < found["noise"] < 1  # it starts near the identity
    assert 0 < found["model_loss"] < 0.1 and 0 < found["model_loss_std"] < 0.1 and 0 < found["gradient_share"] < 1
    assert found["reward_r2"] < 0.5  # of rewards that nothing was learned of
    assert "| Catch-v0 | deep_spi | 1 |" in said
    other = output.read_text() + output.read_text().splitlines()[1].replace(",1,384", ",9,384") + "\n"
    output.write_text(other)
    representations.main(representations.Args((study / "good",), output, num_envs=6, num_steps=20, skip=30))
    assert output.read_text() == other  # the same row again, and that of another run stays
    output.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="which has other columns; choose another name"):
        representations.main(representations.Args((study / "good",), output))
    output.unlink()
    with pytest.raises(UsageError, match="no finished runs"):
        representations.main(representations.Args((study / "unfinished",), output))


def test_mistakes_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for flags, words in (
        ({"runs": (tmp_path / "none",)}, "no such folder"),
        ({"runs": (tmp_path / "empty",)}, "contains no folders of runs"),
        ({"runs": (tmp_path,)}, "no finished runs"),
        ({"runs": (tmp_path,), "num_envs": 2}, "--num-envs 2"),
        ({"runs": (tmp_path,), "num_steps": 0}, "--num-steps 0"),
        ({"runs": (tmp_path,), "seed": -1}, "--seed -1"),
        ({"runs": (tmp_path,), "output": tmp_path / "a" / "b.csv"}, "does not exist"),
    ):
        with pytest.raises(UsageError) as error:
            representations.main(representations.Args(**flags))
        assert words in str(error.value)
