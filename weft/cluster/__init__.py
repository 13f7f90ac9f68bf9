"""Machines to Cluster. Table of contents.

topology   Cluster, and the devices (nodes), links and curves it is made of: plain numbers
parts      its nodes one by one, some of its devices, less of their memory
file       clusters as TOML
presets    clusters from data sheets (presets.toml)
local      this machine, not yet measured
measure    this machine or a whole job, measured from inside (rates: of one device)
"""

from weft.cluster.curve import Curve
from weft.cluster.links import Collective, Link
from weft.cluster.measure import measure
from weft.cluster.nodes import Nodes
from weft.cluster.topology import Cluster, Device

__all__ = ["Cluster", "Collective", "Curve", "Device", "Link", "Nodes", "measure"]
