"""Pure functions of the token position: the learning rate, and what a branch takes from its parent."""
