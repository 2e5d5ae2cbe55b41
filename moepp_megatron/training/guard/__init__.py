"""The routing guard: reads the routers after every step, judges rules, acts, raises alerts.

actions.py        carries the judge's decisions out in the routers: FFN demands, forced tokens, tau
alerts.py         alerts of the routing guard
control.py        the routing guard of a run: its readings, decisions, actions, alerts and state
fallen.py         classes of tokens whose FFN experts a router has taken away, and their ids
readings.py       the numbers of one step that rules may look at
router_copies.py  copies of the routers' weights from steps in which they were healthy
safe_mode.py      what the action safe_mode does: routers go back, or FFN experts alone
"""
