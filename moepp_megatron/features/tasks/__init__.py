"""Evaluation by tasks of lm-eval while a model trains (`evaluation`).

settings.py       the section `evaluation`
part.py           answers lm-eval from the running model, on all ranks
check.py          refuses tasks that cannot be evaluated before a run starts
lm_eval_tasks.py  tasks from local files, and the model that lm-eval asks
"""
