"""What `moepp profile` shows: a table in the terminal, a page with a timeline."""
