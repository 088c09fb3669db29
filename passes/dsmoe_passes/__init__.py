"""Graph passes: recognise gating, dispatch and experts, and fuse them."""
