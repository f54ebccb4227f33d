"""What benchmarks/throughput.py times, as it is asked to."""

import pytest

from benchmarks.throughput import parse_setting
from utils.runs.flags import UsageError


def test_a_setting_is_typed_as_a_script_is():
    assert parse_setting("ppo", "Breakout-v5") == ("ppo", {"env_id": "Breakout-v5"})
    name, flags = parse_setting("dream_spi --overlap-rollout --fc-layers 8 --no-anneal-lr", "Pong-v5")
    assert name == "dream_spi"
    assert flags == {"env_id": "Pong-v5", "overlap_rollout": True, "fc_layers": (8,), "anneal_lr": False}
    for wrong in ("", "pqn", "--overlap-rollout"):
        with pytest.raises(UsageError, match="ppo, deep_mdp, deep_spi, dream_spi"):
            parse_setting(wrong, "Pong-v5")
    with pytest.raises(UsageError, match="leave --env-id out"):
        parse_setting("ppo --env-id Breakout-v5", "Pong-v5")
    with pytest.raises(UsageError, match="one device is timed; leave --num-devices out"):
        parse_setting("ppo --num-devices 4", "Pong-v5")
