"""A search for settings: its trials, which values are tried next, and how a trial is scored.

A trial is a set of runs. The values it tries are stored in trials/NNN/params.json before they begin. Its outcome is stored in
outcome.json beside it as soon as it is known, and added to Optuna's storage in the order of the trials' numbers. The values of
trial n depend only on the sampler's seed and on trials 0 to n - `concurrent_trials`, all of which are over when it begins. So
neither an interruption nor the order in which runs end changes them.
"""

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_origin, get_type_hints

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.pruners import BasePruner, MedianPruner, SuccessiveHalvingPruner
from optuna.storages import RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from envs.atari_scores import reference
from envs.own import absolute
from experiments.study.plan import SEARCH, TRIALS
from experiments.study.records import RunRecord, last_tenth
from experiments.study.space import Params, Space, rounded
from utils.files import locked, write_json
from utils.runs.flags import UsageError, require

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=ExperimentalWarning)

DATABASE, JOURNAL, REPLACED = "search.db", "search.journal", "replaced.json"
REFUSED = "refused: "  # begins the reason of a trial whose values the script does not accept
DRAWS = 1_000  # to propose values that no trial has had
RUNGS = 4  # with --prune-on steps, a trial may be pruned after each quarter
STARTUP_TRIALS = 10  # random trials before the sampler's model is used; Optuna's default
# MinAtar: mean return of random play (332,800 steps, 64 environments), and of PPO after 1M steps with --learning-rate 2e-3
# (5 seeds, last 5%), measured before any search
MINATAR_SCALE = {
    "Asterix-MinAtar": (0.51, 6.02),
    "Breakout-MinAtar": (0.38, 14.4),
    "Freeway-MinAtar": (0.38, 49.6),
    "Seaquest-MinAtar": (0.10, 2.75),
    "SpaceInvaders-MinAtar": (4.12, 56.1),
}


class Outcome(NamedTuple):
    """How a trial ended.

    Attributes:
        state: complete; pruned, with the last intermediate value; or failed: a run diverged or failed, or no episode ended.
        value: mean over environments of the scaled scores; None if failed.
        params: the values of the searched flags.
        scores: mean return of each environment that was scored.
        steps: intermediate values, by rung.
        seconds: training time of all runs together.
        reason: why it failed or was pruned.
        diverged: True if a run stopped because of a NaN or an infinite number.
        attrs: what the pruner notes about the trial.
    """

    state: str
    value: float | None
    params: Params
    scores: dict[str, float]
    steps: dict[int, float]
    seconds: float
    reason: str = ""
    diverged: bool = False
    attrs: dict[str, Any] = {}


class Settings(NamedTuple):
    """What identifies a search; `--trials` may change when it is continued."""

    script: str
    env_ids: list[str]
    seeds: list[int]
    search: list[str]
    flags: list[str]
    scale: dict[str, list[float]]
    sampler_seed: int
    concurrent_trials: int
    pruner: str
    prune_on: str


def make_scale(env_ids: tuple[str, ...], given: tuple[str, ...]) -> dict[str, list[float]]:
    """Return for each environment the mean return that is scaled to 0 (random play), and the one scaled to 1.

    Args:
        env_ids: the environments.
        given: `env-id=LOW:HIGH` for those that are in no table, or to override it.

    Raises:
        UsageError: an environment is in no table, or a scale is damaged.
    """
    typed = {}
    for text in given:
        env_id, _, values = text.rpartition("=")
        env_id = absolute(env_id)
        require(env_id not in typed, f"--scale {text}: {env_id} is scaled twice; leave one out")
        try:
            low, high = map(float, values.split(":"))
        except ValueError:
            raise UsageError(f"--scale {text}: write ENV-ID=LOW:HIGH, two mean returns") from None
        require(env_id in env_ids, f"--scale {text}: {env_id or repr(env_id)} is not in --env-ids")
        require(np.isfinite([low, high]).all() and low < high, f"--scale {text}: LOW must be less than HIGH")
        typed[env_id] = [low, high]
    scale = {}
    for env_id in env_ids:
        atari = reference(env_id)
        known = (atari.random, atari.human) if atari else MINATAR_SCALE.get(env_id)
        require(env_id in typed or known is not None, f"--scale: has no entry for {env_id}; add --scale {env_id}=LOW:HIGH")
        scale[env_id] = typed.get(env_id) or list(known or ())
    return scale


def score(records: list[RunRecord], share: float = 1.0) -> float | None:
    """Return the mean over runs of the mean return in the last tenth of their steps, or of the first `share` of their steps.
    None if no episode ended there in one of them."""
    found = []
    for run in records:
        planned = int(np.ceil(share * run.planned))
        before = run.step <= planned
        part = run._replace(step=run.step[before], value=run.value[before], weight=run.weight[before], planned=planned)
        if not (part.weight > 0).any():
            return None
        found.append(last_tenth(part))
    return float(np.mean(found))


class Search:
    """The trials of a search, in its folder."""

    def __init__(self, logdir: Path, settings: Settings, space: Space, first: Params | None, storage: str = "sqlite"):
        """Begin or continue a search.

        Args:
            logdir: its folder.
            settings: what identifies it.
            space: the distribution of each searched flag.
            first: the values of trial 0; None proposes them like the others'.
            storage: where Optuna stores the trials: sqlite; journal, a file that many processes may write; or memory, which
                reads the folder and writes nothing. A storage that is new gets all trials from the folder.

        Raises:
            UsageError: the folder has a search with other settings, or the storage is damaged.
            OSError: a file cannot be written.
        """
        self.logdir, self.settings, self.space, self.first = logdir, settings, space, first
        if storage == "memory":
            self.path = None
            self.study = optuna.create_study(direction="maximize")
        else:
            self.path = logdir / (JOURNAL if storage == "journal" else DATABASE)
            (logdir / TRIALS).mkdir(parents=True, exist_ok=True)
            with self.lock(), stored(self.path):
                self._check_settings()
                if storage == "journal":
                    backend = JournalStorage(JournalFileBackend(str(self.path)))
                else:  # a path may contain characters that have a meaning in a URL
                    backend = RDBStorage(URL.create("sqlite", database=str(self.path)).render_as_string())
                self.study = optuna.create_study(
                    storage=backend, study_name=settings.script, direction="maximize", load_if_exists=True
                )
        self.publish()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock of the search, for what only one process may do at a time."""
        if self.path is None:  # nothing is written
            yield
            return
        with locked(self.logdir / SEARCH):
            yield

    def _check_settings(self) -> None:
        if not (self.logdir / SEARCH).exists():
            write_json(self.logdir / SEARCH, self.settings._asdict())
        for name, before, now in zip(Settings._fields, read_settings(self.logdir), self.settings, strict=True):
            said = f"--{name.replace('_', '-')}" if name != "flags" else "the flags after --"
            require(
                before == now,
                f"--logdir {self.logdir}: its search has other values of {said} ({_brief(before)}, now {_brief(now)}); repeat "
                "them, or choose another folder",
            )

    def trials(self) -> list[FrozenTrial]:
        """Return the trials in Optuna's storage: all up to the first one that is not over."""
        return self.study.get_trials(deepcopy=False)

    def outcome_path(self, number: int) -> Path:
        """Return the file that says how the trial ended."""
        return self.logdir / TRIALS / f"{number:03d}" / "outcome.json"

    def decide(self, number: int, outcome: Outcome) -> None:
        """Store how the trial ended."""
        self.outcome_path(number).parent.mkdir(parents=True, exist_ok=True)
        write_json(self.outcome_path(number), outcome._asdict())

    def publish(self) -> list[tuple[int, Outcome]]:
        """Add to Optuna's storage what has been decided since, in order. Return it."""
        added = []
        with self.lock(), stored(self.path):
            number = len(self.trials())
            while (path := self.outcome_path(number)).exists():
                outcome = read_outcome(path)
                try:
                    trial = self._frozen(outcome)
                except ValueError:
                    raise UsageError(f"{path}: is damaged; delete it, and the trial is judged again from its runs") from None
                self.study.add_trial(trial)
                added.append((number, outcome))
                number += 1
        return added

    def _frozen(self, outcome: Outcome) -> FrozenTrial:
        states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        attrs = {f"return {env_id}": score for env_id, score in outcome.scores.items()} | {"seconds": outcome.seconds}
        attrs |= {"reason": outcome.reason, "diverged": outcome.diverged}
        return create_trial(
            state=states[outcome.state],
            value=outcome.value,
            params=outcome.params,
            distributions=self.space,
            user_attrs=attrs,
            system_attrs=outcome.attrs,
            intermediate_values=outcome.steps,
        )

    def replace_failed(self) -> None:
        """Leave trials that failed but did not diverge out of the sampler's history, and of the count of trials."""
        with self.lock():
            failed = [t for t in self.trials() if t.state == TrialState.FAIL and not t.user_attrs["diverged"]]
            by_machine = [t.number for t in failed if not t.user_attrs["reason"].startswith(REFUSED)]
            write_json(self.logdir / REPLACED, by_machine)

    def replaced(self) -> list[int]:
        """Return the numbers of the trials that were replaced."""
        path = self.logdir / REPLACED
        if not path.exists():
            return []
        return read_json(path, list, "delete it, and repeat the command with --replace-failed")

    def _history(self, number: int) -> list[FrozenTrial]:
        """Return the trials on which the trial of that number depends. One that failed counts as a bad one: it has the value of
        random play, or the lowest value if that is lower."""
        before, left_out = self.trials()[: max(0, number - self.settings.concurrent_trials + 1)], self.replaced()
        before = [t for t in before if t.number not in left_out]
        worst = min([0.0, *(t.value for t in before if t.state != TrialState.FAIL and t.value is not None)])
        failed = lambda t: create_trial(value=worst, params=t.params, distributions=t.distributions)  # noqa: E731
        return [failed(t) if t.state == TrialState.FAIL else t for t in before]

    def params(self, number: int) -> Params:
        """Return the values of a trial, which are chosen when they are first asked for. All trials up to `number -
        concurrent_trials` must be in the storage."""
        path = self.logdir / TRIALS / f"{number:03d}" / "params.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, self._propose(number))
        params = read_json(path, dict, "delete it, and the same values are proposed again")
        require(set(params) == set(self.space), f"{path}: is of another search; choose another --logdir")
        return params

    def _propose(self, number: int) -> Params:
        replaced = self.replaced()
        tried = [self.params(earlier) for earlier in range(number) if earlier not in replaced]
        if self.first is not None and self.first not in tried:
            return self.first
        seed = int(np.random.SeedSequence([self.settings.sampler_seed, number]).generate_state(1)[0])
        memory = optuna.create_study(
            direction="maximize", sampler=optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=seed)
        )
        memory.add_trials(self._history(number))
        for pending in range(max(0, number - self.settings.concurrent_trials + 1), number):  # so that it is not proposed again
            running = create_trial(state=TrialState.RUNNING, params=self.params(pending), distributions=self.space)
            memory.add_trial(running)
        params = rounded(memory.ask(self.space).params, self.space)
        at_random = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        for _ in range(DRAWS):  # the same values again would be the same runs
            if params not in tried:
                break
            params = rounded(at_random.ask(self.space).params, self.space)
        return params

    def is_pruned(self, number: int, steps: dict[int, float]) -> tuple[bool, dict[str, Any]]:
        """Return whether Optuna's pruner ends the trial after these intermediate values, and what it notes about the trial."""
        pruner = make_pruner(self.settings.pruner)
        if pruner is None or not steps:
            return False, {}
        memory = optuna.create_study(direction="maximize", pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=0))
        memory.add_trials([t for t in self._history(number) if t.intermediate_values])
        trial, ended = memory.ask(), False
        for step in sorted(steps):
            trial.report(steps[step], step)
            ended = trial.should_prune()
        return bool(ended), memory.trials[-1].system_attrs


def read_settings(logdir: Path) -> Settings:
    """Read what identifies the search in a folder.

    Raises:
        UsageError: there is no search, or the file is damaged.
    """
    path, remedy = logdir / SEARCH, "delete it, and repeat the command that began the search"
    require(path.is_file(), f"--logdir {logdir}: contains no search ({SEARCH}); name the folder of one")
    found = read_json(path, dict, remedy)
    kinds = {name: get_origin(kind) or kind for name, kind in get_type_hints(Settings).items()}
    whole = set(found) == set(kinds) and all(isinstance(found[name], kind) for name, kind in kinds.items())
    require(whole, f"{path}: is damaged; {remedy}")
    return Settings(**found)


def make_pruner(name: str) -> BasePruner | None:
    """Return Optuna's pruner of that name: none, median, or halving."""
    if name == "median":
        return MedianPruner()
    return SuccessiveHalvingPruner(min_resource=1, reduction_factor=2) if name == "halving" else None


@contextlib.contextmanager
def stored(path: Path | None) -> Iterator[None]:
    """Turn errors of Optuna's storage into one line. The outcomes of all trials are in files too, so that nothing is lost.

    Raises:
        UsageError: the storage cannot be read or written.
    """
    try:
        yield
    except (StorageInternalError, SQLAlchemyError, LookupError, ValueError) as error:
        said = " ".join(str(getattr(error, "orig", None) or error.__cause__ or error).split())[:200]
        remedy = "if it is damaged, delete it, and repeat the command: it is written anew from the outcomes in trials/"
        raise UsageError(f"{path}: {said}; {remedy}") from None


def read_json(path: Path, kind: type, remedy: str) -> Any:
    """Read a JSON file that holds a value of this kind.

    Raises:
        UsageError: it does not. The message ends with the remedy.
    """
    try:
        value = json.loads(path.read_text())
        if isinstance(value, kind):
            return value
    except (ValueError, RecursionError):
        pass
    raise UsageError(f"{path}: is damaged; {remedy}")


def read_outcome(path: Path) -> Outcome:
    """Read how a trial ended.

    Raises:
        UsageError: the file is damaged.
    """
    remedy = "delete it, and the trial is judged again from its runs"
    try:
        outcome = Outcome(**read_json(path, dict, remedy))
        whole = outcome.state in ("complete", "pruned", "failed") and (outcome.state == "failed" or np.isfinite(outcome.value))
        require(bool(whole) and isinstance(outcome.params, dict), f"{path}: is damaged; {remedy}")
        return outcome._replace(steps={int(step): float(value) for step, value in outcome.steps.items()})
    except (ValueError, TypeError, AttributeError):
        raise UsageError(f"{path}: is damaged; {remedy}") from None


def _brief(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
