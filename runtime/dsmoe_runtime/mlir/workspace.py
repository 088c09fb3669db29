"""Memory that an operator works in: one block, taken when the function begins and given back before it returns.

space = Workspace(code)
space.take("%order", "index", rows)        sizes are known when it runs
space.allocate()                           %order: memref<?xindex>, a view of the block
...
space.release()
"""

from __future__ import annotations

from dsmoe_runtime.mlir.code import Code, Value

LINE = 64  # bytes of a cache line
_BYTES = {"f32": 4, "i32": 4, "i64": 8, "index": 8}


class Workspace:
    """First `take` all of it, then `allocate`: from then on each piece has its name."""

    def __init__(self, code: Code) -> None:
        self._code = code
        self._pieces: list[tuple[str, str, tuple[str, ...], str]] = []
        self._size: Value = 0
        self._block = ""
        self.kinds: list[tuple[str, str]] = []  # name and type of each piece

    def take(self, name: str, element: str, *sizes: Value) -> None:
        """Room for a tensor of these sizes."""
        code, kept = self._code, tuple(self._code.index(size) for size in sizes)
        count = kept[0]
        for size in kept[1:]:
            count = code.mul(count, size)
        offset = code.index(self._size)
        self._size = code.add(offset, code.up_to_multiple(code.mul(count, _BYTES[element]), LINE))
        kind = f"memref<{'x'.join('?' * len(kept))}x{element}>"
        self._pieces.append((name, kind, kept, offset))
        self.kinds.append((name, kind))

    def allocate(self) -> None:
        """One block for all."""
        size = self._code.index(self._size)
        self._block = self._code.let(f"memref.alloc({size}) {{alignment = {LINE} : i64}} : memref<?xi8>", "space")
        for name, kind, sizes, offset in self._pieces:
            self._code.line(
                f"{name} = memref.view {self._block}[{offset}][{', '.join(sizes)}] : memref<?xi8> to {kind}"
            )

    def release(self) -> None:
        """Give it back."""
        self._code.line(f"memref.dealloc {self._block} : memref<?xi8>")
