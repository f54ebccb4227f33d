"""World models, each in the file of its name: transition (z, action) -> distribution of z', reward (z, action) -> [N].

Another one is a file with a `Transition` and a `Reward`, and a line here.
"""

from networks.world_models import fc, lipschitz, softmoe, transformer, unconstrained

CONTINUOUS = {"lipschitz": lipschitz, "unconstrained": unconstrained}
CATEGORICAL = {"fc": fc, "transformer": transformer, "softmoe": softmoe}
