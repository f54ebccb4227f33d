"""Code that all scripts share: losses, distributions, metrics, and packages for runs, guarantees, dreams and evaluation.

Modules in networks/ may import utils; modules in utils/ must not import networks.
"""
