"""Pure functions: sequence first, every one takes and returns its state."""
