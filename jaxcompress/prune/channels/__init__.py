"""Channels: cut whole units (neurons, filters, heads) out of any JAX function."""

from jaxcompress.prune.channels._groups import Group, Groups, Member, groups
from jaxcompress.prune.channels._plan import Plan, from_units
from jaxcompress.prune.channels._shrink import Verification, shrink, verify

__all__ = ["Group", "Groups", "Member", "Plan", "Verification", "from_units", "groups", "shrink", "verify"]
