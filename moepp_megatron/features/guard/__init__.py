"""The routing guard (`routing_guard`): judges routers and data in every step, and acts.

part.py      judges the series and the rules of a step, acts and reports
alerts.py    the rules in effect, and their alerts with remedies
copies.py    the routers' weights of the newest healthy step
settings.py  section `routing_guard`, its default rules and metrics
"""
