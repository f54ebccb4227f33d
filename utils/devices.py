"""Several devices in one process (`--num-devices`).

Arrays are split over the devices along their first axis: environments or minibatch elements. The programs are the same as for
one device, and XLA partitions them. Means, sums and decisions cover all devices, and random draws do not change.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from envs.protocol import DEVICES


def use_devices(num_devices: int, among: Sequence[jax.Device] | None = None) -> AbstractContextManager:
    """Compute on the first `num_devices` of all devices (or of `among`) in this thread from now on; in a `with` statement, only
    until its end. If `num_devices` is 1, only undo an earlier call."""
    if num_devices == 1:
        return nullcontext() if jax.sharding.get_mesh().empty else jax.set_mesh(None)
    devices = (among or jax.devices())[:num_devices]
    return jax.set_mesh(jax.make_mesh((num_devices,), (DEVICES,), axis_types=(AxisType.Auto,), devices=devices))


def on_one_device() -> AbstractContextManager:
    """Return a context that uses only the first device, for work that should be neither split nor repeated on each device."""
    return jax.set_mesh(None)


def by_device(batch: Any) -> Any:
    """Split arrays along their first axis into equal parts, one per device. Minibatches, or their indices, need this: they
    gather steps from all devices, so otherwise each device would compute the whole minibatch."""
    if jax.sharding.get_abstract_mesh().empty:
        return batch
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P(DEVICES)), batch)


def on_each_device(batch: Any) -> Any:
    """Copy arrays in full to every device, so that a rollout is sent once and not again for each minibatch."""
    if jax.sharding.get_abstract_mesh().empty:
        return batch
    # without the barrier, XLA may keep an array split and gather it for each minibatch
    return jax.lax.optimization_barrier(jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), batch))


def distribute(state: Any) -> Any:
    """Put a script's state on the devices; see `placement`."""
    if jax.sharding.get_mesh().empty:
        # arrays from a checkpoint are committed to a device; programs would be compiled again for uncommitted ones
        return jax.device_put(state, jax.devices()[0])
    return jax.tree.map(jax.device_put, state, placement(state))


def placement(state: Any) -> Any:
    """Return the sharding of each array of a script's state: split over the devices if per environment, else replicated."""
    of_envs = {name: getattr(state, name) for name in ("env_state", "obs", "replay") if hasattr(state, name)}
    everywhere = state._replace(**dict.fromkeys(of_envs))
    mesh = jax.sharding.get_mesh()
    everywhere = jax.tree.map(lambda x: NamedSharding(mesh, P()), everywhere)
    return everywhere._replace(**jax.tree.map(lambda x: NamedSharding(mesh, of_environments(x)), of_envs))


def of_environments(x: Any) -> P:
    """Return the partition of a per-environment array: split along its first axis; a scalar is replicated."""
    return P(DEVICES) if x.ndim else P()


def make_split(make: Callable[[], Any]) -> Any:
    """Return `make()`, with its arrays created where `distribute` would put them: one device may lack room for them all."""
    if jax.sharding.get_abstract_mesh().empty:
        return make()
    constrain = lambda x: jax.lax.with_sharding_constraint(x, of_environments(x))  # noqa: E731
    return jax.jit(lambda: jax.tree.map(constrain, make()))()
