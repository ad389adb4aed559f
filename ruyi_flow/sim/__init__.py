"""Virtual time: the product's own loop, policy and scheduler over measured costs and recorded answers."""
