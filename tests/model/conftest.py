"""Every test of this folder runs on LeRobot's own class and on ours, unless it is marked otherwise."""

from support.both_origins import *  # noqa: F403
