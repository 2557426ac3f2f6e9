"""What both fuzzers' programs share."""

import argparse
import json
import random
import time


def main(name, doc, what, run):
    """Run a fuzzer for some seconds and print how its inputs ended; ``run(seed, until)`` returns a counter of that."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.fuzz.{name}", description=doc)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, which is printed")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    end = time.monotonic() + args.seconds
    ends = run(seed, lambda number: time.monotonic() > end)
    print(json.dumps({"seed": seed, "seconds": args.seconds, what: ends.total(), **ends}))
