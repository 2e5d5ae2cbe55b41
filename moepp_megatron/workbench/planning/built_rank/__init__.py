"""Builds any rank of a large layout on one machine and compares it with the plan."""
