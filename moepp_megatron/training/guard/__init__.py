"""What the routing guard (`training.parts.routing_guard`) reads, does and reports.

alerts.py    alerts of rules that begin or end, and of what changes
copies.py    the routers' weights of the newest healthy step
readings.py  the numbers of one step that rules may look at
"""
