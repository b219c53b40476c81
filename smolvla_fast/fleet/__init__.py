"""Many robots on one policy: LeRobot's policy server in front of Ray Serve (``smolvla-fast serve --fleet``)."""
