"""Parts of a run that are no features in folders of their own (`features`).

order.py            makes the parts, in order
refused_batches.py  the numerical guard: refuses batches and acts on their cause
routing_counts.py   selections, losses and bytes of one step, over all ranks
"""
