"""Any rank of a large layout, built on one machine and held to what the plan says of it."""
