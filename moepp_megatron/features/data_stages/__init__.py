"""Data that change while a run trains (`data.stages`).

part.py  which data a run is drawing from, and when others follow
"""
