"""The routing guard (`routing_guard`): judges routers and data in every step, and acts.

part.py      judges the series and the rules of a step, acts and reports
alerts.py    alerts of rules that begin or end, and of shifts, with remedies
copies.py    the routers' weights of the newest healthy step
rules.py     the rules of a run, complete
settings.py  section `routing_guard`, its default rules and metrics
"""
