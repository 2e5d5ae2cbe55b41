"""Multi-token prediction, MTP (`model.mtp_num_layers`).

settings.py  `model.mtp_num_layers`, `model.mtp_loss_scaling_factor`
part.py      its loss in the record of a step
"""
