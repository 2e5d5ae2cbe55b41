"""Device, CPU support, process groups, optional back ends, precision."""
