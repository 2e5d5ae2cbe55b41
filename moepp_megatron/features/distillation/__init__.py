"""Learning from a frozen teacher (`distillation`).

settings.py       the section `distillation`
part.py           the teacher's forward pass, and the loss that compares both models
teacher.py        finds, checks and builds the teacher
"""
