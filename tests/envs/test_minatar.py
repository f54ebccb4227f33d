"""MinAtar's games: against the original in Python, and what we add."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.minatar import GAMES, MinAtar
from tests.states import same
from utils.runs.checkpoints import begin_writing, find, load

pytestmark = pytest.mark.minatar

NAMES = {env_id: game.name.removeprefix("minatar-") for env_id, game in GAMES.items()}
MINIMAL = {  # what the actions of each minimal set are called in the original
    "asterix": "nlurd", "breakout": "nlr", "freeway": "nud", "seaquest": "nlurdf", "space_invaders": "nlrf"
}  # fmt: skip
TRIED = {"freeway": "nuuuud", "seaquest": "nlurdfdlrf"}  # actions drawn for those that would see little of the game otherwise
STEPS = 10_000
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
SAME = {  # fields of the same name and meaning
    "asterix": "player_x player_y spawn_speed spawn_timer move_speed move_timer ramp_timer ramp_index",
    "breakout": "ball_y ball_x ball_dir pos brick_map strike last_x last_y",
    "freeway": "cars pos move_timer terminate_timer",
    "seaquest": "oxygen diver_count sub_x sub_y sub_or e_spawn_speed e_spawn_timer d_spawn_timer move_speed ramp_index"
    " shot_timer surface",
    "space_invaders": "pos f_bullet_map e_bullet_map alien_map alien_dir enemy_move_interval alien_move_timer alien_shot_timer"
    " ramp_index shot_timer",
}
LISTS = {"f_bullets": (5, 3), "e_bullets": (25, 3), "e_fish": (25, 4), "e_subs": (25, 5), "divers": (5, 4)}  # Seaquest's


class Recorder:
    """The original's random numbers, with what was drawn last."""

    def __init__(self, seed: int):
        self.random = np.random.RandomState(seed)
        self.drawn = []

    def __getattr__(self, name):
        def draw(*args, **kwargs):
            drawn = getattr(self.random, name)(*args, **kwargs)
            self.drawn.append(np.copy(drawn))  # the games change what they drew
            return drawn

        return draw


def fields_of(name: str, original) -> dict[str, np.ndarray]:
    """The original's state, as the library's arrays."""
    fields = {field: np.array(getattr(original, field)) for field in SAME[name].split()}
    if name == "asterix":
        fields["entities"] = np.array([[99] * 4 if entity is None else entity for entity in original.entities], np.int32)
    if name == "seaquest":
        for field, shape in LISTS.items():
            fields[field] = np.full(shape, -1, np.int32)
            for i, row in enumerate(getattr(original, field)):
                fields[field][i] = row
    return fields


def draws_of(name: str, original, drawn: list) -> dict[str, np.ndarray]:
    """What a step drew, as the library's step takes it; anything where it drew nothing."""
    if name == "asterix":
        lr, gold, slot = (*drawn, 0)[:3] if len(drawn) >= 2 else (0.0, 0.0, 0)
        free = [i for i, entity in enumerate(original.entities) if entity is None]
        return {"lr": lr < 1 / 2, "is_gold": gold < 1 / 3, "slot": free[slot] if len(drawn) == 3 else 0}
    if name == "freeway":
        speeds, directions = drawn if drawn else (np.ones(8), np.ones(8))
        return {"speeds": np.array(speeds, np.int32), "directions": np.sign(np.array(directions) - 0.5).astype(np.int32)}
    if name == "seaquest":
        enemy = drawn[:3] if original.e_spawn_timer == 0 else (0.0, 0.0, 1)
        diver = drawn[-2:] if original.d_spawn_timer == 0 else (0.0, 1)
        return {
            "enemy_lr": enemy[0] < 1 / 2, "is_sub": enemy[1] < 1 / 3, "enemy_y": enemy[2],
            "diver_lr": diver[0] < 1 / 2, "diver_y": diver[1],
        }  # fmt: skip
    return {}


class Before:
    """What `draws_of` reads of a state before the step changes it."""

    def __init__(self, original):
        self.entities = list(getattr(original, "entities", []))
        self.e_spawn_timer, self.d_spawn_timer = (getattr(original, f"{x}_spawn_timer", None) for x in "ed")


def play_original(name: str, seed: int, steps: int):
    """Random steps of the original, without sticky actions: states, actions, draws, and what the steps returned."""
    game = importlib.import_module(f"minatar.environments.{name}").Env()
    game.random = Recorder(seed)
    game.reset()
    policy = np.random.RandomState(seed + 1)
    states, actions, draws, returned = [], [], [], []
    for _ in range(steps):
        if name == "seaquest" and policy.rand() < 0.02:  # random play collects hardly any
            game.diver_count = policy.randint(7)
        before, state = Before(game), fields_of(name, game)
        action = game.action_map.index(policy.choice(list(TRIED.get(name, MINIMAL[name]))))
        game.random.drawn.clear()
        reward, terminal = game.act(action)
        states.append(state)
        actions.append(action)
        draws.append(draws_of(name, before, list(game.random.drawn)))
        returned.append((game.state(), reward, terminal, fields_of(name, game)))
        if terminal:
            game.reset()
    return states, np.array(actions), draws, returned


def stack(rows):
    return jax.tree.map(lambda *x: np.stack(x), *rows)


@functools.cache
def library_step(name: str):
    """The library's step from the original's state, by the given draws: what it returns, and the fields of the next state."""
    library = importlib.import_module(f"pgx_minatar.{name}")
    start = library.State()

    def step(fields, action, drawn):
        of_type = {f"_{f}": jnp.asarray(x).astype(getattr(start, f"_{f}").dtype) for f, x in fields.items()}
        state = library._step_det(start.replace(**of_type), action, **drawn)
        after = {field: getattr(state, f"_{field}") for field in fields}
        return library._observe(state), state.rewards[0], state.terminated, after

    return jax.jit(step)


def rows_in_order(field: str, x: np.ndarray) -> np.ndarray:
    """A list of things, whose places in it mean nothing, sorted; bullets that have left the grid are none."""
    if field == "e_bullets":
        x = np.where((x[..., :1] < 0) | (x[..., :1] > 9), -1, x)
    return np.array([rows[np.lexsort(rows.T)] for rows in x]) if field in LISTS else x


@pytest.mark.parametrize(
    ("env_id", "count"),
    [
        ("Breakout-MinAtar", 5_000),
        ("Freeway-MinAtar", STEPS),
        ("Seaquest-MinAtar", 5_000),
        *(slow(env_id, STEPS) for env_id in ("Asterix-MinAtar", "SpaceInvaders-MinAtar", "Seaquest-MinAtar")),
    ],
)
def test_steps_are_those_of_the_original(env_id, count):
    """From states of equal meaning, with the same draws: observation, reward, end and next state of thousands of steps.
    Seaquest's differ in what docs/minatar.md says, and nowhere else."""
    name = NAMES[env_id]
    states, actions, draws, returned = play_original(name, 0, count)
    states, drawn = stack(states), stack(draws) if draws[0] else {}
    obs, reward, terminal, after = jax.tree.map(np.asarray, jax.jit(jax.vmap(library_step(name)))(states, actions, drawn))
    wanted_obs, wanted_reward, wanted_terminal = (np.stack(x) for x in list(zip(*returned, strict=True))[:3])
    wanted_after = stack([x[3] for x in returned])
    assert np.sum(wanted_terminal) >= 3 and np.sum(wanted_reward) >= 30
    low, high = GAMES[env_id].reward_range
    assert np.all((low <= wanted_reward) & (wanted_reward <= high))

    none = np.zeros(count, bool)
    drowning, surfacing, shot = none, none, none
    if name == "seaquest":
        drowning = states["oxygen"] == 0
        surfacing = ~states["surface"] & wanted_after["surface"]
        shot = (states["e_subs"][..., 3:] == 0).all(-1).any(-1) & (wanted_reward > 0)
        assert np.sum(drowning & ~terminal) > 3 and np.sum(surfacing & (after["move_speed"] != wanted_after["move_speed"])) > 3
    different = lambda x, y: (x != y).reshape(count, -1).any(axis=1)  # noqa: E731
    assert not np.any(different(obs, wanted_obs) & ~drowning & ~shot)
    assert not np.any(different(terminal, wanted_terminal) & ~drowning)
    assert np.array_equal(reward, wanted_reward)
    for field in after:
        allowed = {"move_speed": surfacing, "e_bullets": shot}.get(field, none)
        ours, theirs = (rows_in_order(field, x[field]) for x in (after, wanted_after))
        assert not np.any(different(ours, theirs) & ~allowed), field


@pytest.mark.parametrize("env_id", ["Asterix-MinAtar", "SpaceInvaders-MinAtar"])
def test_rewards_of_the_original_are_in_the_range(env_id):
    """Of those games whose steps only the slow tests compare."""
    *_, returned = play_original(NAMES[env_id], 0, 1_000)
    rewards = [reward for _, reward, _, _ in returned]
    low, high = GAMES[env_id].reward_range
    assert low <= min(rewards) < max(rewards) <= high


def test_submarines_shot_while_moving_fire_in_the_original_alone():
    """A known difference of the library, too rare for the test above."""
    game = importlib.import_module("minatar.environments.seaquest").Env()
    game.sub_y = 8
    game.e_subs, game.f_bullets = (
        [[3, 5, True, 0, 0]],
        [[5, 5, False]],
    )  # the bullet flies to 4, and then the submarine moves there
    before = fields_of("seaquest", game)
    drawn = draws_of("seaquest", Before(game), [])
    reward, _ = game.act(0)
    _, ours, _, after = library_step("seaquest")(before, 0, drawn)
    assert reward == 1 and ours == 1
    assert game.e_subs == [] and np.all(after["e_subs"] == -1)
    assert game.e_bullets == [[5, 5, True]] and np.all(after["e_bullets"] == -1)


def test_enemy_bullets_that_leave_the_grid_stop_the_others_in_the_library():
    """A known difference of the library: they are kept, and one that has left on the left hides those behind it in the list."""
    game = importlib.import_module("minatar.environments.seaquest").Env()
    game.sub_y, game.e_bullets = 8, [[0, 3, False], [5, 4, True]]
    step = library_step("seaquest")
    fields, drawn = fields_of("seaquest", game), draws_of("seaquest", Before(game), [])
    for _ in range(3):
        game.act(0)
        _, _, _, fields = step(fields, 0, drawn)
    assert game.e_bullets == [[8, 4, True]]
    assert fields["e_bullets"][:2].tolist() == [[-1, 3, 0], [6, 4, 1]]


def test_surfacing_without_oxygen_costs_a_point_in_the_library():
    """In the original the episode has ended before; the range of rewards is that of what is played."""
    game = importlib.import_module("minatar.environments.seaquest").Env()
    game.sub_y, game.surface, game.oxygen, game.diver_count = 1, False, -1, 6
    fields, drawn = fields_of("seaquest", game), draws_of("seaquest", Before(game), [])
    _, reward, terminal, _ = library_step("seaquest")(fields, 2, drawn)
    assert terminal and reward == GAMES["Seaquest-MinAtar"].reward_range[0] == -1


@pytest.mark.parametrize(
    "env_id",
    [
        "Asterix-MinAtar",  # whose empty array is replaced
        *(slow(f"{name}-MinAtar") for name in ("Breakout", "Freeway", "Seaquest", "SpaceInvaders")),
    ],
)
def test_a_checkpoint_holds_a_game(env_id, tmp_path):
    state = MinAtar(env_id, 3, 0).reset()[0]
    begin_writing(tmp_path / "state", {"state": state}, {})()
    other = MinAtar(env_id, 3, 1).reset()[0]
    assert same(load(find(tmp_path / "state"), {"state": other}), {"state": state})


def play(env: MinAtar, policy: jax.Array, steps: int):
    """The actions, drawn from the given ones, what the steps return, and the actions that the games executed."""

    def step(carry, key):
        state, _ = carry
        action = policy[jax.random.randint(key, (env.num_envs,), 0, len(policy))]
        state, after = env.step(state, action)
        return (state, after.obs), (action, after, state.game._last_action)

    return jax.tree.map(
        np.asarray, jax.jit(functools.partial(jax.lax.scan, step))(env.reset(), jax.random.split(jax.random.key(1), steps))[1]
    )


@functools.cache
def random_play(env_id: str, steps: int):
    """What `play` returns of many games of a seed, which two tests read."""
    env = MinAtar(env_id, 400, 3)
    return play(env, jnp.arange(env.num_actions), steps)


@pytest.mark.parametrize(
    ("env_id", "steps"),
    [
        ("Breakout-MinAtar", 600),
        slow("Asterix-MinAtar", 1500),
        slow("SpaceInvaders-MinAtar", 1500),
        slow("Seaquest-MinAtar", 1500),
        slow("Freeway-MinAtar", 2501),
    ],
)
def test_returns_of_random_play_are_those_of_the_original(env_id, steps):
    """With sticky actions, ramp and starts: the mean return and length of the first episodes, within 3 standard errors."""
    name, episodes = NAMES[env_id], 400
    _, after, _ = random_play(env_id, steps)
    assert after.episode.finished.any(axis=0).all()
    first = after.episode.finished.argmax(axis=0), np.arange(episodes)
    ours = np.stack([after.episode.episode_return[first], after.episode.episode_length[first]])
    low, high = GAMES[env_id].reward_range
    assert after.reward.min() >= low and after.reward.max() <= high

    game = importlib.import_module("minatar.environment").Environment(name, sticky_action_prob=0.1)
    game.seed(5)
    random, theirs = np.random.RandomState(7), []
    for _ in range(episodes):
        game.reset()
        total, length, terminal = 0, 0, False
        while not terminal:
            reward, terminal = game.act(random.choice(game.minimal_action_set()))
            total, length = total + reward, length + 1
        theirs.append((total, length))
    theirs = np.array(theirs).T
    error = np.sqrt((ours.var(axis=1, ddof=1) + theirs.var(axis=1, ddof=1)) / episodes)
    assert np.all(np.abs(ours.mean(axis=1) - theirs.mean(axis=1)) <= 3 * error)


@pytest.mark.parametrize("env_id", ["Breakout-MinAtar", slow("Asterix-MinAtar")])
def test_steps_follow_the_convention(env_id, monkeypatch):
    """The last observation of an episode is returned, what follows is no transition but a new start; time limits truncate."""
    monkeypatch.setattr(MinAtar, "time_limit", 12)
    env = MinAtar(env_id, 32, 0)
    state, obs = env.reset()
    assert obs.shape[1:] == env.obs_spec.shape and obs.dtype == env.obs_spec.dtype and set(np.unique(obs)) == {0, 1}
    starts = np.unique(np.asarray(obs), axis=0)
    assert len(starts) == (2 if "Breakout" in env_id else 1)
    _, after, last_action = play(env, jnp.arange(env.num_actions), 200)
    over = after.terminated | after.truncated
    assert after.truncated.any() and not np.any(after.terminated & after.truncated)
    assert after.terminated.any()
    assert np.array_equal(after.valid[1:], ~over[:-1]) and after.valid[0].all()
    is_start = (after.obs[:, :, None] == starts).all(axis=(3, 4, 5)).any(axis=-1)
    assert is_start[~after.valid].all() and not is_start[over].any()
    assert not after.reward[~after.valid].any() and not over[~after.valid].any() and not last_action[~after.valid].any()
    if env_id == "Breakout-MinAtar":  # each start is drawn anew
        sides = [set(after.obs[~after.valid[:, b], b, 3, 0, 1]) for b in range(32)]
        assert all(side == {0, 1} for side in sides)
    assert np.all(after.episode.episode_length[after.truncated] == 12) and np.array_equal(after.episode.finished, over)


def test_actions_stick_with_probability_a_tenth():
    """In one state of the game that is the previous action's, whatever is chosen; new in each episode."""
    action, after, executed = random_play("Breakout-MinAtar", 600)
    executed = np.searchsorted([0, 1, 3], executed)
    before, now = after.valid[:-1] & ~(after.terminated | after.truncated)[:-1], slice(1, None)
    changed = before & (action[now] != executed[:-1])  # only there the two cases can be told apart
    stuck = executed[now][changed] == executed[:-1][changed]
    assert np.all(stuck | (executed[now][changed] == action[now][changed]))
    assert abs(stuck.mean() - 0.1) < 4 * np.sqrt(0.1 * 0.9 / len(stuck))


def test_games_differ_between_environments_and_seeds():
    """Where the ball of Breakout starts is drawn for each environment, by the seed."""
    first, other = (np.asarray(MinAtar("Breakout-MinAtar", 64, seed).reset()[1])[:, 3, 0, 1] for seed in (0, 1))
    assert 10 < first.sum() < 54 and np.any(first != other)


def test_actions_are_those_that_do_something():
    """The minimal action sets of the paper."""
    assert {env_id: MinAtar(env_id, 1, 0).num_actions for env_id in GAMES} == {
        env_id: len(MINIMAL[name]) for env_id, name in NAMES.items()
    }
