"""The routing guard: reads the routers after every step, judges rules, acts, raises alerts."""
