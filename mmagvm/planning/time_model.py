"""The time of an update with AGVM on many GPUs.

It is the sum of the forward and backward passes on one GPU, a ring all-reduce
of the gradients, and what AGVM sends in addition. docs/planning.md names what
the model leaves out.

========  =====================================================================
symbol    meaning
========  =====================================================================
n         GPUs
V         bytes of the gradients
b         bandwidth of a GPU's slowest link, in bytes per second
a         latency of one step of the ring, in seconds
k         collectives that V is cut into, DDP's buckets
========  =====================================================================
"""

import math
from dataclasses import dataclass

#: DDP's buckets: the first, and the others (its bucket_cap_mb).
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
#: Bytes that pairs sends for a module: two float64.
NORM = 16


@dataclass(frozen=True)
class Cluster:
    """What the time of an update depends on, besides the gradients.

    Args:
        compute: Seconds of forward, backward and step on one GPU, for one
            micro-batch.
        bandwidth: Of a GPU's slowest link, in bytes per second (b).
        latency: Of one step of the ring, in seconds (a).
        overlap: Part of the all-reduce that backward hides, from 0 to 1.
    """

    compute: float
    bandwidth: float
    latency: float
    overlap: float = 0.0


@dataclass(frozen=True)
class Gradients:
    """What is sent in an update.

    Args:
        size: V, in the parameters' own precision.
        modules: Number of AGVM's modules.
        sent: Part of V that an all-reduce sends, less than 1 where a
            ``comm_hook`` compresses.
    """

    size: float
    modules: int
    sent: float = 1.0

    @property
    def buckets(self) -> int:
        """k: collectives that DDP cuts an all-reduce of them into."""
        rest = max(0.0, self.size - FIRST_BUCKET)
        return 1 + math.ceil(rest / BUCKET)


@dataclass(frozen=True)
class Update:
    """Seconds of an update, on average over measured and other ones."""

    compute: float
    all_reduce: float
    agvm: float

    @property
    def total(self) -> float:
        return self.compute + self.all_reduce + self.agvm


def all_reduce_seconds(
    gpus: int, size: float, calls: int, cluster: Cluster
) -> float:
    """A ring's time: 2 (n - 1) / n * V / b + k * 2 (n - 1) * a.

    Args:
        gpus: Number of GPUs (n).
        size: Bytes to reduce (V).
        calls: Collectives that they are cut into (k).
        cluster: Its bandwidth (b) and latency (a).
    """
    steps = 2 * (gpus - 1)
    return (
        steps / gpus * size / cluster.bandwidth
        + calls * steps * cluster.latency
    )


def update_seconds(
    gpus: int,
    accumulation: int,
    gradients: Gradients,
    cluster: Cluster,
    estimator: str,
    measured: float,
) -> Update:
    """The parts of an update's time.

    Args:
        gpus: Number of GPUs (n).
        accumulation: Micro-batches of an update.
        gradients: What is sent.
        cluster: The cluster.
        estimator: Of AGVM. On measured updates 'split' sends the gradients
            once more, uncompressed; 'pairs' sends two numbers for each
            module.
        measured: Part of the updates that AGVM measures, from 0 to 1.
    """
    size, calls = gradients.size, gradients.buckets
    training = all_reduce_seconds(gpus, gradients.sent * size, calls, cluster)
    # after backward, where nothing hides it
    if estimator == 'split':
        agvm = all_reduce_seconds(gpus, size, calls, cluster)
    else:
        agvm = all_reduce_seconds(gpus, NORM * gradients.modules, 1, cluster)
    return Update(
        accumulation * cluster.compute,
        (1 - cluster.overlap) * training,
        measured * agvm,
    )
