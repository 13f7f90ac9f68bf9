"""What benchmarks/prediction.py predicts and measures: models, surroundings, plans and scenarios."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hosts import hosts, slowed

from weft.cluster import Cluster, measure
from weft.runtime.launch import device_count
from weft.runtime.pool import Place, Pool
from weft.runtime.worker import join

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
Model = tuple[Path, dict[str, Any]]
MEMORY = 2048 * MIB
"""More than any plan needs, but a limit, under which freed memory goes back (runtime/memory.py)."""

MODELS: dict[str, Model] = {
    "decoder": (ROOT / "examples" / "code_lm.py", {"layers": 6, "hidden": 256, "batch_size": 16}),
    "llama": (ROOT / "examples" / "hf_llama.py", {"layers": 6, "hidden": 192, "batch_size": 16}),
    "cnn": (ROOT / "benchmarks" / "prediction_cnn.py", {"width": 32, "depth": 2, "batch_size": 32}),
}
SMALL_MODELS: dict[str, Model] = {"decoder": (MODELS["decoder"][0], {"layers": 2, "hidden": 64, "batch_size": 8})}


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a job runs in.

    Attributes:
        hosts: the processes are spread over so many, evenly.
        bits_per_s: of their network cards.
        slow: the last process computes at half the speed of the others.
        memory: bytes of every process; None: no limit.
        halved: the last process has half of it.
    """

    name: str = "plain"
    hosts: int = 1
    bits_per_s: float | None = None
    slow: bool = False
    memory: int | None = None
    halved: bool = False

    @contextlib.contextmanager
    def pool(self, devices: int) -> Iterator[Pool]:
        """Processes in these surroundings."""
        with contextlib.ExitStack() as held:
            address, places = "127.0.0.1", [Place() for _ in range(devices)]
            if self.hosts > 1:
                network = held.enter_context(hosts(self.hosts, bits_per_s=self.bits_per_s))
                address = network.address
                places = [network.place(rank * self.hosts // devices) for rank in range(devices)]
            if self.slow:
                # All get a share that is there at any time, so that what one leaves makes no other faster.
                share = min(1.0, 0.95 * device_count("cpu") / (devices - 0.5))
                for rank, place in enumerate(places):
                    own = share / 2 if rank == devices - 1 else share
                    places[rank] = held.enter_context(slowed(place, own, str(rank)))
            limits = self.limits(devices)
            yield held.enter_context(Pool(devices, memory=limits, device="cpu", places=places, address=address))

    def limits(self, devices: int) -> list[int] | None:
        """Memory of every process."""
        if self.memory is None:
            return None
        return [self.memory] * (devices - 1) + [self.memory // (2 if self.halved else 1)]

    def cluster(self, devices: int) -> Cluster:
        """What these surroundings are, as weft measures them: with memory enough to measure in."""
        with replace(self, memory=self.memory and MEMORY, halved=False).pool(devices) as pool:
            found = pool.run(measured, self.memory and MEMORY)[0]
        return found.with_memory(*(self.limits(devices) or ()))


def measured(memory_bytes: int | None) -> Cluster:
    """The cluster, from inside a job."""
    join()
    return measure(memory_bytes=memory_bytes)


PLAIN = Surroundings()
SLOW_LINK = Surroundings(name="100 Mbit/s", hosts=2, bits_per_s=1e8)
FAST_LINK = Surroundings(name="1 Gbit/s", hosts=2, bits_per_s=1e9)
HALF_SPEED = Surroundings(name="half speed", slow=True)
HALF_MEMORY = Surroundings(name="half memory", halved=True, memory=192 * MIB)

SCENARIOS: list[tuple[str, int, Surroundings]] = [
    ("decoder", 2, PLAIN),
    ("decoder", 4, PLAIN),
    ("llama", 4, PLAIN),
    ("llama", 3, PLAIN),
    ("cnn", 4, PLAIN),
    ("decoder", 8, PLAIN),
    ("decoder", 4, FAST_LINK),
    ("cnn", 4, FAST_LINK),
    ("decoder", 4, SLOW_LINK),
    ("llama", 4, SLOW_LINK),
    ("cnn", 2, SLOW_LINK),
    ("decoder", 3, HALF_SPEED),
    ("llama", 2, HALF_SPEED),
    ("decoder", 4, HALF_MEMORY),
    ("llama", 2, HALF_MEMORY),
]
SMALL_SCENARIOS: list[tuple[str, int, Surroundings]] = [
    ("decoder", 2, surroundings) for surroundings in (PLAIN, SLOW_LINK, HALF_SPEED, HALF_MEMORY)
]

PLANS: dict[str, list[dict[str, Any]]] = {
    "decoder": [
        {},
        {"recompute": "full"},
        {"dp_replicate": 2, "microbatches": 2},
        {"dp_replicate": 4},
        {"dp_replicate": 8},
        {"dp_shard": 4},
        {"dp_shard": 2, "recompute": "selective"},
        {"pp": 4, "microbatches": 8},
        {"pp": 4, "microbatches": 8, "schedule": "gpipe"},
        {"pp": 2, "microbatches": 4, "recompute": "full"},
        {"tp": 2},
        {"tp": 4},
        {"pp": 2, "dp_replicate": 2, "microbatches": 4},
        {"pp": 2, "tp": 2, "microbatches": 2},
        {"pp": 2, "dp_shard": 4, "microbatches": 2},
    ],
    "llama": [
        {},
        {"recompute": "selective"},
        {"dp_replicate": 3},
        {"dp_shard": 2, "microbatches": 2},
        {"pp": 3, "microbatches": 6},
        {"pp": 2, "microbatches": 4, "schedule": "gpipe", "recompute": "selective"},
        {"tp": 2},
        {"dp_shard": 2, "tp": 2},
        {"pp": 6, "microbatches": 8},
    ],
    "cnn": [
        {},
        {"dp_replicate": 4},
        {"dp_shard": 4},
        {"pp": 2, "microbatches": 4},
        {"pp": 4, "microbatches": 4, "schedule": "gpipe"},
        {"dp_replicate": 2, "dp_shard": 2},
        {"tp": 2},
    ],
}
SMALL_PLANS: dict[str, list[dict[str, Any]]] = {
    "decoder": [{}, {"dp_replicate": 2}, {"pp": 2, "microbatches": 2, "recompute": "full"}]
}
