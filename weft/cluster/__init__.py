"""Machines to Cluster. Table of contents."""

from weft.cluster.topology import Cluster, Collective, Curve, Device, Link, Nodes

__all__ = ["Cluster", "Collective", "Curve", "Device", "Link", "Nodes"]
