"""Environments of your own: the loader, what it checks, games in JAX from rules for one, and gymnax's interface."""

import inspect
import sys
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deep_spi
from envs import own
from envs.jax_env import Gymnax, JaxEnv, Octax
from envs.options import EnvError
from envs.protocol import Env, Timestep
from envs.registry import family, file_name, make_env, observes_images
from utils.runs.flags import RunArgs, UsageError, check_flags, make_args


class Corridor(JaxEnv):
    """Walk right to the end, which pays 1."""

    num_actions = 2
    reward_range = (0.0, 1.0)
    time_limit = 7

    def __init__(self, num_envs: int, seed: int, length: int = 4, slippery: bool = False):
        self.length, self.slippery = length, slippery
        super().__init__(num_envs, seed)

    def start_one(self, key):
        return jnp.zeros((), jnp.int32)

    def observe_one(self, game):
        return jax.nn.one_hot(game, self.length)

    def step_one(self, key, game, action):
        place = jnp.clip(game + 2 * action - 1, 0, self.length - 1)
        ends = place == self.length - 1
        return place, ends * 1.0, ends, jnp.zeros((), bool)


def step_by_step(env, actions):
    """All steps of one environment, as NumPy arrays."""
    state, obs = env.reset()
    found = []
    for action in actions:
        state, after = jax.jit(env.step)(state, jnp.full(env.num_envs, action))
        found.append(jax.device_get(after))
    return np.asarray(obs), found


def test_rules_for_one_game_by_hand():
    """Three steps right end the episode; the next action starts a new one; seven steps without reaching the end truncate."""
    first, steps = step_by_step(Corridor(2, 0), [1, 1, 1, 0, *[0] * 7, 1, 1])
    assert first.argmax(-1).tolist() == [0, 0]
    table = [
        (int(s.obs[1].argmax()), float(s.reward[1]), bool(s.terminated[1]), bool(s.truncated[1]), bool(s.valid[1]))
        for s in steps
    ]
    assert table[:4] == [
        (1, 0.0, False, False, True),
        (2, 0.0, False, False, True),
        (3, 1.0, True, False, True),
        (0, 0.0, False, False, False),
    ]
    assert table[4:10] == [(0, 0.0, False, False, True)] * 6
    assert table[10:] == [(0, 0.0, False, True, True), (0, 0.0, False, False, False), (1, 0.0, False, False, True)]
    ended = [s.episode for s in steps if s.episode.finished[1]]
    assert [(float(e.episode_return[1]), int(e.episode_length[1])) for e in ended] == [(1.0, 3), (0.0, 7)]


class Clock(NamedTuple):
    time: jax.Array
    place: jax.Array


class Params(NamedTuple):
    max_steps_in_episode: int = 6
    goal: int = 3

    def replace(self, **changes):
        return self._replace(**changes)


class Ticking:
    """A game with gymnax's interface: it ends at the goal or at the time limit, and `step` resets by itself."""

    num_actions = 2

    def reset_env(self, key, params):
        state = Clock(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
        return self.obs(state), state

    def obs(self, state):
        return jnp.stack([state.place, state.time]).astype(jnp.float32)

    def is_terminal(self, state, params):
        return (state.place >= params.goal) | (state.time >= params.max_steps_in_episode)

    def step_env(self, key, state, action, params):
        state = Clock(state.time + 1, state.place + action)
        reward = (state.place >= params.goal) * 1.0
        return self.obs(state), state, reward, self.is_terminal(state, params), {}

    reset = reset_env

    def step(self, key, state, action, params):
        obs, new, reward, done, info = self.step_env(key, state, action, params)
        first_obs, first = self.reset_env(key, params)
        choose = lambda a, b: jnp.where(done, a, b)  # noqa: E731
        return choose(first_obs, obs), jax.tree.map(choose, first, new), reward, done, info


def test_gymnax_returns_terminal_observations_and_tells_time_limits():
    env = Gymnax(Ticking(), Params(), 2, 0)
    assert (env.num_actions, env.obs_spec.shape, env.resets_within) == (2, (2,), False)
    _, steps = step_by_step(env, [1, 1, 1, 0, *[0] * 6, 0, 1])
    ends = [(s.obs[0].tolist(), bool(s.terminated[0]), bool(s.truncated[0]), bool(s.valid[0])) for s in steps]
    assert ends[2] == ([3.0, 3.0], True, False, True)  # the goal
    assert ends[3] == ([0.0, 0.0], False, False, False)
    assert ends[9] == ([0.0, 6.0], False, True, True)  # the time limit, at its true observation
    assert ends[10] == ([0.0, 0.0], False, False, False)
    assert not any(np.any(s.unseen_end) for s in steps)


class Stored(NamedTuple):
    time: jax.Array
    place: jax.Array
    terminal: jax.Array


class Storing(Ticking):
    """As gymnax's MinAtar games before version 1: the state stores that the episode is over, and `is_terminal` reads it."""

    def reset_env(self, key, params):
        obs, state = super().reset_env(key, params)
        return obs, Stored(*state, jnp.zeros((), bool))

    reset = reset_env

    def is_terminal(self, state, params):
        return super().is_terminal(state, params) | getattr(state, "terminal", False)

    def step_env(self, key, state, action, params):
        obs, new, reward, done, info = super().step_env(key, state, action, params)
        return obs, Stored(*new, done), reward, done, info


class Telling(Ticking):
    """As games of gymnax 1: only `is_truncated` knows the time limit, and `step` returns both ends."""

    def is_terminal(self, state, params):
        return state.place >= params.goal

    def is_truncated(self, state, params):
        return state.time >= params.max_steps_in_episode

    def step(self, key, state, action, params):
        obs, new, reward, terminated, info = self.step_env(key, state, action, params)
        truncated = self.is_truncated(new, params)
        choose = lambda a, b: jnp.where(terminated | truncated, a, b)  # noqa: E731
        first_obs, first = self.reset_env(key, params)
        return choose(first_obs, obs), jax.tree.map(choose, first, new), reward, terminated, truncated, info


@pytest.mark.parametrize("game", [Ticking(), Storing(), Telling()])
def test_gymnax_games_of_all_versions_tell_time_limits(game):
    """The goal after three steps, a reset, and the time limit after six."""
    _, steps = step_by_step(Gymnax(game, Params(), 2, 0), [1, 1, 1, 0, *[0] * 6, 0])
    assert [bool(s.terminated[0]) for s in steps] == [k == 2 for k in range(11)]
    assert [bool(s.truncated[0]) for s in steps] == [k == 9 for k in range(11)]
    _, steps = step_by_step(Gymnax(game, Params(goal=6), 2, 0), [1] * 6)  # both in one step
    assert steps[5].terminated[0] and not steps[5].truncated[0]
    if isinstance(game, Telling):
        alone = SimpleNamespace(num_actions=2, reset=game.reset, step=game.step)
        _, steps = step_by_step(Gymnax(alone, Params(), 2, 0), [0] * 7)
        assert [bool(s.truncated[0]) for s in steps] == [bool(s.unseen_end[0]) for s in steps] == [k == 5 for k in range(7)]
        assert [bool(s.valid[0]) for s in steps] == [k != 5 for k in range(7)]


def test_a_resumed_own_environment_draws_other_numbers(tmp_path):
    """If it cannot be saved; of one that can, the state is restored."""
    (tmp_path / "mine.py").write_text(
        "import jax, jax.numpy as jnp\nfrom envs.jax_env import JaxEnv\n\n"
        "class Dice(JaxEnv):\n    num_actions, saveable = 2, False\n"
        "    start_one = lambda self, key: jax.random.uniform(key, 3)\n    observe_one = lambda self, game: game\n"
        "    step_one = lambda self, key, game, action: (game, 0.0, False, False)\n"
    )
    args = make_args(deep_spi.Args, env_id=f"{tmp_path / 'mine.py'}:Dice", num_envs=2)
    first, same, later = (make_env(args, iteration).reset()[1] for iteration in (0, 0, 5))
    assert np.array_equal(first, same) and not np.any(first == later)


def test_gymnax_marks_ends_that_it_cannot_see():
    """With only a `step` that resets, an end returns the next episode's first observation, and no reset step follows."""
    game = SimpleNamespace(num_actions=2, reset=Ticking().reset, step=Ticking().step)
    env = Gymnax(game, Params(), 2, 0)
    assert env.resets_within
    _, steps = step_by_step(env, [1, 1, 1, 1, 1, 1])
    assert [s.obs[0].tolist() for s in steps] == [[1, 1], [2, 2], [0, 0], [1, 1], [2, 2], [0, 0]]
    assert [bool(s.terminated[0]) for s in steps] == [bool(s.unseen_end[0]) for s in steps] == [False, False, True] * 2
    assert all(s.valid.all() for s in steps)
    assert [int(s.episode.episode_length[0]) for s in steps] == [1, 2, 3, 1, 2, 3]
    assert [int(s.episode.age[0]) for s in steps] == [1, 2, 3, 1, 2, 3] and int(steps[3].episode.previous_age[0]) == 3


def test_a_time_limit_starts_a_game_anew_that_resets_by_itself():
    """The game has its own limit of 6 steps; here it is cut off after 4 of them, and after 2 the goal is reached."""
    game = SimpleNamespace(num_actions=2, reset=Ticking().reset, step=Ticking().step)
    env = Gymnax(game, Params(goal=2), 2, 0)
    env.time_limit = 4
    _, steps = step_by_step(env, [0, 0, 0, 0, 1, 1, 0, 0])
    assert [s.obs[0].tolist() for s in steps] == [[0, 1], [0, 2], [0, 3], [0, 0], [1, 1], [0, 0], [0, 1], [0, 2]]
    assert [bool(s.truncated[0]) for s in steps] == [k == 3 for k in range(8)]
    assert [bool(s.terminated[0]) for s in steps] == [k == 5 for k in range(8)]
    assert [bool(s.valid[0]) for s in steps] == [k != 3 for k in range(8)]


class Chip:
    """A game with octax's interface: images of booleans, and a truncation that it tells."""

    num_actions = 2

    def reset(self, key):
        return jnp.zeros((), jnp.int32), self.obs(0), {}

    def obs(self, time):
        return jnp.zeros((4, 64, 32), bool).at[:, 0, 0].set(time > 0)

    def step(self, state, action):
        return state + 1, self.obs(state + 1), action * 1.0, (state == 2) & (action == 1), state == 3, {}


def test_octax_tells_its_truncations_and_has_images_of_bytes():
    env = Octax(Chip(), 2, 0)
    assert (env.obs_spec.shape, env.obs_spec.dtype) == ((4, 64, 32), jnp.uint8)
    _, steps = step_by_step(env, [1, 1, 1, 0, 0, 0, 0, 0])
    assert [bool(s.terminated[0]) for s in steps] == [False, False, True, *[False] * 5]
    assert [bool(s.truncated[0]) for s in steps] == [*[False] * 7, True]
    assert [int(s.obs[0].max()) for s in steps[:4]] == [255, 255, 255, 0] and float(steps[0].reward[0]) == 1.0


FILE = inspect.getsource(Corridor).replace("time_limit = 7", "time_limit = 50")
HEAD = "import jax\nimport jax.numpy as jnp\nfrom envs.jax_env import JaxEnv\n\n\n"


def write(folder, text, name="mine.py"):
    (folder / name).write_text(text)
    return folder / name


def test_an_import_path_makes_an_environment_with_options(tmp_path):
    env_id = f"{write(tmp_path, HEAD + FILE)}:Corridor"
    args = make_args(deep_spi.Args, env_id=env_id, num_envs=3, env_option=("length=6", "slippery=yes"))
    check_flags(args)
    assert (family(env_id), args.num_steps, args.total_timesteps) == ("own", 128, 1_000_000)
    env = make_env(args)
    assert (env.num_envs, env.length, env.slippery, env.obs_spec.shape) == (3, 6, True, (6,))
    assert file_name(env_id) == "mine-Corridor" and observes_images(env_id)


def test_a_video_needs_a_method_that_draws(tmp_path):
    env_id = f"{write(tmp_path, HEAD + FILE)}:Corridor"
    with pytest.raises(UsageError, match="--capture-video: is used only with an environment that can be rendered"):
        check_flags(make_args(deep_spi.Args, env_id=env_id, capture_video=True))


def test_a_module_on_the_path_works_too(tmp_path, monkeypatch):
    write(tmp_path, HEAD + FILE, "a_module_of_mine.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert own.make("a_module_of_mine:Corridor", 2, 0).num_envs == 2
    (tmp_path / "a_package_of_mine").mkdir()
    write(
        tmp_path / "a_package_of_mine", "import jax\n\n\ndef f(num_envs, seed):\n    return jax.numpy.zeros('a')\n", "envs.py"
    )
    with pytest.raises(EnvError, match=r"TypeError: .*a_package_of_mine/envs.py, line 5\)$"):
        own.make("a_package_of_mine.envs:f", 2, 0)
    assert own.source("a_module_of_mine:Corridor") == tmp_path / "a_module_of_mine.py" and own.source("Pong-v5") is None


def test_files_of_one_name_are_different_modules(tmp_path):
    for n in (3, 5):
        (tmp_path / str(n)).mkdir()
        write(tmp_path / str(n), (HEAD + FILE).replace("length: int = 4", f"length: int = {n}"))
    assert [own.make(f"{tmp_path / str(n)}/mine.py:Corridor", 1, 0).length for n in (3, 5)] == [3, 5]


@pytest.mark.parametrize(
    "text, name, options, said",
    [
        (None, "Corridor", (), "mine.py does not exist; check the path"),
        (HEAD + FILE, "Corridr", (), "has no class or function Corridr; it has Corridor"),
        ("x = 3\n", "Corridor", (), "it defines no class or function"),
        ("import nothing_of_this_name\n", "Corridor", (), "needs the module nothing_of_this_name; install it"),
        ("x = 1 / 0\n", "Corridor", (), "fails with ZeroDivisionError: division by zero"),
        ("def f(:\n", "Corridor", (), "fails with SyntaxError"),
        (HEAD + FILE, "Corridor", ("size=3",), "has no such option; it has length, slippery"),
        (HEAD + FILE, "Corridor", ("length=long",), "length=long: must be an integer"),
        ("def f(num_envs): pass\n", "f", (), "f must take num_envs and seed; add seed"),
        ("def f(num_envs, seed, size: int): pass\n", "f", (), "needs --env-option size=..."),
    ],
)
def test_mistakes_before_anything_starts(text, name, options, said, tmp_path):
    path = tmp_path / "mine.py" if text is None else write(tmp_path, text)
    with pytest.raises(UsageError) as error:
        check_flags(RunArgs(env_id=f"{path}:{name}", env_option=options))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "signature, typed, value",
    [
        ("size", "5", 5),
        ("size", "0.5", 0.5),
        ("size", "true", True),
        ("size", "none", None),
        ("size", "big", "big"),
        ("size=None", "5", 5),
        ("size: str", "5", "5"),
        ("size: 'float'", "5", 5.0),
        ("size=(1, 2)", "3,4", (3, 4)),
    ],
)
def test_an_option_has_the_type_of_its_default_or_annotation_or_that_of_its_text(signature, typed, value, tmp_path):
    path = write(tmp_path, f"def f(num_envs, seed, {signature}): return size\n")
    _, options = own.load(f"{path}:f", (f"size={typed}",))
    assert options == {"size": value} and type(options["size"]) is type(value)


def test_an_environment_that_cannot_be_created_is_one_line_with_the_place(tmp_path):
    path = write(tmp_path, "import jax\n\n\ndef f(num_envs, seed, size):\n    return jax.numpy.zeros(size)\n")
    with pytest.raises(EnvError) as error:
        own.make(f"{path}:f", 2, 0, ("size=big",))
    said = str(error.value)
    assert f"{path}:f: creating f fails with TypeError: " in said and said.endswith(f"({path}, line 5)") and "\n" not in said


class Wrong(Env):
    """An environment with one mistake."""

    num_actions = 2

    def __init__(self, num_envs, seed, mistake=""):
        self.num_envs, self.mistake = num_envs + (mistake == "count"), mistake
        shape = {"small": (2, 8, 8), "uneven": (40, 20, 3)}.get(mistake, (3,))
        self.obs_spec = jax.ShapeDtypeStruct(shape, jnp.float32)

    def reset(self):
        return jnp.zeros(self.num_envs), jnp.zeros((self.num_envs, 4 if self.mistake == "obs" else 3))

    def step(self, state, action):
        flags = [jnp.zeros(self.num_envs, bool)] * (3 // (self.mistake != "code"))
        reward = jnp.zeros(self.num_envs, jnp.int32 if self.mistake == "reward" else jnp.float32)
        after = Timestep(jnp.zeros((self.num_envs, 3)), reward, *flags, None)
        return state.astype(jnp.int32) if self.mistake == "state" else state, None if self.mistake == "step" else after


@pytest.mark.parametrize(
    "mistake, said",
    [
        ("count", "has 3 environments, but was asked for 2"),
        ("obs", r"obs of reset is float32\[2, 4\], but must be float32\[2, 3\]"),
        ("reward", r"reward of step is int32\[2\], but must be float32\[2\]"),
        ("state", "the state that step returns has other arrays"),
        ("step", "step returns NoneType"),
        ("small", r"observations of shape \[2, 8, 8\]: must be frames of 32 or more pixels along each axis"),
        (
            "uneven",
            r"observations of shape \[40, 20, 3\]: must be frames .*, or a grid, \[height, width, channels\], of 3 to 31",
        ),
        ("code", "step fails with ZeroDivisionError: integer division or modulo by zero .*test_own.py, line"),
    ],
)
def test_what_an_environment_returns_is_checked(mistake, said):
    with pytest.raises(EnvError, match=said):
        own.make(f"{__name__}:Wrong", 2, 0, (f"mistake={mistake}",))
    assert own.make(f"{__name__}:Wrong", 2, 0).num_envs == 2


@jax.tree_util.register_pytree_node_class
class Unequal:
    """A state without __eq__, so that two of the same arrays are not equal."""

    def __init__(self, place):
        self.place = place

    def tree_flatten(self):
        return (self.place,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


class OfObjects(Corridor):
    """Its state is any pytree of arrays."""

    def start_one(self, key):
        return Unequal(super().start_one(key))

    def observe_one(self, game):
        return super().observe_one(game.place)

    def step_one(self, key, game, action):
        place, *told = super().step_one(key, game.place, action)
        return Unequal(place), *told


def test_a_state_may_be_any_pytree():
    assert own.make(f"{__name__}:OfObjects", 2, 0).num_envs == 2


def test_the_reward_network_may_be_limited_where_rewards_are():
    """The class says so: its range is [0, 1]; that of `Unlimited` is unknown."""
    check_flags(make_args(deep_spi.Args, env_id=f"{__name__}:Corridor", clip_reward_net_output=True))
    with pytest.raises(UsageError, match="--clip-reward-net-output: cannot predict the rewards of .* beyond"):
        check_flags(make_args(deep_spi.Args, env_id=f"{__name__}:Unlimited", clip_reward_net_output=True))


class Unlimited(Corridor):
    """The same, without the range of its rewards."""

    reward_range = Env.reward_range


def test_a_function_may_return_anything_but_has_to_return_an_env():
    sys.modules[__name__].nothing = lambda num_envs, seed: object()
    with pytest.raises(EnvError, match="returned object, but must return an envs.protocol.Env"):
        own.make(f"{__name__}:nothing", 2, 0)
