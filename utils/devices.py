"""Several devices in one process (`--num-devices`).

Arrays are split over them along their first axis, of environments or of a minibatch. The programs are those for one device, and
XLA divides the work: what is a mean, a sum, or a decision there is one over all of it, and what is drawn is the same.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from envs.protocol import DEVICES


def use_devices(num_devices: int, among: Sequence[jax.Device] | None = None) -> AbstractContextManager:
    """Has this thread compute on so many from now on, the first of all (or of `among`); one is used in any case. In a `with`
    statement, until its end."""
    if num_devices == 1:
        return nullcontext()
    devices = (among or jax.devices())[:num_devices]
    return jax.set_mesh(jax.make_mesh((num_devices,), (DEVICES,), axis_types=(AxisType.Auto,), devices=devices))


def on_one_device() -> AbstractContextManager:
    """In which the first device is used alone: what is played for a film is neither split nor done on each."""
    return jax.set_mesh(None)


def by_device(batch: Any) -> Any:
    """Arrays, each split along its first axis into equal parts, one on each device. (A minibatch's steps come from all devices:
    unless it is split, or the indices of its steps are, each device computes everything.)"""
    if jax.sharding.get_abstract_mesh().empty:
        return batch
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P(DEVICES)), batch)


def on_each_device(batch: Any) -> Any:
    """Arrays, all of each on every device: what minibatches are made of is sent around once, and not for each of them."""
    if jax.sharding.get_abstract_mesh().empty:
        return batch
    # without the barrier XLA may keep an array split after all, and gather it for each minibatch
    return jax.lax.optimization_barrier(jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), batch))


def distribute(state: Any) -> Any:
    """A script's state, put where it belongs."""
    if jax.sharding.get_mesh().empty:
        # what a checkpoint has is loaded to a device, and a program is compiled anew for what is on none yet
        return jax.device_put(state, jax.devices()[0])
    return jax.tree.map(jax.device_put, state, placement(state))


def placement(state: Any) -> Any:
    """Where each array of a script's state belongs: what is of environments is split over the devices, all else is on each."""
    of_envs = {name: getattr(state, name) for name in ("env_state", "obs", "replay") if hasattr(state, name)}
    everywhere = state._replace(**dict.fromkeys(of_envs))
    mesh = jax.sharding.get_mesh()
    everywhere = jax.tree.map(lambda x: NamedSharding(mesh, P()), everywhere)
    return everywhere._replace(**jax.tree.map(lambda x: NamedSharding(mesh, of_environments(x)), of_envs))


def of_environments(x: Any) -> P:
    """How an array of environments is split; one without axes is on each device."""
    return P(DEVICES) if x.ndim else P()


def make_split(make: Callable[[], Any]) -> Any:
    """What a function returns, made where `distribute` would put it: what all devices together have room for, one may not."""
    if jax.sharding.get_abstract_mesh().empty:
        return make()
    constrain = lambda x: jax.lax.with_sharding_constraint(x, of_environments(x))  # noqa: E731
    return jax.jit(lambda: jax.tree.map(constrain, make()))()
