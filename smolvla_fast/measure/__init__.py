"""Rounds, machine facts, charts and the console, shared by the commands."""
