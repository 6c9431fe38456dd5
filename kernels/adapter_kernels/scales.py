"""Scales around the base's product: y = out_scale * (W (in_scale * x)) + b, for the rows whose adapter has them.

DoRA has out_scale, IA3 both. The additive ops read the original x, so they see nothing of this. Products are fp32 and
rounded to the model's dtype once; since the base adds its bias itself, out_scale is applied as b + scale * (y - b),
which costs one rounding of y more. Invariant: rows without scales keep the bits of the base's own product.
"""

from torch import Tensor

from adapter_kernels.delta import FUSED_SITES, BaseLinear
from adapter_kernels.route import Group
from adapter_kernels.slab import FusedRows, Member


def scaled_product(site: str, acting: list[tuple[Group, FusedRows]], x: Tensor, base: BaseLinear) -> Tensor:
    """Run the base on x [T, D] with the scales of the groups that act at a fused site: [T, O]."""
    is_whole = len(FUSED_SITES[site]) == 1
    y = base(_scale_whole_input(acting, x) if is_whole else x)
    for group, rows in acting:
        for member in rows.members:
            columns = group.own(y)[:, member.out_begin : member.out_end]
            if member.in_scale is not None and not is_whole:
                # q, k and v share one product: one of them alone costs another, of these rows
                own_x = _times(group.own(x), group.per_row(member.in_scale))
                columns.copy_(base(own_x)[:, member.out_begin : member.out_end])
            _scale_output(columns, group, member, base.bias)
    return y


def _scale_whole_input(acting: list[tuple[Group, FusedRows]], x: Tensor) -> Tensor:
    scaled = None
    for group, rows in acting:
        (member,) = rows.members
        if member.in_scale is not None:
            scaled = x.clone() if scaled is None else scaled
            group.own(scaled).copy_(_times(group.own(x), group.per_row(member.in_scale)))
    return x if scaled is None else scaled


def _scale_output(columns: Tensor, group: Group, member: Member, bias: Tensor | None) -> None:
    if member.out_scale is None:
        return
    scale = group.per_row(member.out_scale)
    if bias is None:
        columns.copy_(_times(columns, scale))
        return
    own_bias = bias[member.out_begin : member.out_end].float()
    columns.copy_((columns.float() - own_bias) * scale + own_bias)


def _times(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows.float() * scale).to(rows.dtype)
