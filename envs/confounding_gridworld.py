"""The confounding gridworld: two paths look alike, but the best action at the end of one is ruinous at the end of the other.

    #  #  #  #  #  G  #  #        I start             > path: right pays 1
    #  >  >  >  >  !  W  #        @ hazard            ! choice: right pays 1 and leads to W; up pays n / gamma^n on the
    I  @  #  #  #  F  #  #        # wall                upper path, and costs (2 - eps) n / (eps gamma^n) on the lower one
    #  >  >  >  >  !  W  #        G, W, F: terminal   (n = 5 here)
    #  #  #  #  #  #  #  #

From the start the agent goes right into the hazard, which drops it on the upper path with probability 1 - eps and on the lower
one with probability eps. At the upper choice, up pays n / gamma^n. To an agent whose representation merges the two choices, up
pays (1 - eps) n / gamma^n - (2 - eps) n / gamma^n = -n / gamma^n on average. Such an agent learns to avoid up.

The dynamics are known, so policies can be evaluated exactly. `build_model` returns the dynamics as arrays; `policy_value` and
`optimal_value` evaluate them. `ConfoundingGridworld` is the JAX environment that the scripts train on. After importing this
module, `gymnasium.make("ConfoundingGridworld-v0")` creates the same environment for one agent.

Source: the didactic example of the paper (arXiv 2510.12312).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, UInt8

from envs.protocol import Env, EpisodeStats, Timestep, own_seed

ENV_ID = "ConfoundingGridworld-v0"
ACTIONS = ("up", "down", "left", "right")
UP, DOWN, LEFT, RIGHT = range(4)
TIME_LIMIT = 200  # steps
SIZE = 84  # pixels of a frame along each axis
ROWS = 5
MAX_N_PATH = SIZE - 3  # a frame needs a pixel for each of its n + 3 columns
MAX_LOG_REWARD = 14.0  # e^14 is a million: next to it, float32 still resolves the other rewards, which are 1
BRIGHTNESS = {"#": 50, ">": 100, "!": 100, "@": 180, "I": 120, "W": 200, "G": 220, "F": 220}
AGENT = 255
CELL_PIXELS = 16  # pixels of an entry of the policy matrix image, along each axis


class Model(NamedTuple):
    """The dynamics over the S cells that are not walls. Terminal cells lead to themselves and pay 0."""

    probability: Float[np.ndarray, "S A S"]  # of the next cell
    reward: Float[np.ndarray, "S A"]
    terminal: Bool[np.ndarray, " S"]
    coordinates: Int[np.ndarray, "S 2"]  # row and column
    grid: tuple[str, ...]  # the rows, one letter per cell as in the module docstring
    start: int  # index of I
    choices: tuple[int, int]  # indices of the upper and the lower choice


def build_model(n_path: int = 5, epsilon: float = 0.2, gamma: float = 0.99) -> Model:
    """Build the gridworld's dynamics.

    Args:
        n_path: n, the column of the choices: a path has n - 1 cells before its choice.
        epsilon: probability that the hazard leads to the lower path.
        gamma: discount factor in the rewards of the choices.

    Raises:
        ValueError: n_path is not in [2, 81], epsilon not in (0, 1], gamma not in (0, 1), or rewards are too large for float32.
    """
    if not 2 <= n_path <= MAX_N_PATH:
        raise ValueError(f"n_path {n_path}: must lie between 2 and {MAX_N_PATH}")
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon {epsilon}: must lie in (0, 1]")
    if not 0 < gamma < 1:  # with gamma 1, a policy that never leaves a cell has no value
        raise ValueError(f"gamma {gamma}: must lie in (0, 1)")
    n = n_path
    largest = np.log(2 * n) - n * np.log(gamma) - np.log(epsilon)
    if largest > MAX_LOG_REWARD:
        raise ValueError(
            f"n_path {n}: rewards of up to e^{largest:.0f} (with gamma {gamma}, epsilon {epsilon}) are too large for float32; "
            "choose a smaller n_path"
        )
    path = "#" + ">" * (n - 1) + "!W#"
    grid = ("#" * n + "G##", path, "I@" + "#" * (n - 2) + "F##", path, "#" * (n + 3))
    coordinates = [(row, col) for row in range(ROWS) for col in range(n + 3) if grid[row][col] != "#"]
    index = {cell: i for i, cell in enumerate(coordinates)}

    cells = len(coordinates)
    probability = np.zeros((cells, 4, cells))
    probability[range(cells), :, range(cells)] = 1.0  # by default an action stays in its cell and pays 0
    reward = np.zeros((cells, 4))

    def leads(cell, action, paid, *outcomes):
        probability[index[cell], action] = 0.0
        for to, p in outcomes:
            probability[index[cell], action, index[to]] = p
        reward[index[cell], action] = paid

    leads((2, 0), RIGHT, 0.0, ((2, 1), 1.0))
    for action in range(4):
        leads((2, 1), action, 0.0, ((1, 1), 1.0 - epsilon), ((3, 1), epsilon))
    for row in (1, 3):
        for col in range(1, n + 1):
            leads((row, col), RIGHT, 1.0, ((row, col + 1), 1.0))
    prize = n / gamma**n
    leads((1, n), UP, prize, ((0, n), 1.0))
    leads((3, n), UP, -(2.0 - epsilon) / epsilon * prize, ((2, n), 1.0))

    terminal = np.array([grid[row][col] in "GWF" for row, col in coordinates])
    return Model(probability, reward, terminal, np.array(coordinates), grid, index[2, 0], (index[1, n], index[3, n]))


def policy_value(model: Model, policy: Float[Array, "S A"], gamma: float) -> Float[Array, " S"]:
    """Compute the exact value of each cell under a policy (action probabilities in each cell): V = (I - gamma P)^-1 R. It
    ignores the time limit. Jittable and differentiable in the policy."""
    going_on = jnp.asarray(~model.terminal, policy.dtype)[:, None]  # makes the value of terminal cells exactly 0
    probability = jnp.einsum("sa,sat->st", policy, model.probability, precision="highest") * going_on
    reward = jnp.sum(policy * model.reward, axis=1)
    return jnp.linalg.solve(jnp.eye(len(reward)) - gamma * probability, reward)


def optimal_value(model: Model, gamma: float) -> Float[np.ndarray, " S"]:
    """Compute the value of each cell under the optimal policy, by value iteration until no value changes by more than 1e-12."""
    value = np.zeros(len(model.reward))
    while True:
        previous = value
        value = np.max(model.reward + gamma * model.probability @ previous, axis=1)
        if np.max(np.abs(value - previous)) <= 1e-12:
            return value


def frames(model: Model) -> UInt8[np.ndarray, "S 1 84 84"]:
    """Return the observation in each cell: the grid with the agent in it, scaled to 84 x 84 (nearest neighbor)."""
    columns = len(model.grid[0])
    grid = np.array([[BRIGHTNESS[letter] for letter in row] for row in model.grid], np.uint8)
    drawn = np.repeat(grid[None], len(model.coordinates), axis=0)
    drawn[np.arange(len(drawn)), model.coordinates[:, 0], model.coordinates[:, 1]] = AGENT
    rows, cols = np.arange(SIZE) * ROWS // SIZE, np.arange(SIZE) * columns // SIZE
    return drawn[:, None, rows[:, None], cols]


def enlarged(frame: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "5*H 5*W 3"]:
    """Return a gray frame as an RGB image, five times as large."""
    return np.repeat(np.kron(frame, np.ones((5, 5), np.uint8))[..., None], 3, axis=-1)


class GridState(NamedTuple):
    """State of B agents."""

    cell: Int[Array, " B"]
    steps: Int[Array, " B"]  # taken in the current episode
    over: Bool[Array, " B"]  # the last step ended the episode
    key: jax.Array
    episode: EpisodeStats


class ConfoundingGridworld(Env):
    """The environment in JAX. Rewards are never clipped.

    Raises:
        ValueError: see `build_model`.
    """

    num_actions = len(ACTIONS)

    def __init__(self, num_envs: int, seed: int, n_path: int = 5, epsilon: float = 0.2, gamma: float = 0.99):
        self.num_envs, self.gamma = num_envs, gamma
        self.model = build_model(n_path, epsilon, gamma)
        self.reward_range = (float(self.model.reward.min()), float(self.model.reward.max()))
        self.frames = frames(self.model)
        self.obs_spec = jax.ShapeDtypeStruct(self.frames.shape[1:], self.frames.dtype)
        self.seed = own_seed(seed)

    def observe(self, cell: Int[Array, " B"]) -> Num[Array, "B *obs"]:
        """Return the observations of agents in the given cells, 1 x 84 x 84 bytes each."""
        return jnp.asarray(self.frames)[cell]

    def reset(self) -> tuple[GridState, Num[Array, "B *obs"]]:
        """Put every agent at the start."""
        cell = jnp.full(self.num_envs, self.model.start, jnp.int32)  # as `step` returns it: one program
        state = GridState(
            cell,
            jnp.zeros(self.num_envs, jnp.int32),
            jnp.zeros(self.num_envs, bool),
            jax.random.key(self.seed),
            EpisodeStats.zeros(self.num_envs),
        )
        return state, self.observe(cell)

    def step(self, state: GridState, action: Int[Array, " B"]) -> tuple[GridState, Timestep]:
        """Step every agent; see `envs.protocol.Timestep`."""
        key, draw = jax.random.split(state.key)
        probability = jnp.asarray(self.model.probability, jnp.float32)[state.cell, action]
        valid = ~state.over
        cell = jnp.where(valid, jax.random.categorical(draw, jnp.log(probability)), self.model.start)
        reward = jnp.where(valid, jnp.asarray(self.model.reward, jnp.float32)[state.cell, action], 0.0)
        steps = jnp.where(valid, state.steps + 1, 0)
        terminated = jnp.asarray(self.model.terminal)[cell]
        truncated = (steps == TIME_LIMIT) & ~terminated
        episode = state.episode.update(reward, valid, terminated | truncated)
        timestep = Timestep(self.observe(cell), reward, terminated, truncated, valid, episode)
        return GridState(cell, steps, terminated | truncated, key, episode), timestep

    def render(self, state: GridState) -> UInt8[np.ndarray, "H W 3"]:
        """Return the first agent's frame as an RGB image."""
        return enlarged(self.frames[int(state.cell[0]), 0])

    def exact_metrics(
        self, policy: Callable[[Num[Array, "S *obs"]], tuple[Float[Array, "S *z"], Float[Array, "S A"]]]
    ) -> dict[str, Array]:
        """Compute metrics of a policy from the dynamics, without playing.

        Args:
            policy: maps observations to latents and action probabilities.

        Returns:
            `charts/init_value`: exact value of the start.
            `charts/representation_distance`: Euclidean distance between the latents of the two choices.
            `charts/distinct_latents`: number of different latents among the S cells.
            `values/r_c`: exact value of the cell in row r and column c, for each cell that is not terminal.
            `charts/policy_matrix`: image, a row per such cell in order, a column per action (see `ACTIONS`); bright is likely.
        """
        z, probabilities = policy(jnp.asarray(self.frames))
        value = policy_value(self.model, probabilities, self.gamma)
        upper, lower = self.model.choices
        flat = z.reshape(len(z), -1)
        same = jnp.all(flat[:, None] == flat[None], axis=-1)
        first = jnp.argmax(same, axis=1) == jnp.arange(len(z))  # no earlier cell has the same latent
        matrix = jnp.round(255 * probabilities[~self.model.terminal]).astype(jnp.uint8)
        return {
            "charts/init_value": value[self.model.start],
            "charts/representation_distance": jnp.linalg.norm((z[upper] - z[lower]).reshape(-1)),
            "charts/distinct_latents": jnp.sum(first),
            "charts/policy_matrix": jnp.repeat(jnp.repeat(matrix, CELL_PIXELS, axis=0), CELL_PIXELS, axis=1),
        } | {
            f"values/{row}_{col}": value[i] for i, (row, col) in enumerate(self.model.coordinates) if not self.model.terminal[i]
        }


class GymConfoundingGridworld(gymnasium.Env):
    """The same environment for one agent, as a Gymnasium environment.

    Raises:
        ValueError: see `build_model`.
    """

    metadata = {"render_modes": ["rgb_array", "ansi"], "render_fps": 4}

    def __init__(self, n_path: int = 5, epsilon: float = 0.2, gamma: float = 0.99, render_mode: str | None = None):
        self.model = build_model(n_path, epsilon, gamma)
        self.frames = frames(self.model)
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Box(0, 255, (1, SIZE, SIZE), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(len(ACTIONS))
        self.cell = self.model.start

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Put the agent at the start."""
        super().reset(seed=seed)
        self.cell = self.model.start
        return self.frames[self.cell].copy(), {}

    def step(self, action: int | np.integer):
        """Take one step. Gymnasium's wrapper applies the registered time limit.

        Raises:
            ValueError: there is no such action.
        """
        if not self.action_space.contains(action):
            raise ValueError(f"action {action!r}: must be an integer from 0 to {len(ACTIONS) - 1}")
        reward = float(self.model.reward[self.cell, action])
        self.cell = int(self.np_random.choice(len(self.model.reward), p=self.model.probability[self.cell, action]))
        return self.frames[self.cell].copy(), reward, bool(self.model.terminal[self.cell]), False, {}

    def render(self) -> UInt8[np.ndarray, "H W 3"] | str | None:
        """Return the frame as an RGB image (`rgb_array`), or the letters of the grid with A for the agent (`ansi`)."""
        if self.render_mode == "rgb_array":
            return enlarged(self.frames[self.cell, 0])
        if self.render_mode == "ansi":
            row, col = self.model.coordinates[self.cell]
            rows = list(self.model.grid)
            rows[row] = rows[row][:col] + "A" + rows[row][col + 1 :]
            return "\n".join(rows) + "\n"
        return None


gymnasium.register(ENV_ID, entry_point=GymConfoundingGridworld, max_episode_steps=TIME_LIMIT)
