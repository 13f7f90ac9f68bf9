"""Machines to Cluster. Table of contents.

topology   Cluster, and the devices and links it is made of: plain numbers
file       clusters as TOML
presets    clusters from data sheets (presets.toml)
local      this machine, not yet measured
measure    this machine or a whole job, measured from inside (rates: of one device)
"""

from weft.cluster.curve import Curve
from weft.cluster.measure import measure
from weft.cluster.topology import Cluster, Collective, Device, Link, Nodes

__all__ = ["Cluster", "Collective", "Curve", "Device", "Link", "Nodes", "measure"]
