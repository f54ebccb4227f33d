"""Measures of latents and world models. A measure is None if the data do not determine it."""

import numpy as np
from jaxtyping import Bool, Float, Num

SILENT = 0.025  # fraction of the mean activity of all units
RIDGES = 10.0 ** np.arange(-4, 3)  # ridge coefficients, in units of the mean variance of the latents' elements
SIDE = 12  # size of an image that the probe predicts


def effective_rank(z: Float[np.ndarray, "N d"]) -> float | None:
    """Return exp of the entropy of the singular values of the centered latents, normalized to sum 1 (Roy & Vetterli, 2007):
    d if all directions are used equally, 1 if only one is used."""
    values = np.linalg.svd(centered(z), compute_uv=False)
    values = values[values > 1e-6 * np.linalg.norm(z)]  # smaller values are rounding errors
    shares = values / values.sum()
    return float(np.exp(-np.sum(shares * np.log(shares)))) if len(values) else None


def dormant_share(z: Float[np.ndarray, "N *z"]) -> float | None:
    """Return the fraction of units with at most `SILENT` times the mean activity of all units (Sokar et al., 2023, def. 3.1).
    Units are the channels of a map [h, w, c], with positions as samples, or the classes of a categorical latent."""
    axes = (0, 1, 2) if z.ndim == 4 else (0,)
    activity = np.abs(z).mean(axes, dtype=np.float64)
    return float(np.mean(activity <= SILENT * activity.mean())) if activity.any() else None


def explained(error: Float[np.ndarray, "N *k"], whole: Float[np.ndarray, "N *k"]) -> float | None:
    """Return 1 - (sum of squares of `error`) / (sum of squares of `whole`)."""
    total = np.sum(whole.astype(np.float64) ** 2)
    return 1.0 - float(np.sum(error.astype(np.float64) ** 2) / total) if total > 0 else None


def centered(x: Float[np.ndarray, "N *k"]) -> Float[np.ndarray, "N *k"]:
    """Return x minus its mean, or exactly 0 if the difference is only rounding."""
    x = x.astype(np.float64)
    deviation = x - x.mean(0)
    return deviation if np.any(np.abs(deviation) > 1e-9 * np.abs(x).max()) else 0.0 * x


def probe(z: Float[np.ndarray, "N d"], y: Float[np.ndarray, "N k"], group: Num[np.ndarray, " N"]) -> float | None:
    """Return the fraction of the variance of y that a ridge regression on z explains. One third of the groups is used to fit
    it, one to select the best of `RIDGES`, and one to measure the result."""
    fit, choose, test = (group % 3 == k for k in range(3))
    z, y = z.astype(np.float64), y.astype(np.float64)
    mean_z, mean_y = z[fit].mean(0), y[fit].mean(0)
    z, y = z - mean_z, y - mean_y
    values, vectors = np.linalg.eigh(z[fit].T @ z[fit])
    unit = max(values.mean(), 1e-12)
    target = vectors.T @ (z[fit].T @ y[fit])
    errors = {}
    for ridge in RIDGES:
        weights = vectors @ (target / (values + ridge * unit)[:, None])
        errors[ridge] = [y[part] - z[part] @ weights for part in (choose, test)]
    best = min(RIDGES, key=lambda ridge: np.sum(errors[ridge][0] ** 2))
    return explained(errors[best][1], centered(y[test]))


def readable(obs: Num[np.ndarray, "N *obs"]) -> Float[np.ndarray, "N k"]:
    """Return the target of the probe: the observation, or the newest image of a stack, averaged to `SIDE` x `SIDE`."""
    if obs.ndim == 4 and obs.dtype == np.uint8 and not (obs.shape[-1] % SIDE or obs.shape[-2] % SIDE):
        height, width = obs.shape[-2] // SIDE, obs.shape[-1] // SIDE
        obs = obs[:, -1].reshape(-1, SIDE, height, SIDE, width).mean((2, 4)) / 255.0
    return obs.reshape(len(obs), -1).astype(np.float32)


def of_latents(
    valid: Bool[np.ndarray, "T B"], z: Float[np.ndarray, "T+1 B *z"], obs: Num[np.ndarray, "T+1 B *obs"]
) -> dict[str, float | None]:
    """Measure the latents at the valid steps of a rollout: effective rank, dormant fraction, probe, and their mean squared
    change in one step, divided by their variance."""
    group = np.broadcast_to(np.arange(valid.shape[1]), valid.shape)[valid]
    now, after = z[:-1][valid], z[1:][valid]
    flat, variance = now.reshape(len(now), -1), np.sum(centered(now) ** 2)
    return {
        "effective_rank": effective_rank(flat),
        "dormant": dormant_share(now),
        "probe": probe(flat, readable(obs[:-1][valid]), group),
        "moves": float(np.sum((after - now).astype(np.float64) ** 2) / variance) if variance > 0 else None,
    }


def of_predictions(
    now: Float[np.ndarray, "N *z"],
    after: Float[np.ndarray, "N *z"],
    mean: Float[np.ndarray, "N *z"],
    sample: Float[np.ndarray, "N *z"],
    reward: Float[np.ndarray, " N"],
    predicted_reward: Float[np.ndarray, " N"],
) -> dict[str, float | None]:
    """Measure a world model that predicts, from the latents `now`, a mean and a sample of the next latents, and rewards."""
    certain = explained(sample - mean, sample - after)
    return {
        "transition_skill": explained(mean - after, now - after),
        "noise": None if certain is None else 1.0 - certain,
        "reward_r2": explained(predicted_reward - reward, centered(reward)),
    }
