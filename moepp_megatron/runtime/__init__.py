"""Device, CPU support, process groups, optional back ends, launching ranks.

agent.py             torchrun that reports a failure in one line per rank
agreement.py         small messages between the CPUs of all ranks
atomic.py            files, lines and folders that appear whole or not at all
backends.py          the roles of optional packages on this machine
compilers.py         checks for the compilers that a run needs at its start
cpu_support.py       lets unmodified megatron-core train on CPU ranks with gloo
disk.py              full disks: recognises failed writes, measures free space
distributed.py       creates process groups: the default group and Megatron's rank grid
fit.py               checks whether this machine can run a valid configuration
fp8.py               FP8 support of this machine: GPU, Transformer Engine and CUDA
install.py           the command that installs a missing package
kernel_choices.py    the implementation chosen for each fusible operation
launch.py            starts this machine's ranks with torchrun and looks after them
nodes.py             the machines of a run: rendezvous addresses and timeouts
object_store.py      paths of objects in a store such as S3, read and written as files are
optional.py          detection of usable optional packages
parent.py            ends a process together with the process that started it
patches.py           every change that this package makes to another library's objects
printable.py         makes untrusted text safe for a terminal
quiet.py             readies other libraries for their import: silent, without broken packages
rank.py              this rank, read from the launcher's environment
rank_gpu.py          the GPU that a rank computes on, and the CPU cores next to it
rank_environment.py  sets the environment variables with which every rank is started
stop_signals.py      passes requests to stop from a launcher to its ranks, past torchrun
store_errors.py      classifies the errors of an object store's client
terminal.py          the console for all output that may hold untrusted text
peer_failure.py      tells the other machines when one has failed for good
"""
