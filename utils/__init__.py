"""What is the same in every script and the point of none: losses, distributions, and in folders runs, guarantees, dreams.

Imports go one way: networks may import utils, utils never networks.
"""
