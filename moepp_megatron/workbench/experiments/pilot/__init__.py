"""Pilot runs: does MoE++ pay on the user's own data, and how sure is that?"""
