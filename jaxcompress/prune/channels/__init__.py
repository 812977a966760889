"""Channels: cut whole units (neurons, filters, heads) out of any JAX function, so that it is smaller and faster.

`groups` traces a function and finds which indices of which parameters' axes go together; nothing is declared. Scores
say what each unit is worth, `plan` chooses, `Plan.apply` cuts the parameters, and `shrink` makes the function that runs
on them: the traced one, evaluated at the sizes that are left.

    groups = channels.groups(model, params, x)
    plan = channels.plan(groups, channels.norm(groups, params), ratio=0.5, round_to=8)
    small_params, small_opt = plan.apply(params), plan.apply_like(opt_state)
    small = jax.jit(channels.shrink(model, params, plan))
    assert channels.verify(model, params, plan, x).ok           # equal to the model whose dropped units are zero

Every axis of every value has a label, the conditions under which its indices are kept (`_labels.py`); each primitive
has a rule that relates the labels of what goes in and what comes out (`_rules_*.py`), and one without a rule keeps
whole what it meets, which the groups report. `docs/channels.md` has the details.
"""

from jaxcompress.prune.channels._activations import activation
from jaxcompress.prune.channels._choose import plan
from jaxcompress.prune.channels._cost import flops
from jaxcompress.prune.channels._draw import draw
from jaxcompress.prune.channels._groups import Group, Groups, Member, groups
from jaxcompress.prune.channels._penalties import group_lasso, growing, slimming, unit_norms
from jaxcompress.prune.channels._plan import Plan, from_units
from jaxcompress.prune.channels._register import Along, register
from jaxcompress.prune.channels._scores import (
    from_weights,
    geometric_median,
    hessian,
    lamp,
    norm,
    random,
    scale,
    taylor,
)
from jaxcompress.prune.channels._shrink import Verification, shrink, verify

__all__ = [
    "Along",
    "Group",
    "Groups",
    "Member",
    "Plan",
    "Verification",
    "activation",
    "draw",
    "flops",
    "from_units",
    "from_weights",
    "geometric_median",
    "group_lasso",
    "groups",
    "growing",
    "hessian",
    "lamp",
    "norm",
    "plan",
    "random",
    "register",
    "scale",
    "shrink",
    "slimming",
    "taylor",
    "unit_norms",
    "verify",
]
