"""The trials of a search, as a source of runs for `experiments.study.local.launch`."""

import shlex
import time
from typing import Any, NamedTuple

from experiments.study.local import Source
from experiments.study.plan import PlannedRun, Progress, plan, planned_in, rates, seconds_left, state_of, write_plan
from experiments.study.records import LEFT_OUT, OF_EPISODES, read_folder
from experiments.study.search import REFUSED, RUNGS, Outcome, Search, score
from experiments.study.space import Params, as_words, refusal
from experiments.study.status import Live
from utils.runs import folder
from utils.runs.flags import UsageError, parse_flags

LOOK_SECONDS = 5.0  # between checks of how far runs are, and of what other processes have decided


def runs_of(search: Search, args_type: type, number: int, params: Params) -> dict[str, list[PlannedRun]]:
    """Return the runs of a trial for each environment, one per seed."""
    asked = search.settings
    words = [*asked.flags, *as_words(params, args_type)]
    runs = plan((shlex.quote(asked.script),), tuple(asked.env_ids), asked.seeds, words, search.logdir, prefix=f"{number:03d}__")
    return {env_id: runs[i :: len(asked.env_ids)] for i, env_id in enumerate(asked.env_ids)}


class Trial(NamedTuple):
    """A trial in progress. `runs` are those of each environment, `lock` keeps other processes from working on it."""

    number: int
    params: Params
    runs: dict[str, list[PlannedRun]]
    lock: Any

    def all_runs(self) -> list[PlannedRun]:
        """Return the runs of all environments."""
        return [run for runs in self.runs.values() for run in runs]


class Trials(Source):
    """The runs of the trials that are next, until all trials are over.

    Args:
        search: the search.
        args_type: the class that declares the script's flags.
        trials: number of trials of the whole search.
        at_once: largest number of trials in progress here.
        live: prints what becomes known.
    """

    def __init__(self, search: Search, args_type: type, trials: int, at_once: int, live: Live):
        super().__init__([])
        self.search, self.args_type, self.at_once, self.live = search, args_type, at_once, live
        self.total = trials + len(search.replaced())
        self.mine: dict[int, Trial] = {}
        self.finished: set[str] = set()
        self.failed: dict[str, str] = {}  # reason of each run that failed
        self.values: dict[tuple[int, int], float | None] = {}  # of each trial at the rungs that it has reached
        self.looked = -LOOK_SECONDS
        # a tuner may have been killed before it stopped the runs of a trial that it had decided
        self.dropped = {run.name: run for run in planned_in(search.logdir) if search.outcome_path(number_of(run)).exists()}

    def greeting(self, new: list[PlannedRun], finished: int) -> str:
        """Return nothing: a trial prints its values when it begins."""
        return ""

    def is_over(self) -> bool:
        """Return True if all trials of the search are over."""
        self.search.publish()  # also what was decided last, here or by other processes
        return len(self.search.trials()) >= self.total

    def over(self, run: PlannedRun, state: Progress) -> None:
        """Note that a run is finished, or has failed."""
        self.looked = -LOOK_SECONDS
        if state.kind == "finished":
            self.finished.add(run.name)
        else:
            self.failed[run.name] = f"{run.env_id}, seed {run.seed}: {state.error or 'stopped by a signal'}"

    def rank(self, run: PlannedRun) -> int:
        """Return the number of the run's environment if trials are pruned by environments: a trial does not begin its second
        while another one waits for its first, because it may be pruned before."""
        asked = self.search.settings
        return asked.env_ids.index(run.env_id) if asked.pruner != "none" and asked.prune_on == "games" else 0

    def more(self) -> list[PlannedRun] | None:
        """Judge the trials in progress, and return the runs of those that begin. None once all trials are over, or if other
        processes work on those that are left."""
        if time.monotonic() - self.looked < LOOK_SECONDS:
            return []
        self.looked = time.monotonic()
        for trial in list(self.mine.values()):
            outcome = self._judge(trial)
            if outcome is not None:
                self.search.decide(trial.number, outcome)
                self.dropped |= {run.name: run for run in trial.all_runs() if run.name not in self.finished}
                trial.lock.release()
                del self.mine[trial.number]
                self.live.say(describe(trial.number, outcome))
        self.search.publish()
        over, begun = len(self.search.trials()), []
        window = range(over, min(over + self.search.settings.concurrent_trials, self.total))
        for number in window:
            if len(self.mine) < self.at_once and number not in self.mine and not self.search.outcome_path(number).exists():
                trial = self._claim(number)
                begun += trial.all_runs() if trial else []
        if not self.mine and window.stop == self.total:  # none can be begun here, now or later
            return None
        return begun

    def _claim(self, number: int) -> Trial | None:
        """Begin the trial, or continue what another process has left of it. None if another process works on it."""
        path = self.search.outcome_path(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = folder.claim(path.parent)
        except UsageError:
            return None
        if path.exists():  # decided in the meantime
            lock.release()
            return None
        params = self.search.params(number)
        if said := self._refused(params):
            self.search.decide(number, Outcome("failed", None, params, {}, {}, 0.0, f"{REFUSED}{said}"))
            lock.release()
            self.looked = -LOOK_SECONDS
            return None
        runs = runs_of(self.search, self.args_type, number, params)
        trial = self.mine[number] = Trial(number, params, runs, lock)
        with self.search.lock():
            write_plan(self.search.logdir, trial.all_runs())
        self.live.say(f"trial {number} of {self.total}: {' '.join(as_words(params, self.args_type))}")
        return trial

    def _refused(self, params: Params) -> str:
        """Return why the script does not accept these values; "" if it does."""
        asked = self.search.settings
        for env_id in asked.env_ids:
            args = parse_flags(self.args_type, [f"--env-id={env_id}", *asked.flags, *as_words(params, self.args_type)])
            if said := refusal(args):
                return f"{env_id}: {said}"
        return ""

    def _judge(self, trial: Trial) -> Outcome | None:
        """Return how the trial ended; None if it goes on."""
        runs = trial.all_runs()
        whole = all(run.name in self.finished for run in runs)
        prunes = self.search.settings.pruner != "none"
        rungs = self._rungs(trial) if prunes else {run.name: 0 for run in runs}
        reached = min(rungs.values())
        # judged in the order of rungs: a trial that is pruned before a run fails is pruned even if the failure is known first
        reason = next((self.failed[name] for name, rung in rungs.items() if name in self.failed and rung == reached), "")
        steps, pruned, attrs = {}, False, {}
        if prunes:
            for rung in range(1, min(reached + 1, self._last_rung())):
                place = trial.number, rung
                if place not in self.values:  # the logs of long runs are large
                    self.values[place] = self._value(trial, rung)
                value = self.values[place]
                if value is not None:
                    steps[rung] = value
                    pruned, attrs = self.search.is_pruned(trial.number, steps)
                if pruned:
                    break
        if not (reason or pruned or whole):
            return None
        seconds = sum(state_of(self.search.logdir, run).elapsed for run in runs)
        ended = {env_id: of for env_id, of in trial.runs.items() if all(run.name in self.finished for run in of)}
        known = {env_id: found for env_id, of in ended.items() if (found := self._score(of)) is not None}
        silent = next((of for env_id, of in ended.items() if env_id not in known), None)
        if not (pruned or reason) and silent is not None:
            readings = [read_folder(self.search.logdir / run.name, OF_EPISODES[0]) for run in silent]
            said = [problem for _, problems in readings for problem in problems]
            reason = [*said[-1:], f"{silent[0].env_id}: no episode ended"][0].removesuffix(LEFT_OUT)
        rest = trial.params, known, steps, round(seconds, 1)
        if pruned:
            last = max(steps)
            return Outcome("pruned", steps[last], *rest, f"after {last} of {self._last_rung()} {self._unit()}", False, attrs)
        if reason:
            return Outcome("failed", None, *rest, reason, "not finite" in reason)
        return Outcome("complete", self._mean(known), *rest, "", False, attrs)

    def _mean(self, scores: dict[str, float]) -> float:
        """Return the mean over environments of the scaled scores."""
        ends = self.search.settings.scale
        return sum((s - ends[e][0]) / (ends[e][1] - ends[e][0]) for e, s in scores.items()) / len(scores)

    def _score(self, runs: list[PlannedRun], share: float = 1.0) -> float | None:
        """Return the score of an environment; None if no episode ended, or if rows of its metrics are lost."""
        readings = [read_folder(self.search.logdir / run.name, OF_EPISODES[0]) for run in runs]
        lost = any(run is None or problems or run.reached < share * run.planned for run, problems in readings)
        return None if lost else score([run for run, _ in readings], share)

    def _unit(self) -> str:
        return "environments" if self.search.settings.prune_on == "games" else "quarters of the steps"

    def _last_rung(self) -> int:
        return len(self.search.settings.env_ids) if self.search.settings.prune_on == "games" else RUNGS

    def _rungs(self, trial: Trial) -> dict[str, int]:
        """Return the rung that each run has reached, by its name; the trial has reached the lowest of them. A rung is a quarter
        of the steps, or an environment: its unfinished runs are at the rung before it, and finished ones at the last rung."""
        if self.search.settings.prune_on == "steps":
            return {run.name: state_of(self.search.logdir, run).step * RUNGS // run.steps for run in trial.all_runs()}
        last = self._last_rung()
        places = [(rung, run.name) for rung, runs in enumerate(trial.runs.values()) for run in runs]
        return {name: last if name in self.finished else rung for rung, name in places}

    def _value(self, trial: Trial, rung: int) -> float | None:
        """Return the trial's value at a rung; None if no episode has ended in one of the environments."""
        by_game, asked = self.search.settings.prune_on == "games", list(trial.runs)
        chosen, share = (asked[:rung], 1.0) if by_game else (asked, rung / RUNGS)
        scores = {env_id: self._score(trial.runs[env_id], share) for env_id in chosen}
        return None if None in scores.values() else self._mean(scores)

    def summary(self, runs: list[PlannedRun], states: dict[str, Progress], together: int) -> str:
        """Return one line: trials that are over and in progress, and the time left at the speed so far."""
        trials = self.search.trials()
        over = sum(trial.number < self.total for trial in trials)
        line = f"{over} of {self.total} trials are over, {len(self.mine)} in progress"
        took = [trial.user_attrs["seconds"] for trial in trials]
        here = [run for trial in self.mine.values() for run in trial.all_runs()]
        left = seconds_left(here, states, rates(runs, states))
        if took and left is not None:
            left += sum(took) / len(took) * (self.total - over - len(self.mine))
            line += f"; about {left / together / 3600:.1f} hours left"
        return line


def is_of_trial(run: PlannedRun) -> bool:
    """Return True if the run is one of a search, and not of another study in the same folder."""
    return run.name.partition("__")[0].isdecimal()


def number_of(run: PlannedRun) -> int:
    """Return the number of a run's trial, with which its name begins."""
    return int(run.name.partition("__")[0])


def describe(number: int, outcome: Outcome) -> str:
    """Return a line that says how the trial ended."""
    scores = ", ".join(f"{env_id} {value:.3g}" for env_id, value in outcome.scores.items())
    value = f" {outcome.value:.3f} ({scores})" if outcome.value is not None and scores else ""
    what = "diverged" if outcome.diverged else outcome.state
    return f"trial {number}: {what}{value}{f': {outcome.reason}' if outcome.reason else ''}"
