"""What the ranks that divide a call exchange in it: between ``compute``, which says how much, and ``communication``."""

from __future__ import annotations

from weft.planner.communication import Mesh
from weft.planner.compute import CallCost


def call_s(call: CallCost, mesh: Mesh) -> float:
    """Seconds of a call, forward and backward, with what the ranks that divide it exchange."""
    return call.forward_s + call.backward_s + sum(exchange_s(call, mesh))


def exchange_s(call: CallCost, mesh: Mesh) -> tuple[float, float]:
    """Seconds that the ranks of ``tp`` and ``cp`` exchange in a call, in its forward and in its backward.

    Keys and values go around the ring of ``cp`` once in the forward; in the backward they and their gradients do (Liu
    et al. 2023, ring attention).
    """
    forward, backward = (
        sum(mesh.collective_s("tp", "all_reduce", size) for size in sizes)
        for sizes in (call.forward_reduced, call.backward_reduced)
    )
    ring = mesh.collective_s("cp", "all_gather", call.exchanged_bytes * mesh.ranks("cp"))
    there, back = (mesh.collective_s("ep", "all_to_all", size) for size in (call.forward_routed, call.backward_routed))
    return forward + ring + there, backward + 2 * ring + back
