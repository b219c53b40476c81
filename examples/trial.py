"""What a trial is and what it costs: a full-size policy under a LeRobot release that this version pretends not to know.

python examples/trial.py                        # about a minute on two CPU cores
python examples/trial.py --size tiny --precision exact
"""

from __future__ import annotations

import argparse
import time

import smolvla_fast
from smolvla_fast.patching import source_digests
from smolvla_fast.testing.policies import make_noise, make_observation, make_policy


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()
    source_digests.KNOWN.clear()  # as if nobody had read the release that is installed
    policy = make_policy(args.size)
    smolvla_fast.patch(policy, precision=args.precision)
    print(smolvla_fast.status(policy).last_fallback)
    given, noise = make_observation(policy), make_noise(policy)
    for what in ("stock, not patched", "the first call, a trial", "the second call", "the third call"):
        if what == "stock, not patched":
            smolvla_fast.unpatch(policy)
        started = time.perf_counter()
        policy.predict_action_chunk(dict(given), noise=noise)
        print(f"{what}: {time.perf_counter() - started:.2f} s")
        if what == "stock, not patched":
            smolvla_fast.patch(policy, precision=args.precision)
    for kind, verdict in smolvla_fast.status(policy).trials.items():
        print(f"{kind}: {verdict}")


if __name__ == "__main__":
    main()
