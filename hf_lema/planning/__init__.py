"""What a step takes: bytes by name, a lower bound of its time, and the choices that fit a budget."""
