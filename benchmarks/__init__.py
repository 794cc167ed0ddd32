"""Speed of the CPU backend, as ratios to other implementations and to the machine's peak."""
