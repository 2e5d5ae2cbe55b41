"""What the routing guard (`training.parts.routing_guard`) reads, does and reports.

actions.py   what is done to routers: tau, weights from before, FFN experts only
alerts.py    alerts of actions that begin or end
fallen.py    classes of tokens whose FFN experts a router has taken away
readings.py  the numbers of one step that rules may look at
"""
