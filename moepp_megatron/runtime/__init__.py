"""Device, CPU support, process groups, optional back ends, launching ranks.

agent.py             torchrun that reports a failure in one line per rank
agreement.py         small messages between the CPUs of all ranks
atomic.py            files, lines and folders that appear whole or not at all
backends.py          the roles of optional packages on this machine
compilers.py         whether this machine can compile what is compiled when a run starts
cpu_support.py       lets unmodified megatron-core train on CPU ranks with gloo
disk.py              full disks: what a failed write means, and how much space is free
distributed.py       creates process groups: the default group and Megatron's rank grid
fit.py               checks whether this machine can run a valid configuration
fp8.py               whether this machine can run FP8: the GPU, Transformer Engine and CUDA
install.py           the command that installs what is missing
kernel_choices.py    which implementation serves each operation that can be fused
launch.py            starts this machine's ranks with torchrun and looks after them
nodes.py             the machines of a run: how they find and wait for each other
object_store.py      paths of objects in a store such as S3, read and written as files are
optional.py          which optional packages are usable
parent.py            ends a process together with the process that started it
patches.py           every change that this package makes to another library's objects
printable.py         makes untrusted text safe for a terminal
quiet.py             readies other libraries for their import: silent, without broken packages
rank.py              what the launcher's environment says about this rank
rank_gpu.py          the GPU that a rank computes on, and the CPU cores next to it
rank_environment.py  sets the environment variables with which every rank is started
stop_signals.py      passes requests to stop from a launcher to its ranks, past torchrun
store_errors.py      what the errors of an object store's client mean
terminal.py          the console for all output that may hold untrusted text
peer_failure.py      what a machine leaves for the others when it has failed for good
"""
