"""Jobs on clusters: batch scripts rendered from the configuration.

slurm_script.py  the batch script of a run on a Slurm cluster
"""
