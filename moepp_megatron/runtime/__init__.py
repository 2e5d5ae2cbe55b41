"""Device, CPU support, process groups, optional back ends, launching ranks."""
