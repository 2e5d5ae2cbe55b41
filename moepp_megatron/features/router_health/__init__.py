"""Router health (`observe.health_interval`).

settings.py  how often
part.py  measures it from every rank's sums over logits
"""
