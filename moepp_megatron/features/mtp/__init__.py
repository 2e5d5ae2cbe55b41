"""Multi-token prediction, MTP (`model.mtp_num_layers`).

part.py  its loss in the record of a step
"""
