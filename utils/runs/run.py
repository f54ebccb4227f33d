"""A run: what a script does around its algorithm. It starts or goes on, logs, saves, and ends properly whatever happens.

    run = Run(args, "ppo", steps_per_iteration)
    env = make_env(args, run.iteration)
    ...
    with run:
        state = run.restore(init_state(...), env, agent)
        for _ in range(run.iteration, run.num_iterations):
            state, metrics = learn(*rollout(state))
            run.log(state, metrics)

The state may be donated to the next iteration as soon as it was logged.
"""

import os
import shlex
import shutil
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from utils.devices import distribute, on_one_device
from utils.evaluation.camera import Camera
from utils.histograms import statistics
from utils.runs import folder
from utils.runs.checkpoints import Checkpoints, Damaged, Trees, begin_writing, find, load, write_json
from utils.runs.flags import RunArgs, UsageError, own_defaults, require
from utils.runs.launch import NotFinite, RunIsFinished, describe_device, one_line
from utils.runs.logs import METRICS, Logger, cut_back, last_step
from utils.runs.signals import Interrupted, Signals
from utils.runs.stored_flags import check_continued, stretched, to_store
from utils.runs.wandb_run import WandbRun

BEFORE = ".before"  # ends the name of a record that nothing goes on from
REFILLED = "replay"  # a field of a script's state that only `--save-replay` saves


@jax.jit
def _all_finite(trees: list[Any]) -> jax.Array:
    numbers = [[x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)] for tree in trees]
    return jnp.array([jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in tree])) for tree in numbers])


def finite_parts(params: Any, opt_state: Any) -> tuple[list[str], jax.Array]:
    """The parameters of each network and the states of the optimizers, by name, and whether all numbers in each are finite."""
    names = [f"the parameters of {name}" for name in params._fields] + ["the optimizer's state"]
    return names, _all_finite([*params, opt_state])


track_params = jax.jit(lambda params: statistics(params, "params/"))


class Run:
    """One run of a script, new or continued.

    A context manager. On leaving it, whether the run ended, failed or was asked to stop, all is written, the terminal says what
    there is and how to go on, and W&B how it ended: once, and after the last thing that can fail.

    Args:
        args: flags.
        algorithm: part of a name that is not given.
        steps_per_iteration: environment steps of an update.

    Attributes:
        iteration: updates made so far.
        num_iterations: updates of the whole run.
        folder: its folder.

    Raises:
        UsageError: there is such a run and --resume does not say to continue it; it cannot be continued with these flags, or by
            this code; another process is at work on it.
        RunIsFinished: nothing is left to do.
    """

    def __init__(self, args: RunArgs, algorithm: str, steps_per_iteration: int):
        self.args, self.algorithm, self.steps_per_iteration = args, algorithm, steps_per_iteration
        self.num_iterations = args.total_timesteps // steps_per_iteration
        self.saves_replay = getattr(args, "save_replay", False)  # not every script has a buffer
        self.iteration, self.saved, self.damaged, self.said = 0, None, {}, []
        self.lock, self.made, self.complete, self.camera = None, False, False, None
        self.folder, named = folder.locate(args, algorithm)
        self.checkpoints = Checkpoints(self.folder / folder.CHECKPOINTS, args.keep_checkpoints)
        self.new = folder.is_new(self.folder) or (args.resume == "never" and args.run_name is None)
        if not self.new:
            require(
                args.resume != "never",
                f"--run-name {args.run_name}: {self.folder} exists already; --resume auto continues it, or choose another name",
            )
            try:
                self._find(named)
            except BaseException:
                if self.lock is not None:
                    self.lock.release()
                raise

    def _find(self, named: Path | None) -> None:
        """Where the run stands, and whether it may go on."""
        is_run = (self.folder / folder.RECORD).exists() or self.checkpoints.folder.exists()
        require(is_run, f"{self.folder}: is no run's folder, and not empty; choose another --run-name")
        self.lock = folder.claim(self.folder)
        if named is None:
            self.saved, self.damaged = self.checkpoints.newest()
            self.said += [
                f"*** the checkpoint {path} is damaged ({what}): the one before it is used ***"
                for path, what in self.damaged.items()
            ]
        else:
            later = [path.name for path in self.checkpoints.steps().values() if int(path.name) > int(named.name)]
            require(not later, f"--resume {named}: the run has later checkpoints ({', '.join(later)}): move them away first")
            try:
                self.saved = find(named)
            except Damaged as error:
                raise UsageError(f"--resume {named}: is damaged ({error}); name the run's folder to use another") from None
        self.record = folder.read_record(self.folder)
        if self.record is None:
            what = f"{self.folder / folder.RECORD} is missing or damaged"
            require(self.saved is not None, f"{what}, and there is no checkpoint; choose another --run-name")
            self.record = {name: self.saved.progress[name] for name in folder.IDENTITY} | {"sittings": []}
            self.said.append(f"*** {what}: it is made anew from the checkpoint ***")
        stored = self.saved.progress if self.saved else self.record
        check_continued(self.args, stored["flags"], f"the run {self.record['name']}")
        done = self.record.get("finished_at", 0)
        if self.saved:
            self.iteration = stored["iteration"]
            done = max(done, stored["step"])
        if done >= self.num_iterations * self.steps_per_iteration:
            if self.record.get("finished_at", 0) < done:  # it died between its last checkpoint and its end
                write_json(self.folder / folder.RECORD, self.record | {"finished_at": done})
            raise RunIsFinished(f"{self.folder}: finished, after {done:,} steps")
        if self.saved is None:
            gone = done or self.record["flags"].get("keep_checkpoints") == 0
            require(not gone, f"{self.folder}: has no checkpoint to go on from; choose another --run-name")
            self.said.append(f"there is no checkpoint yet: the run starts anew ({METRICS} of before becomes {METRICS}{BEFORE})")
        else:
            self.said += [line for line in (stretched(self.args, stored["flags"], stored["step"]),) if line]
            now, before = folder.versions(), stored["versions"]
            both = [name for name in now if name in before]  # an extra may have come since, or have gone
            changed = [f"{name} {before[name]} -> {now[name]}" for name in both if before[name] != now[name]]
            if (devices := stored["flags"].get("num_devices", 1)) != self.args.num_devices:
                changed.append(f"devices {devices} -> {self.args.num_devices}")
            if changed:
                self.said.append(f"*** not as before: {', '.join(changed)}: the results may not be the same to the bit ***")

    def __enter__(self) -> "Run":
        self.signals = Signals()
        self.signals.raise_at_once()
        self.wandb, self.logger, self.logged = None, None, False
        self.busy = threading.Lock()  # held where the main thread writes
        try:
            self._begin()
        except BaseException:
            if self.wandb is not None:
                self.wandb.finish(1)
            if self.made:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.signals.restore()
            raise
        return self

    def _begin(self) -> None:
        if self.new:
            self._make_folder()
        name, flags = self.record["name"], to_store(self.args)
        step = self.iteration * self.steps_per_iteration
        known = self.record.get("wandb")
        if known and self.record["flags"]["track"]:
            known["logged_to"] = max(known["logged_to"], last_step(self.folder))
        self.record["flags"] = flags
        self.record["sittings"].append(folder.describe_sitting(step))
        write_json(self.folder / folder.RECORD, self.record)
        self.checkpoints.clean(self.damaged)
        if self.saved is None and not self.new and (self.folder / METRICS).exists():
            os.replace(self.folder / METRICS, self.folder / (METRICS + BEFORE))
        rows = cut_back(self.folder, step)
        if rows < self.iteration:
            self.said.append(f"*** {self.folder / METRICS} lacks {self.iteration - rows} rows of the past ***")
        progress = self.saved.progress["log"] if self.saved else None
        self.logger = Logger(self.args, self.folder, self.steps_per_iteration, self.iteration, progress, self.new)
        self.logger.describe(flags)
        if self.args.track:
            sitting = self.record["sittings"][-1]
            about = {name: self.record[name] for name in ("algorithm", "script")}
            about |= {name: sitting[name] for name in ("device", "git_commit", "git_dirty", "versions")}
            self.wandb = self.logger.wandb = WandbRun(self.args, name, about | flags, known, self.logger.say)
            self.record["wandb"] = self.wandb.identity()
            write_json(self.folder / folder.RECORD, self.record)
        own = own_defaults(self.args)
        if own:
            self.said.append(f"defaults of environments like {self.args.env_id}: {', '.join(own)}")
        for line in self.said:
            print(line)
        left = self.num_iterations - self.iteration
        goes_on = f" goes on from step {step:,}" if self.saved else ""
        steps = self.num_iterations * self.steps_per_iteration
        print(f"{name}{goes_on}: {steps - step:,} steps in {left:,} updates\n{describe_device()}\ncompiling ...", flush=True)
        self.logger.start()
        self.next_save = time.monotonic() + self.args.save_every
        self.signals.watch(self._first_signal)

    def _make_folder(self) -> None:
        named = self.args.run_name is not None or self.args.resume != "never"
        try:
            self.folder.mkdir(parents=True, exist_ok=named)
        except FileExistsError:  # a run of the same flags that started in the same second
            require(not named, f"--run-name {self.args.run_name}: {self.folder} is no folder; choose another name")
            self.folder = self.folder.with_name(f"{self.folder.name}_{os.getpid()}")
            self.folder.mkdir()
            self.checkpoints.folder = self.folder / folder.CHECKPOINTS
        self.lock = folder.claim(self.folder)
        if not folder.is_new(self.folder):
            raise UsageError(f"{self.folder}: another run has just made it; choose another --run-name, or type this once more")
        self.made = True
        folder.clear(self.folder)
        self.record = folder.describe_run(self.args, self.algorithm, self.folder.name) | {"sittings": []}

    def _first_signal(self, signum: int) -> None:
        """In the thread that reads signals."""
        if self.busy.acquire(blocking=False):
            if self._nothing_to_lose():  # then neither compilation nor prefill is waited for
                self._leave_at_once(signum)
            self.busy.release()
        self.logger.say("stopping after this update ... (once more: at once)")

    def _nothing_to_lose(self) -> bool:
        return not self.logger.learned and not self.saves_replay

    def _leave_at_once(self, signum: int) -> NoReturn:
        """Closes what is open and ends the process: the main thread may be in the middle of anything but writing."""
        try:
            self.logger.say("stopped before an update that could be saved")
            self.logger.events.close()
            if self.wandb is not None:
                self.wandb.finish(128 + signum)
            if self.made and not self.logged:
                shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            os._exit(128 + signum)

    def __exit__(self, kind, error, traceback) -> None:
        failure = error

        def attempt(action, *args):  # all that follows is tried, whatever fails; what failed first is what is raised
            nonlocal failure
            try:
                return action(*args)
            except BaseException as raised:
                if failure is None or isinstance(failure, KeyboardInterrupt):
                    failure = raised

        with self.busy:
            attempt(self.logger.flush)
            # an iteration may still be running, and the environments that it steps must not be freed before it ends
            attempt(jax.effects_barrier)
            attempt(self.checkpoints.wait)
            attempt(self.logger.bar.close)
            attempt(self.logger.metrics.close)
            attempt(self.logger.events.close)
            ended = failure is None and self.iteration == self.num_iterations
            if ended and self.complete:
                self.record["finished_at"] = self.logger.step
            if self.wandb is not None:
                self.record["wandb"] = self.wandb.identity()
            attempt(write_json, self.folder / folder.RECORD, self.record)
            if self.wandb is not None:
                code = 128 + failure.signum if isinstance(failure, Interrupted) else int(failure is not None)
                attempt(self.wandb.finish, code)
            self._say_what_there_is(failure, ended)
            self.signals.restore()
            if self.lock is not None:
                self.lock.release()
        if failure is not error:
            raise failure

    def _say_what_there_is(self, failure: BaseException | None, ended: bool) -> None:
        print(f"{'ended' if failure is None else 'stopped'} after {self.logger.step:,} steps")
        logdir = shlex.quote(str(self.folder.parent))
        print(f"logs: {self.folder}   (uv run tensorboard --logdir {logdir})", flush=True)
        if ended and self.complete and self.args.save_model:
            print(f"model: {self.folder / folder.MODEL}", flush=True)
        if not ended and self.args.keep_checkpoints:
            last = max(self.checkpoints.steps(), default=None)
            if last is not None:
                print(f"to go on from step {last:,}: {folder.command_to_resume(self.args, self.folder)}", flush=True)

    def restore(self, state: Any, env: Any, agent: Any = None) -> Any:
        """The state to go on from: the given one, of a run that starts, with what the checkpoint holds in its place.

        Args:
            state: a script's, with fields `params`, `opt_state`, `env_state`, `obs` and others.
            env: its environments; if they are not `saveable`, they start anew.
            agent: its networks, which `--capture-video` plays with.

        Raises:
            UsageError: the checkpoint is not of this code.
        """
        if self.args.capture_video:
            self.camera = Camera(self.args, agent, self.folder)
        self.left_out = {} if env.saveable else {"env_state": None, "obs": None}
        if hasattr(state, REFILLED) and not self.saves_replay:
            self.left_out[REFILLED] = None
        state = distribute(state)
        if self.saved is None:
            return state
        targets = self._split(state)
        for x in jax.tree.leaves(targets):
            x.delete()  # a buffer for replay has no room for a second one beside it; shape, type and place are still known
        try:
            loaded = load(self.saved, targets)
        except Damaged as error:
            raise UsageError(
                f"{self.saved.path}: cannot be read ({error}); move it away, and the one before it is used"
            ) from None
        if not env.saveable:
            self.logger.say("the environments start anew: there is no mean return before each of them has ended an episode")
        started = {name: getattr(state, name) for name in self.left_out}
        return loaded["rest"]._replace(params=loaded["params"], **started)

    def _split(self, state: Any) -> Trees:
        """What a checkpoint holds: the parameters, and the rest."""
        return {"params": state.params, "rest": state._replace(params=None, **self.left_out)}

    def log(self, state: Any, metrics: dict[str, jax.Array]) -> None:
        """Takes what the update just dispatched returns, and writes the metrics of the one before it. Saves when it is time,
        after the last update, and when a signal asks the run to stop. The state may be donated after this.

        Raises:
            NotFinite: the update before (or this one, if it was to be saved) has no finite results.
            Interrupted: a signal asked the run to stop.
            OSError: the log or the checkpoint could not be written.
        """
        with self.busy:
            self.checkpoints.check()
            if self.args.track_params and self.iteration % self.args.track_every == 0:
                metrics = metrics | track_params(state.params)
            self._check(self.logger.log(metrics, *finite_parts(state.params, state.opt_state)))
            self.logged = True
            self.iteration += 1
            last, stop = self.iteration == self.num_iterations, self.signals.received
            if last or stop or time.monotonic() >= self.next_save:
                good = self._check(self.logger.flush())
                if good and not self._nothing_to_lose():
                    self._save(state, last)
                    self.complete = last
                elif not good:
                    self.logger.say(f"*** not finite at step {self.logger.step:,}: nothing of it is saved ***")
                self.next_save = time.monotonic() + self.args.save_every
            if stop and not last:
                raise Interrupted(stop)
        step = self.iteration * self.steps_per_iteration
        if self.camera is not None and self.camera.is_due(step, self.steps_per_iteration, last):
            self._film(state.params, step)

    def _film(self, params: Any, step: int) -> None:
        try:
            with on_one_device():
                path, episodic_return = self.camera.take(jax.device_put(params, jax.devices()[0]), step)
        except Exception as error:  # of whatever kind: a film is not worth a run
            return self.logger.say(f"*** no video at step {step:,}: {one_line(error)} ***")
        self.logger.say(f"video: {path} (return {'-' if episodic_return is None else f'{episodic_return:g}'})")
        if self.wandb is not None:
            self.wandb.log_video(step, path)

    def _check(self, bad: list[str]) -> bool:
        """Whether the update that was written last has finite results; an error if it has not, and that is to stop the run."""
        if bad and self.args.stop_if_not_finite:
            self.checkpoints.wait()
            update, last = self.logger.step // self.steps_per_iteration, max(self.checkpoints.steps(), default=None)
            where = "there is no checkpoint before it" if last is None else f"the last checkpoint is of step {last:,}"
            command = folder.command_to_resume(self.args, self.folder, "--debug-nans")
            raise NotFinite(
                f"not finite in update {update:,} (step {self.logger.step:,}): {', '.join(bad)}; {where}; "
                f"try a lower --learning-rate, or look for the first NaN: {command}"
            )
        return not bad

    def _save(self, state: Any, last: bool) -> None:
        saves_model = last and self.args.save_model
        if not (self.args.keep_checkpoints or saves_model):
            return
        step = self.logger.step
        self.logger.to_disk()
        sitting = self.record["sittings"][-1]
        progress = {name: self.record[name] for name in folder.IDENTITY}
        progress |= {name: sitting[name] for name in ("versions", "git_commit", "git_dirty")}
        progress |= {"step": step, "iteration": self.iteration, "log": self.logger.progress()}
        trees = self._split(state)
        if saves_model:  # before the checkpoint that says that the run is finished
            self.checkpoints.wait()
            begin_writing(self.folder / folder.MODEL, {"params": trees["params"]}, progress)()
        self.checkpoints.save(step, trees, progress)
