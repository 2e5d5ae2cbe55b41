"""`python -m moepp_megatron`: the `moepp` command where its script is not on PATH."""

from moepp_megatron.cli.main import run

if __name__ == "__main__":
    run()
