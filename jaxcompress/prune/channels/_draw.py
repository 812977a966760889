"""A picture of the coupled layers and their widths, before and after, as text."""

from jaxcompress.prune.channels._groups import Groups
from jaxcompress.prune.channels._plan import Plan


def draw(groups: Groups, plan: Plan | None = None, width: int = 32) -> str:
    """One bar a group, as long as its share of the widest; filled as far as the plan keeps it; its members below.

        c1[3]   ████████░░░░░░░░   64 -> 32   c1[3] out, n1/scale[0] scale, n1/bias[0] shift, c2[2] in

    Args:
      groups: of the function.
      plan: what stays; without one, everything.
      width: of the longest bar, in characters.

    Returns:
      Lines of text; print them.

    Raises:
      ValueError: the plan has none of the groups.
    """
    if plan is not None and not set(plan.widths) & {group.name for group in groups}:
        raise ValueError("the plan is for other groups: none of its names is among them")
    if not len(groups):
        return "no groups"
    largest, longest = max(group.size for group in groups), max(len(group.name) for group in groups)
    lines = []
    for group in groups:
        before, after = plan.widths.get(group.name, (group.size, group.size)) if plan is not None else (group.size,) * 2
        total = max(1, round(width * before / largest))
        kept = max(1, round(total * after / before))
        bar = ("█" * kept + "░" * (total - kept)).ljust(width)
        members = ", ".join(f"{m.path}[{m.axis}] {'/'.join(sorted(m.roles)) or 'other'}" for m in group.members)
        size = f"{before} -> {after}" if plan is not None else f"{before}"
        lines.append(
            f"{group.name.ljust(longest)}  {bar}  {size.rjust(14)}  {members}" + ("" if group.exact else "  (inexact)")
        )
    return "\n".join(lines)
