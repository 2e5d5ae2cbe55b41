"""The output of `moepp profile`: a table in the terminal, a page with a timeline."""
