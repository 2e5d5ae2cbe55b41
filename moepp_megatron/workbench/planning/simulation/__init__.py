"""One training step played out pass by pass, with uneven load, contention, slow nodes, failures."""
