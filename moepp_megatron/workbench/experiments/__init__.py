"""Sets of runs that can be interrupted and go on: the pilot and the scaling test."""
