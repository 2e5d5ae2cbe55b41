"""Instruments around the engine; a run needs none of them to train.

The engine (every other room of the package but `cli`) imports nothing from here. Rooms, from the
top down; each imports only rooms below it:

    experiments/  resumable sets of runs: pilot/ (does MoE++ pay?) and scaling/, each with its page
    report/       pages, plots and tables; live/ is `moepp monitor`
    planning/     cost model, memory, search over layouts, published results
    inspection/   which experts the tokens of a text take
    bench/        times of a layer, a step, the dispatch and collectives
    profiling/    traces of a run: where the time goes, per kernel and per collective
    doctor/       whether this node is fit to train
"""
