"""Network modules shared by all scripts: encoder, heads, certified Lipschitz layers, world models."""
