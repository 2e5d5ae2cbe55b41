"""Router health (`observe.health_interval`).

part.py  measures it from every rank's sums over logits
"""
