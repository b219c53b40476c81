from support.both_origins import *  # noqa: F403
