"""The routing guard (`routing_guard`): judges routers and data in every step, and acts.

part.py      judges the rules of a step and does what follows
shift.py     shifts of the data, of routing and of the loss, judged in every step
alerts.py    alerts of rules that begin or end, and of what changes
copies.py    the routers' weights of the newest healthy step
rules.py     the rules of a run, complete, with remedies
settings.py  section `routing_guard`, its default rules and metrics
readings.py  the numbers of one step that rules may look at
"""
