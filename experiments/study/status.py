"""Print the progress of a study on the terminal."""

import shutil
import sys
import time
from pathlib import Path

from tqdm import tqdm

from experiments.study.plan import PlannedRun, Progress, rates, seconds_left, state_of

REDRAWN_SECONDS = 2.0  # between updates on a terminal
PLAIN_SECONDS = 60.0  # between updates if the output is not a terminal
KINDS = ("finished", "running", "stopped", "failed", "left")


class Progresses:
    """The progress of all runs; finished runs are read only once."""

    def __init__(self, logdir: Path, runs: list[PlannedRun]):
        self.logdir, self.runs, self.states = logdir, runs, {}
        self.read()

    def read(self) -> dict[str, Progress]:
        """Return the progress of each run, by name."""
        for run in self.runs:
            if run.name not in self.states or self.states[run.name].kind != "finished":
                self.states[run.name] = state_of(self.logdir, run)
        return self.states


def summary(runs: list[PlannedRun], states: dict[str, Progress], together: int | None = None) -> str:
    """Return one line: the number of runs in each state, and the time left with `together` runs at once (default: as now)."""
    count = {kind: sum(states[run.name].kind == kind for run in runs) for kind in KINDS}
    line = f"{count['finished']} of {len(runs)} runs finished, " + ", ".join(f"{count[k]} {k}" for k in KINDS[1:])
    together = together or count["running"]
    left = seconds_left(runs, states, rates(runs, states))
    if left and together:
        line += f"; about {tqdm.format_interval(int(left / min(together, len(runs) - count['finished'])))} left"
    return line


def running(runs: list[PlannedRun], states: dict[str, Progress]) -> list[str]:
    """Return one line for each running run."""
    lines = []
    for run in runs:
        state = states[run.name]
        if state.kind == "running":
            rate = f"{state.step / state.elapsed:,.0f} steps/s" if state.elapsed else "compiling"
            reached = "" if state.episodic_return is None else f", return {state.episodic_return:.1f}"
            lines.append(f"  {state.step / run.steps:4.0%}  {run.name}  {rate}{reached}")
    return lines


def table(runs: list[PlannedRun], states: dict[str, Progress]) -> list[str]:
    """Return a table of finished/all seeds per environment and script, with the numbers of running (+) and failed runs."""
    scripts, env_ids = list(dict.fromkeys(run.script for run in runs)), list(dict.fromkeys(run.env_id for run in runs))

    def cell(env_id, script):
        of = [states[run.name] for run in runs if (run.env_id, run.script) == (env_id, script)]
        done = sum(state.kind == "finished" for state in of)
        at_work, failed = (sum(state.kind == kind for state in of) for kind in ("running", "failed"))
        return f"{done}/{len(of)}" + f" +{at_work}" * (at_work > 0) + f" {failed} FAILED" * (failed > 0) if of else "-"

    rows = [["", *scripts], *([env_id, *(cell(env_id, script) for script in scripts)] for env_id in env_ids)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def failures(runs: list[PlannedRun], states: dict[str, Progress]) -> list[str]:
    """Return one line for each failed run, with its error."""
    return [f"failed: {run.name}: {states[run.name].error}" for run in runs if states[run.name].kind == "failed"]


class Live:
    """Status lines: updated in place below other output on a terminal, printed less often elsewhere."""

    def __init__(self):
        self.interactive, self.drawn, self.last = sys.stdout.isatty(), 0, -PLAIN_SECONDS

    def due(self) -> bool:
        """Return True if it is time for an update."""
        return time.monotonic() - self.last >= (REDRAWN_SECONDS if self.interactive else PLAIN_SECONDS)

    def say(self, line: str) -> None:
        """Print a permanent line."""
        self._erase()
        print(line, flush=True)

    def show(self, lines: list[str]) -> None:
        """Show the status lines in place of the previous ones."""
        self.last = time.monotonic()
        self._erase()
        if self.interactive:
            width, height = shutil.get_terminal_size()
            lines = [line[: width - 1] for line in lines[: height - 2]]
            self.drawn = len(lines)
        print("\n".join(lines), flush=True)

    def _erase(self) -> None:
        if self.drawn:
            print(f"\x1b[{self.drawn}F\x1b[J", end="")
            self.drawn = 0
