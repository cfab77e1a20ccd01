"""Random runs of nets over devices in child processes: `python sync_stress.py [RUNS]`.

In each, steps with random delays, then something that goes wrong, then a right step or the end of
the process. A run that hangs, crashes or computes something wrong is reported.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

STATUS = {
    "delays": 0,
    "missing": 0,
    "exception": 0,
    "exit": 3,
    "raise": 1,
    "os_exit": 4,
    "sigterm": -signal.SIGTERM,
}
LIMIT = 120  # seconds, of a run that takes about five


def run(seed):
    """What a child does."""
    from scratchbn.sync import abandon

    import mxnet as mx
    from mxnet import autograd
    from sync_nets import FORMS, Pair

    rng = random.Random(seed)
    event = list(STATUS)[seed % len(STATUS)]
    sizes = [rng.randint(1, 3) for _ in range(rng.randint(2, 4))]
    pair = Pair(sizes, rng.choice(list(FORMS)), rng.choice([1, 1, 2]), seed)

    def step():
        order = rng.choice(["loop", "together", "reversed"])
        return pair.step(order, lambda i: time.sleep(rng.random() * 0.03))

    def steps():
        apart = max(step() for _ in range(rng.randint(1, 3)))
        if apart > 1e-10:
            raise AssertionError(f"{apart} from one device")

    def call_some():
        pair.wait(2)
        xs = pair.parts(pair.batch()[0])
        rng.shuffle(xs)
        with autograd.record():
            return [pair.loss(pair.shared, x, 1) for x in xs[: rng.randint(1, len(xs) - 1)]]

    steps()
    if event in ("missing", "exception"):
        ys = call_some()
        if event == "exception":
            abandon()
        try:
            rng.choice(ys).wait_to_read()
            raise AssertionError("no error")
        except mx.MXNetError as error:
            if "net_batchnorm" not in str(error):
                raise
        while True:
            try:
                mx.nd.waitall()
                break
            except mx.MXNetError:
                continue
        pair.wait(None)
        steps()
    elif event != "delays":
        ys = call_some()
        for y in ys[: rng.randint(0, len(ys))]:
            y.backward()
        time.sleep(rng.random() * 0.05)
        if event == "exit":
            sys.exit(3)
        elif event == "raise":
            raise RuntimeError("in the middle of a step")
        elif event == "os_exit":
            os._exit(4)
        else:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(LIMIT)


def problem_of(seed):
    """Run a child, a fork that has MXNet's code already; say what is wrong with it, or None."""
    event = list(STATUS)[seed % len(STATUS)]
    with tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            run(seed)
            sys.exit(0)
        end = time.monotonic() + LIMIT
        while (found := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return f"seed {seed} ({event}) hangs"
            time.sleep(0.01)
        errors.seek(0)
        text = errors.read()
    status = os.waitstatus_to_exitcode(found[1])
    if status == STATUS[event] and (event != "raise" or "RuntimeError: in the middle" in text):
        return None
    return f"seed {seed} ({event}) ends with {status}: {text[-2000:]}"


def main(runs):
    import sync_nets  # noqa: F401, so that no child has to
    from tqdm import tqdm

    problems = []
    for seed in tqdm(range(runs), disable=None):
        problems += filter(None, [problem_of(seed)])
    print(f"{runs} runs, {len(problems)} problems", *problems, sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 7))
