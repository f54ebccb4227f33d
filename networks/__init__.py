"""Network modules that every script shares: encoder, heads, certified Lipschitz layers, world model."""
