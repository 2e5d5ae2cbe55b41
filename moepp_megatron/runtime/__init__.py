"""Device, CPU support, process groups, optional back ends, launching ranks.

agent.py             torchrun that reports failures in one line, and to the other machines
atomic.py            files, lines and folders that appear whole or not at all
backends.py          the roles of optional packages; the implementation of each operation
cpu_support.py       lets unmodified megatron-core train on CPU ranks with gloo
disk.py              full disks: recognises failed writes, measures free space
distributed.py       process groups, small messages between CPUs of all ranks, a rank's GPU
fit.py               checks whether this machine can run a valid configuration; its FP8 support
gpu_state.py         the state of a GPU from NVML, as plain data
launch.py            starts this machine's ranks with torchrun and looks after them
nodes.py             the machines of a run: rendezvous addresses and timeouts
nvml.py              an open connection to NVML; the GPUs that CUDA shows
object_store.py      paths of objects in a store such as S3, and the errors of its client
optional.py          optional packages: which are usable, how to install one, which to silence
patches.py           every change that this package makes to another library's objects
printable.py         makes untrusted text safe for a terminal
rank.py              this rank, read from the launcher's environment
rank_environment.py  sets the environment variables with which every rank is started
stop_signals.py      passes requests to stop from a launcher to its ranks; ends orphans
terminal.py          the console for all output that may hold untrusted text
"""
