"""World models, each in the file of its name: transition (z, action) -> distribution of z', reward (z, action) -> [N].

Another one of categorical latents is a file with `Transition(num_actions, activation, temperature)` and `Reward(num_actions,
activation)`, and a line here.
"""

from networks.world_models import fc, softmoe, transformer

CATEGORICAL = {"fc": fc, "transformer": transformer, "softmoe": softmoe}
