"""Graph passes: recognise gating, dispatch and experts, and fuse them into the operators of `dsmoe_runtime.ops`."""

import dsmoe_runtime.ops  # noqa: F401  registers torch.ops.dsmoe.*, which every pass names
