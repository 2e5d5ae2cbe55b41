"""Router health (`observe.health_interval`).

settings.py  the interval
part.py  measures it from every rank's sums over logits
"""
